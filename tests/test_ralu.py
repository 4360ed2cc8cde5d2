"""RALU: the published numbers, whole runs against a restatement on stock models, and the edges of a run."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models import attention_processor as processors
from diffusers.models import embeddings
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.testing import CompileCounter

import fastdit
import oracle
import ralu_oracle
import ras_oracle
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import (
    ECAD,
    RALU,
    RAS,
    ArgumentError,
    Cached,
    CompositionError,
    PerStage,
    Schedule,
    ScheduleError,
    UnsupportedModelError,
)
from fastdit.account.cost import Cost
from fastdit.adapters import latents
from fastdit.blocks import attention
from fastdit.ops import bind
from fastdit.tokens import lift
from fastdit.tokens.layout import Layout
from fastdit.tokens.resolution import ResolutionRun
from fastdit.tokens.stages import mismatch
from snapshot import snapshot
from test_coexistence import FEATURES
from tiny_models import LATENT, arguments, generate, latents_of

# Published: preset -> sigmas of each stage, (start, scale, deviation) of the second and third.
PUBLISHED = {
    "flux-4x": (
        [1, 0.9695, 0.9304, 0.8786, 0.8066, 0.7],
        [0.9365, 0.8925, 0.8426, 0.7854, 0.7192, 0.6418, 0.55],
        [0.8853, 0.8157, 0.7347, 0.6396, 0.526, 0.3881, 0.2173, 0],
        (0.0635, 0.2118, 0.9365),
        (0.1147, 0.2548, 0.8853),
    ),
    "flux-5x": (
        [1, 0.9611, 0.9073, 0.8281, 0.7],
        [0.9461, 0.8924, 0.8294, 0.7542, 0.663, 0.55],
        [0.9018, 0.82, 0.7218, 0.6016, 0.4514, 0.258, 0],
        (0.0539, 0.1798, 0.9461),
        (0.0982, 0.2181, 0.9018),
    ),
    "flux-7x": (
        [1, 0.9417, 0.8],
        [0.9616, 0.8946, 0.8101, 0.7],
        [0.9359, 0.8336, 0.7052, 0.539, 0.3158, 0],
        (0.0384, 0.192, 0.9616),
        (0.0641, 0.2136, 0.9359),
    ),
    "sd3-2x": (
        [1, 0.9782, 0.9508, 0.9153, 0.8676, 0.8],
        [0.9429, 0.9101, 0.8747, 0.8363, 0.7948, 0.7495, 0.7],
        [0.906, 0.8473, 0.7822, 0.7095, 0.6278, 0.5353, 0.4298, 0.3083, 0.1668, 0],
        (0.0571, 0.2853, 0.9429),
        (0.094, 0.3133, 0.906),
    ),
    "sd3-3x": (
        [1, 0.9561, 0.8851, 0.75],
        [0.9495, 0.8827, 0.8014, 0.7],
        [0.9359, 0.8534, 0.7537, 0.6308, 0.4757, 0.2738, 0],
        (0.0505, 0.2022, 0.9495),
        (0.0641, 0.2135, 0.9359),
    ),
}

# What solving from the published start gave independently: steps, ends, shift -> shifts, Z, distance.
SOLVED = {
    "flux-4x": ((5, 6, 7), (0.3, 0.45, 1.0), 3.0, (5.019, 2.589, 2.226), 6.317, 0.0175),
    "flux-5x": ((4, 5, 6), (0.3, 0.45, 1.0), 3.0, (5.106, 2.641, 2.251), 7.522, 0.0163),
    "flux-7x": ((2, 3, 5), (0.2, 0.3, 1.0), 3.0, (8.140, 2.855, 2.192), 6.261, 0.0266),
    "sd3-2x": ((5, 6, 9), (0.2, 0.3, 1.0), 3.0, (6.121, 2.237, 1.973), 4.132, 0.0367),
    "sd3-3x": ((3, 3, 6), (0.25, 0.3, 1.0), 3.0, (6.402, 2.602, 2.273), 6.258, 0.0213),
    "schnell": ((1, 1, 2), (0.3, 0.45, 1.0), 1.0, (1.008, 0.568, 0.864), 2.0, None),
}

#: a short run with all that matters
SHORT = RALU((2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
#: families of pictures; `test_clips.py` has those of videos
STAGED = [
    name
    for name in tiny_models.one_each(tiny_models.forms("changes_resolution"))
    if name not in tiny_models.VIDEOS
]
#: those that the oracle of whole runs knows
RESTATED = [name for name in ("sd3", "flux", "qwen") if name in STAGED]
#: those whose pipelines hold latents as tokens
PACKED = tuple(
    name for name in STAGED if tiny_models.latents_given(name, tiny_models.call(name)).ndim == 3
)
SIZE = {"height": 16, "width": 24}  # latent pixels: 8 x 12 cells, 24 coarse tokens


# --- numbers


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_grids_and_transitions(name):
    *grids, second, third = PUBLISHED[name]
    stages = RALU.preset(name).stages()
    assert [stage.layout for stage in stages] == ["coarse", "mixed", "full"]
    for stage, grid in zip(stages, grids, strict=True):
        assert stage.sigmas == pytest.approx(grid, abs=1e-4)
    for stage, (start, scale, deviation) in zip(stages[1:], (second, third), strict=True):
        found = (1 - stage.sigmas[0], stage.scale, stage.deviation)
        assert found == pytest.approx((start, scale, deviation), abs=1e-4)


@pytest.mark.parametrize("name", ["flux-4x", "sd3-2x", "schnell", "sd35-turbo"])
def test_a_transition_reaches_a_point_of_the_flow(name):
    """Signal a e = s; copied noise a (1 - e) = b sqrt(c), which the added noise takes away; b = 1 - s."""
    method = RALU.preset(name)
    before = None
    for stage in method.stages():
        if before is not None:
            end, start = 1 - before.sigmas[-1], 1 - stage.sigmas[0]
            assert stage.scale * end == pytest.approx(start)
            copied = stage.scale * (1 - end)
            assert copied == pytest.approx(stage.deviation * math.sqrt(method.noise))
            assert stage.deviation == pytest.approx(1 - start)
        before = stage


@pytest.mark.parametrize("name", SOLVED)
def test_the_solver_finds_the_published_shifts(name):
    """The objective is flat and has steps, so the last bits of a logarithm move the shifts by half a percent."""
    steps, ends, base_shift, shifts, z, reached = SOLVED[name]
    found, found_z = RALU.solve(steps, ends, base_shift)
    assert found == pytest.approx(shifts, rel=1e-2)
    assert found_z == pytest.approx(z, rel=1e-2)
    if reached is not None:
        assert mismatch(found, found_z, steps, ends, base_shift) < reached + 1e-4


def test_without_shifts_and_noise_they_are_solved():
    method = RALU((2, 3, 5), (0.2, 0.3, 1.0))
    solved, z = RALU.solve((2, 3, 5), (0.2, 0.3, 1.0))
    assert (method.shifts, method.noise) == (solved, pytest.approx(z**-2))


def test_a_stage_may_be_left_out():
    method = dataclasses.replace(SHORT, steps=(2, 0, 3))
    assert [(stage.layout, stage.first, stage.steps) for stage in method.stages()] == [
        ("coarse", 0, 2),
        ("full", 2, 3),
    ]
    assert method.tokens(96, 5) == [24, 24, 96, 96, 96]
    assert RALU((2, 0, 3), (0.3, 0.4, 1.0)).noise <= 0.25


@pytest.mark.parametrize(
    ("split", "align", "text", "count"),
    [(0.3, 1, 512, 307), (0.1, 1, 512, 102), (0.3, 128, 512, 256), (0.2, 128, 333, 145)],
)
def test_how_many_tokens_are_split(split, align, text, count):
    method = dataclasses.replace(SHORT, split=split, align=align)
    assert method.split_count(1024, text) == count
    assert (1024 + 3 * count + text) % align == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (5, 6)}, "steps must be three numbers"),
        ({"steps": (5, -1, 7)}, "steps must be three whole numbers"),
        ({"steps": (0, 0, 0)}, "not all 0"),
        ({"steps": (1.5, 2, 3)}, "steps must be three whole numbers"),
        ({"ends": (0.5, 0.4, 1.0)}, "ends must rise to 1"),
        ({"ends": (0.3, 0.45, 0.9)}, "ends must rise to 1"),
        ({"ends": (0.0, 0.45, 1.0)}, "ends must be a number in"),
        ({"shifts": (1.0, 0.0, 1.0)}, "shifts must be a number above 0"),
        ({"shifts": None}, "shifts and noise belong together"),
        ({"noise": 0.3}, "noise must be a number in"),
        ({"noise": None}, "shifts and noise belong together"),
        ({"split": 1.5}, "split must be a number in"),
        ({"selector": "canny"}, "selector must be one of edges, gradient, variance"),
        ({"selector": "change", "steps": (1, 2, 3)}, "needs at least 2 coarse steps"),
        ({"lift": "bicubic"}, "lift must be one of pixels, spectrum, picture"),
        ({"lift": "spectrum"}, 'lift must be "pixels" with a mixed stage'),
        ({"lift": "picture", "mode": "parity", "steps": (2, 0, 3)}, 'with mode="parity"'),
        ({"mode": "exact"}, 'mode must be "corrected" or "parity"'),
        ({"weigh_keys": 1}, "weigh_keys must be True, False or None"),
        ({"weigh_keys": True, "mode": "parity"}, 'not True with mode="parity"'),
        ({"align": 0}, "align must be a whole number"),
        ({"base_shift": -1.0}, "base_shift must be a number above 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(SHORT, **change)


def test_an_unknown_preset_is_named():
    with pytest.raises(ArgumentError, match="preset must be one of flux-4x"):
        RALU.preset("sdxl")
    with pytest.raises(ArgumentError, match="steps must be at least 1 in every stage"):
        RALU.solve((0, 3, 5), (0.2, 0.3, 1.0))
    with pytest.raises(ScheduleError, match="align=96 fits no split"):
        dataclasses.replace(SHORT, align=96).split_count(24, 5)


# --- layouts and noise


def test_one_split_token_and_its_four():
    """The published order and places: kept tokens, then the children of the split one; then raster order."""
    ops = bind("reference")
    coarse = Layout.uniform((4, 4), 1, torch.device("cpu"))
    x = torch.arange(4.0)[None, :, None].expand(1, 4, 8).contiguous()
    rows = torch.tensor([[3]])
    still = {"scale": 1.0, "deviation": 0.0, "correlation": 0.05}
    mixed, table = ops.resolution_transition(x, coarse.table, rows, torch.zeros(1, 7, 8), **still)
    assert mixed[0, :, 0].tolist() == [0, 1, 2, 3, 3, 3, 3]
    places = (table[0, :, 1:] / 2).tolist()
    assert places == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 1.5], [1.5, 1], [1.5, 1.5]]
    layout = Layout((4, 4), table, 3)
    assert layout.name == "mixed"
    assert layout.levels()[0].tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    rows = torch.arange(3)[None]
    full, _ = ops.resolution_transition(
        mixed, table, rows, torch.zeros(1, 16, 8), raster=4, **still
    )
    expected = [[2 * (row // 2) + column // 2 for column in range(4)] for row in range(4)]
    assert full[0, :, 0].unflatten(0, (4, 4)).tolist() == expected


@pytest.mark.parametrize("centred", [False, True])
def test_a_coarse_token_lies_at_its_first_cell_or_in_the_middle_of_four(centred):
    table = torch.tensor([[[1, 0, 2], [1, 4, 0], [0, 0, 0], [0, 3, 5]]], dtype=torch.int32)
    coarse = [[0.5, 2.5], [4.5, 0.5]] if centred else [[0.0, 2.0], [4.0, 0.0]]
    assert Layout((6, 6), table, 2, centred).places()[0].tolist() == [*coarse, [0, 0], [3, 5]]


def test_a_coarse_key_counts_as_four_beside_fine_ones_alone():
    mixed = Layout((4, 4), torch.zeros(2, 7, 3, dtype=torch.int32), 3, True, 4)
    bias = mixed.key_bias(torch.float64)
    assert bias.dtype is torch.float64
    assert bias.exp().tolist() == [pytest.approx([4, 4, 4, 1, 1, 1, 1])]
    alike = [dataclasses.replace(mixed, coarse=n) for n in (0, 7)]
    for layout in (*alike, dataclasses.replace(mixed, coarse_keys=1)):
        assert layout.key_bias(torch.float64) is None
        assert not layout.weighs_keys


@pytest.mark.parametrize("packed", [False, True], ids=["picture", "packed"])
def test_what_is_drawn_is_read_back(packed):
    ops = bind("reference")
    coarse = Layout.uniform((4, 6), 1, torch.device("cpu"))
    x = torch.randn(2, 6, 12)
    rows = torch.tensor([[0, 4], [1, 5]])
    x, table = ops.resolution_transition(
        x,
        coarse.table_of(2),
        rows,
        torch.randn(2, 12, 12),
        scale=1.0,
        deviation=1.0,
        correlation=0.1,
    )
    layout = Layout((4, 6), table, 4)
    if packed:
        latents = torch.full((2, 24, 12), math.nan)
        field = latents.unflatten(1, (4, 6)).unflatten(3, (3, 2, 2))
        field = field.permute(0, 1, 2, 4, 5, 3)
    else:
        latents = torch.full((2, 3, 8, 12), math.nan)
        field = latents.unflatten(2, (4, 2)).unflatten(4, (6, 2)).permute(0, 2, 4, 3, 5, 1)
    layout.write(x, field, ops)
    assert latents.isfinite().all()
    same_bits(layout.read(field, ops), x)
    first = coarse.read(field, ops).view(2, 6, 3, 2, 2)[0, 1]  # a token that stayed coarse
    drawn = field[0, :2, 2:4].permute(4, 0, 2, 1, 3).reshape(3, 4, 4)
    same_bits(drawn, first.repeat_interleave(2, 1).repeat_interleave(2, 2))


class Pictures:
    """Stands in for an adapter whose latents are pictures."""

    redrawn = latents.Pictures.redrawn

    def as_clip(self, picture, frames):
        return picture

    def field(self, latents, cells):
        return latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)


def stages_of(method, pipeline=None):
    """The stages of a run without a model."""
    patched = SimpleNamespace(adapter=Pictures(), ops=bind())
    return ResolutionRun(method, SimpleNamespace(patched=patched, pipeline=lambda: pipeline or 1))


@pytest.mark.parametrize("mode", ["corrected", "parity"])
def test_noise_is_white_after_each_transition(mode):
    """From data 0, the state must be the next time's noise: variance (1 - s)^2 and no correlation of any pixels.

    With the published unit variance, tokens that were not split have (1 - s)^2 (1 + c).
    """
    method = dataclasses.replace(SHORT, noise=0.2, mode=mode, split=0.5)
    run = stages_of(method)
    cells, channels, batch = (4, 4), 4096, 2
    run.begin(cells, 0, torch.device("cpu"))
    latents = torch.randn(batch, channels, 8, 8)
    run.seed(latents)
    for index in (1, 2):
        before = run.now
        end = method.stages()[index - 1].sigmas[-1]
        tokens = torch.randn(batch, before.tokens, channels * 4) * end
        run.now.write(tokens, run.adapter.field(latents, run.now.grid), run.ops)
        run.finish(torch.zeros_like(latents), latents)
        assert run.index == index
        found = run.now.read(run.adapter.field(latents, run.now.grid), run.ops)
        pixels = found.unflatten(2, (channels, 4)).transpose(2, 3).flatten(1, 2)
        covariance = torch.stack([image @ image.T / channels for image in pixels])
        variance = method.stages()[index].deviation ** 2
        extra = torch.zeros(batch, run.now.tokens)
        if mode == "parity":  # what was coarse and stayed so, and then what was fine
            kept = run.now.table[..., 0] == 1
            if index == 2:
                fine = before.table[:, before.coarse :].long()
                kept = torch.zeros(batch, 4, 4, dtype=torch.bool)
                for b in range(batch):
                    kept[b, fine[b, :, 1], fine[b, :, 2]] = True
                kept = kept.flatten(1)
            extra[kept.expand_as(extra)] = method.noise
        expected = torch.diag_embed((variance * (1 + extra)).repeat_interleave(4, 1))
        # The standard error of an entry is variance / sqrt(4096), 1.6 %, for the diagonal sqrt(2) of it.
        torch.testing.assert_close(covariance, expected, rtol=0, atol=0.11 * variance)


def test_the_latest_end_is_told_by_what_a_small_picture_lacks():
    """Two waves that half the size cannot show, of 96 - 24 coefficients; the same waves half as strong allow more."""
    waves = np.zeros((3, 8, 12))
    waves[:, 5, 2], waves[:, 1, 9], waves[:, 1, 2] = 3.0, 4.0, 100.0
    latents = torch.from_numpy(scipy.fft.idctn(waves, axes=(1, 2), norm="ortho"))
    for noise in (0.25, 0.1):
        end = RALU.latest_end(latents, share=0.04, noise=noise)
        start = dataclasses.replace(SHORT, ends=(end, 0.99, 1.0), noise=noise).stages()[1].sigmas[0]
        power = 25 / 72
        assert ((1 - start) / start) ** 2 * power == pytest.approx(0.04)
    assert RALU.latest_end(latents / 2) > RALU.latest_end(latents)
    assert RALU.latest_end(torch.zeros(1, 4, 4)) == 1
    with pytest.raises(ArgumentError, match="latents must be pictures"):
        RALU.latest_end(torch.zeros(1, 4, 5))
    with pytest.raises(ArgumentError, match="share must be"):
        RALU.latest_end(latents, share=0)


@pytest.mark.parametrize("noise", [0.25, 0.1])
def test_noise_is_white_after_a_lift(noise):
    """From data 0 the state must be the next time's noise, as after a transition of tokens."""
    method = dataclasses.replace(SHORT, steps=(2, 0, 3), noise=noise, lift="spectrum")
    run = stages_of(method)
    run.begin((4, 6), 0, torch.device("cpu"))
    channels = 4096
    latents = torch.randn(1, channels, 8, 12)
    run.seed(latents)
    small = torch.randn(1, channels, 4, 6) * method.stages()[0].sigmas[-1]
    latents.copy_(small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    run.finish(torch.zeros_like(latents), latents)
    assert run.now.name == "full"
    pixels = latents[0].flatten(1)
    variance = method.stages()[1].deviation ** 2
    expected = torch.eye(96) * variance
    torch.testing.assert_close(pixels.T @ pixels / channels, expected, rtol=0, atol=0.11 * variance)


def test_a_lift_keeps_the_low_half_and_adds_noise_to_the_other():
    """A wave of the coarse picture is the same wave of the fine one; at c = 1/4 its own noise is all it has."""

    def wave(scale):
        y, x = (torch.arange(side * scale, dtype=torch.float64) + 0.5 for side in (4, 6))
        of_y, of_x = 2 * y / (4 * scale), 5 * x / (6 * scale)
        return torch.cos(torch.pi * of_y)[:, None] * torch.cos(torch.pi * of_x)

    noise = torch.randn(8, 12, dtype=torch.float64)
    found = lift.enlarged(wave(1), noise, scale=0.3, deviation=0.7, correlation=0.25)
    rest = scipy.fft.dctn((found - 0.3 * wave(2)).numpy(), norm="ortho")
    assert abs(rest[:4, :6]).max() < 1e-12
    expected = 0.7 * scipy.fft.dctn(noise.numpy(), norm="ortho")
    expected[:4, :6] = 0
    np.testing.assert_allclose(rest, expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["corrected", "parity"])
def test_a_token_that_is_split_is_drawn_larger_or_tiled(mode, monkeypatch):
    """Without noise the transition leaves the picture as it is, or copies tokens of 2 x 2 pixels as published."""
    method = dataclasses.replace(SHORT, noise=0.2, mode=mode, split=0.5)
    run = stages_of(method)
    run.begin((4, 4), 0, torch.device("cpu"))
    small = torch.randn(2, 3, 4, 4)
    latents = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    run.seed(latents)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(size))
    expected = {  # of a token [a b; c d], one row of pixels below the other
        "corrected": small.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "parity": small.unflatten(2, (2, 2))
        .unflatten(4, (2, 2))
        .repeat(1, 1, 1, 2, 1, 2)
        .flatten(4)
        .flatten(2, 3),
    }[mode]
    for index in (1, 2):
        run.finish(torch.zeros_like(latents), latents)
        expected = method.stages()[index].scale * expected
        fine = run.now.levels()[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3) == 0
        torch.testing.assert_close(
            latents[fine.expand_as(latents)], expected[fine.expand_as(latents)]
        )
    assert fine.all()


@pytest.mark.parametrize("mode", ["corrected", "parity"])
def test_edges_below_mid_grey_are_seen_or_clipped(mode, monkeypatch):
    """A strong edge in the dark, in the last token: the published code clips it away before it looks."""
    picture = torch.full((1, 3, 64, 64), -1.0)
    picture[:, :, 40:56, 36:44] = -0.05
    monkeypatch.setattr(Pictures, "decode", lambda self, latents, vae: picture, raising=False)
    method = dataclasses.replace(SHORT, selector="edges", mode=mode, split=0.25)
    run = stages_of(method, SimpleNamespace(vae=None))
    run.begin((4, 4), 0, torch.device("cpu"))
    latents = torch.randn(1, 3, 8, 8)
    run.seed(latents)
    run.finish(torch.zeros_like(latents), latents)
    fine = (run.now.levels()[0, ::2, ::2] == 0).flatten().tolist()
    assert fine == [mode == "parity", False, False, mode == "corrected"]


def test_seeds_follow_each_image():
    run = stages_of(SHORT)

    def draws(latents):
        run.seed(latents)
        return [torch.randn(8, generator=generator) for generator in run.generators]

    images = torch.randn(3, 4, 8, 8)
    together, alone = draws(images), draws(images[2:])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(draws(images.to(torch.bfloat16))[0], draws(images.to(torch.bfloat16))[0])


# --- whole runs


def start_of(name: str, batch: int, dtype: torch.dtype = torch.float64, size=SIZE, seed: int = 3):
    """(initial latents [B, C, H, W], the same as the pipeline takes them)."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, LATENT, size["height"], size["width"]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return noise, as_given(name, noise)


def as_given(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Initial latents [B, C, H, W] as the pipeline takes them; FLUX.2's packs what has a token's channels already."""
    if name.startswith("flux2"):
        return torch.nn.functional.pixel_unshuffle(noise, 2)
    if name in tiny_models.VIDEOS:
        return tiny_models.frames_of(noise)
    return ralu_oracle.pack(noise) if name.startswith(PACKED) else noise


def as_picture(name: str, latents: torch.Tensor, size=SIZE) -> torch.Tensor:
    """What a run ends with as [B, C, H, W]; frames lie below each other."""
    if name in tiny_models.VIDEOS:
        return latents.flatten(2, 3)
    if not name.startswith(PACKED):
        return latents
    return ralu_oracle.unpack(latents, (size["height"] // 2, size["width"] // 2))


CASES = [
    ("sd3", 1, {}),
    ("sd3", 3, {"mode": "parity"}),
    ("sd3.5", 2, {"selector": "edges", "split": 0.5}),
    ("sd3", 2, {"selector": "change"}),
    ("flux", 2, {"steps": (3, 1, 2), "selector": "change"}),
    ("sd3", 2, {"weigh_keys": False}),
    ("flux", 3, {"weigh_keys": False}),
    ("sd3", 1, {"steps": (2, 0, 3)}),
    ("sd3", 2, {"steps": (2, 0, 3), "lift": "spectrum"}),
    ("sd3", 1, {"steps": (2, 0, 3), "lift": "picture", "noise": 0.25}),
    ("flux", 1, {}),
    ("flux", 3, {}),
    ("flux", 1, {"steps": (2, 0, 3), "lift": "spectrum", "noise": 0.25}),
    ("flux", 2, {"steps": (2, 0, 3), "lift": "picture"}),
    ("flux-dev", 2, {"selector": "variance", "mode": "parity"}),
    *[
        ("zimage", batch, change)
        for batch, change in (
            (1, {}),
            (3, {"mode": "parity"}),
            (2, {"selector": "change"}),
            (2, {"weigh_keys": False, "selector": "edges"}),
            (2, {"steps": (2, 0, 3), "lift": "picture"}),
        )
        if tiny_models.HAS_ZIMAGE
    ],
]
if tiny_models.HAS_FLUX2:
    CASES += [
        ("flux2", 1, {}),
        ("flux2", 3, {"selector": "edges"}),
        ("flux2", 2, {"steps": (3, 1, 2), "selector": "change", "mode": "parity"}),
        ("flux2", 2, {"steps": (2, 0, 3), "lift": "picture"}),
        ("flux2", 2, {"weigh_keys": False}),
    ]
CASES += [
    ("wan", 1, {"mode": "parity"}),
    ("wan", 2, {"selector": "edges", "split": 0.5}),
    ("wan", 1, {"steps": (2, 0, 3), "lift": "spectrum"}),
    ("hunyuanvideo15", 1, {"selector": "variance"}),
    ("hunyuanvideo15", 3, {"selector": "edges", "mode": "parity"}),
    ("hunyuanvideo15", 2, {"weigh_keys": False, "selector": "change"}),
    ("hunyuanvideo15", 1, {"steps": (2, 0, 3), "lift": "picture"}),
]


@pytest.mark.diffusers
@pytest.mark.parametrize(("name", "batch", "change"), CASES)
def test_a_run_is_that_of_the_restatement(name, batch, change):
    method = dataclasses.replace(SHORT, **change)
    pipe = tiny_models.pipeline(name, torch.float64)
    # Z-Image's pipeline steps, and Wan's begins, in fp32 whatever the model's dtype
    starts = torch.float32 if name in ("zimage", "wan") else torch.float64
    noise, latents = start_of(name, batch, starts)
    given = arguments(name, batch, method.run_steps, dtype=torch.float64, latents=latents, **SIZE)
    with torch.no_grad():
        expected = ralu_oracle.run(pipe, method, noise, given)
    generate(pipe, name, steps=1, dtype=torch.float64, **SIZE)  # diffusers puts hooks of its own in
    stock = snapshot(pipe.transformer)
    handle = fastdit.patch(pipe, method)
    found = as_picture(name, latents_of(pipe, given))
    report = handle.report()
    handle.unpatch()
    assert snapshot(pipe.transformer) == stock
    assert distance(found, expected) <= (1e-5 if name == "zimage" else RUN_FP64)
    frames = 2 if name in tiny_models.VIDEOS else 1
    assert list(report.tokens_per_step) == method.tokens(96, tiny_models.TEXT, frames)


@pytest.mark.diffusers
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", STAGED)
@pytest.mark.usefixtures("unprogrammed")
def test_a_weighed_key_stands_four_times(name, batch, backend, monkeypatch):
    """For every family and in either order of its arithmetic; one number a key serves all queries and heads."""
    pipe, masks = tiny_models.pipeline(name, torch.float64), []
    _, latents = start_of(name, batch)
    given = arguments(name, batch, 7, dtype=torch.float64, latents=latents, **SIZE)
    prompts = [given[key] for key in ("prompt_embeds", "negative_prompt_embeds") if key in given]
    texts, mixed = {prompt[0].shape[0] for prompt in prompts}, 24 + 3 * 7
    if name == "zimage":  # which pads both to multiples of 32, and refines the image alone
        for key in ("prompt_embeds", "negative_prompt_embeds"):  # lengths that no other stage has
            given[key] = [prompt[:3].repeat(22, 1) for prompt in given[key]]
        texts = {64 - mixed, 64 - mixed + 96}
    attend = attention.torch_attention

    def seen(q, k, v, scale, mask=None):
        masks.append(mask)
        return attend(q, k, v, scale, mask)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "torch_attention", seen)
        fastdit.patch(pipe, SHORT, backend=backend)
        found = latents_of(pipe, given)
    shapes = {tuple(mask.shape[1:]) for mask in masks}
    assert shapes
    assert shapes <= {(1, 1, length + mixed) for length in {0, *texts}}
    if name != "qwen":  # whose prompts have masks of their own
        assert {mask.shape[0] for mask in masks} == {1}
    fastdit.patch(pipe, dataclasses.replace(SHORT, weigh_keys=False), backend=backend)
    plain = latents_of(pipe, given)
    often = [4] * (24 - 7) + [1] * (4 * 7)
    with ralu_oracle.standing(often, texts, name.startswith(PACKED)):
        assert distance(found, latents_of(pipe, given)) <= FORWARD_FP64
    assert distance(found, plain) > 1e-3


@pytest.mark.diffusers
@pytest.mark.parametrize("name", STAGED)
def test_one_resolution_is_the_stock_model(name):
    method = dataclasses.replace(SHORT, steps=(0, 0, 4))
    sigmas = list(method.stages()[0].sigmas[:-1])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = tiny_models.pipeline(name, scheduler=scheduler)
    stock = generate(pipe, name, steps=4, sigmas=sigmas, **SIZE)
    fastdit.patch(pipe, method, backend="reference")
    same_bits(generate(pipe, name, steps=4, **SIZE), stock)


@pytest.mark.diffusers
@pytest.mark.parametrize("name", STAGED)
def test_the_coarse_stage_is_the_stock_model_at_half_size(name):
    """To the end, from every other row and column of the noise."""
    method = dataclasses.replace(SHORT, steps=(4, 0, 0), ends=(1.0, 0.5, 0.5))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = tiny_models.pipeline(name, scheduler=scheduler)
    half = {side: length // 2 for side, length in SIZE.items()}
    noise, latents = start_of(name, 2, torch.float32)
    small = noise[..., ::2, ::2].contiguous()
    sigmas = list(method.stages()[0].sigmas[:-1])
    cfg = name != "qwen"  # whose guidance rescales by token, so it depends on their size
    given = {"sigmas": sigmas, "cfg": cfg, **half}
    stock = latents_of(pipe, arguments(name, 2, 4, latents=as_given(name, small), **given))
    fastdit.patch(pipe, method, backend="reference")
    given = {"latents": latents, "cfg": cfg, **SIZE}
    found = as_picture(name, latents_of(pipe, arguments(name, 2, 4, **given)))
    stock = as_picture(name, stock, half)
    same_bits(found, stock.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.diffusers
@pytest.mark.parametrize(
    ("name", "selector"), [("sd3", "gradient"), *[(name, "edges") for name in PACKED]]
)
def test_a_batch_is_its_images(name, selector):
    method = dataclasses.replace(SHORT, selector=selector)
    pipe = tiny_models.pipeline(name, torch.float64)
    _, latents = start_of(name, 3)
    handle = fastdit.patch(pipe, method)

    def draw(images):
        some = arguments(name, 3, 7, dtype=torch.float64, latents=latents, **SIZE)
        for key, value in some.items():
            if isinstance(value, torch.Tensor) and value.shape[0] == 3:
                some[key] = value[images]
        some["num_images_per_prompt"] = 1 if name == "sd3" else len(some["latents"])
        return latents_of(pipe, some)

    together = draw(slice(0, 3))
    masks = handle.report().stages[1].coarse
    assert (masks[0] != masks[1]).any()
    for b in range(3):
        within_contract(draw(slice(b, b + 1)), together[b : b + 1])


@pytest.mark.diffusers
@pytest.mark.parametrize("name", STAGED)
def test_callbacks_see_full_size_at_every_step(name):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, SHORT)
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.append(as_picture(name, kwargs["latents"].clone()))
        return kwargs

    end = generate(pipe, name, steps=7, callback_on_step_end=look, **SIZE)
    assert len(seen) == 7
    assert {tuple(latents.shape) for latents in seen} == {(1, LATENT, 16, 24)}
    same_bits(seen[-1], as_picture(name, end))
    coarse = seen[0][..., ::2, ::2]
    same_bits(seen[0], coarse.repeat_interleave(2, -1).repeat_interleave(2, -2))
    # What a callback writes is what the run goes on from.
    edited = generate(
        pipe,
        name,
        steps=7,
        callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * (0.5 if i == 0 else 1)},
        **SIZE,
    )
    assert distance(edited, end) > 1e-3


@pytest.mark.diffusers
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("name", ["sd3", "flux"])  # by a table, and by a module
@pytest.mark.usefixtures("unprogrammed")
def test_positions_are_made_once_for_a_stage(name, cfg, monkeypatch):
    """Whatever the number of steps and of calls within one."""
    pipe = tiny_models.pipeline(name)
    made = []
    if name == "flux":
        kind = type(pipe.transformer.pos_embed)
        real = kind.forward

        def forward(self, ids):
            made.append(len(ids))
            return real(self, ids)

        monkeypatch.setattr(kind, "forward", forward)
    else:
        real = embeddings.get_2d_sincos_pos_embed_from_grid

        def positions(width, grid, **kwargs):
            made.append(tuple(grid.shape[1:]))
            return real(width, grid, **kwargs)

        monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed_from_grid", positions)
    fastdit.patch(pipe, SHORT)
    for _ in range(2):  # and anew in each run
        made.clear()
        generate(pipe, name, steps=7, batch=2, cfg=cfg, **SIZE)
        # FLUX: text and tokens, of the mixed stage those of both images; SD3 crops a table where there is one size,
        # and makes one of corners and one of middles for the mixed stage.
        assert made == ([5 + 24, 2 * (5 + 45), 5 + 96] if name == "flux" else [(8, 12)] * 2)


@pytest.mark.parametrize("name", STAGED)
def test_lengths_are_aligned_where_asked(name):
    """24 coarse and 5 text tokens: the nearest to 7 splits that makes 24 + 3 k + 5 a multiple of 16 is 1 or 17."""
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, dataclasses.replace(SHORT, align=16))
    assert generate(pipe, name, steps=7, **SIZE).isfinite().all()
    tokens = handle.report().tokens_per_step
    assert set(tokens[2:4]) == {24 + 3}
    assert tokens == handle.explain(**SIZE, text_tokens=tiny_models.TEXT).tokens_per_step
    fastdit.patch(pipe, dataclasses.replace(SHORT, align=96))
    with pytest.raises(ScheduleError, match="align=96 fits no split of 24 coarse tokens beside 5"):
        generate(pipe, name, steps=7, **SIZE)


def test_a_run_repeats_and_follows_its_seed():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, SHORT)
    first = generate(pipe, "sd3", steps=7, **SIZE)
    torch.randn(3)  # the global generator has no say
    same_bits(generate(pipe, "sd3", steps=7, **SIZE), first)
    assert distance(generate(pipe, "sd3", steps=7, seed=1, **SIZE), first) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STAGED)
def test_other_dtypes(name, dtype):
    """A fixed number of steps of a chaotic model: near to the fp64 run where no token set differs."""
    method = dataclasses.replace(SHORT, split=1.0)
    exact = tiny_models.pipeline(name, torch.float64)
    fastdit.patch(exact, method)
    _, latents = start_of(name, 2, dtype)
    truth = exact(
        **arguments(name, 2, 7, dtype=torch.float64, latents=latents.double(), cfg=False, **SIZE)
    ).images
    pipe = tiny_models.pipeline(name, dtype)
    fastdit.patch(pipe, method)
    found = pipe(**arguments(name, 2, 7, dtype=dtype, latents=latents, cfg=False, **SIZE)).images
    # whose pipeline steps in fp32 whatever the model's dtype
    assert found.dtype == (torch.float32 if name == "zimage" else dtype)
    # The generators are seeded from the bits of the latents, which differ by dtype: only the first stage compares.
    assert found.isfinite().all()
    assert 0.5 < float(found.double().std() / truth.std()) < 2


# --- a pipeline's other features


@pytest.mark.slow
@pytest.mark.diffusers
@pytest.mark.parametrize(
    "feature",
    [
        "LoRA",
        "model offload",
        "accelerate offload",
        "group offload by block",
        "group offload by leaf",
    ],
)
@pytest.mark.parametrize("name", STAGED)
def test_adapters_and_offloading(name, feature):
    """Adapters equal the same run with their weights merged in; offloading changes nothing."""
    method = dataclasses.replace(SHORT, selector="edges")
    found = {}
    for arm in ("plain", "feature"):
        pipe = tiny_models.pipeline(name, torch.float64)
        if feature == "model offload" and arm == "feature":
            pipe.enable_model_cpu_offload(device="cpu")
        elif feature == "LoRA" or arm == "feature":
            FEATURES[feature](pipe.transformer)
        if feature == "LoRA" and arm == "plain":
            for module in pipe.transformer.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
        handle = fastdit.patch(pipe, method)
        found[arm] = generate(pipe, name, batch=2, steps=7, **SIZE)
        assert handle.stage_pictures().shape[:2] == (3, 2)  # decodes when the run is over
    assert distance(found["feature"], found["plain"]) <= RUN_FP64


@pytest.mark.parametrize(
    ("change", "uses"),
    [
        ({"selector": "edges"}, 2),
        ({"selector": "gradient"}, 0),
        ({"steps": (2, 0, 5), "lift": "spectrum"}, 0),
        ({"steps": (2, 0, 5), "lift": "picture"}, 4),  # each is decoded and encoded
    ],
)
def test_offloading_moves_the_autoencoder_in_where_it_is_used(change, uses):
    """For each image, and the transformer comes back for the next step."""
    pipe = tiny_models.pipeline("flux")
    pipe.enable_model_cpu_offload(device="cpu")
    moves = []
    for part in ("transformer", "vae"):
        hook = getattr(pipe, part)._hf_hook

        def pre_forward(*args, part=part, real=hook.pre_forward, **kwargs):
            moves.append(part)
            return real(*args, **kwargs)

        hook.pre_forward = pre_forward
    fastdit.patch(pipe, dataclasses.replace(SHORT, **change))
    generate(pipe, "flux", batch=2, steps=7, cfg=False, **SIZE)
    assert moves == ["transformer"] * 2 + ["vae"] * uses + ["transformer"] * 5


@pytest.mark.slow
def test_compiled_blocks_run_the_stages():
    """Of all three lengths, as `compile_repeated_blocks` compiles them; a second run makes no graph anew."""
    method = dataclasses.replace(SHORT, steps=(1, 1, 1))
    given = {"steps": 3, "batch": 2, "cfg": False, **SIZE}
    pipe = tiny_models.pipeline("flux")
    fastdit.patch(pipe, method, backend="reference")
    wanted = generate(pipe, "flux", **given)
    torch._dynamo.reset()
    counter = CompileCounter()
    model = pipe.transformer
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        same_bits(generate(pipe, "flux", **given), wanted)
        graphs = counter.frame_count
        assert graphs > 0
        same_bits(generate(pipe, "flux", **given), wanted)
    assert counter.frame_count == graphs
    torch._dynamo.reset()


# --- refusals


@pytest.mark.diffusers
def test_a_processor_is_refused_where_keys_are_weighed():
    """One named like the stock one is another all the same."""

    class JointAttnProcessor2_0(processors.JointAttnProcessor2_0):
        pass

    pipe = tiny_models.pipeline("sd3")
    pipe.transformer.transformer_blocks[1].attn.processor = JointAttnProcessor2_0()
    with pytest.raises(UnsupportedModelError, match="a part of the tokens, or weighs them"):
        fastdit.patch(pipe, SHORT)
    for change in ({"weigh_keys": False}, {"mode": "parity"}, {"steps": (3, 0, 4)}):
        fastdit.patch(pipe, dataclasses.replace(SHORT, **change))
        assert generate(pipe, "sd3", steps=7, **SIZE).isfinite().all()


@pytest.mark.diffusers
def test_an_attention_backend_that_may_leave_the_mask_out_is_refused():
    pipe = tiny_models.pipeline("flux", torch.float64)
    fastdit.patch(pipe, SHORT)
    wanted = generate(pipe, "flux", steps=7, **SIZE)
    for name in ("native", "_native_math", "flash"):
        for module in pipe.transformer.modules():
            if getattr(module, "processor", None) is not None:
                module.set_attention_backend(name)
        if name == "flash":
            with pytest.raises(
                ArgumentError, match=r"of attn in block 0 must be one of .* got flash"
            ):
                generate(pipe, "flux", steps=7, **SIZE)
        else:
            within_contract(generate(pipe, "flux", steps=7, **SIZE), wanted)


@pytest.mark.parametrize("name", STAGED)
def test_another_number_of_steps_is_refused_by_set_timesteps(name):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, SHORT)
    with pytest.raises(ScheduleError, match=r"2, 2, 3 steps, 7 together, but the run has 8"):
        pipe.scheduler.set_timesteps(8)
    with pytest.raises(ScheduleError, match="num_inference_steps=7"):
        generate(pipe, name, steps=8, **SIZE)
    assert not handle.live_runs()
    assert generate(pipe, name, steps=7, **SIZE).isfinite().all()


@pytest.mark.parametrize("name", STAGED)
def test_sizes_that_do_not_halve_are_refused(name):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, SHORT)
    with pytest.raises(ArgumentError, match="height and width must be multiples of 4 for RALU"):
        generate(pipe, name, steps=7, height=16, width=22)
    assert not handle.live_runs()
    assert generate(pipe, name, steps=7, **SIZE).isfinite().all()


def test_models_and_schedulers_it_cannot_run_on():
    with pytest.raises(UnsupportedModelError, match="cannot change its resolution"):
        fastdit.patch(tiny_models.pipeline("pixart-alpha"), SHORT)
    with pytest.raises(UnsupportedModelError, match="target must be a pipeline for RALU"):
        fastdit.patch(tiny_models.pipeline("sd3").transformer, SHORT)
    heun = tiny_models.pipeline("sd3", scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(UnsupportedModelError, match="got FlowMatchHeunDiscreteScheduler"):
        fastdit.patch(heun, SHORT)
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UnsupportedModelError, match="stochastic_sampling=True"):
        fastdit.patch(tiny_models.pipeline("sd3", scheduler=noisy), SHORT)
    blind = tiny_models.pipeline("sd3")
    blind.vae = None
    with pytest.raises(UnsupportedModelError, match='selector="edges" decodes'):
        fastdit.patch(blind, dataclasses.replace(SHORT, selector="edges"))
    with pytest.raises(CompositionError, match="both decide 'resolution'"):
        fastdit.patch(tiny_models.pipeline("sd3"), SHORT, SHORT)


@pytest.mark.parametrize("name", tiny_models.IMAGE_TO_IMAGE)
def test_a_run_that_does_not_start_from_noise_is_refused(name):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, SHORT)
    with pytest.raises(ScheduleError, match="RALU starts from noise, but this run begins at step"):
        generate(pipe, name, steps=7, **SIZE)
    assert not handle.live_runs()


@pytest.mark.parametrize("name", STAGED)
def test_a_scheduler_put_in_later_is_led_too(name):
    """Also in the very call in which it is met, when the pipeline has taken its timesteps."""
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, SHORT)
    expected = generate(pipe, name, steps=7, **SIZE)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for _ in range(2):
        same_bits(generate(pipe, name, steps=7, **SIZE), expected)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    if name == "sd3":  # FLUX's pipeline itself refuses it
        with pytest.raises(UnsupportedModelError, match="got FlowMatchHeunDiscreteScheduler"):
            generate(pipe, name, steps=4, **SIZE)


def test_a_call_outside_of_a_run_is_refused():
    pipe = tiny_models.pipeline("flux")
    fastdit.patch(pipe, SHORT)
    with torch.no_grad(), pytest.raises(ScheduleError, match="this is no call of its run"):
        pipe.transformer(
            hidden_states=torch.randn(1, 96, 16),
            encoder_hidden_states=torch.randn(1, 5, 20),
            pooled_projections=torch.randn(1, 12),
            timestep=torch.ones(1),
            img_ids=torch.zeros(96, 3),
            txt_ids=torch.zeros(5, 3),
        )


def test_reference_images_are_refused(monkeypatch):
    pipe = tiny_models.pipeline("flux")
    fastdit.patch(pipe, SHORT)
    real = pipe._prepare_latent_image_ids

    def shifted(*args):
        ids = real(*args)
        ids[:, 0] = 1
        return ids

    monkeypatch.setattr(pipe, "_prepare_latent_image_ids", shifted)
    with pytest.raises(ArgumentError, match="img_ids must be the rows and columns of one picture"):
        generate(pipe, "flux", steps=7, **SIZE)


def test_a_controlnet_is_refused():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, SHORT)
    pipe.scheduler.set_timesteps(7)
    with torch.no_grad(), pytest.raises(ArgumentError, match="block_controlnet_hidden_states"):
        pipe.transformer(
            hidden_states=torch.randn(1, 4, 16, 24),
            encoder_hidden_states=torch.randn(1, 5, 20),
            pooled_projections=torch.randn(1, 12),
            timestep=torch.ones(1),
            block_controlnet_hidden_states=[torch.randn(1, 96, 32)],
        )
    assert not handle.live_runs()


def test_gradients_are_refused():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, SHORT)
    pipe.scheduler.set_timesteps(7)
    with pytest.raises(ArgumentError, match="RALU has no gradient"):
        pipe.transformer(
            hidden_states=torch.randn(1, 4, 16, 24),
            encoder_hidden_states=torch.randn(1, 5, 20),
            pooled_projections=torch.randn(1, 12),
            timestep=torch.ones(1),
        )


def test_disabled_is_the_stock_pipeline():
    pipe = tiny_models.pipeline("sd3")
    stock = generate(pipe, "sd3", steps=5, **SIZE)
    handle = fastdit.patch(pipe, SHORT)
    with handle.disabled():
        same_bits(generate(pipe, "sd3", steps=5, **SIZE), stock)


# --- together with other methods


@pytest.mark.parametrize("name", STAGED)
def test_a_schedule_that_reuses_nothing_changes_nothing(name):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, SHORT, backend="reference")
    alone = generate(pipe, name, steps=7, batch=2, **SIZE)
    fastdit.patch(pipe, SHORT, Cached(Schedule.every(1)), backend="reference")
    same_bits(generate(pipe, name, steps=7, batch=2, **SIZE), alone)


@pytest.mark.parametrize("name", STAGED)
def test_caches_drop_where_the_tokens_change(name):
    """Of 7 steps in stages of 2, 2 and 3 a schedule that computes once has to compute three times."""
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, SHORT, Cached(Schedule.every(7)))
    found = generate(pipe, name, steps=7, batch=2, **SIZE)
    records = handle.last_run().records
    computing = [step for step, record in records.items() if record.computed]
    assert computing == [0, 2, 4]
    assert handle.explain(steps=7, **SIZE).reuse_share == pytest.approx(4 / 7)
    fastdit.patch(pipe, SHORT)
    assert distance(found, generate(pipe, name, steps=7, batch=2, **SIZE)) > 1e-3


@pytest.mark.parametrize("name", STAGED)
def test_tokens_are_left_out_at_full_resolution_only(name):
    method, ras = (
        dataclasses.replace(SHORT, steps=(2, 2, 6)),
        RAS(0.5, start=2, resets=(4,), align=1),
    )
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, method, ras)
    assert generate(pipe, name, steps=10, batch=2, **SIZE).isfinite().all()
    report = handle.report()
    mixed = 24 + 3 * 7
    expected = [24, 24, mixed, mixed, 96, 96, 48, 48, 96, 48]
    assert list(report.tokens_per_step) == expected
    assert sorted(report.active) == [6, 7, 9]
    assert list(handle.explain(steps=10, **SIZE).tokens_per_step) == expected
    fastdit.patch(pipe, method, RAS(0.5, start=6))
    with pytest.raises(ScheduleError, match="start=6 leaves no sparse step in a run of 6 steps"):
        generate(pipe, name, steps=10, **SIZE)


EVERY = Schedule.every
THREE_STEPS = Cached(Schedule.from_bits(np.ones((3, 3, 1), dtype=bool), ("ff",)))


@pytest.mark.diffusers
@pytest.mark.parametrize("name", RESTATED)
def test_each_stage_has_a_schedule_of_its_own(name):
    """Together they are the run's; what a stage's schedule does not name computes."""
    pipe = tiny_models.pipeline(name, torch.float64)
    bits, names = oracle.random_bits(pipe.transformer, 7, seed=5, compute=0.5)
    bits = {kind: some.copy() for kind, some in bits.items()}
    last = {kind: (some[4:, :, 1:], names[kind][1:]) for kind, some in bits.items()}
    for some in bits.values():
        some[:2] = True  # no schedule in the first stage
        some[4:, :, :1] = True  # and none of this component in the last
    mixed = Schedule.from_bits({kind: some[2:4] for kind, some in bits.items()}, names)
    full = Schedule.from_bits(
        {kind: some for kind, (some, _) in last.items()},
        {kind: some for kind, (_, some) in last.items()},
    )
    noise, latents = start_of(name, 2)
    given = arguments(name, 2, 7, dtype=torch.float64, latents=latents, **SIZE)
    handle = fastdit.patch(pipe, SHORT, PerStage(None, Cached(mixed), ECAD(full)))
    found = as_picture(name, latents_of(pipe, given))
    said = handle.explain(**SIZE)
    handle.unpatch()
    with torch.no_grad():
        expected = ralu_oracle.run(pipe, SHORT, noise, given, bits)
    within_contract(found, expected)
    whole = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), SHORT)
    assert said.macs == whole.explain(**SIZE).macs < said.dense_macs
    assert said.methods == ("RALU", "PerStage")


def test_a_stage_takes_rows_by_its_own_timesteps():
    """With `resample`, as the whole run would: its timesteps are RALU's, in `explain` too."""
    pipe = tiny_models.pipeline("sd3")
    bits, names = oracle.random_bits(pipe.transformer, 20, seed=5)
    found = []
    ecad = ECAD(Schedule.from_bits(bits, names), resample="sigma")
    for methods in ((ecad,), (PerStage(None, ecad, None),)):
        handle = fastdit.patch(pipe, SHORT, *methods)
        with pytest.warns(UserWarning, match="schedule of 20 steps"):
            said = handle.explain(steps=7, **SIZE).resampled
        with pytest.warns(UserWarning, match="schedule of 20 steps"):
            generate(pipe, "sd3", steps=7, **SIZE)
        assert handle.last_run().plan.reuse.taken == said
        found.append(said)
    assert found[1] == (0, 1, *found[0][2:4], 0, 1, 2)
    sigmas = FlowMatchEulerDiscreteScheduler()
    sigmas.set_timesteps(20)
    for row, sigma in zip(found[0], SHORT.run_sigmas, strict=True):
        assert row == int((sigmas.sigmas[:-1] - sigma).abs().argmin())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PerStage(), ArgumentError, "for at least one stage, got none"),
        (lambda: PerStage(None, None), ArgumentError, "for at least one stage, got none"),
        (lambda: PerStage(EVERY(2)), ArgumentError, r"such as Cached\(schedule\), or None"),
        (lambda: PerStage(RAS()), ArgumentError, "that reuses components"),
        (lambda: PerStage(PerStage(Cached(EVERY(2)))), ArgumentError, "that reuses components"),
        (
            lambda: PerStage(Cached(EVERY(2), cache_dtype="float16"), Cached(EVERY(2))),
            ArgumentError,
            "cache_dtype must be the same in all stages, got None, float16",
        ),
        (
            lambda: (SHORT, PerStage(None, Cached(EVERY(2)))),
            ScheduleError,
            "PerStage was given 2 stages, but the run has 3",
        ),
        (
            lambda: PerStage(Cached(EVERY(2), order="auto"), Cached(EVERY(2), order=1)),
            ArgumentError,
            'order="auto" must be that of all stages that forecast',
        ),
        (
            lambda: (SHORT, PerStage(None, THREE_STEPS, None)),
            ScheduleError,
            "stage 2 of 3, with 2 steps",
        ),
        (
            lambda: (SHORT, PerStage(None, Cached(EVERY(2)), None), Cached(EVERY(2))),
            CompositionError,
            "PerStage and Cached both decide 'reuse'",
        ),
    ],
)
def test_schedules_that_fit_no_stage_are_named(make, error, message):
    pipe = tiny_models.pipeline("sd3")

    def start():
        fastdit.patch(pipe, *make())
        pipe.scheduler.set_timesteps(7)

    with pytest.raises(error, match=message):
        start()


@pytest.mark.diffusers
@pytest.mark.parametrize("name", RESTATED)
def test_the_published_rule_at_full_size_is_that_of_the_restatement(name):
    """Beside a random schedule over all stages."""
    method, steps = dataclasses.replace(SHORT, steps=(2, 2, 6)), 10
    pipe = tiny_models.pipeline(name, torch.float64)
    bits, names = oracle.random_bits(pipe.transformer, steps, seed=1, compute=0.5)
    of_tokens = {"metric": "std", "high_ratio": 0.3, "mode": "parity"}
    ras = RAS(0.5, start=2, resets=(4,), align=1, **of_tokens)
    rule = ras_oracle.published(0.5, 6, 2, (4,), 0.3, packed=name in PACKED)
    noise, latents = start_of(name, 1)
    given = arguments(name, 1, steps, dtype=torch.float64, latents=latents, **SIZE)
    handle = fastdit.patch(pipe, method, Cached(Schedule.from_bits(bits, names)), ras)
    found = as_picture(name, latents_of(pipe, given))
    assert list(handle.last_run().selection.history) == [2, 3, 5]
    handle.unpatch()
    with torch.no_grad():
        expected = ralu_oracle.run(pipe, method, noise, given, bits, lambda b, *seen: rule(*seen))
    within_contract(found, expected)


@pytest.mark.parametrize("name", STAGED)
def test_leaving_tokens_out_counts_from_the_stage(name):
    """With only a full-size stage, it is leaving tokens out alone."""
    method, ras = (
        dataclasses.replace(SHORT, steps=(0, 0, 6)),
        RAS(0.5, start=2, resets=(4,), align=1),
    )
    sigmas = list(method.stages()[0].sigmas[:-1])
    pipe = tiny_models.pipeline(name, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    fastdit.patch(pipe, ras, backend="reference")
    alone = generate(pipe, name, steps=6, sigmas=sigmas, **SIZE)
    fastdit.patch(pipe, method, ras, backend="reference")
    same_bits(generate(pipe, name, steps=6, **SIZE), alone)


# --- what is said about a run


def test_the_report_shows_the_stages():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, SHORT)
    with pytest.raises(ArgumentError, match="resolution_map needs a run in stages"):
        handle.report().resolution_map()
    with pytest.raises(ArgumentError, match="stage_pictures needs a run in stages"):
        handle.stage_pictures()
    generate(pipe, "sd3", steps=7, batch=2, **SIZE)
    report = handle.report()
    assert report.live
    assert [(s.layout, s.steps, s.tokens) for s in report.stages] == [
        ("coarse", 2, 24),
        ("mixed", 2, 45),
        ("full", 3, 96),
    ]
    assert [stage.coarse.sum((1, 2)).tolist() for stage in report.stages] == [[96], [68, 68], [0]]
    for sample in (0, 1):
        maps = report.resolution_map(sample=sample, scale=4)
        assert maps.shape == (3, 32, 48, 3)
        assert maps.dtype == np.uint8
        # A token's first cell has dark pixels above and to the left, but at the border.
        dark = (maps[..., 0] < 255).sum((1, 2))
        assert dark[0] < dark[1] < dark[2]
    assert (report.resolution_map()[1] != report.resolution_map(sample=1)[1]).any()
    pictures = handle.stage_pictures()
    assert pictures.shape[:2] == (3, 2)
    assert report.resolution_map(pictures[:, 0]).shape == pictures[:, 0].shape
    with pytest.raises(ArgumentError, match="sample must be 0 to 1"):
        report.resolution_map(sample=2)


def test_explain_counts_the_tokens_of_each_stage():
    pipe = tiny_models.pipeline("flux")
    handle = fastdit.patch(pipe, SHORT)
    text = {"text_tokens": 5, "cfg": False}
    said = handle.explain(**SIZE, **text)
    assert said.steps == 7
    assert said.tokens_per_step == tuple(SHORT.tokens(96, 5))
    # The arithmetic of each stage is that of the stock model on so many tokens, but for the prompt's projection, which
    # is done once in each of three stages.
    model = pipe.transformer
    total = (3 - 7) * 5 * model.context_embedder.weight.numel()
    for tokens in SHORT.tokens(96, 5):
        count = Cost.of(model, tokens, 5)
        total += count.overhead + sum(c.macs for c in count.components)
    assert said.macs == total
    with pytest.raises(ScheduleError, match="the run has 9"):
        handle.explain(steps=9)
