"""What the Triton kernels promise beyond the checks of all backends, run in the interpreter.

The `check_*` here take a Runner like those of test_gated_residual.py; test_triton_faults.py runs
them on kernels with planted faults. test_triton_interpreter.py starts the process for both.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import backend_labels
from fastdit.ops import BACKENDS
from inputs import Runner, generator, normal, poisoned, some_rows
from interpreter import INTERPRETED, debug_build, narrow
from tolerance import Mismatch, assert_close, assert_equal
from truth import (
    eager_gated_residual,
    eager_norm_modulate,
    exact_gated_residual,
    exact_norm_modulate,
)

if not INTERPRETED:
    pytest.skip(
        "run by test_triton_interpreter.py, in a process with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl

from triton_kernels.gated_residual import gated_residual
from triton_kernels.launch import Launch
from triton_kernels.norm_modulate import norm_modulate

MODEL_WIDTHS = (1152, 1536, 2304, 2432, 3072)


@pytest.fixture
def run() -> Runner:
    return Runner(BACKENDS["triton"], "triton")


def ulp_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at each value."""
    limits = torch.finfo(dtype)
    _, exponent = values.abs().clamp(limits.tiny, limits.max).frexp()
    return limits.eps * torch.ldexp(torch.ones_like(values), exponent - 1)


def assert_one_rounding(what: str, actual: Tensor, exact: Tensor, eager_fp32: Tensor) -> None:
    """Half an ulp of the dtype, on top of what the pass rule allows a kernel that stays in fp32."""
    stock = (eager_fp32.double() - exact).abs().max()
    fp32 = 2 * stock + ulp_of(exact.abs().max(), torch.float32)
    error = (actual.double() - exact).abs()
    if not bool((error <= ulp_of(exact, actual.dtype) / 2 + fp32).all()):
        raise Mismatch(f"{what}: more than one rounding, error {error.max():.3g}")


def check_one_rounding_of_sums(run: Runner) -> None:
    for dtype in run.dtypes():
        for count in (2, 16):
            g = generator(1, count)
            x = normal((1, 3, 72), dtype, g)
            branches = [normal(x.shape, dtype, g) for _ in range(count)]
            gates = [normal((1, 72), dtype, g) for _ in range(count)]
            out = run.gated_residual(x, branches, gates)
            exact = exact_gated_residual(x, branches, gates)
            wide = [[t.float() for t in ts] for ts in (branches, gates)]
            what = f"gated_residual on {run.label}, {count} branches"
            assert_one_rounding(what, out, exact, eager_gated_residual(x.float(), *wide))


def check_one_rounding_of_norms(run: Runner) -> None:
    for dtype in run.dtypes():
        for rms in (False, True):
            g = generator(2, rms)
            x = normal((1, 3, 600), dtype, g)
            small = [normal(shape, dtype, g) for shape in ((1, 600), (1, 600), (600,), (600,))]
            names = ("scale", "shift", "weight", "bias")
            y = run.norm_modulate(x, **dict(zip(names, small, strict=True)), rms=rms)
            exact, _ = exact_norm_modulate(x, *small, rms=rms)
            eager, _ = eager_norm_modulate(x.float(), *(t.float() for t in small), rms=rms)
            assert_one_rounding(f"norm_modulate on {run.label}, rms {rms}", y, exact, eager)


def check_ties_to_even(run: Runner) -> None:
    """One addition is exact in fp32, so torch's own sum in the dtype is right to the bit."""
    for dtype in run.dtypes():
        step = torch.finfo(dtype).eps / 2
        x = torch.tensor([1, 1 + 2 * step], dtype=dtype).repeat(32).view(1, 1, 64)
        branch = torch.full_like(x, step)
        out = run.gated_residual(x, [branch], [None])
        assert_equal(f"gated_residual on {run.label}, ties", out, x + branch)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(3)
        x, branch = normal((1, 3, 300), dtype, g), normal((1, 3, 300), dtype, g)
        gate = normal((1, 300), dtype, g)
        first = run.gated_residual(x, [branch, branch], [gate, None])
        normed = run.norm_modulate(x, gate, gate)
        for i in range(10):
            again = run.gated_residual(x, [branch, branch], [gate, None])
            assert_equal(f"gated_residual on {run.label}, repeat {i}", again, first)
            again = run.norm_modulate(x, gate, gate)
            assert_equal(f"norm_modulate on {run.label}, repeat {i}", again, normed)


def check_model_widths(run: Runner) -> None:
    for dtype in run.dtypes():
        for width in MODEL_WIDTHS:
            g = generator(4, width)
            rows = some_rows(2, 2, 3, g, torch.int32)
            x, store = normal((2, 2, width), dtype, g), normal((2, 3, width), dtype, g)
            gate = normal((2, 1, width), dtype, g)
            out = run.gated_residual(x, [x, store], [gate, None], fresh=0, rows=rows)
            args = ([x, store], [gate, None], 0, rows)
            exact, eager = exact_gated_residual(x, *args), eager_gated_residual(x, *args)
            assert_close(f"gated_residual on {run.label}, D {width}", out, exact, eager)
            y = run.norm_modulate(x, gate, gate)
            exact, eager = exact_norm_modulate(x, gate, gate), eager_norm_modulate(x, gate, gate)
            assert_close(f"norm_modulate on {run.label}, D {width}", y, exact[0], eager[0])


def check_shifted_rows(run: Runner) -> None:
    """Adding a constant to a row changes nothing, as long as the sum is exact."""
    for dtype in run.dtypes():
        step = 2**13 * torch.finfo(dtype).eps
        near = (step * torch.randint(64, (2, 3, 300), generator=generator(5))).to(dtype)
        y = run.norm_modulate(near + 2**13, eps=0.0)
        exact, _ = exact_norm_modulate(near, eps=0.0)
        eager, _ = eager_norm_modulate(near, eps=0.0)
        assert_close(f"norm_modulate on {run.label}, shifted rows", y, exact, eager)


def check_offsets_beyond_int32(run: Runner) -> None:
    """A stride and a row that fit int32, and their product that does not.

    Most of the store's pages are never touched. A debug build asserts on integer overflow, so a
    wrong address is not followed.
    """
    stride, tokens = 1 << 20, (1 << 11) + 2
    store = torch.empty((tokens - 1) * stride + 8, dtype=torch.float16)
    store = store.as_strided((1, tokens, 8), (tokens * stride, stride, 1))
    last = tokens - 1
    store[0, 0], store[0, last] = -1, torch.arange(8)
    rows = torch.tensor([[0, last]])
    x = torch.zeros(1, 2, 8, dtype=torch.float16)
    with debug_build():
        out = run.gated_residual(x, [store], [None], rows=rows)
        expected = torch.stack([store[:, 0], store[:, last]], 1)
        assert_equal(f"gated_residual on {run.label}, far rows", out, expected)
        run.norm_modulate(store, branch=torch.ones_like(x), rows=rows)
    expected = torch.arange(1, 9).half()
    assert_equal(f"norm_modulate on {run.label}, far rows of x", store[0, last], expected)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_triton(check, run):
    check(run)


def test_the_checks_of_all_backends_run_here():
    assert "triton" in backend_labels()


@pytest.mark.parametrize(
    "launch", [Launch(1, 16, 1), Launch(1, 128, 4), Launch(4, 32, 2), Launch(16, 64, 8)], ids=str
)
def test_every_tile_obeys_the_rule(launch):
    """The launch table may hold any tile: fewer columns than D, more rows than there are."""
    g = generator(5)
    x, branch = (normal((2, 5, 72), torch.bfloat16, g) for _ in range(2))
    gate = normal((2, 72), torch.bfloat16, g)
    out = poisoned(x.shape, x.dtype)
    gated_residual(x, [branch], [gate], -1, None, None, out, launch=launch)
    exact, eager = (f(x, [branch], [gate]) for f in (exact_gated_residual, eager_gated_residual))
    assert_close(f"gated_residual, {launch}", out, exact, eager)
    for rms in (False, True):
        out = poisoned(x.shape, x.dtype)
        norm_modulate(
            x, gate, gate, None, None, 1e-6, rms, None, None, None, None, out, launch=launch
        )
        exact, _ = exact_norm_modulate(x, gate, gate, rms=rms)
        eager, _ = eager_norm_modulate(x, gate, gate, rms=rms)
        assert_close(f"norm_modulate, {launch}, rms {rms}", out, exact, eager)


def test_rows_out_of_range_stop_a_debug_build():
    x, store = torch.zeros(1, 2, 8), torch.zeros(1, 4, 8)
    for wrong in (-1, 4):
        rows = torch.tensor([[1, wrong]])
        with debug_build(), pytest.raises(Exception, match="outside of its store"):
            gated_residual(x, [store], [None], -1, None, rows, torch.empty_like(x))


@triton.jit
def arithmetic_kernel(a, b, product, quotient, larger, exponential, matrix, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    left, right = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, left * right)
    tl.store(quotient + at, (left - right).to(tl.bfloat16))
    tl.store(larger + at, tl.where(left > right, left, right))
    tl.store(exponential + at, tl.exp(left.to(tl.float32)).to(tl.bfloat16))
    tl.store(matrix + at, tl.dot(left, right))


def test_the_shim_computes_bf16_as_torch_does():
    g = generator(6)
    a, b = (normal((16, 16), torch.bfloat16, g) for _ in range(2))
    outs = [poisoned((16, 16), torch.bfloat16) for _ in range(4)]
    matrix = poisoned((16, 16), torch.float32)
    arithmetic_kernel[(1,)](a, b, *outs, matrix, N=16)
    expected = (a * b, a - b, torch.maximum(a, b), a.float().exp().bfloat16())
    for what, got, want in zip(("a b", "a - b", "max", "exp"), outs, expected, strict=True):
        assert_equal(f"shim, {what}", got, want)
    assert_close("shim, dot", matrix, a.double() @ b.double(), a.float() @ b.float())


def test_the_shim_rounds_as_torch_does():
    bits = torch.arange(1 << 16, dtype=torch.int64) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (bits | low).to(torch.uint32).view(torch.float32)
        values = values[~values.isnan()]
        got = torch.from_numpy(narrow(values.numpy())).view(torch.bfloat16)
        assert_equal(f"shim, low half {low:#x}", got, values.bfloat16())
