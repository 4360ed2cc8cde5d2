"""What the Triton kernels promise beyond the checks of all backends: one rounding, and no digit lost.

Each `check_*` takes a Runner like those of test_gated_residual.py. They run in the interpreter
(test_triton_kernels.py), with planted faults (test_triton_faults.py) and on a GPU
(test_triton_gpu.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inputs import Runner, generator, normal, poisoned, some_rows
from tolerance import Mismatch, assert_close, assert_equal
from truth import (
    eager_blend,
    eager_collapse,
    eager_gated_residual,
    eager_head_norm,
    eager_norm_modulate,
    eager_rotation,
    eager_swiglu,
    exact_blend,
    exact_collapse,
    exact_gated_residual,
    exact_head_norm,
    exact_norm_modulate,
    exact_rotation,
    exact_swiglu,
)

MODEL_WIDTHS = (1152, 1536, 2304, 2432, 3072)


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


def check_shifted_heads(run: Runner) -> None:
    """The same for the norm of all heads of a token."""
    for dtype in run.dtypes():
        step = 2**13 * torch.finfo(dtype).eps
        near = (step * torch.randint(64, (2, 3, 4 * 72), generator=generator(6))).to(dtype)
        outputs = [poisoned((2, 3, 4, 72), dtype) for _ in range(3)]
        run.qkv_prologue(near + 2**13, *[near] * 2, *outputs, norm="layer", eps=0.0)
        exact = exact_head_norm(near, 4, "layer", eps=0.0)
        eager = eager_head_norm(near, 4, "layer", eps=0.0)
        assert_close(f"qkv_prologue on {run.label}, shifted heads", outputs[0], exact, eager)


def check_one_rounding_of_heads(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in ("rms", "layer"):
            g = generator(7)
            q = normal((1, 3, 4 * 72), dtype, g)
            weight = normal((72 if norm == "rms" else 4 * 72,), dtype, g)
            angles = 6.3 * torch.rand((3, 36), generator=g)
            table = angles.cos(), angles.sin()
            outputs = [poisoned((1, 3, 4, 72), dtype) for _ in range(3)]
            options = {"norm": norm, "q_weight": weight, "cos": table[0], "sin": table[1]}
            run.qkv_prologue(q, q, q, *outputs, **options)
            positions = torch.arange(3)[None]
            exact = exact_rotation(exact_head_norm(q, 4, norm, weight), *table, positions)
            wide = eager_head_norm(q.float(), 4, norm, weight.float())
            what = f"qkv_prologue on {run.label}, norm {norm}"
            assert_one_rounding(what, outputs[0], exact, eager_rotation(wide, *table, positions))


def check_one_rounding_of_blends(run: Runner) -> None:
    """Also of what is added to x: it is the blend as it was before it was rounded."""
    for dtype in run.dtypes():
        g = generator(8)
        fresh, cached, x = (normal((1, 3, 72), dtype, g) for _ in range(3))
        gate, r = normal((1, 72), dtype, g), torch.tensor(0.3)
        out = run.blend(fresh, cached, r, x=x, gate=gate)
        exact, _ = exact_blend(fresh, cached, r, x, gate)
        wide, _ = eager_blend(fresh.float(), cached.float(), r, x.float(), gate.float())
        assert_one_rounding(f"blend on {run.label}", out, exact, wide)


def check_one_rounding_of_sums_by_group(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(9)
        branches = [normal((1, 3, 72), dtype, g) for _ in range(16)]
        weights = [normal((1, 72), dtype, g) for _ in range(16)]
        groups = [i % 3 for i in range(16)]
        sums = run.collapse(branches, weights, groups)
        exact = exact_collapse(branches, weights, groups, count=3)
        wide = [[t.float() for t in ts] for ts in (branches, weights)]
        eager = eager_collapse(*wide, groups, count=3)
        assert_one_rounding(f"collapse on {run.label}", sums, exact, eager)


def check_one_rounding_of_gated_values(run: Runner) -> None:
    """The SiLU is not rounded before it multiplies."""
    for dtype in run.dtypes():
        g = generator(11)
        gate, value = (4 * normal((1, 3, 600), dtype, g) for _ in range(2))
        out = run.swiglu(gate, value)
        wide = eager_swiglu(gate.float(), value.float())
        assert_one_rounding(f"swiglu on {run.label}", out, exact_swiglu(gate, value), wide)


def check_repeats_of_gradients(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(10)
        grad, fresh, cached = (normal((2, 9, 300), dtype, g) for _ in range(3))
        first = run.blend_backward(grad, fresh, cached, torch.tensor(0.3))
        for i in range(3):
            again = run.blend_backward(grad, fresh, cached, torch.tensor(0.3))
            for part, expected in zip(again, first, strict=True):
                assert_equal(f"blend_backward on {run.label}, repeat {i}", part, expected)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}
