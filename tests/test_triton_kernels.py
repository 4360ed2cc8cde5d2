"""The Triton kernels in the interpreter: their own checks, every tile, debug builds, and the shim.

test_triton_interpreter.py starts the process for this.
"""

from __future__ import annotations

import pytest
import torch

import kernel_checks
import test_blend
from conftest import backend_labels
from fastdit.ops import BACKENDS
from inputs import Runner, generator, normal, poisoned
from interpreter import INTERPRETED, debug_build, narrow
from tolerance import assert_close, assert_equal
from truth import (
    eager_attention,
    eager_blend,
    eager_collapse,
    eager_gated_residual,
    eager_norm_modulate,
    eager_swiglu,
    exact_attention,
    exact_blend,
    exact_collapse,
    exact_gated_residual,
    exact_norm_modulate,
    exact_swiglu,
)

if not INTERPRETED:
    pytest.skip(
        "run by test_triton_interpreter.py, in a process with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl

from triton_kernels.blend import blend, blend_backward
from triton_kernels.collapse import collapse
from triton_kernels.gated_residual import gated_residual
from triton_kernels.launch import Launch
from triton_kernels.norm_modulate import norm_modulate
from triton_kernels.sparse_attention import sparse_attention
from triton_kernels.swiglu import swiglu


@pytest.fixture
def run() -> Runner:
    return Runner(BACKENDS["triton"], "triton")


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


def check_more_tiles_than_partial_sums(run: Runner) -> None:
    """A program then takes several tiles; at this width each is one row."""
    for dtype in run.dtypes():
        g = generator(12)
        grad, fresh, cached = (normal((1, 1100, 1024), dtype, g) for _ in range(3))
        r = torch.tensor(0.3)
        found = run.blend_backward(grad, fresh, cached, r)
        test_blend.compare_backward(run, "many tiles", found, grad, fresh, cached, r)


CHECKS = kernel_checks.CHECKS | {
    "check_more_tiles_than_partial_sums": check_more_tiles_than_partial_sums,
    "check_offsets_beyond_int32": check_offsets_beyond_int32,
}


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
    r = torch.tensor(0.3)
    blend(x, branch, r, x, gate, None, out, launch=launch)
    exact, eager = (f(x, branch, r, x, gate)[0] for f in (exact_blend, eager_blend))
    assert_close(f"blend, {launch}", out, exact, eager)
    found = poisoned(x.shape, x.dtype), poisoned(x.shape, x.dtype), poisoned((), r.dtype)
    blend_backward(x, x, branch, r, gate, *found, launch=launch)
    test_blend.compare_backward(
        Runner(BACKENDS["triton"], "triton"), f"{launch}", found, x, x, branch, r, gate
    )
    sums, given = poisoned((2, *x.shape), x.dtype), ([x, branch], [gate, None], [0, 1])
    collapse(*given, False, sums, launch=launch)
    exact, eager = exact_collapse(*given, count=2), eager_collapse(*given, count=2)
    assert_close(f"collapse, {launch}", sums, exact, eager)
    swiglu(x, branch, out, launch=launch)
    exact, eager = (f(x, branch) for f in (exact_swiglu, eager_swiglu))
    assert_close(f"swiglu, {launch}", out, exact, eager)
    for rms in (False, True):
        out = poisoned(x.shape, x.dtype)
        norm_modulate(
            x, gate, gate, None, None, 1e-6, rms, None, None, None, None, out, launch=launch
        )
        exact, _ = exact_norm_modulate(x, gate, gate, rms=rms)
        eager, _ = eager_norm_modulate(x, gate, gate, rms=rms)
        assert_close(f"norm_modulate, {launch}, rms {rms}", out, exact, eager)


@pytest.mark.parametrize("launch", [Launch(16, 16, 4), Launch(32, 32, 4)], ids=str)
def test_however_the_keys_are_shared_attention_obeys_the_rule(launch):
    """Tiles done whole and tiles in parts, of equal and of unequal numbers of blocks."""
    g = generator(8)
    q = normal((1, 17, 2, 72), torch.bfloat16, g)
    k, v = (normal((1, 70, 1, 72), torch.bfloat16, g) for _ in range(2))
    exact, eager = exact_attention(q, k, v), eager_attention(q, k, v)
    tiles, blocks = 2 * -(-17 // launch.rows), -(-70 // launch.cols)
    for whole in range(tiles + 1):
        for parts in range(1, blocks + 1):
            out = poisoned(q.shape, q.dtype)
            sparse_attention(q, k, v, 72**-0.5, out, launch=launch, shares=(whole, parts))
            assert_close(f"{whole} of {tiles} tiles whole, {parts} parts", out, exact, eager)


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
