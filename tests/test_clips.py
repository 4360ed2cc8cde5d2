"""Videos: active tokens by frame, maps that play, and outputs that are frames."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastdit
import tiny_models
from contract import within_contract
from fastdit import RAS, ArgumentError
from ras_oracle import RowOracle, by_change
from test_ras import NO_GPU, token_run
from tiny_models import generate

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
    run = SimpleNamespace(patched=patched, steps=steps, first=0, resolution=None)
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
