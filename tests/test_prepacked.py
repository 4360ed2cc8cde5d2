"""Weights kept laid out for few rows: what is computed, when they are laid out, and what makes them stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdit
import test_generic
import tiny_models
from contract import distance, same_bits
from fastdit.blocks import prepacked
from fastdit.blocks.prepacked import PrepackedWeights
from fastdit.errors import ArgumentError, BackendError
from fastdit.runtime.install import is_installed
from tiny_models import generate
from tolerance import assert_close

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL"),
]
STEPS = 8
#: of latents in fp32, after a run
FORWARD = 1e-4


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(96, 160)


@pytest.fixture
def few_rows(monkeypatch):
    """The models of the tests have fewer rows than anybody would pack for."""
    monkeypatch.setattr(prepacked, "LEAST_ROWS", 2)


@pytest.mark.parametrize("shape", [(65, 96), (2, 128, 96), (4, 192, 96)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_packed_layer_is_as_exact_as_torch(shape, bias):
    torch.manual_seed(1)
    layer, x, weights = nn.Linear(96, 160, bias=bias), torch.randn(shape), PrepackedWeights()
    exact = copy.deepcopy(layer).double()(x.double())
    for call in range(3):
        assert_close(f"call {call}", weights.linear(layer, x), exact, layer(x))
    assert weights.nbytes >= layer.weight.nbytes
    strided = torch.randn(*shape[:-1], 192)[..., ::2]
    exact = copy.deepcopy(layer).double()(strided.double())
    assert_close("strided", weights.linear(layer, strided), exact, layer(strided))


@torch.no_grad()
def test_the_second_call_of_as_many_rows_lays_out(layer, monkeypatch):
    made, lay_out = [], torch.ops.mkl._mkl_reorder_linear_weight

    def counted(weight, rows):
        made.append(rows)
        return lay_out(weight, rows)

    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight", counted)
    weights = PrepackedWeights()
    for rows in (80, 80, 80, 96, 80, 96, 96, 96, 64, 2049, 96, 80, 80):
        weights.linear(layer, torch.randn(rows, 96))
    assert made == [80, 96, 80]
    weights.clear()
    assert weights.nbytes == 0


@pytest.mark.parametrize("how", ["written", "replaced", "moved"])
@torch.no_grad()
def test_weights_that_change_are_laid_out_anew(layer, how):
    weights, x = PrepackedWeights(), torch.randn(80, 96)
    for _ in range(2):
        weights.linear(layer, x)
    if how == "written":
        layer.weight.mul_(2)
    elif how == "replaced":
        layer.weight = nn.Parameter(torch.randn(160, 96))
    else:
        layer.weight.data = layer.weight.data * 3
    for _ in range(3):
        assert distance(weights.linear(layer, x), layer(x)) < 1e-6


def test_gradients_other_dtypes_and_autocast_go_as_torch_does(layer):
    weights, x = PrepackedWeights(), torch.randn(80, 96, requires_grad=True)
    for _ in range(3):
        same_bits(weights.linear(layer, x), layer(x))
    weights.linear(layer, x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        half = copy.deepcopy(layer).to(torch.bfloat16)
        for _ in range(3):
            same_bits(weights.linear(half, x.bfloat16()), half(x.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert weights.linear(layer, x).dtype is torch.bfloat16
    assert weights.nbytes == 0


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms("layouts"), -1))
def test_a_run_with_packed_weights_is_the_run_without(name, few_rows):
    pipe = tiny_models.pipeline(name)
    method = fastdit.RAS(ratio=0.5, start=2, align=1)
    handle = fastdit.patch(pipe, method)
    expected = generate(pipe, name, steps=STEPS)
    assert handle.report().packed_bytes == 0
    handle = fastdit.patch(pipe, method, pack_weights=True)
    assert distance(generate(pipe, name, steps=STEPS), expected) <= FORWARD
    report = handle.report()
    assert 0 < report.packed_bytes <= handle.explain(steps=STEPS).packed_bytes
    assert "packed weights" in str(report)
    assert handle.last_run().prepacked.nbytes == 0  # nothing outlives the run
    with handle.disabled():
        stock = generate(pipe, name, steps=STEPS)
    handle.unpatch()
    assert not any(map(is_installed, pipe.transformer.modules()))
    same_bits(stock, generate(pipe, name, steps=STEPS))


class Quantised(torch.Tensor):
    """A weight that says it is fp32 and holds int8, as torchao's does."""

    @staticmethod
    def __new__(cls, whole, step):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole, step):
        self.whole, self.step = whole, step

    @classmethod
    def of(cls, weight):
        step = weight.abs().max() / 127
        return nn.Parameter(cls((weight / step).round().to(torch.int8), step), requires_grad=False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].step)
        plain = [arg.whole * arg.step if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Doubled(nn.Module):
    """Makes a weight anew at each access."""

    def forward(self, weight):
        return 2 * weight


@torch.inference_mode()
def made_in_inference_mode(layer):
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


ODD_WEIGHTS = {
    "quantised": lambda layer: setattr(layer, "weight", Quantised.of(layer.weight)),
    "parametrized": lambda layer: nn.utils.parametrize.register_parametrization(
        layer, "weight", Doubled()
    ),
    "made in inference mode": made_in_inference_mode,
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
@torch.no_grad()
def test_weights_that_are_no_plain_parameter_go_as_torch_does(kind, few_rows):
    layer, weights, x = nn.Linear(32, 32), PrepackedWeights(), torch.randn(80, 32)
    ODD_WEIGHTS[kind](layer)
    for _ in range(3):
        same_bits(weights.linear(layer, x), layer(x))
    assert weights.nbytes == 0
    model = tiny_models.transformer("sd3")
    linears = prepacked.linears_of([model])
    for one in linears[1:]:
        ODD_WEIGHTS[kind](one)
    handle = fastdit.patch(model, pack_weights=True)
    assert handle.explain(steps=STEPS).packed_bytes <= linears[0].weight.nbytes
    handle.unpatch()
    ODD_WEIGHTS[kind](linears[0])
    with pytest.raises(ArgumentError, match=r"pack_weights: got True .* own dense Parameter"):
        fastdit.patch(model, pack_weights=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@torch.no_grad()
def test_sparse_weights_go_as_torch_does():
    layer, weights, x = nn.Linear(32, 32, bias=False), PrepackedWeights(), torch.randn(80, 32)
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    for _ in range(3):
        same_bits(weights.linear(layer, x), layer(x))
    assert weights.nbytes == 0


def test_weights_written_between_runs_are_seen(few_rows):
    """As when a LoRA is fused: `data` is written, which no version of the weight tells."""
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, pack_weights=True)
    generate(pipe, "sd3", steps=4)
    for module in pipe.transformer.modules():
        if isinstance(module, nn.Linear):
            module.weight.data += 0.1 * module.weight.data
    found = generate(pipe, "sd3", steps=4)
    fastdit.unpatch(pipe)
    assert distance(found, generate(pipe, "sd3", steps=4)) <= FORWARD


def test_hooks_of_a_layer_are_called_and_copies_have_their_own(few_rows):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, pack_weights=True)
    layer, calls = pipe.transformer.transformer_blocks[0].attn.to_q, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    expected = generate(pipe, "sd3", steps=4)
    assert len(calls) == 4
    twin = copy.deepcopy(pipe)
    fastdit.unpatch(pipe)
    assert distance(generate(twin, "sd3", steps=4), expected) <= FORWARD
    assert fastdit.report(twin).packed_bytes > 0


@torch.no_grad()
def test_a_compiler_sees_the_layer_itself():
    model = tiny_models.transformer("sd3")
    fastdit.patch(model, pack_weights=True)
    traced = torch.compile(model.transformer_blocks[0].ff, fullgraph=True, backend="eager")
    x = torch.randn(2, 8, 32)
    same_bits(traced(x), model.transformer_blocks[0].ff(x))


def test_what_would_come_to_nothing_is_refused(monkeypatch):
    model = tiny_models.transformer("sd3")
    with pytest.raises(ArgumentError, match='pack_weights: got True with backend "reference"'):
        fastdit.patch(model, backend="reference", pack_weights=True)
    half = tiny_models.transformer("sd3").to(torch.bfloat16)
    with pytest.raises(
        ArgumentError, match=r"bfloat16 on cpu \(Parameter\); accepted are weights in float32"
    ):
        fastdit.patch(half, pack_weights=True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(BackendError, match="a torch with MKL"):
        fastdit.patch(model, pack_weights=True)
    assert not any(map(is_installed, (*model.modules(), *half.modules())))


@torch.no_grad()
def test_a_layer_that_is_a_component_itself_is_still_reused(few_rows):
    """Of a family without an adapter, whose components are wrapped as they are."""
    model = tiny_models.randomise(test_generic.aura_flow()).eval()
    for block in (*model.joint_transformer_blocks, *model.single_transformer_blocks):
        block.ff = nn.Linear(16, 16)
    schedule = fastdit.Cached(fastdit.Schedule.every(2))
    found = []
    for pack_weights in (False, True):
        with pytest.warns(UserWarning, match="has no adapter"):
            handle = fastdit.patch(model, schedule, pack_weights=pack_weights)
        with handle.run(range(STEPS)):
            for step in range(STEPS):
                found.append(model(**test_generic.inputs(step))[0])
        assert handle.report().reuse_share == 0.5
        handle.unpatch()
    assert not any(map(is_installed, model.modules()))
    for plain, packed_one in zip(found[:STEPS], found[STEPS:], strict=True):
        assert distance(packed_one, plain) <= FORWARD
