"""The work behind `fastdit demo`: distances, the choice of steps, the comparison, the picture grid.

On a saved pipeline of random weights that draws 32 x 32 pixels in 2 or 3 steps; nothing here
depends on how long anything takes.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdit
import tiny_models
from fastdit import tiny
from fastdit.cli.demo import Settings, compare, equal_time_steps, resolve_steps, total_calls
from fastdit.cli.distance import psnr, relative_l2
from fastdit.cli.grid import GAP, MARGIN, Row, Tile, draw_grid, shown_size, to_picture
from fastdit.cli.loading import calls, default_prompts, load_model, messages_once
from fastdit.errors import ArgumentError, FastDiTError, ScheduleError, UnsupportedModelError
from saved_pipelines import save_dit, save_sd3, save_unsupported

PROMPTS = ("a red circle", "a blue square")
EVERY_2 = {"every(2)": fastdit.Cached(fastdit.Schedule.every(2))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def pipeline(folder):
    return load_model(folder).pipeline


def plain(pipeline, prompt: str, steps: int, seed: int) -> np.ndarray:
    """The picture of an ordinary pipeline call."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        prompt, num_inference_steps=steps, generator=generator, output_type="np"
    ).images[0]


def is_patched(pipeline) -> bool:
    try:
        fastdit.report(pipeline)
    except FastDiTError:
        return False
    return True


# ---- distances and steps


@pytest.mark.parametrize("difference", [1.0, 0.5, 0.1, 1e-3])
def test_psnr_of_a_constant_difference(difference):
    reference = np.zeros((4, 6, 3), dtype=np.float32)
    assert psnr(reference + difference, reference) == pytest.approx(
        -20 * math.log10(np.float32(difference))
    )


def test_psnr_of_one_wrong_value_and_of_none():
    reference = np.full((5, 5, 3), 0.25)
    image = reference.copy()
    image[2, 3, 1] += 0.5
    assert psnr(image, reference) == pytest.approx(10 * math.log10(75 / 0.25))
    assert psnr(reference, reference) == math.inf


def test_psnr_is_not_limited_by_float32_sums():
    reference = np.ones((64, 64, 3), dtype=np.float32)
    image = reference - np.float32(2**-20)
    assert psnr(image, reference) == pytest.approx(400 * math.log10(2))


def test_relative_l2():
    reference = np.full((2, 2, 3), 0.5)
    assert relative_l2(reference * 1.1, reference) == pytest.approx(0.1)
    assert relative_l2(reference, reference) == 0.0
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_l2(np.ones(3), np.zeros(3)) == math.inf


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 14), (0.55, 15), (0.001, 1), (1.0, 28), (1.7, 28)]
)
def test_equal_time_steps(share, expected):
    assert equal_time_steps(28, share) == expected


# ---- the comparison


def test_compare_draws_what_plain_calls_draw(pipeline):
    expected = [plain(pipeline, prompt, 3, seed=7) for prompt in PROMPTS]
    heard = []
    found = compare(
        pipeline,
        calls(pipeline, PROMPTS),
        PROMPTS,
        EVERY_2,
        Settings(steps=3, seed=7, repeats=2),
        progress=lambda text, done, total: heard.append((done, total)),
    )
    assert [arm.name for arm in found.arms] == ["unpatched", "fewer steps", "every(2)"]
    assert [arm.rival for arm in found.arms] == [None, "every(2)", None]
    total = total_calls(2, 1, found.settings)
    assert heard == [(done, total) for done in range(total)]
    for row, image, prompt in zip(found.pictures, expected, PROMPTS, strict=True):
        assert np.array_equal(row[0].image, image)
        assert row[0].psnr == math.inf
        fewer = plain(pipeline, prompt, found.arms[1].steps, seed=7)
        assert np.array_equal(row[1].image, fewer)
        assert row[2].psnr == psnr(row[2].image, image) < math.inf
        assert all(len(cell.seconds) == 2 for cell in row)
    assert not is_patched(pipeline)


def test_the_schedule_arm_is_what_patch_gives(pipeline):
    found = compare(pipeline, calls(pipeline, ["x"]), ["x"], EVERY_2, Settings(3, repeats=1))
    with_patch = fastdit.patch(pipeline, EVERY_2["every(2)"])
    image = plain(pipeline, "x", 3, seed=0)
    ratio = with_patch.explain(steps=3).flop_speedup
    with_patch.unpatch()
    assert np.array_equal(found.pictures[0][2].image, image)
    assert found.arms[2].compute_ratio == ratio > 1


def test_facts_of_a_comparison(pipeline):
    found = compare(
        pipeline, calls(pipeline, PROMPTS), PROMPTS, EVERY_2, Settings(2, repeats=3), _judge
    )
    assert found.speedup(0) == 1.0
    ratios = [
        before / after
        for row in found.pictures
        for before, after in zip(row[0].seconds, row[2].seconds, strict=True)
    ]
    assert found.speedup(2) == pytest.approx(float(np.median(ratios)))
    assert found.speedup(2, 1) == pytest.approx(float(np.median(ratios[3:])))
    assert len(found.seconds(1)) == 6
    assert found.pictures[0][0].right == (1, 1)
    assert found.pictures[1][0].right is None
    assert found.right(0) == (1, 1)


def test_a_run_in_stages_shows_them(pipeline):
    method = fastdit.RALU((1, 1, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
    assert (
        resolve_steps(pipeline, [method], None) == 28
    )  # its own number is not that of the plain runs
    found = compare(pipeline, calls(pipeline, PROMPTS), PROMPTS, {"RALU": method}, Settings(3))
    assert [arm.steps for arm in found.arms] == [3, found.arms[1].steps, 4]
    handle = fastdit.patch(pipeline, method)
    image = plain(pipeline, PROMPTS[1], 4, seed=0)
    pictures = handle.report().resolution_map(handle.stage_pictures()[:, 0])
    ratio = handle.explain().flop_speedup
    handle.unpatch()
    assert found.arms[2].compute_ratio == pytest.approx(ratio * 3 / 4)
    cell = found.pictures[1][2]
    assert np.array_equal(cell.image, image)
    assert [stage.layout for stage in cell.stages] == ["coarse", "mixed", "full"]
    assert [stage.steps for stage in cell.stages] == [1, 1, 2]
    for stage, picture in zip(cell.stages, pictures, strict=True):
        assert np.array_equal(stage.image, picture)
    assert not found.pictures[1][0].stages


def _judge(images, prompts):
    """Knows circles only, and finds all of them."""
    if "circle" not in prompts[0]:
        raise ValueError("prompt must name a shape")
    verdict = tiny.ObjectScore(prompts[0], None, None, True, None, None)
    return tiny.Score(1.0, 1.0, 1.0, 1.0, 0.0, (verdict,))


@pytest.mark.parametrize("failing_call", range(8))
def test_nothing_stays_patched_after_an_error(pipeline, monkeypatch, failing_call):
    count = iter(range(100))
    stock = type(pipeline).__call__

    def fails(self, *args, **kwargs):
        def stop(*_):
            raise RuntimeError("interrupted inside the run")

        if next(count) == failing_call:
            kwargs["callback_on_step_end"] = stop
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "__call__", fails)
    with pytest.raises(RuntimeError, match="interrupted inside"):
        compare(pipeline, [{"prompt": "x"}], ["x"], EVERY_2, Settings(2, repeats=1))
    assert not is_patched(pipeline)


def test_what_the_pipeline_refuses_is_an_argument_error(pipeline):
    asked = calls(pipeline, ["x"], height=33)
    with pytest.raises(ArgumentError, match=r"StableDiffusion3Pipeline.*33"):
        compare(pipeline, asked, ["x"], EVERY_2, Settings(2))
    assert not is_patched(pipeline)


def test_resolve_steps(pipeline):
    every = [fastdit.Cached(fastdit.Schedule.every(2))]
    assert resolve_steps(pipeline, every, None) == 28
    assert resolve_steps(pipeline, every, 3) == 3
    spec = tiny_models.spec_of(pipeline)
    fixed = [fastdit.Cached(fastdit.Schedule.every(2).bind(spec, 5))]
    assert resolve_steps(pipeline, fixed, None) == 5
    with pytest.raises(ScheduleError, match="5 steps"):
        resolve_steps(pipeline, fixed, 4)
    assert not is_patched(pipeline)


@pytest.mark.parametrize("name", ["steps", "repeats"])
def test_settings_refuse_less_than_one(name):
    with pytest.raises(ArgumentError, match=f"{name}.*-3"):
        Settings(**{"steps": 2, name: -3})


# ---- pipelines


def test_dit_takes_classes(tmp_path):
    model = load_model(save_dit(tmp_path))
    assert calls(model.pipeline, [" 7 ", "otter"]) == [{"class_labels": [7]}, {"class_labels": [3]}]
    assert default_prompts(model) == ["207", "360", "387", "974"]
    for wrong in ("-1", "1000", "a red circle", "٣"):
        with pytest.raises(ArgumentError, match=r"DiTPipeline draws classes.*0 to 999"):
            calls(model.pipeline, [wrong])
    with pytest.raises(ArgumentError, match="--height"):
        calls(model.pipeline, ["1"], height=64)
    found = compare(
        model.pipeline, calls(model.pipeline, ["1"]), ["1"], EVERY_2, Settings(2, repeats=1)
    )
    assert found.pictures[0][0].image.shape == (16, 16, 3)


def test_a_pipeline_without_prompts_is_refused_by_name(tmp_path):
    model = load_model(save_unsupported(tmp_path))
    with pytest.raises(UnsupportedModelError, match="DDPMPipeline"):
        calls(model.pipeline, ["x"])


# ---- the grid


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 32), (256, 256)), ((128, 64), (128, 256)), ((300, 200), (200, 300))],
)
def test_pictures_are_shown_at_a_readable_size(size, shown):
    assert shown_size(*size) == shown


def test_large_pictures_are_reduced():
    assert shown_size(1024, 2048) == (512, 256)


def test_grid_holds_every_picture_where_it_belongs():
    rng = np.random.default_rng(0)
    pictures = [[rng.random((64, 64, 3)) for _ in range(3)] for _ in range(2)]
    rows = [Row("prompt " * 40, tuple(Tile(p, ("1.00 s", "2x")) for p in row)) for row in pictures]
    grid = draw_grid("title", [("unpatched", "28 steps")] * 3, rows, "what it means " * 30)
    assert grid.width == 2 * MARGIN + 3 * 256 + 2 * GAP
    pixels = np.asarray(grid)
    for row in pictures:
        for column, picture in enumerate(row):
            left = MARGIN + column * (256 + GAP)
            shown = np.asarray(to_picture(picture)).repeat(4, axis=0).repeat(4, axis=1)
            strip = pixels[:, left : left + 256]
            tops = [y for y in range(grid.height - 256) if np.array_equal(strip[y], shown[0])]
            assert any(np.array_equal(strip[y : y + 256], shown) for y in tops)


def test_grid_text_stays_inside():
    picture = np.zeros((8, 8, 3))
    words = ("a-word-that-is-much-too-long-for-a-line" * 3, "many short words " * 9)
    grid = draw_grid("title " * 40, [words], [Row(words[0], (Tile(picture, words),))], words[1])
    pixels = np.asarray(grid)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()


# ---- messages


def test_what_libraries_repeat_is_said_once():
    logger = logging.getLogger("diffusers.some.pipeline")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    root = logging.getLogger("diffusers")
    level = root.level
    root.setLevel(logging.WARNING)
    root.addHandler(handler)
    try:
        with messages_once():
            for _ in range(3):
                logger.warning("the prompt was cut")
        logger.warning("the prompt was cut")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert heard == ["the prompt was cut"] * 2
