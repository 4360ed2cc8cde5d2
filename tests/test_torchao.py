"""Linear layers that torchao keeps in float8 run under every method, as they do in the stock model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdit
import tiny_models
from contract import same_bits, within_contract
from fastdit import RAS, Cached, Dense, Schedule, ops
from fastdit.adapters import find_adapter
from fastdit.blocks import float8, products
from test_ralu import SHORT, SIZE
from tiny_models import sample

pytest.importorskip("torchao", reason="torchao is not installed")
pytestmark = [pytest.mark.diffusers, pytest.mark.filterwarnings("ignore")]

FAMILIES = tiny_models.one_each(tiny_models.forms("layouts"), -1)
DTYPE, STEPS = torch.bfloat16, 4
#: whose inputs torchao 0.18 does not quantise, and why
NOT_INPUTS = {
    "pixart-sigma": "torchao makes NaN of a row of zeros, also in the stock model",
    "lumina2": "torchao leaves alone the widths of the tiny model",
}
METHODS = {
    "dense": (Dense(),),
    "every(2)": (Cached(Schedule.every(2)),),
    "every(2) on a line": (Cached(Schedule.every(2, order=1)),),
    "RAS": (RAS(start=1, resets=(), align=1),),
    "RAS and every(2)": (RAS(start=1, resets=(), align=1), Cached(Schedule.every(2))),
}


@pytest.fixture(params=["weights", "weights and inputs"])
def quantise(request, monkeypatch):
    """Quantises the linear layers of blocks, as on a GPU, rows of a weight each by its own scale."""
    from torchao.float8 import inference
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    monkeypatch.setattr(inference, "is_MI300", lambda: True)
    config = {
        "weights": Float8WeightOnlyConfig,
        "weights and inputs": lambda: Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow()
        ),
    }[request.param]()

    def apply(model):
        for _, block in find_adapter(model).blocks(model):
            quantize_(block, config)
        return model

    apply.inputs = request.param != "weights"
    return apply


def run(model, family, methods, backend):
    handle = fastdit.patch(model, *methods, backend=backend)
    found = []
    with handle.run(range(STEPS)):
        for step in range(STEPS):
            found.append(sample(model(**tiny_models.call(family, 2, DTYPE, step=step))))
            handle.advance()
    return torch.stack(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_quantised_layers_run(family, method, quantise):
    if quantise.inputs and family in NOT_INPUTS:
        pytest.skip(NOT_INPUTS[family])
    whole = tiny_models.transformer(family, DTYPE)
    model = quantise(copy.deepcopy(whole))
    stock = [
        sample(model(**tiny_models.call(family, 2, DTYPE, step=step))) for step in range(STEPS)
    ]
    unquantised = run(whole, family, METHODS[method], "reference")
    reference = run(model, family, METHODS[method], "reference")
    assert not torch.equal(reference, unquantised)
    if method == "dense":
        same_bits(reference, torch.stack(stock))
    fastdit.unpatch(model)
    within_contract(run(model, family, METHODS[method], "cpu"), reference, unquantised.double())


@torch.no_grad()
def test_their_products_are_left_to_them(quantise):
    model = quantise(tiny_models.transformer("flux", DTYPE))
    block = model.single_transformer_blocks[0]
    for layer in (block.proj_out, block.proj_mlp):
        assert type(layer) is nn.Linear
        assert products.weight_and_bias(layer, torch.zeros(1, 1, dtype=DTYPE)) is None


@torch.no_grad()
def test_rows_that_are_normed_for_them_are_quantised_as_they_would(quantise):
    layer = quantise(tiny_models.transformer("flux", DTYPE)).single_transformer_blocks[0].proj_mlp
    torch.manual_seed(0)
    x = torch.randn(2, 9, layer.in_features).to(DTYPE)
    assert float8.read_rows([layer], x) == quantise.inputs
    if quantise.inputs:
        rows = float8.QuantisedRows.like(x, 9)
        ops.norm_modulate(x, out=rows.data, row_scale=rows.scale)
        same_bits(float8.linear(layer, rows), layer(ops.norm_modulate(x)))


@torch.no_grad()
def test_one_scale_for_all_rows_is_left_to_torchao(quantise):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    layer = nn.Sequential(nn.Linear(64, 64).to(DTYPE))
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig())
    assert not float8.read_rows([layer[0]], torch.zeros(1, 1, 64, dtype=DTYPE))


@pytest.mark.parametrize("family", ["sd3", "flux"])
@torch.no_grad()
def test_models_whose_norms_quantise(family, quantise, monkeypatch):
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)
    whole = tiny_models.transformer(family, DTYPE)
    model = quantise(copy.deepcopy(whole))
    methods = METHODS["every(2)"]
    unquantised = run(whole, family, methods, "reference")
    reference = run(model, family, methods, "reference")
    fastdit.unpatch(model)
    count, norm = [], ops.norm_modulate

    def counted(*given, **named):
        count.append(named.get("row_scale") is not None)
        return norm(*given, **named)

    monkeypatch.setitem(ops.OPS, "norm_modulate", counted)
    within_contract(run(model, family, methods, "cpu"), reference, unquantised.double())
    assert any(count) == quantise.inputs


@torch.no_grad()
def test_two_sizes_of_tokens(quantise):
    pipe = tiny_models.pipeline("flux-dev", DTYPE)
    quantise(pipe.transformer)
    fastdit.patch(pipe, SHORT)
    assert tiny_models.generate(pipe, "flux-dev", **SIZE, steps=7).isfinite().all()
