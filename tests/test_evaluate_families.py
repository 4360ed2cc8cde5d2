"""Studies of every family: latents, errors and metrics against the pipeline itself and plain sums, and refusals."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

import fastdit
import saved_families
import tiny_models
from fastdit import tiny
from fastdit.cli import evaluation
from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.evaluate import authors_ras, contenders, page, peers, study
from fastdit.evaluate.arms import Arm, check_solver, prepared
from fastdit.evaluate.studio import UNPATCHED, Studio
from fastdit.search import solution
from saved_families import FAMILIES

PROMPTS = ("a red circle", "a green star and a blue square")
CLASSES = ("3", "207")
SMALL = {"height": 16, "width": 16}
MIDDLE = {"height": 64, "width": 64, "max_sequence_length": 16}
ARGUMENTS = {
    "pixart": {**MIDDLE, "use_resolution_binning": False},
    "flux": {**SMALL, "max_sequence_length": 16},
    "wan": {**MIDDLE, "height": 32, "width": 32, "num_frames": 5},
    "lumina": MIDDLE,
    "lumina2": MIDDLE,
    "dit": {},
    "qwen": {**SMALL, "true_cfg_scale": 3.0, "negative_prompt": " "},
    "zimage": MIDDLE,
}
PATCHED = ("wan",)
OLD = "qwen" not in FAMILIES  # diffusers before 0.37
PEER = "diffusers TaylorSeer every 3"


def studio_of(name: str, folder, **more) -> Studio:
    prompts = CLASSES if name == "dit" else PROMPTS
    pipe = saved_families.build(name)
    return Studio(pipe, prompts, folder, arguments=ARGUMENTS[name], batch=2, seed=4, **more)


def drawn_by_hand(studio: Studio, name: str, steps: int, **more) -> tuple[np.ndarray, np.ndarray]:
    """The second prompt by a plain call: latents as the pipeline itself ends with them, and the picture."""
    asked = {"class_labels": [207]} if name == "dit" else {"prompt": PROMPTS[1]}
    decoded = []
    decode = studio.pipe.vae.decode

    def look(latents, *args, **kwargs):
        decoded.append(latents)
        return decode(latents, *args, **kwargs)

    def draw(kind):
        noise = torch.Generator().manual_seed(5)
        given = {**asked, **studio.arguments, **more}
        found = studio.pipe(**given, num_inference_steps=steps, generator=noise, output_type=kind)
        return (found.images if hasattr(found, "images") else found.frames)[0]

    if name == "dit":  # it shows latents to its autoencoder alone
        studio.pipe.vae.decode = look
        picture = draw("np")
        del studio.pipe.vae.decode
        return (decoded[0][0] * studio.pipe.vae.config.scaling_factor).numpy(), picture
    return draw("latent").numpy(), draw("np")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_study_of_every_family(name, tmp_path, monkeypatch):
    if name == "wan" and OLD:
        pytest.importorskip("ftfy", reason="its pipeline cleans prompts by ftfy")
    monkeypatch.setattr(solution, "STEPS", 4)
    studio = studio_of(name, tmp_path)
    evaluation.check_draws(studio, {})
    found = contenders.Field()
    contenders.unpatched(found, 3)
    contenders.fewer_steps(found, studio, [2])
    ours = name in PATCHED
    if ours:
        every = Arm("stock", 3, lambda pipe, _: fastdit.Cached(fastdit.Schedule.every(2)))
        contenders.patched(found, studio, "every", "every 2", every)
        found.judged["every 2"] = None
    contenders.others(found, studio, 3)
    found.groups = {
        group: {n: arm for n, arm in arms.items() if group not in found.peers or n == PEER}
        for group, arms in found.groups.items()
    }
    found.groups = {group: arms for group, arms in found.groups.items() if arms}
    done = study.conduct(studio, found, rounds=1)
    rows = {row["arm"]: row for row in study.result(done)["rows"]}
    noise = name in ("pixart", "dit")
    assert done.solver == ("UniPCMultistepScheduler" if noise else "AB2Scheduler")
    # Z-Image gives its scheduler levels, which UniPC does not take; so did Lumina 2 once.
    without = f"{contenders.FEWER}, unipc" in found.refused
    assert without is (name == "zimage" or (name == "lumina2" and OLD))
    assert ("euler 2" in rows) is ("ab2 2" in rows) is not noise
    assert OLD or ("dpm++ 2" in rows) is (name not in ("lumina2", "qwen", "zimage"))
    assert {"stock 2", UNPATCHED, *(["every 2"] if ours else [])} <= set(rows)
    if name == "lumina2":
        assert "is called 2 times a step" in found.refused["diffusers' caches"]
    else:
        assert rows[PEER]["error"] > 0

    latents, picture = drawn_by_hand(studio, name, 3)
    own = done.drawn[UNPATCHED]
    np.testing.assert_allclose(own.latents[1], latents, atol=2e-5 * np.abs(latents).max())
    np.testing.assert_allclose(own.pictures[1], picture.clip(0, 1), atol=2e-4)
    assert own.latents.shape[0] == own.pictures.shape[0] == 2
    with prepared(studio.pipe, Arm("solution", 4)) as more:
        more.pop("num_inference_steps")
        truth, wanted = drawn_by_hand(studio, name, 4, **more)
    error = np.sqrt(((latents - truth) ** 2).sum() / (truth**2).sum())
    assert done.errors[UNPATCHED][1] == pytest.approx(error, rel=2e-3)
    frames = [picture.clip(0, 1), wanted.clip(0, 1)]
    frames = [each[None] if each.ndim == 3 else each for each in frames]
    psnr = np.mean([-10 * np.log10(((a - b) ** 2).mean()) for a, b in zip(*frames, strict=True)])
    values = study.alike(own.pictures, done.truth.pictures)
    assert values["psnr"][1] == pytest.approx(psnr, abs=0.02)
    if ours:  # the second of three steps repeats the first
        assert rows["every 2"]["arithmetic"] == pytest.approx(2 / 3, abs=0.1)
    assert rows["stock 2"]["arithmetic"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_pipeline_that_takes_no_levels_has_the_trailing_grid(solver):
    """Wan's, whose own scheduler is UniPC of a flow with a shift of 3."""
    pipe = saved_families.build("wan")
    with prepared(pipe, Arm(solver, 3)) as arguments:
        assert arguments == {"num_inference_steps": 3}
        pipe.scheduler.set_timesteps(3, device="cpu")
        levels = np.array([1, 2 / 3, 1 / 3, 0])
        np.testing.assert_allclose(pipe.scheduler.sigmas, 3 * levels / (1 + 2 * levels), atol=1e-6)


# ---- what is refused, before anything is drawn


def test_what_cannot_be_served_is_refused_by_name(tmp_path):
    pipe = saved_families.build("dit")
    drawn = []
    pipe.transformer.register_forward_pre_hook(lambda *_: drawn.append(1))
    with pytest.raises(ArgumentError, match="--height: DiTPipeline takes no height"):
        evaluation.arguments_of(pipe, {"--height": 64})
    with pytest.raises(ArgumentError, match="DiTPipeline takes no num_frames"):
        Studio(pipe, CLASSES, tmp_path, arguments={"num_frames": 5})
    with pytest.raises(ArgumentError, match="prompt 'a fox': DiTPipeline draws classes"):
        Studio(pipe, ("a fox",), tmp_path)
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    for solver in ("unipc", "dpm++"):
        with pytest.raises(UnsupportedModelError, match=f"clips .* {re.escape(solver)} does not"):
            check_solver(pipe, solver)
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(UnsupportedModelError, match=r"draws noise at each step \(DDPMScheduler\)"):
        Studio(pipe, CLASSES, tmp_path)
    pipe.transformer = None
    with pytest.raises(UnsupportedModelError, match="DiTPipeline has no transformer"):
        Studio(pipe, CLASSES, tmp_path)
    assert not drawn


@pytest.mark.skipif("qwen" not in FAMILIES, reason="diffusers' Qwen-Image is older")
def test_guidance_goes_where_a_pipeline_heeds_it(tmp_path):
    pipe = saved_families.build("qwen")
    with pytest.raises(ArgumentError, match="told no guidance scale; --true-cfg is the scale of Q"):
        evaluation.arguments_of(pipe, {"--guidance": 4.0, "--true-cfg": None})
    given = evaluation.arguments_of(pipe, {"--height": 16, "--width": 16, "--true-cfg": 4.0})
    studio = Studio(pipe, PROMPTS, tmp_path, arguments=given)
    assert studio.sketch(Arm("stock", 2)).calls == 2
    del given["negative_prompt"], given["true_cfg_scale"]
    assert Studio(pipe, PROMPTS, tmp_path / "b", arguments=given).sketch(Arm("stock", 2)).calls == 1


def test_a_picture_is_tried_before_a_study(tmp_path):
    studio = studio_of("flux", tmp_path)

    def broken(*_):
        raise RuntimeError("too small")

    with pytest.raises(ArgumentError, match=r"judge 'lpips' takes no picture of 16 x 16: .*too sm"):
        evaluation.check_draws(studio, {"lpips": broken})
    for height, why in ((8, "sides of at least 11 pixels"), ("16", "does not draw 'a red circle'")):
        given = {**SMALL, "height": height}
        other = Studio(studio.pipe, PROMPTS, tmp_path / str(height), arguments=given)
        with pytest.raises(ArgumentError, match=why):
            evaluation.check_draws(other, {})


# ---- peers


def test_the_prompts_rows_are_found():
    """Lumina's pipeline has them first, PixArt's last; what both prompts share tells nothing."""
    rows = torch.arange(8.0).view(2, 4)
    last, first = rows.clone(), rows.clone()
    last[1] += 1
    first[0] += 1

    def guided(other):
        return peers.Guided(
            1, {"text": rows, "noise": rows}, {"text": other, "noise": rows + 1}, False
        )

    assert guided(first).prompt_first
    assert not guided(last).prompt_first
    assert not guided(rows).prompt_first


def test_a_clock_counts_calls():
    layer = torch.nn.Identity()
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    clock = peers.Clock(
        SimpleNamespace(transformer=layer, scheduler=SimpleNamespace(timesteps=timesteps)), 2
    )
    with clock.running():
        found = [(layer(torch.zeros(1)), clock())[1] for _ in range(8)]
    assert found == [900, 900, 500, 500, 100, 100, 900, 900]
    assert not layer._forward_pre_hooks


def test_parts_stand_in_their_order_again():
    """cache-dit takes lists of blocks out for a call and puts them back last."""
    pipe = SimpleNamespace(transformer=tiny_models.flux())
    names = [name for name, _ in pipe.transformer.named_children()]
    with peers.as_it_was(pipe):
        blocks = pipe.transformer.transformer_blocks
        del pipe.transformer.transformer_blocks
        pipe.transformer.transformer_blocks = blocks
        pipe.transformer.added = torch.nn.Identity()
        assert [name for name, _ in pipe.transformer.named_children()] != names
    assert [name for name, _ in pipe.transformer.named_children()] == names


def test_a_peer_that_breaks_at_its_second_call_is_told(tmp_path, monkeypatch):
    """It draws; only what is timed calls it twice. The arms of the package raise."""
    monkeypatch.setattr(solution, "STEPS", 4)
    studio = studio_of("dit", tmp_path)

    @contextlib.contextmanager
    def once():
        calls = []

        def count(*_):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("no second call")

        hook = studio.pipe.transformer.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()

    found = contenders.Field(peers={"peer"})
    contenders.unpatched(found, 2)
    found.add("peer", "breaks", Arm("stock", 2, around=once))
    done = study.conduct(studio, found, rounds=1)
    assert found.refused["breaks"] == "RuntimeError: no second call"
    assert set(done.spent) == set(done.drawn) == set(done.errors) == {UNPATCHED}
    study.result(done)
    found.add("ours", "breaks", Arm("stock", 2, around=once))
    with pytest.raises(RuntimeError, match="no second call"):
        study.conduct(studio, found, rounds=1)


def test_the_authors_ras_runs_by_its_own_function(tmp_path, monkeypatch):
    """A stand-in has their package's names: what it is told, that its scheduler steps, and that all is undone."""
    told, stepped = [], []

    class Theirs(FlowMatchEulerDiscreteScheduler):
        def step(self, output, *args, **kwargs):
            stepped.append(len(output))
            return super().step(output, *args, **kwargs)

    def update(pipe):
        told.append((MANAGER.vae_size, MANAGER.told))
        pipe.scheduler = Theirs.from_config(pipe.scheduler.config)
        pipe.transformer.forward = pipe.transformer.forward

    MANAGER = SimpleNamespace(vae_size=8, set_parameters=lambda a: setattr(MANAGER, "told", a))
    how = authors_ras.RAS["LuminaPipeline"]
    modules = {
        "ras": ModuleType("ras"),
        "ras.utils": ModuleType("ras.utils"),
        "ras.utils.ras_manager": SimpleNamespace(MANAGER=MANAGER),
        how.module: SimpleNamespace(**{how.update: update}),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["ras"].__spec__ = ModuleSpec("ras", None)
    before = dict(vars(MANAGER))
    studio = studio_of("lumina", tmp_path)
    pipe, own = studio.pipe, studio.pipe.scheduler
    arms = authors_ras.arms_of(pipe, 6, (64, 64))
    assert list(arms) == ["microsoft RAS 0.5", "microsoft RAS 0.25"]
    arm = Arm("stock", 6, alone=True, around=functools.partial(arms["microsoft RAS 0.25"], pipe))
    drawn = studio.drawn("theirs", arm)
    assert stepped == [1] * 12  # their selection is of one picture
    np.testing.assert_array_equal(
        drawn.latents, studio.drawn("ours", Arm("stock", 6, alone=True)).latents
    )
    settings = told[0][1]
    assert told[0][0] == 8
    assert (settings.sample_ratio, settings.height, settings.num_inference_steps) == (0.25, 64, 6)
    assert settings.error_reset_steps == "0"  # theirs are later than the last of six steps
    assert vars(MANAGER) == before
    assert pipe.scheduler is own
    assert "forward" not in vars(pipe.transformer)
    with pytest.raises(peers.Refused, match="square pictures, got 64 x 128"):
        authors_ras.arms_of(pipe, 6, (64, 128))
    with pytest.raises(peers.Refused, match="not FluxPipeline"):
        authors_ras.arms_of(saved_families.build("flux"), 6, (16, 16))
    normed = tiny.load_pipeline()
    with pytest.raises(peers.Refused, match="norms queries and keys before their heads are parted"):
        authors_ras.arms_of(normed, 6, (64, 64))


# ---- a page of videos


def test_a_video_stands_in_a_page_as_frames_beside_each_other():
    video = np.arange(9, dtype=np.float32).reshape(9, 1, 1, 1) * np.ones((1, 6, 5, 3), np.float32)
    shown = page.strip(video)
    assert shown.shape == (6, 20, 3)
    assert [shown[0, 5 * i, 0] for i in range(4)] == [0, 3, 5, 8]
    assert page.strip(video[0]).shape == (6, 5, 3)
    assert page.strip(video[:2]).shape == (6, 10, 3)
