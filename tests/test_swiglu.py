"""swiglu on every backend and instruction set, against fp64.

Each `check_*` takes a Runner and raises where the backend is wrong; test_faults.py runs the same
functions on backends with planted faults.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from fastdit import ops
from fastdit.errors import ArgumentError
from inputs import (
    SERVING,
    SHAPES,
    Guarded,
    Runner,
    Untouched,
    generator,
    misaligned,
    normal,
    padded_rows,
    poisoned,
)
from tolerance import assert_close, assert_equal
from truth import eager_swiglu, exact_swiglu


def compare(run: Runner, what: str, out, gate, value) -> None:
    what, eager = f"swiglu on {run.label}, {what}", eager_swiglu(gate, value)
    assert_close(what, out, exact_swiglu(gate, value), eager)
    if run.backend.name == "reference":
        assert_equal(f"{what}, against torch", out, eager)


def compare_layouts(run: Runner, what: str, out, plain, gate, value) -> None:
    """A kernel gives the same bits wherever its operands lie; torch's SiLU, which alone serves fp64, does not."""
    if torch.float64 in run.dtypes():
        compare(run, what, out, gate, value)
    else:
        assert_equal(f"swiglu on {run.label}, {what}", out, plain)


def operands(shape, dtype, *key):
    g = generator(*shape, *key)
    return 3 * normal(shape, dtype, g), normal(shape, dtype, g)


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in SHAPES:
            gate, value = operands(shape, dtype)
            compare(run, "both", run.swiglu(gate, value), gate, value)


def check_each_gate(run: Runner) -> None:
    """Gates of every size, one row for each, so that an error is seen beside results as small as its own.

    In 16 bits: an exponential of a GPU in fp32 may lose as many bits as its argument has before the point.
    """
    for dtype in (dtype for dtype in run.dtypes() if dtype.itemsize == 2):
        largest = torch.tensor(8.0 if dtype is torch.float16 else 80.0)
        sizes = torch.logspace(-4, largest.log10(), 41, dtype=torch.float64)
        for sign in (-1, 1):
            gates = (sign * sizes).to(dtype)[:, None, None].expand(-1, -1, 24).contiguous()
            values = normal(gates.shape, dtype, generator(1))
            for i, (gate, value) in enumerate(zip(gates, values, strict=True)):
                gate, value = gate[None], value[None]
                compare(run, f"gate {gates[i, 0, 0]}", run.swiglu(gate, value), gate, value)


def check_wide_rows(run: Runner) -> None:
    """A thread of a GPU takes several pieces of a row."""
    for dtype in run.dtypes():
        for width in (3080, 6144, 6147):
            gate, value = operands((1, 2, width), dtype, 2)
            compare(run, "wide rows", run.swiglu(gate, value), gate, value)


def check_halves(run: Runner) -> None:
    """Gate and value side by side in one tensor, in either order, and out a part of another."""
    batch, tokens = 2, 5
    for dtype in run.dtypes():
        for width, half in ((64, 64), (72, 72), (71, 71), (71, 72)):
            both = normal((batch, tokens, 2 * half), dtype, generator(2, width))
            parts = both[..., :width], both[..., half : half + width]
            for gate, value in (parts, parts[::-1]):
                what = f"{width} of halves of {2 * half}"
                given = run.swiglu(gate.clone(), value.clone()), gate, value
                compare_layouts(run, what, run.swiglu(gate, value), *given)
                wider = poisoned((batch, tokens + 3, 24 + half), dtype)
                out = wider[:, 2 : 2 + tokens, 24 : 24 + width]
                run.swiglu(gate, value, out=out)
                compare_layouts(run, f"{what}, into a part", out, *given)
                out.fill_(float("nan"))
                assert_equal(
                    f"swiglu on {run.label}, beside out", wider, poisoned(wider.shape, dtype)
                )


def check_strides(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype in run.dtypes():
        given = operands(shape, dtype, 3)
        plain = run.swiglu(*given)
        for view in (misaligned, padded_rows):
            for one in (0, 1):
                moved = [view(t) if i == one else t for i, t in enumerate(given)]
                compare_layouts(run, f"view of {one}", run.swiglu(*moved), plain, *moved)
            out = view(poisoned(shape, dtype))
            compare_layouts(run, "view of out", run.swiglu(*given, out=out), plain, *given)
        for one in (0, 1):
            once = [t[:, :1].expand(shape) if i == one else t for i, t in enumerate(given)]
            whole = run.swiglu(*(t.clone() for t in once))
            compare_layouts(run, f"{one} expanded", run.swiglu(*once), whole, *once)


def check_in_place(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((2, 5, 72), (1, 3, 2047)):
            given = operands(shape, dtype, 4)
            plain = run.swiglu(*given)
            for one in (0, 1):
                own = [t.clone() for t in given]
                run.swiglu(*own, out=own[one])
                assert_equal(f"swiglu on {run.label}, out is {one}", own[one], plain)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((1, 1, 1), (2, 3, 71), (1, 2, 513)):
            gate, value = operands(shape, dtype, 5)
            inputs, out = Untouched(gate=gate, value=value), Guarded(poisoned(shape, dtype))
            run.swiglu(gate, value, out=out.tensor)
            out.assert_intact(f"swiglu on {run.label}")
            inputs.check(f"swiglu on {run.label}")


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        gate, value = operands((2, 17, 1152), dtype, 6)
        first = run.swiglu(gate, value)
        threads = torch.get_num_threads()
        try:
            for i in range(run.repeats(4)):
                torch.set_num_threads(1 + i % 2)  # above 32768 elements the kernels do split
                again = run.swiglu(misaligned(gate, i % 5), value)
                assert_equal(f"swiglu on {run.label}, repeat {i}", again, first)
        finally:
            torch.set_num_threads(threads)


def check_special_values(run: Runner) -> None:
    """What is not finite stays in its element; gates too large for exp are 0 or themselves."""
    special = (float("nan"), float("inf"), float("-inf"))
    for dtype in run.dtypes():
        most = torch.finfo(dtype).max
        gate, value = operands((1, 4, 72), dtype, 7)
        for i, x in enumerate((*special, most, -most, 1e4, -1e4, -90.0, 90.0)):
            gate[0, 0, 7 * i], value[0, 1, 7 * i] = x, x
            gate[0, 2, 7 * i], value[0, 2, 7 * i] = x, 0.0
        gate[0, 3, :2], value[0, 3, 1] = torch.tensor([0.0, -0.0]), -1.0
        out = run.swiglu(gate, value)
        compare(run, "special values", out, gate, value)
        zeros = out[0, 3, :2].signbit().tolist()
        if zeros != eager_swiglu(gate, value)[0, 3, :2].signbit().tolist():
            raise AssertionError(f"swiglu on {run.label}: a zero of another sign, {zeros}")


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
            nothing, out = torch.zeros(shape, dtype=dtype), Guarded(poisoned(shape, dtype))
            assert run.swiglu(nothing, nothing, out=out.tensor).shape == shape
            out.assert_intact(f"swiglu on {run.label}, of nothing")


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_swiglu(check, runner):
    check(runner)


# --- diffusers' modules


@pytest.mark.diffusers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_reference_is_bit_equal_to_diffusers(dtype):
    from diffusers.models.activations import FP32SiLU, SwiGLU

    g = generator(8)
    both = 3 * normal((2, 3, 142), dtype, g)
    gate, value = both.chunk(2, dim=-1)
    ours = ops.swiglu(gate, value, backend="reference")
    if dtype is not torch.float64:  # which that one computes in fp32
        assert torch.equal(ours, FP32SiLU()(gate) * value)
    stock = SwiGLU(8, 71).to(dtype)
    stock.proj = torch.nn.Identity()
    swapped = torch.cat([value, gate], -1)
    found = ops.swiglu(*swapped.chunk(2, dim=-1)[::-1], backend="reference")
    assert torch.equal(found, stock(swapped))
    try:
        from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
    except ImportError:
        return
    assert torch.equal(ours, Flux2SwiGLU()(both))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate_of_16_bits_is_bit_equal_to_fp32_silu(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    every = every[every.isfinite()].view(1, 1, -1)
    one = torch.ones_like(every)
    stock = torch.nn.functional.silu(every.float()).to(dtype)
    assert torch.equal(ops.swiglu(every, one, backend="reference"), stock)
    if "cpu" in SERVING:
        exact = exact_swiglu(every, one)
        assert_close("swiglu on cpu", ops.swiglu(every, one, backend="cpu"), exact, stock)


# --- what is checked


def test_gradients():
    gate, value = (t.requires_grad_() for t in operands((2, 3, 5), torch.float64, 9))
    assert gradcheck(ops.swiglu, (gate, value), fast_mode=True)
    with pytest.raises(ArgumentError, match="gradient"):
        ops.swiglu(gate, value, out=torch.empty(2, 3, 5, dtype=torch.float64))


X = torch.ones(2, 3, 8)
WRONG = {
    "gate rank": ({"gate": X[0]}, "gate", "rank 3"),
    "gate dtype": ({"gate": X.int()}, "gate", "bfloat16"),
    "gate strides": ({"gate": X.transpose(1, 2)}, "gate", "last stride of 1"),
    "value shape": ({"value": X[:, :2]}, "value", "[2, 3, 8]"),
    "value dtype": ({"value": X.half()}, "value", "torch.float32"),
    "value device": ({"value": X.to("meta")}, "value", "one on cpu"),
    "value no tensor": ({"value": 1.0}, "value", "a tensor"),
    "out shape": ({"out": X[:1]}, "out", "[2, 3, 8]"),
    "out dtype": ({"out": X.half()}, "out", "torch.float32"),
    "out expanded": ({"out": X[:1].expand(2, 3, 8)}, "out", "without expanded dimensions"),
}


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, backend):
    changes, name, accepted = WRONG[case]
    with pytest.raises(ArgumentError) as raised:
        ops.swiglu(**{"gate": X.clone(), "value": X.clone()} | changes, backend=backend)
    assert str(raised.value).startswith(f"{name}: got")
    assert accepted in str(raised.value)


def test_shared_memory_is_refused_but_for_the_same():
    both = torch.ones(2, 3, 20)
    gate, value = both[..., :8], both[..., 8:16]
    for out in (both[..., 1:9], both[..., 4:12], both[..., 9:17]):
        with pytest.raises(ArgumentError, match="shares with"):
            ops.swiglu(gate, value, out=out)
    flat = both.view(-1)
    with pytest.raises(
        ArgumentError, match="shares with"
    ):  # as many elements from the same place on
        ops.swiglu(gate, value, out=flat[:48].view(2, 3, 8))
    for out in (gate, value, torch.ones(2, 3, 8)):
        ops.swiglu(gate, value, out=out)


@pytest.mark.slow
def test_compiled_and_traced_as_one_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    gate, value = operands((2, 3, 40), torch.float32, 10)
    expected = ops.swiglu(gate, value)
    with Seen() as seen:
        assert torch.equal(ops.swiglu(gate, value), expected)
    assert "fastdit::swiglu" in seen.names
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert ops.swiglu(gate.to("meta"), value.to("meta")).shape == gate.shape
    found = torch.compile(ops.swiglu, fullgraph=True, backend="aot_eager")(gate, value)
    assert torch.equal(found, expected)
