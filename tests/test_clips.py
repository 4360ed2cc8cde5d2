"""Videos: active tokens by frame, maps that play, and outputs that are frames."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

import fastdit
import ralu_oracle
import tiny_models
from contract import RUN_FP64, distance, same_bits, within_contract
from fastdit import RALU, RAS, ArgumentError, ScheduleError, UnsupportedModelError
from fastdit.cli import demo
from fastdit.search import calibrate, solution
from fastdit.search.evaluator import Evaluator, Task, Work
from ras_oracle import RowOracle, by_change
from test_ras import NO_GPU, token_run
from tiny_models import arguments, generate, latents_of

pytestmark = pytest.mark.diffusers

VIDEOS = ("wan", "hunyuanvideo15")
FRAMES = 3
#: of three frames with 4 x 6 tokens each
SIZE = {
    "wan": {"height": 16, "width": 12, "num_frames": FRAMES - 1},
    "hunyuanvideo15": {"height": 8 * FRAMES, "width": 12, "num_frames": FRAMES},
}
TOKENS = 24  # of a frame
SETTINGS = {"ratio": 0.4, "start": 2, "resets": (), "align": 1}


# ---- active tokens


@pytest.mark.parametrize("name", VIDEOS)
def test_each_frame_chooses_among_its_own_tokens(name):
    """As many of each, by rules that see a frame and nothing else."""
    pipe = tiny_models.pipeline(name, torch.float64)
    given = {"batch": 2, "steps": 6} | SIZE[name]
    rules = [by_change(0.4, 6, 2, (4,)) for _ in range(FRAMES)]

    def choose(step, velocity, sigmas):
        chosen = [rule(step, velocity[:, :, f], sigmas) for f, rule in enumerate(rules)]
        if chosen[0] is None:
            return None
        return torch.cat([rows + f * TOKENS for f, rows in enumerate(chosen)], dim=1)

    with RowOracle(pipe, choose, None, 2).installed() as truth:
        expected = generate(pipe, name, **given)
    asked = {key: size for key, size in tiny_models.asked(name, 16, 12).items() if key != "frames"}
    for backend in ("reference", None):
        method = RAS(**SETTINGS | {"resets": (4,)}, per="frame")
        handle = fastdit.patch(pipe, method, backend=backend)
        within_contract(generate(pipe, name, **given), expected)
        history = handle.last_run().selection.history
        assert sorted(history) == sorted(truth.history) == [2, 3, 5]
        for step, rows in history.items():
            assert rows.tolist() == truth.history[step].tolist()
        said = handle.explain(batch=2, steps=6, **asked, frames=FRAMES)
        assert handle.report().tokens_per_step == said.tokens_per_step == (72, 72, 30, 30, 72, 30)
        handle.unpatch()
    with RowOracle(pipe, by_clip(), None, 2).installed() as truth:
        generate(pipe, name, **given)
    assert any(truth.history[step].tolist() != history[step].tolist() for step in truth.history)


def by_clip():
    """The rule over the clip, drawn as one picture."""
    rule = by_change(0.4, 6, 2, (4,))
    return lambda step, velocity, sigmas: rule(step, velocity.flatten(2, 3), sigmas)


def in_frames(frames, method, steps, backend):
    """The choice of tokens in a run of a clip."""
    patched = SimpleNamespace(ops=fastdit.ops.bind(backend))
    patched.adapter = SimpleNamespace(frames=lambda *given: frames)
    plan = SimpleNamespace(forecast_order=lambda step: 0)
    run = SimpleNamespace(patched=patched, steps=steps, first=0, resolution=None, plan=plan)
    run.latents = run.positions = run.patch = None
    run.plan_partial = lambda steps: None
    made = method.begin(run)
    made.lay_out(frames * TOKENS, NO_GPU)
    return made


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "more", [{"metric": "std", "high_ratio": 0.5, "max_age": 2}, {"metric": "l2norm"}], ids=str
)
def test_a_frame_chooses_as_it_would_alone(more, backend):
    method = RAS(**SETTINGS, **more)
    clip = in_frames(FRAMES, RAS(**SETTINGS, **more, per="frame"), 6, backend)
    alone = [token_run(method, 6, TOKENS, backend) for _ in range(FRAMES)]
    for step in range(5):
        velocity = torch.randn(2, FRAMES, 4, 6, 1, 2, 4, dtype=torch.float32)
        clip.observe(step, velocity.flatten(1, 2), 1.0)
        for f, run in enumerate(alone):
            run.observe(step, velocity[:, f], 1.0)
        if step:
            rows = torch.stack([run.active + f * TOKENS for f, run in enumerate(alone)], dim=1)
            assert clip.active.tolist() == rows.flatten(1).tolist()


def test_counts_of_all_frames_are_a_multiple():
    """Of 16 tokens, which is 8 of each of six frames; waves have no count that frames cannot share."""
    step = RAS(0.5, start=1, align=16, per="frame").active(4, 6 * 21, 6)[1]
    assert (step.keep, step.frames) == (6 * 8, 6)
    method = RAS(0.5, start=1, align="wave", per="frame", metric="std", high_ratio=0.5)
    fitted = method.fitted(method.active(4, 1500, 5), 1500, NO_GPU)[1]
    assert (fitted.keep, fitted.high) == (
        5 * 153,
        5 * 74,
    )  # 768 for 755, and 147 dropped of a frame


def test_a_picture_is_one_frame():
    pipe, found = tiny_models.pipeline("sd3"), []
    for per in ("clip", "frame"):
        fastdit.patch(pipe, RAS(**SETTINGS, per=per))
        found.append(generate(pipe, "sd3", steps=4))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per": "video"}, "per must be"),
        ({"per": "frame", "mode": "parity"}, 'per must be "clip" with mode="parity"'),
    ],
)
def test_what_it_cannot_be_per_is_named(change, message):
    with pytest.raises(ArgumentError, match=message):
        RAS(**change)


# ---- tokens of two sizes

SHORT = RALU((2, 2, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
#: two frames of 4 x 12 cells, of 2 x 2 latent pixels each
HALVED = {"height": 16, "width": 24}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def restated(pipe, name, method, noise, **given):
    """(latents of a run under RALU, of the restatement), frames below each other."""
    given = {"dtype": torch.float64, "latents": tiny_models.frames_of(noise)} | HALVED | given
    given = arguments(name, len(noise), method.run_steps, **given)
    with torch.no_grad():
        expected = ralu_oracle.run(pipe, method, noise, given)
    fastdit.patch(pipe, method)
    return latents_of(pipe, given).flatten(2, 3), expected


def noise_of(batch, height=16, width=24, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, 4, height, width, generator=draw, dtype=torch.float64).to(dtype)


def test_a_stage_is_unipcs_first_steps():
    """It looks back over no change of the tokens; the end, coarse in one run, is as sharp as its tokens."""
    scheduler = UniPCMultistepScheduler(**FLOW)
    for steps, ends in (((4, 3, 4), SHORT.ends), ((4, 0, 0), (1.0, 0.5, 0.5))):
        pipe = tiny_models.pipeline("wan", torch.float64, scheduler)
        method = dataclasses.replace(SHORT, steps=steps, ends=ends)
        found, expected = restated(pipe, "wan", method, noise_of(2, dtype=torch.float32))
        assert distance(found, expected) <= 1e-6  # it steps in fp32


@pytest.mark.parametrize("change", [{}, {"mode": "parity", "selector": "variance"}], ids=str)
def test_tokens_of_one_pixel_are_split_into_copies(change, monkeypatch):
    """Such are the published HunyuanVideo-1.5's."""
    monkeypatch.setattr(ralu_oracle, "P", 1)
    pipe = tiny_models.pipeline("hunyuanvideo15", torch.float64)
    made = tiny_models.randomise(tiny_models.hunyuanvideo15(patch_size=1)).to(torch.float64)
    pipe.register_modules(transformer=made)
    method = dataclasses.replace(SHORT, **change)
    given = {"height": 8, "width": 12}
    found, expected = restated(pipe, "hunyuanvideo15", method, noise_of(2, 8, 12), **given)
    assert distance(found, expected) <= RUN_FP64
    assert fastdit.report(pipe).tokens_per_step == (24, 24, 42, 42, 96, 96)


def test_as_many_tokens_of_each_frame_are_split():
    pipe = tiny_models.pipeline("wan")
    handle = fastdit.patch(pipe, SHORT)
    generate(pipe, "wan", steps=6, batch=2, **HALVED)
    coarse = handle.report().stages[1].coarse
    assert coarse.reshape(2, 2, -1).sum(-1).tolist() == [[36, 36]] * 2
    assert not (coarse[0] == coarse[1]).all()
    method = dataclasses.replace(SHORT, split=1.0, align=7)
    assert method.split_count(24, 3, 2) == 24 - 12
    with pytest.raises(ScheduleError, match=r"align=7 fits no split of 24 .* in 24 frames"):
        method.split_count(24, 3, 24)


def test_frames_that_do_not_halve_are_refused():
    """Though all rows together are an even number."""
    pipe = tiny_models.pipeline("wan")
    fastdit.patch(pipe, SHORT)
    with pytest.raises(ArgumentError, match=r"multiples of \d+ for RALU"):
        generate(pipe, "wan", steps=6, height=12, width=24)


def test_timesteps_of_tokens_that_are_alike_are_served():
    """TI2V-5B draws a video by its prompt alone so; a frame that is given is refused."""
    pipe, found = tiny_models.pipeline("wan", torch.float64), []
    fastdit.patch(pipe, SHORT)
    for several in (False, True):
        pipe.register_to_config(expand_timesteps=several)
        found.append(generate(pipe, "wan", steps=6, batch=2, **HALVED))
    assert distance(*found) <= 1e-6  # timesteps of tokens are fp32
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"timestep": kwargs["timestep"] * (torch.arange(96) >= 48)},
        ),
        with_kwargs=True,
    )
    fastdit.patch(pipe, SHORT)
    with pytest.raises(ArgumentError, match="timestep must be the same for all tokens"):
        generate(pipe, "wan", steps=6, batch=2, **HALVED)


def test_what_shows_an_image_at_full_size_is_refused():
    pipe = tiny_models.pipeline("wan")
    pipe.register_modules(transformer=tiny_models.wan(in_channels=9))
    with pytest.raises(UnsupportedModelError, match="of its 9 channels 5 show an image"):
        fastdit.patch(pipe, SHORT)
    pipe = tiny_models.pipeline("hunyuanvideo15")
    fastdit.patch(pipe, SHORT)
    shown = pipe.prepare_cond_latents_and_mask
    pipe.prepare_cond_latents_and_mask = lambda *args: tuple(x + 1 for x in shown(*args))
    with pytest.raises(ArgumentError, match=r"must show no image .* 5 of its 9"):
        generate(pipe, "hunyuanvideo15", steps=6, **HALVED)


def test_models_and_schedulers_of_videos_that_cannot_change():
    pipe = tiny_models.pipeline("wan")
    whole = tiny_models.wan(patch_size=(2, 2, 2))
    pipe.register_modules(transformer=whole)
    with pytest.raises(UnsupportedModelError, match="patches are of 2 x 2 x 2, frames first"):
        fastdit.patch(pipe, SHORT)
    pipe = tiny_models.pipeline("wan", scheduler=UniPCMultistepScheduler())
    with pytest.raises(UnsupportedModelError, match="must have use_flow_sigmas=True"):
        fastdit.patch(pipe, SHORT)
    parts = tiny_models.pipeline("wan").components | {"transformer_2": tiny_models.wan()}
    pipe = WanPipeline(**parts, boundary_ratio=0.7)
    with pytest.raises(UnsupportedModelError, match="two transformers that take turns"):
        fastdit.patch(pipe, SHORT)


@pytest.mark.parametrize("name", VIDEOS)
def test_one_size_is_the_stock_model(name):
    """To the bit: at full size, and of coarse tokens alone at half of it, from every other row and column."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = tiny_models.pipeline(name, scheduler=scheduler)
    noise = noise_of(2, dtype=torch.float32)
    for steps, every, side in (((0, 0, 3), 1, 1), ((3, 0, 0), 2, 0.5)):
        method = dataclasses.replace(SHORT, steps=steps, ends=(1.0, 0.5, 1.0 if side == 1 else 0.5))
        sigmas = [*method.stages()[0].sigmas[:-1], 0.0]

        def run(latents, height, width):
            given = {"latents": tiny_models.frames_of(latents), "height": height, "width": width}
            return latents_of(pipe, arguments(name, 2, 3, **given))

        fastdit.unpatch(pipe)
        with taking(scheduler, sigmas):
            stock = run(noise[..., ::every, ::every], int(16 * side), int(24 * side))
        fastdit.patch(pipe, method, backend="reference")
        found = run(noise, 16, 24)
        same_bits(found, stock.repeat_interleave(every, -1).repeat_interleave(every, -2))


@contextlib.contextmanager
def taking(scheduler, steps):
    """A stock scheduler takes these steps."""
    stock = scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None):
        stock(len(steps) - 1, device=device)
        scheduler.sigmas = torch.tensor(steps)
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


# ---- what is shown, and what is drawn


def test_maps_play_as_videos():
    pipe = tiny_models.pipeline("hunyuanvideo15")
    handle = fastdit.patch(pipe, RAS(**SETTINGS, per="frame"))
    with handle.watch() as frames:
        generate(pipe, "hunyuanvideo15", steps=6, **SIZE["hunyuanvideo15"])
    report = handle.report()
    maps = report.token_map(frames.pictures())
    clip = report.clip(maps, columns=4)
    assert report.frames == FRAMES
    height, width = maps.shape[1] // FRAMES, maps.shape[2]
    assert clip.shape == (FRAMES, 2 * (height + 2), 4 * (width + 2), 3)
    for frame in range(FRAMES):
        for step in range(6):
            row, column = divmod(step, 4)
            top, left = row * (height + 2) + 1, column * (width + 2) + 1
            seen = clip[frame, top : top + height, left : left + width]
            assert (seen == maps[step, frame * height : (frame + 1) * height]).all()
    assert report.clip(maps).shape[1] == 2 * (height + 2)
    with pytest.raises(ArgumentError, match="3 frames below each other"):
        report.clip(maps[:, :-1])
    with pytest.raises(ArgumentError, match="columns must be"):
        report.clip(maps, columns=0)


class Brightness:
    """A judge of pictures."""

    name = "brightness"
    needs_reference = False

    def losses(self, images, prompts, references):
        assert images.ndim == 4
        assert len(images) == len(prompts)
        return [float(image.mean()) for image in images]


def told(pipe):
    """It takes prompts, of which each letter counts."""

    def encode(prompt, **more):
        draws = (torch.Generator().manual_seed(sum(map(ord, text))) for text in prompt)
        found = torch.stack([torch.randn(tiny_models.TEXT, 20, generator=g) for g in draws])
        return found, -found

    pipe.encode_prompt = encode
    return pipe


CLIP = {"height": 64, "width": 96, "num_frames": 2}  # three frames of 8 x 12 latent pixels


@pytest.mark.parametrize("quality", ["paired", "truth", Brightness()], ids=["paired", "truth", ""])
def test_a_search_draws_videos(quality, monkeypatch):
    monkeypatch.setattr(solution, "STEPS", 12)
    pipe = told(tiny_models.pipeline("wan"))
    work = Work(("a cat", "a dog"), 4, quality=quality, batch=2, arguments=CLIP)
    judge = Evaluator(lambda: pipe, work)
    computes = np.ones((4, len(judge.genome.components)), dtype=bool)
    computes[1::2] = False
    reused = judge.genome.join(computes)
    found = judge.measure(Task("", "losses", judge.genome.to_bytes(reused), 4, 0, 2))
    assert len(found["losses"]) == 2
    assert min(found["losses"]) > 0
    handle = fastdit.patch(pipe)
    assert judge.facts()["costs"]["true-macs"] == handle.explain(64, 96, steps=4, frames=2).macs


def test_a_book_is_made_of_videos(monkeypatch):
    monkeypatch.setattr("fastdit.search.solution.STEPS", 12)
    pipe = told(tiny_models.pipeline("wan"))
    book = calibrate.calibrate(pipe, ["a cat", "a dog"], 8, shares=(0.5,), arguments=CLIP)
    assert book.image_tokens == 3 * 24
    assert [len(plan.computed) for plan in book.plans] == [8, 4]


def test_the_demo_shows_the_frame_in_the_middle():
    pipe = told(tiny_models.pipeline("wan"))
    call, settings = {"prompt": ["a cat"]} | CLIP, demo.Settings(steps=4, seed=0, repeats=1)
    every = fastdit.Cached(fastdit.Schedule.every(2))
    found = demo.compare(pipe, [call], ["a cat"], {"every": every}, settings)
    draw = torch.Generator().manual_seed(0)
    drawn = pipe(**call, num_inference_steps=4, output_type="np", generator=draw).frames[0]
    assert len(found.pictures[0]) == 3
    assert (found.pictures[0][0].image == drawn[len(drawn) // 2]).all()
