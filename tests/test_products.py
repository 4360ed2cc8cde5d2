"""Products with an activation or a concatenation fused: as near to fp64 as stock, and stock wherever somebody looks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit
import tiny_models
from contract import FORWARD_FP64, same_bits, within_contract
from fastdit import Cached, Schedule
from fastdit.adapters import find_adapter
from fastdit.blocks import products, segments
from test_coexistence import lora
from test_prepacked import Doubled, Quantised
from tiny_models import sample
from tolerance import assert_close

BLOCKS = 2  # single blocks of the tiny FLUX
#: families with diffusers' feed-forward with the GELU by tanh
FEED_FORWARDS = ["sd3", "flux", "pixart-sigma"] + ["qwen"] * tiny_models.HAS_QWEN


class Concatenations(TorchDispatchMode):
    """Counts concatenations along the channels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cat.default and args[0][0].ndim == 3:
            self.count += args[-1] in (2, -1) and len(args) > 1
        return func(*args, **(kwargs or {}))


def projection(dtype=torch.float32, bias=True, rows=(2, 9)):
    """FLUX's output projection and its inputs."""
    torch.manual_seed(0)
    module = nn.Linear(16 + 64, 16, bias=bias).to(dtype).requires_grad_(False)
    return module, torch.randn(*rows, 16).to(dtype), torch.randn(*rows, 64).to(dtype)


TANH = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_products_err_as_little_as_one(dtype, bias):
    module, attention, mlp = projection(dtype, bias, (2, 300))
    strided = torch.stack([attention, attention], dim=2)[:, :, 0]
    exact = segments.project(module.double(), attention.double(), TANH, mlp.double())
    module.to(dtype)
    stock = segments.project(module, attention, TANH, mlp)
    for given in (attention, strided):
        assert_close("project", products.project(module, given, TANH, mlp), exact, stock)


@pytest.mark.diffusers
@torch.no_grad()
def test_flux_concatenates_nothing_before_its_projection():
    model = tiny_models.transformer("flux")
    given = tiny_models.call("flux", 2)
    counts = {}
    for backend in ("reference", "cpu"):
        fastdit.patch(model, backend=backend)
        with Concatenations() as seen:
            model(**given)
        counts[backend] = seen.count
    assert counts["reference"] - counts["cpu"] == BLOCKS


def seen(module):
    module.register_forward_hook(lambda *_: None)


def packed(module):
    module.forward = lambda x: nn.Linear.forward(module, x)


ODD = {
    "seen": seen,
    "its forward replaced": packed,
    "quantised": lambda module: setattr(module, "weight", Quantised.of(module.weight)),
    "parametrized": lambda module: nn.utils.parametrize.register_parametrization(
        module, "weight", Doubled()
    ),
    "in another dtype": lambda module: module.double(),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_layers_are_called_as_they_are(kind):
    module, attention, mlp = projection()
    ODD[kind](module)
    assert products.weight_and_bias(module, attention, mlp) is None
    if kind == "in another dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            products.project(module, attention, TANH, mlp)
        return
    same_bits(
        products.project(module, attention, TANH, mlp),
        segments.project(module, attention, TANH, mlp),
    )


@pytest.mark.diffusers
@torch.no_grad()
def test_adapters_of_peft_are_honoured():
    model = tiny_models.transformer("flux", torch.float64)
    given = tiny_models.call("flux", 2, torch.float64)
    without = sample(model(**given))
    lora(model)
    stock = sample(model(**given))
    assert not torch.allclose(stock, without)
    fastdit.patch(model)
    within_contract(sample(model(**given)), stock, bound=FORWARD_FP64)


# --- GELU on the way out of a product


@pytest.fixture
def epilogue(monkeypatch):
    """Stands for the products of a GPU; gives the shapes of their weights."""
    calls = []

    def product(bias, rows, weight, *, use_gelu):
        assert use_gelu
        calls.append(tuple(weight.shape))
        exact = rows.double() @ weight.double() + bias.double()
        return F.gelu(exact, approximate="tanh").to(rows.dtype)

    monkeypatch.setattr(products, "gelu_of_products", lambda device: "tanh")
    monkeypatch.setattr(torch, "_addmm_activation", product)
    return calls


def test_on_a_cpu_torch_has_the_other_gelu():
    """So nothing is fused there, whose models want the approximation."""
    assert products.gelu_of_products(torch.device("cpu")) is None
    x = torch.linspace(-4, 4, 64)[None]
    made = torch._addmm_activation(torch.zeros(64), x, torch.eye(64), use_gelu=True)
    assert torch.equal(made, F.gelu(x))
    assert (made - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


def test_a_gelu_is_fused_where_it_is_the_same(epilogue):
    torch.manual_seed(0)
    module, x = nn.Linear(32, 48).bfloat16(), torch.randn(2, 50, 32).bfloat16()
    with torch.no_grad():
        exact = TANH(F.linear(x.double(), module.weight.double(), module.bias.double()))
        stock = TANH(module(x))
        assert_close("activated", products.activated(module, TANH, x), exact, stock)
        assert epilogue == [(32, 48)]
        other = nn.GELU()
        same_bits(products.activated(module, other, x), other(module(x)))
        same_bits(products.activated(module, nn.SiLU(), x), nn.SiLU()(module(x)))
        same_bits(products.activated(module.float(), TANH, x.float()), TANH(module(x.float())))
        seen(watched := copy.deepcopy(TANH))
        same_bits(products.activated(module.bfloat16(), watched, x), stock)
        bare = nn.Linear(32, 48, bias=False).bfloat16()
        same_bits(products.activated(bare, TANH, x), TANH(bare(x)))
    assert len(epilogue) == 1


@pytest.mark.diffusers
@pytest.mark.parametrize("family", FEED_FORWARDS)
@torch.no_grad()
@pytest.mark.usefixtures("unprogrammed")
def test_feed_forwards_are_as_near_to_fp64_as_stock(family, epilogue):
    dtype = torch.bfloat16
    model = tiny_models.transformer(family, dtype)
    truth_model = tiny_models.transformer(family, dtype).double()
    inputs = [tiny_models.call(family, 3, dtype, step=step) for step in range(4)]
    truth = [sample(truth_model(**doubled(given))) for given in inputs]
    stock = [sample(model(**given)) for given in inputs]
    fastdit.patch(model)
    actual = [sample(model(**given)) for given in inputs]
    within_contract(torch.cat(actual), torch.cat(stock), torch.cat(truth))
    modules = [m for m in model.modules() if type(m).__name__ == "FeedForward"]
    assert len(epilogue) == 4 * (len(modules) + BLOCKS * (family == "flux"))


def doubled(given):
    floats = (torch.float32, torch.bfloat16)
    return {k: v.double() if getattr(v, "dtype", None) in floats else v for k, v in given.items()}


@pytest.mark.diffusers
@pytest.mark.parametrize("keeps", [True, False])
@torch.no_grad()
def test_an_output_that_is_kept_is_kept_as_it_was(keeps, epilogue):
    """`single_proj_mlp` is cached before its GELU, which the step that reuses it applies."""
    dtype, steps = torch.bfloat16, range(2)
    spec = find_adapter(model := tiny_models.transformer("flux", dtype)).spec(model)
    names = {kind.name: kind.components for kind in spec.kinds}
    bits = {
        kind.name: torch.ones(2, kind.count, len(names[kind.name]), dtype=int)
        for kind in spec.kinds
    }
    if keeps:
        kind = "single_transformer_blocks"
        bits[kind][1, :, names[kind].index("single_proj_mlp")] = 0
    method = Cached(Schedule.from_bits(bits, names))
    inputs = [tiny_models.call("flux", 2, dtype, step=step) for step in steps]

    def run(model, inputs, **settings):
        handle = fastdit.patch(model, method, **settings)
        with handle.run(steps):
            return torch.cat([sample(model(**given)) for given in inputs])

    actual = run(model, inputs)
    in_feed_forwards = 2 * sum(type(m).__name__ == "FeedForward" for m in model.modules())
    assert len(epilogue) - in_feed_forwards == (0 if keeps else 2 * BLOCKS)
    stock = run(model, inputs, backend="reference")
    truth = run(model.double(), [doubled(given) for given in inputs])
    within_contract(actual, stock, truth)
