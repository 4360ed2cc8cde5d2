"""Lumina 2: guidance that ends early and rescales, prompts of unlike length, and what runs once for a prompt."""

from __future__ import annotations

import functools

import pytest
import torch

import fastdit
import tiny_models
from contract import FORWARD_FP64, RUN_FP64, distance, same_bits, within_contract
from fastdit import RALU, Cached, Schedule, UnsupportedModelError
from fastdit.blocks.modulation import Modulations
from oracle import Oracle, random_bits
from ras_oracle import random_rows
from test_ras import COUNTS, TOKENS, Chosen, chosen  # noqa: F401
from tiny_models import generate

pytestmark = pytest.mark.diffusers

STEPS = 6
GUIDED = 4
GUIDANCE = {"cfg_trunc_ratio": GUIDED / STEPS, "cfg_normalization": True, "steps": STEPS}


class Truncated(Oracle):
    """The plain cache where steps are guided by a second call only at the beginning."""

    def _count(self, module, args):
        super()._count(module, args)
        if self._calls > 2 * GUIDED:
            self._calls += self._calls % 2


@pytest.fixture
def fused(monkeypatch):
    """The adapter's own attention runs, as on a GPU."""
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)


def calls_of(module):
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_that_ends_early_and_rescales(batch):
    given = {**GUIDANCE, "batch": batch, "height": 16, "width": 8}
    pipe = tiny_models.pipeline("lumina2")
    seen = calls_of(pipe.transformer)
    stock = generate(pipe, "lumina2", **given)
    assert len(seen) == STEPS + GUIDED
    assert distance(generate(pipe, "lumina2", **given | {"cfg_normalization": False}), stock) > 0.01
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, "lumina2", **given), stock)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_schedule_under_guidance_that_ends_early(backend):
    pipe = tiny_models.pipeline("lumina2", torch.float64)
    bits, names = random_bits(pipe.transformer, STEPS, 0)
    with Truncated(pipe.transformer, bits, 2).installed():
        expected = generate(pipe, "lumina2", batch=3, **GUIDANCE)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend=backend)
    assert distance(generate(pipe, "lumina2", batch=3, **GUIDANCE), expected) <= RUN_FP64


def test_all_tokens_in_another_order_under_such_guidance(chosen):  # noqa: F811
    pipe = tiny_models.pipeline("lumina2", torch.float64)
    stock = generate(pipe, "lumina2", batch=2, **GUIDANCE)

    def permuted(step, velocity, sigmas):
        return torch.stack([torch.randperm(TOKENS) for _ in range(2)])

    fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, STEPS), TOKENS)))
    within_contract(generate(pipe, "lumina2", batch=2, **GUIDANCE), stock)


def test_a_mask_that_changes_drops_what_was_kept():
    """The prompt's embeddings are the same tensor; which of its tokens are read is not."""
    model = tiny_models.transformer("lumina2", torch.float64)
    given = tiny_models.call("lumina2", 2, torch.float64)
    shorter = given | {"encoder_attention_mask": given["encoder_attention_mask"].clone()}
    shorter["encoder_attention_mask"][:, 2:] = 0
    with torch.no_grad():
        expected = model(**shorter)[0]
        assert distance(model(**given)[0], expected) > 0.01
        handle = fastdit.patch(model, Cached(Schedule.every(2)))
        with handle.run(range(4)):
            model(**given)
            handle.advance()
            assert distance(model(**shorter)[0], expected) <= FORWARD_FP64


def test_what_sees_the_prompt_alone_runs_once_in_a_run(monkeypatch):
    pipe = tiny_models.pipeline("lumina2")
    refiner = pipe.transformer.context_refiner[0]
    seen = []
    stock = type(refiner).forward

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        seen.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(refiner), "forward", forward)
    fastdit.patch(pipe)
    generate(pipe, "lumina2", steps=STEPS)
    assert seen.count(refiner) == 2  # of the prompt, and of the negative one


@torch.no_grad()
def test_fused_attention_is_exact_in_fp64(fused):
    model = tiny_models.transformer("lumina2", torch.float64)
    inputs = tiny_models.call("lumina2", 3, torch.float64)
    stock = model(**inputs)[0]
    fastdit.patch(model)
    within_contract(model(**inputs)[0], stock, bound=FORWARD_FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_fused_attention_errs_at_most_twice_as_much_as_stock(dtype, fused):
    model = tiny_models.transformer("lumina2", dtype)
    inputs = [tiny_models.call("lumina2", 3, dtype, step=step) for step in range(4)]
    doubles = [
        {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in one.items()
        }
        for one in inputs
    ]
    exact = tiny_models.transformer("lumina2", dtype).double()
    truth = torch.cat([exact(**one)[0] for one in doubles])
    stock = torch.cat([model(**one)[0] for one in inputs])
    fastdit.patch(model)
    within_contract(torch.cat([model(**one)[0] for one in inputs]), stock, truth)


def test_a_part_of_the_tokens_in_fp32_is_near_fp64(chosen):  # noqa: F811
    """Also through the op, whose angles are of each image here."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(3, tiny_models.LATENT, 8, 16, generator=draw)
    found = []
    for dtype in (torch.float64, torch.float32):
        pipe = tiny_models.pipeline("lumina2", dtype)
        fastdit.patch(pipe, Chosen(random_rows(COUNTS, TOKENS, 3), COUNTS))
        given = {"batch": 3, "steps": 7, "latents": latents.to(dtype)}
        found.append(generate(pipe, "lumina2", **given))
    assert distance(found[1], found[0]) < 1e-5


def test_two_resolutions_are_refused_by_name():
    pipe = tiny_models.pipeline("lumina2")
    with pytest.raises(UnsupportedModelError, match="Lumina2Transformer2DModel cannot change its"):
        fastdit.patch(pipe, RALU.preset("flux-4x", family=None))


def test_modulations_are_made_ahead(monkeypatch):
    """Once for each branch of guidance, of all its steps."""
    made = []
    stock = Modulations.of

    def of(self, layer, compute):
        def counted(*inputs):
            made.append(inputs[0].shape[0])
            return compute(*inputs)

        return stock(self, layer, counted)

    monkeypatch.setattr(Modulations, "of", of)
    pipe = tiny_models.pipeline("lumina2", torch.float64)
    expected = generate(pipe, "lumina2", steps=STEPS, batch=2)
    fastdit.patch(pipe)
    assert distance(generate(pipe, "lumina2", steps=STEPS, batch=2), expected) <= RUN_FP64
    blocks = len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    assert made == [2 * STEPS] * 2 * (blocks + 1)  # and the norm behind them
