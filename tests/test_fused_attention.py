"""Attention without concatenations, as on a GPU: equal results, and the stock one wherever it may be seen."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0

import fastdit
import tiny_models
from contract import FORWARD_FP64, same_bits, within_contract
from fastdit import Cached, Dense, Schedule
from fastdit.adapters import find_adapter
from fastdit.backends.base import attention
from oracle import Oracle, random_bits
from test_cached import as_double
from tiny_models import sample

pytestmark = pytest.mark.diffusers

FAMILIES = tiny_models.forms("fused_attentions")
STEPS = 5


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Counts the calls of the adapters' own attention."""
    calls = []

    def counting(function):
        def counted(*args, **kwargs):
            calls.append(args[1])
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)
    for place in ("fastdit.blocks.attention.attend", "fastdit.adapters.lumina.cross_attention"):
        monkeypatch.setattr(place, counting(pkgutil.resolve_name(place)))
    return calls


def attentions(model):
    """Those of the blocks that an adapter does itself."""
    adapter = find_adapter(model)
    return [
        getattr(block, name)
        for _, block in adapter.blocks(model)
        for name in adapter.fused_attentions
        if getattr(block, name, None) is not None
    ]


def call_in_fp64(family, batch, *args, **kwargs):
    """With angles of fp64 too: products of complex numbers in fp32 round by their own order."""
    given = tiny_models.call(family, batch, torch.float64, *args, **kwargs)
    narrow = {k: v for k, v in given.items() if getattr(v, "dtype", None) is torch.complex64}
    return given | {k: v.to(torch.complex128) for k, v in narrow.items()}


@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 12, 8)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@pytest.mark.usefixtures("unprogrammed")
def test_dense_is_exact_in_fp64(family, shape, fused):
    model = tiny_models.transformer(family, torch.float64)
    batch, height, width = shape
    inputs = call_in_fp64(family, batch, height, width)
    stock = sample(model(**inputs))
    fastdit.patch(model)
    for _ in range(2):
        within_contract(sample(model(**inputs)), stock, bound=FORWARD_FP64)
    assert len(fused) == 2 * len(attentions(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dense_errs_at_most_twice_as_much_as_stock(family, dtype):
    model = tiny_models.transformer(family, dtype)
    truth_model = tiny_models.transformer(family, dtype).double()
    inputs = [tiny_models.call(family, 3, dtype, step=step) for step in range(4)]
    truth = [sample(truth_model(**as_double(given))) for given in inputs]
    stock = [sample(model(**given)) for given in inputs]
    fastdit.patch(model)
    actual = [sample(model(**given)) for given in inputs]
    within_contract(torch.cat(actual), torch.cat(stock), torch.cat(truth))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_random_schedules_are_exact_in_fp64(family, seed, fused):
    model = tiny_models.transformer(family, torch.float64)
    bits, names = random_bits(model, STEPS, seed, compute=(0.2, 0.5, 0.8)[seed])
    inputs = [call_in_fp64(family, 1 + seed, step=step) for step in range(STEPS)]
    with Oracle(model, bits).installed():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    with handle.run(range(STEPS)):
        for given, truth in zip(inputs, expected, strict=True):
            within_contract(sample(model(**given)), truth, bound=FORWARD_FP64)
    assert fused


@pytest.mark.parametrize("family", ["sd3", "flux"])  # stock diffusers cannot fuse attn2 of SD 3.5
@torch.no_grad()
def test_fused_projections(family, fused):
    model = tiny_models.transformer(family, torch.float64)
    inputs = tiny_models.call(family, 2, torch.float64)
    stock = sample(model(**inputs))
    model.fuse_qkv_projections()
    fastdit.patch(model)
    within_contract(sample(model(**inputs)), stock, bound=FORWARD_FP64)
    assert fused


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_hook_on_one_attention_sees_it(family, fused):
    model = tiny_models.transformer(family)
    seen = []
    fastdit.patch(model)
    hook = attentions(model)[1].register_forward_hook(lambda *_: seen.append(1))
    model(**tiny_models.call(family, 2))
    assert seen == [1]
    assert not fused
    hook.remove()
    model(**tiny_models.call(family, 2))
    assert seen == [1]
    assert fused


@torch.no_grad()
def test_a_processor_of_ones_own_runs(fused):
    class Mine(JointAttnProcessor2_0):
        calls = 0

        def __call__(self, *args, **kwargs):
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    model = tiny_models.transformer("sd3")
    fastdit.patch(model)
    model.transformer_blocks[1].attn.processor = Mine()
    model(**tiny_models.call("sd3", 2))
    assert Mine.calls == 1
    assert not fused


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_told_to_processors_reaches_them(family, fused):
    """Stock processors warn of arguments that they do not know; ours would not be told."""
    model = tiny_models.transformer(family)
    fastdit.patch(model)
    known = inspect.signature(type(model).forward).parameters
    names = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")
    name = next(name for name in names if name in known)
    given = tiny_models.call(family, 2)
    model(**given | {name: {"unheard_of": 1}})
    assert not fused
    model(**given | {name: {}})
    assert fused


def test_heads_that_share_keys_are_repeated_under_a_mask_alone(monkeypatch):
    """On a GPU no fast attention of torch takes a mask and shared keys; without a mask the fastest does."""
    seen = []
    stock = F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append((k.shape[1], "enable_gqa" in kwargs))
        return stock(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 8, generator=g) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 1, 5, generator=g) > 0.4
    scores = torch.einsum("bqhd,bshd->bhqs", q, k.repeat_interleave(3, 2)) * 8**-0.5
    for given in (None, mask):
        shown = scores if given is None else scores.masked_fill(~given, -torch.inf)
        expected = torch.einsum("bhqs,bshd->bqhd", shown.softmax(-1), v.repeat_interleave(3, 2))
        torch.testing.assert_close(attention(q, k, v, None, given), expected)
    assert seen == [(2, True), (6, False)]


@torch.no_grad()
def test_compiled_blocks_keep_their_attention(fused):
    model = tiny_models.transformer("sd3")
    fastdit.patch(model)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    model(**tiny_models.call("sd3", 2))
    assert not fused


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_reference_backend_stays_stock(family, fused):
    model = tiny_models.transformer(family)
    inputs = tiny_models.call(family, 2)
    stock = sample(model(**inputs))
    fastdit.patch(model, Dense(), backend="reference")
    same_bits(sample(model(**inputs)), stock)
    assert not fused
