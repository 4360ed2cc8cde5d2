"""Active counts for whole waves: the rule on shapes of real models, in runs, and what is said of it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import fastdit
import tiny_models
from fastdit import RAS
from fastdit.adapters import find_adapter
from fastdit.tokens.waves import LEAST_GAIN, MOST_MOVED, UNIT, Waves, waves_of
from tiny_models import generate

H100 = 132
FLUX = Waves(H100, 3072, 1, ((19, 0), (38, 512)))
SINGLE = Waves(H100, 3072, 1, ((38, 512),))
SD3 = Waves(H100, 1536, 2, ((24, 0),))
NO_GPU = Waves(0, 1536, 2, ((24, 0),))


def test_the_fill_of_a_grid():
    assert SINGLE.fill(896) == 1.0  # 11 x 12 tiles on 132
    assert SINGLE.fill(1024) == 144 / 264
    assert SINGLE.fill(1025) < SINGLE.fill(1024) + 1 / 264  # a 13th row of tiles, nearly empty
    blocks = 19 * 8 * 12 + 38 * 12 * 12, 19 * 132 + 38 * 264
    assert FLUX.fill(1024) == pytest.approx(blocks[0] / blocks[1])
    assert SD3.fill(1024) == 96 / 132


def test_counts_move_to_full_waves():
    assert FLUX.nearest(1024, 4096) == 896
    assert SD3.nearest(1024, 4096) == 1152  # as many waves, fuller
    assert SD3.nearest(1408, 4096) == 1408


@pytest.mark.parametrize("waves", [FLUX, SD3, Waves(108, 1152, 2, ((28, 0),))], ids=str)
def test_no_count_moves_far_or_for_nothing(waves):
    for count in range(64, 4097, 37):
        found = waves.nearest(count, 4096)
        rounded = max(1, round(count / UNIT)) * UNIT
        if found != rounded:
            assert found % UNIT == 0
            assert abs(found - count) <= MOST_MOVED * count
            assert waves.fill(found) >= LEAST_GAIN * waves.fill(rounded)
    assert waves.nearest(60, 60) == 60


@pytest.mark.parametrize(("count", "tokens"), [(1000, 4096), (20, 32), (5, 4096), (4090, 4096)])
def test_without_a_gpu_counts_are_rounded_as_by_default(count, tokens):
    assert NO_GPU.nearest(count, tokens) == min(tokens, max(1, round(count / UNIT)) * UNIT)


def test_the_dropped_keep_their_ends():
    plan = RAS(0.25, metric="std", high_ratio=0.5, align="wave").active(28, 4096)
    moved = RAS(0.25, metric="std", high_ratio=0.5, align="wave").fitted(plan, 4096, FLUX)
    assert [s and (s.keep, s.high) for s in plan[:5]] == [None] * 4 + [(1024, 1536)]
    assert [s and (s.keep, s.high) for s in moved[:5]] == [None] * 4 + [(896, 1600)]
    assert RAS(0.25).fitted(plan, 4096, FLUX) == plan
    assert (
        RAS(0.99, align="wave").fitted(RAS(0.99, align=1).active(28, 100), 100, NO_GPU)[4] is None
    )


@pytest.mark.parametrize(
    ("name", "text"), [("flux", True), ("sd3", False), ("pixart-sigma", False)]
)
def test_text_counts_where_it_is_in_one_product_with_the_image(name, text):
    model = tiny_models.transformer(name)
    adapter = find_adapter(model)
    patched = SimpleNamespace(adapter=adapter, spec=adapter.spec(model))
    found = waves_of(patched, model, torch.device("cpu"), 2, 7)
    assert found.multiprocessors == 0
    assert found.beside[-1][1] == (7 if text else 0)
    assert found.beside[0][1] == 0


@pytest.mark.diffusers
@torch.no_grad()
def test_runs_compute_what_is_explained(monkeypatch):
    pipe = tiny_models.pipeline("sd3")
    # One tile for any count, so the most tokens fill it best.
    monkeypatch.setattr("fastdit.tokens.waves.multiprocessors", lambda device: 4)
    monkeypatch.setattr("fastdit.tokens.waves.UNIT", 1)
    handle = fastdit.patch(pipe, RAS(0.5, start=1, resets=(), align="wave"))
    said = handle.explain(height=8, width=16, steps=4)
    assert said.tokens_per_step == (32, 18, 18, 18)
    assert re.search(r"waves +of 4 tiles: 18 tokens for 16, \d+% full for \d+%", str(said))
    generate(pipe, "sd3", steps=4)
    assert handle.report().tokens_per_step == said.tokens_per_step


@pytest.mark.diffusers
def test_on_a_cpu_it_says_that_there_is_no_gpu():
    handle = fastdit.patch(tiny_models.pipeline("sd3"), RAS(0.5, align="wave"))
    assert "waves     none: no GPU; counts are rounded to 64" in str(handle.explain())
    assert fastdit.patch(tiny_models.pipeline("sd3"), RAS(0.5)).explain().waves == ""
