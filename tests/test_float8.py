"""Rows quantised where they are normed, for products by weights in fp8: against fp64, and never where it is seen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fastdit
import tiny_models
from contract import same_bits, within_contract
from fastdit import RAS, Cached, Dense, Schedule, ops
from fastdit.adapters import find_adapter
from fastdit.blocks import float8
from fastdit.blocks.float8 import QuantisedRows
from float8_weights import (
    Float8Tensor,
    KernelPreference,
    PerRow,
    PerTensor,
    ProductSettings,
    quantise,
    quantise_blocks,
)
from inputs import SERVING, generator, normal
from test_coexistence import lora
from tolerance import assert_close
from truth import dequantised, eager_norm_modulate, exact_norm_modulate, quantised

BF16 = torch.bfloat16
WIDTH, OUT = 96, 48
STEPS = 6


def layer(bias=True, **settings):
    torch.manual_seed(0)
    made = nn.Linear(WIDTH, OUT, bias=bias).to(BF16).requires_grad_(False)
    quantise(made, **settings)
    return made


def normed(backend, rows=7, batch=2):
    g = generator(rows, batch)
    x = normal((batch, rows, WIDTH), BF16, g)
    scale, shift = (normal((batch, WIDTH), BF16, g) for _ in range(2))
    return x, scale, shift, QuantisedRows.like(x, rows)


# --- the product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 7), (3, 40)])
@pytest.mark.parametrize("backend", SERVING)
@torch.no_grad()
def test_a_normed_product_is_as_exact_as_the_layers_own(backend, batch, rows, bias):
    linear = layer(bias)
    x, scale, shift, made = normed(backend, rows, batch)
    ops.norm_modulate(x, scale, shift, out=made.data, row_scale=made.scale, backend=backend)
    found = float8.linear(linear, made)

    weight = dequantised(linear.weight.qdata, linear.weight.scale.squeeze(1))
    more = linear.bias.double() if bias else 0.0
    exact = exact_norm_modulate(x, scale, shift)[0] @ weight.t() + more
    assert_close(
        f"with its norm, {backend}", found, exact, linear(eager_norm_modulate(x, scale, shift)[0])
    )
    exact = dequantised(made.data, made.scale) @ weight.t() + more
    assert_close(f"the product alone, {backend}", found, exact, exact.to(BF16))
    # What the layer makes of the same rows, whose quantising is torchao's.
    same_bits(found, linear(ops.norm_modulate(x, scale, shift, backend=backend)))


@torch.no_grad()
def test_rows_of_zeros_give_the_bias_and_nan_stays_in_its_row():
    linear = layer()
    x, _, _, made = normed("cpu")
    none, shift = torch.full((WIDTH,), -1.0, dtype=BF16), torch.ones_like(x)
    shift[0, 1], shift[1, 2, 5], shift[1, 3, 5] = 0.0, float("nan"), float("inf")
    ops.norm_modulate(x, none, shift, out=made.data, row_scale=made.scale)
    out = float8.linear(linear, made)
    same_bits(out[0, 1], linear.bias.data)
    lost = out.isnan().all(-1)
    assert lost.nonzero().tolist() == [[1, 2], [1, 3]]
    assert out[~lost].isfinite().all()


# --- which layers


def hooked(made):
    made.register_forward_pre_hook(lambda *_: None)


def packed(made):
    made.forward = lambda x: nn.Linear.forward(made, x)


def in_another_class(made):
    made.__class__ = type("Mine", (nn.Linear,), {})


OTHERS = {
    "plain": lambda: nn.Linear(WIDTH, OUT).to(BF16),
    "weights alone": lambda: layer(act_quant_kwargs=None),
    "one scale for all inputs": lambda: layer(inputs={"granularity": PerTensor()}),
    "by column": lambda: layer(inputs={"granularity": PerRow(0)}),
    "a lower bound": lambda: layer(inputs={"hp_value_lb": 1e-3}),
    "an upper bound": lambda: layer(inputs={"hp_value_ub": 10.0}),
    "inputs in e5m2": lambda: layer(inputs={"float8_dtype": torch.float8_e5m2}),
    "inputs by another kernel": lambda: layer(inputs={"kernel_preference": KernelPreference.MSLK}),
    "another kernel": lambda: layer(kernel_preference=KernelPreference.MSLK),
    "emulated": lambda: layer(mm_config=ProductSettings(emulate=True)),
    "padded": lambda: layer(mm_config=ProductSettings(pad_inner_dim=True)),
    "no settings": lambda: layer(mm_config=None),
    "in blocks": lambda: layer(block_size=[1, WIDTH // 2]),
    "in fp16": lambda: layer(dtype=torch.float16),
}
CHANGES = {"hooks": hooked, "packed": packed, "another class": in_another_class}


@pytest.mark.parametrize("kind", [*OTHERS, *CHANGES])
def test_other_layers_are_called_as_they_are(kind):
    made = OTHERS[kind]() if kind in OTHERS else layer()
    x = torch.zeros(1, 1, WIDTH, dtype=BF16)
    if kind in CHANGES:
        assert float8.read_rows([made], x)
        CHANGES[kind](made)
    assert not float8.read_rows([made], x)
    assert not float8.read_rows([layer(), made], x)


def test_layers_by_row_take_rows_in_bf16():
    x = torch.zeros(1, 1, WIDTH, dtype=BF16)
    assert float8.read_rows([layer(), layer(bias=False)], x)
    assert not float8.read_rows([layer()], x.float())
    assert not float8.read_rows([], x)


# --- whole models


FAMILIES = ("sd3", "flux")
METHODS = {
    "dense": (Dense(),),
    "every(2)": (Cached(Schedule.every(2)),),
    "RAS": (RAS(start=1, resets=(), align=1),),
    "RAS and every(2)": (RAS(start=1, resets=(), align=1), Cached(Schedule.every(2))),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The adapters' own attention, also where all tokens pass."""
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)


@pytest.fixture
def seen(monkeypatch):
    """How many norms were quantised, and how many layers quantised their input themselves."""
    count = Counter()
    run, own = ops.norm_modulate, Float8Tensor.__torch_function__.__func__

    def counted(*given, **named):
        count["norms"] += named.get("row_scale") is not None
        return run(*given, **named)

    def called(cls, func, types, args=(), kwargs=None):
        count["layers"] += func is torch.nn.functional.linear
        return own(cls, func, types, args, kwargs)

    monkeypatch.setitem(ops.OPS, "norm_modulate", counted)
    monkeypatch.setattr(Float8Tensor, "__torch_function__", classmethod(called))
    return count


def model_of(family):
    model = tiny_models.transformer(family, BF16)
    quantise_blocks([block for _, block in find_adapter(model).blocks(model)])
    return model


def run(model, family, methods, backend="cpu", dtype=BF16):
    handle = fastdit.patch(model, *methods, backend=backend)
    found = []
    with handle.run(range(STEPS)):
        for step in range(STEPS):
            found.append(model(**tiny_models.call(family, 2, dtype, step=step))[0])
            handle.advance()
    handle.unpatch()
    return torch.stack(found)


def unquantised(family, methods):
    """What is true of the model before its weights were quantised."""
    model = tiny_models.transformer(family, torch.float64)
    return run(model, family, methods, "reference", torch.float64)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_are_as_exact_as_with_the_layers_own_products(family, method, seen):
    model = model_of(family)
    reference = run(model, family, METHODS[method], "reference")
    assert seen["norms"] == 0
    found = run(model, family, METHODS[method])
    assert seen["norms"] > 0
    within_contract(found, reference, unquantised(family, METHODS[method]))


def dense_call(model, family, seen):
    """A call, counted without what `patch` does first."""
    handle = fastdit.patch(model, backend="cpu")
    seen.clear()
    model(**tiny_models.call(family, 2, BF16))
    handle.unpatch()


def expected(model, own_attention):
    """(norms, layers that quantise their own input) of a dense call, counted by reading the blocks."""
    norms = layers = 0
    for _, block in find_adapter(model).blocks(model):
        linears = sum(type(part) is nn.Linear for part in block.modules())
        if type(block).__name__ == "FluxSingleTransformerBlock":
            taken, read = (2, 4) if own_attention else (0, 0)  # two streams; q, k, v and proj_mlp
        else:
            last = getattr(block, "context_pre_only", False)
            forwards = 1 if last else 2
            attentions = 1 + bool(getattr(block, "use_dual_attention", False))
            taken = forwards + own_attention * (1 + attentions)
            read = forwards + own_attention * 3 * (1 + attentions)
        norms += taken
        layers += linears - read
    return norms, layers


@pytest.mark.parametrize("own_attention", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_norm_that_feeds_them_alone_quantises(family, own_attention, seen, request):
    if own_attention:
        request.getfixturevalue("as_on_a_gpu")
    model = model_of(family)
    dense_call(model, family, seen)
    assert (seen["norms"], seen["layers"]) == expected(model, own_attention)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layer_that_is_looked_at_keeps_its_norm(family, seen):
    model = model_of(family)
    dense_call(model, family, seen)
    all_of_them = seen["norms"]
    block = model.transformer_blocks[0]
    given = []
    block.attn.to_k.register_forward_pre_hook(lambda module, args: given.append(args[0].dtype))
    dense_call(model, family, seen)
    assert given == [BF16]
    assert seen["norms"] == all_of_them - 1


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fused_projections_and_chunks(family, seen):
    model = tiny_models.transformer(family, BF16)
    model.fuse_qkv_projections()
    quantise_blocks([block for _, block in find_adapter(model).blocks(model)])
    reference = run(model, family, (Dense(),), "reference")
    found = run(model, family, (Dense(),))
    within_contract(found, reference, unquantised(family, (Dense(),)))
    norms = seen.pop("norms")
    assert norms
    if family == "sd3":
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(1, 0)
        run(model, family, (Dense(),))
        assert 0 < seen["norms"] < norms


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_adapters_of_peft_keep_the_layers_own_products(seen):
    model = tiny_models.transformer("flux", BF16)
    quantise_blocks([block for _, block in find_adapter(model).blocks(model)])
    lora(model)
    dense_call(model, "flux", seen)
    assert seen["norms"] == len(model.transformer_blocks)  # the text's own projections carry none


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_a_program_has_the_op(monkeypatch):
    """Of plain weights with the numbers beside them: a model with weights of a class of its own has no programs."""

    def beside(linear):
        if not hasattr(linear, "qdata"):
            return None
        return float8.Weight(linear.qdata, linear.row_scale, False)

    monkeypatch.setattr(float8, "weight_of", beside)
    model = tiny_models.transformer("flux", BF16)
    for _, block in find_adapter(model).blocks(model):
        for linear in block.modules():
            if type(linear) is nn.Linear:
                data, scale = quantised(linear.weight)
                linear.register_buffer("qdata", data)
                linear.register_buffer("row_scale", scale[:, None])
    with monkeypatch.context() as patch:
        patch.setattr("fastdit.runtime.programmed.model_of", lambda call: None)
        truth = run(model, "flux", (Dense(),))
    handle = fastdit.patch(model, backend="cpu")
    found = []
    with handle.run(range(STEPS)):
        for step in range(STEPS):
            found.append(model(**tiny_models.call("flux", 2, BF16, step=step))[0])
            handle.advance()
        programs = [
            p for p in handle.last_run().patched.programs.found.values() if hasattr(p, "source")
        ]
    same_bits(torch.stack(found), truth)
    assert programs
    assert any("_scaled_mm" in repr(p.run.__globals__) for p in programs)
    plain = run(tiny_models.transformer("flux", BF16), "flux", (Dense(),))
    assert not torch.equal(truth, plain)
