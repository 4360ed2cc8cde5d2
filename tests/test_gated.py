"""SwiGLU feed-forwards by one op: as near to fp64 as stock, and stock wherever somebody looks."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import fastdit
import tiny_models
from contract import same_bits, within_contract
from dispatch_trace import Trace
from fastdit import RAS, Cached, Dense, Schedule, ops
from fastdit.blocks import gated
from fastdit.blocks.forward import Forward
from fastdit.blocks.gated import feed_forward
from fastdit.blocks.products import FUSED
from test_coexistence import lora
from test_prepacked import Doubled, Quantised
from tolerance import assert_close

pytestmark = pytest.mark.diffusers

WIDTH, INNER = 24, 40
#: class of `gated.LAYERS` -> what makes one
MAKES = {
    "attention.LuminaFeedForward": lambda kind: kind(WIDTH, INNER, multiple_of=8),
    "transformer_flux2.Flux2FeedForward": lambda kind: kind(WIDTH, inner_dim=INNER),
    "transformer_z_image.FeedForward": lambda kind: kind(WIDTH, INNER),
}


def made(name, dtype=torch.float32):
    """A module of diffusers, its input [B, n, D], and a call that fuses; skipped where diffusers lacks it."""
    file, _, kind = name.rpartition(".")
    folder = "" if file == "attention" else "transformers."
    try:
        found = getattr(importlib.import_module(f"diffusers.models.{folder}{file}"), kind)
    except ImportError:
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    module = MAKES[name](found).requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):  # gates of both signs, of some size
            nn.init.normal_(layer.weight, std=0.4)
    fw = Forward(ops.bind("cpu"), [module], immediate=False)
    fw.segments = FUSED
    return module.to(dtype), 2 * torch.randn(2, 9, WIDTH).to(dtype), fw


@pytest.fixture
def served(monkeypatch):
    """Counts the calls of the op."""
    calls = []
    run = fastdit.backends.cpu.BACKEND.swiglu

    def counted(*args):
        calls.append(args)
        run(*args)

    monkeypatch.setattr(fastdit.backends.cpu.BACKEND, "swiglu", counted, raising=False)
    ops.registry.resolve.cache_clear()
    yield calls
    ops.registry.resolve.cache_clear()


def test_all_classes_are_tested():
    assert MAKES.keys() == gated.LAYERS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAKES)
def test_it_errs_as_little_as_stock(name, dtype, served):
    module, x, fw = made(name, dtype)
    stock, actual = module(x), feed_forward(fw, module, x)
    exact = made(name, torch.float64)[0]
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    for part in exact.modules():  # in fp64 too
        if type(part).__name__ == "FP32SiLU":
            part.forward = torch.nn.functional.silu
    assert_close(name, actual, exact(x.double()), stock)
    assert len(served) == 1


@pytest.mark.parametrize("name", MAKES)
def test_an_input_of_any_layout_is_served(name, served):
    module, x, fw = made(name)
    expected = feed_forward(fw, module, x)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    assert_close(name, feed_forward(fw, module, strided), expected.double(), module(strided))
    assert len(served) == 2


def hook(module):
    module.register_forward_hook(lambda *_: None)


def replace(module):
    module.forward = type(module).forward.__get__(module)


def activation(module):
    return next(m for m in module.modules() if m is not module and not isinstance(m, nn.Linear))


def layer(module):
    return next(m for m in module.modules() if isinstance(m, nn.Linear))


ODD = {
    "seen": hook,
    "its forward replaced": replace,
    "a layer seen": lambda module: hook(layer(module)),
    "a layer's forward replaced": lambda module: replace(layer(module)),
    "the activation seen": lambda module: hook(activation(module)),
    "the activation replaced": lambda module: replace(activation(module)),
    "quantised": lambda module: setattr(
        layer(module), "weight", Quantised.of(layer(module).weight)
    ),
    "parametrized": lambda module: nn.utils.parametrize.register_parametrization(
        layer(module), "weight", Doubled()
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", MAKES)
def test_odd_modules_are_called_as_they_are(name, kind, served):
    module, x, fw = made(name)
    if "activation" in kind and name == "transformer_z_image.FeedForward":
        pytest.skip("its activation is a function")
    ODD[kind](module)
    same_bits(feed_forward(fw, module, x), module(x))
    assert not served


@pytest.mark.parametrize("name", MAKES)
def test_a_class_of_ones_own_is_called_as_it_is(name, served):
    module, x, fw = made(name)
    module.__class__ = type("Mine", (type(module),), {})
    same_bits(feed_forward(fw, module, x), module(x))
    assert not served


@pytest.mark.parametrize("name", MAKES)
def test_fp64_and_other_ways_to_run_are_stock(name, served):
    module, x, fw = made(name, torch.float64)
    same_bits(feed_forward(fw, module, x), module(x))
    module, x, _ = made(name)
    same_bits(feed_forward(Forward(None, [module]), module, x), module(x))  # nothing is fused there
    assert not served


# --- in models

FAMILIES = {"lumina": "layers", "lumina2": "layers noise_refiner"}
BF16 = torch.bfloat16


def traced(model, given):
    with Trace() as trace:
        model(**given)
    return [kernel.name for kernel in trace.kernels]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_feed_forward_is_three_products_and_the_op(family):
    """A step that reuses its output has neither; some of the tokens are no other case."""
    model, given = tiny_models.transformer(family, BF16), tiny_models.call(family, 2, BF16)
    blocks = sum(len(getattr(model, name)) for name in FAMILIES[family].split())
    stock = traced(model, given)
    for method in (Dense(), Cached(Schedule.every(2)), RAS(ratio=0.5, start=1, resets=())):
        handle = fastdit.patch(model, method, backend="cpu")
        with handle.run(torch.tensor([900.0, 500.0, 100.0])):
            found = []
            for _ in range(3):
                found.append(traced(model, given).count("fastdit::swiglu"))
                handle.advance()
        reused = isinstance(method, Cached)
        assert found == [blocks, 0 if reused else blocks, blocks], method
        handle.unpatch()
    fastdit.patch(model, backend="cpu")
    fused = traced(model, given)
    for name in ("aten::silu", "aten::_to_copy"):
        assert stock.count(name) - fused.count(name) >= blocks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_of_peft_are_honoured(family, served):
    model = tiny_models.transformer(family, BF16)
    given = tiny_models.call(family, 2, BF16)
    lora(model)
    stock = model(**given)[0]
    truth = tiny_models.transformer(family, torch.float64)
    lora(truth)
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors(given).items()}
    fastdit.patch(model, backend="cpu")
    within_contract(model(**given)[0], stock, truth(**given | exact)[0])


def tensors(given):
    return {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
