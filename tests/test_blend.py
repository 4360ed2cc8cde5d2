"""blend and its gradients on every backend and instruction set, against fp64.

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
    gate_kinds,
    generator,
    misaligned,
    normal,
    padded_rows,
    poisoned,
)
from tolerance import Mismatch, assert_close, assert_equal, ulp
from truth import eager_blend, eager_blend_backward, exact_blend, exact_blend_backward

MANY_ROWS = (2, 700, 9)  # more than the partial sums of a GPU
WEIGHTS = (0.3, 0.0067, 0.9933)  # a logit within [-5, 5] gives no more than the last two


def weight(value: float, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def compare(run: Runner, what: str, out, blended, *arguments) -> None:
    exact, eager = exact_blend(*arguments), eager_blend(*arguments)
    what = f"blend on {run.label}, {what}"
    for part, found, truth, stock in zip(
        ("out", "blended"), (out, blended), exact, eager, strict=True
    ):
        if found is not None:
            assert_close(f"{what}, {part}", found, truth, stock)
            if run.backend.name == "reference":
                assert_equal(f"{what}, {part}, against torch", found, stock)


def compare_backward(run: Runner, what: str, found, *arguments) -> None:
    exact, eager = exact_blend_backward(*arguments), eager_blend_backward(*arguments)
    what = f"blend_backward on {run.label}, {what}"
    for part, ours, truth, stock in zip(("fresh", "cached"), found, exact, eager, strict=False):
        if ours is not None:
            assert_close(f"{what}, of {part}", ours, truth, stock)
    if found[2] is not None:
        assert_sum_close(f"{what}, of r", found[2], exact, eager)


def assert_sum_close(what: str, actual, exact, eager) -> None:
    """The rule of tolerance.py, with an ulp at the scale of the terms that are added."""
    (*_, truth, scale), stock = exact, eager[2]
    if not truth.isfinite():
        same = bool(actual.isnan()) if truth.isnan() else actual.item() == truth.item()
        if not same:
            raise Mismatch(f"{what}: {actual.item()!r}, expected {truth.item()!r}")
        return
    error = abs(actual.double() - truth).item()
    allowed = 2 * abs(stock.double() - truth).item() + ulp(scale, actual.dtype)
    if not error <= allowed:
        raise Mismatch(f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def operands(shape, dtype, *key):
    """fresh, cached, x and a gate [B, D]."""
    g = generator(*shape, *key)
    return *(normal(shape, dtype, g) for _ in range(3)), normal((shape[0], shape[2]), dtype, g)


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for i, shape in enumerate(SHAPES):
            fresh, cached, x, gate = operands(shape, dtype)
            r = weight(WEIGHTS[i % 3])
            out = run.blend(fresh, cached, r)
            compare(run, f"r {r}", out, None, fresh, cached, r)
            for by in (None, gate):
                blended = poisoned(shape, dtype)
                out = run.blend(fresh, cached, r, x=x, gate=by, blended=blended)
                compare(run, f"r {r} on x", out, blended, fresh, cached, r, x, by)


def check_one_operand_alone(run: Runner) -> None:
    """r = 1 is fresh and r = 0 is cached, bit for bit, whatever the other is."""
    shape = (2, 3, 71)
    for dtype in run.dtypes():
        fresh, _, x, gate = operands(shape, dtype, 1)
        fresh[0, 0, :2] = -0.0
        for poison in (float("nan"), float("inf"), 0.0):
            other = torch.full(shape, poison, dtype=dtype)
            for value, pair in ((1.0, (fresh, other)), (0.0, (other, fresh))):
                what = f"blend on {run.label}, r {value}"
                assert_equal(what, run.blend(*pair, weight(value)), fresh)
                blended = poisoned(shape, dtype)
                out = run.blend(*pair, weight(value), x=x, gate=gate, blended=blended)
                assert_equal(f"{what}, blended", blended, fresh)
                expected = run.gated_residual(x, [fresh], [gate])
                assert_equal(f"{what} on x", out, expected)


def check_gates(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in run.dtypes():
        g = generator(2)
        fresh, cached, x, _ = operands(shape, dtype, 2)
        grad, r = normal(shape, dtype, g), weight(0.4)
        for kind, gate in gate_kinds(batch, tokens, width, dtype, g).items():
            out = run.blend(fresh, cached, r, x=x, gate=gate)
            compare(run, f"gate {kind}", out, None, fresh, cached, r, x, gate)
            found = run.blend_backward(grad, fresh, cached, r, gate=gate)
            compare_backward(run, f"gate {kind}", found, grad, fresh, cached, r, gate)


def check_backward_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for i, shape in enumerate((*SHAPES, MANY_ROWS)):
            fresh, cached, grad, gate = operands(shape, dtype, 3)
            r = weight(WEIGHTS[i % 3])
            for by in (None, gate):
                found = run.blend_backward(grad, fresh, cached, r, gate=by)
                compare_backward(run, f"r {r}", found, grad, fresh, cached, r, by)


def check_each_gradient_alone(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype in run.dtypes():
        fresh, cached, grad, gate = operands(shape, dtype, 4)
        r = weight(0.7)
        whole = run.blend_backward(grad, fresh, cached, r, gate=gate)
        for i, letter in enumerate("fcr"):
            pair = (fresh, cached) if letter == "r" else (None, None)
            found = run.blend_backward(grad, *pair, r, gate=gate, wanted=letter)
            assert_equal(f"blend_backward on {run.label}, {letter} alone", found[i], whole[i])


def check_strides(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype in run.dtypes():
        fresh, cached, x, gate = operands(shape, dtype, 5)
        r = torch.tensor([9.0, 0.4, 9.0])[1]  # one of many, as a router's output is
        plain = run.blend(fresh, cached, r, x=x, gate=gate)
        grads = run.blend_backward(x, fresh, cached, r, gate=gate)
        alone = run.blend(fresh, cached, r)
        for view in (misaligned, padded_rows):
            for one in range(6):  # one operand at a time, then one of two results

                def seen(t, number, view=view, one=one):
                    return view(t) if number == one else t

                ts = [seen(t, i) for i, t in enumerate((fresh, cached, x))]
                by = misaligned(gate) if one == 3 else gate
                outs = [seen(poisoned(shape, dtype), i) for i in (4, 5)]
                run.blend(*ts[:2], r, x=ts[2], gate=by, blended=outs[0], out=outs[1])
                what = f"on {run.label}, view of number {one}"
                assert_equal(f"blend {what}", outs[1], plain)
                assert_equal(f"blended {what}", outs[0], alone)
                outs = [seen(poisoned(shape, dtype), i) for i in (4, 5)]
                found = run.blend_backward(ts[2], *ts[:2], r, gate=by, outs=(*outs, None))
                for part, expected in zip(found, grads, strict=True):
                    assert_equal(f"blend_backward {what}", part, expected)
        first = fresh[:, :1].expand(shape)
        out = run.blend(first, cached, r)
        assert_equal(f"blend on {run.label}, expanded", out, run.blend(first.clone(), cached, r))


def check_in_place(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((2, 17, 64), (1, 3, 1153)):
            fresh, cached, x, gate = operands(shape, dtype, 6)
            apart = run.blend(fresh, cached, weight(0.4), x=x, gate=gate)
            run.blend(fresh, cached, weight(0.4), x=x, gate=gate, out=x)
            assert_equal(f"blend on {run.label}, in place", x, apart)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((1, 1, 1), (2, 3, 71), (1, 2, 513)):
            fresh, cached, x, gate = operands(shape, dtype, 7)
            r = weight(0.4)
            inputs = Untouched(fresh=fresh, cached=cached, x=x, gate=gate, r=r)
            what = f"blend on {run.label}"
            outs = [Guarded(poisoned(shape, dtype)) for _ in range(4)]
            of_r = Guarded(poisoned((), r.dtype))
            written = [out.tensor for out in outs]
            run.blend(fresh, cached, r, x=x, gate=gate, blended=written[0], out=written[1])
            gradients = (*written[2:], of_r.tensor)
            run.blend_backward(x, fresh, cached, r, gate=gate, outs=gradients)
            for guarded in (*outs, of_r):
                guarded.assert_intact(what)
            inputs.check(what)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        fresh, cached, x, gate = operands((2, 17, 1152), dtype, 8)
        r = weight(0.4)
        first = run.blend(fresh, cached, r, x=x, gate=gate)
        grads = run.blend_backward(x, fresh, cached, r, gate=gate)
        threads = torch.get_num_threads()
        try:
            for i in range(4):
                torch.set_num_threads(1 + i % 2)  # above 32768 elements the kernels do split
                moved = misaligned(fresh, i % 5)
                again = run.blend(moved, cached, r, x=x, gate=gate)
                assert_equal(f"blend on {run.label}, repeat {i}", again, first)
                for part, expected in zip(
                    run.blend_backward(x, moved, cached, r, gate=gate), grads, strict=True
                ):
                    assert_equal(f"blend_backward on {run.label}, repeat {i}", part, expected)
        finally:
            torch.set_num_threads(threads)


def check_special_values(run: Runner) -> None:
    for dtype in run.dtypes():
        fresh, cached, x, gate = operands((1, 6, 72), dtype, 9)
        fresh[0, 1, 5], cached[0, 2, 6], x[0, 3, 7] = (float(v) for v in ("nan", "inf", "-inf"))
        r = weight(0.4)
        blended = poisoned(x.shape, dtype)
        out = run.blend(fresh, cached, r, x=x, gate=gate, blended=blended)
        compare(run, "special values", out, blended, fresh, cached, r, x, gate)
        found = run.blend_backward(x, fresh, cached, r, gate=gate)
        compare_backward(run, "special values", found, x, fresh, cached, r, gate)
        # One row that is not finite makes the sum so, and no other gradient.
        clean = x.nan_to_num(0.0, 0.0, 0.0)
        found = run.blend_backward(clean, cached, cached, r, gate=gate)
        assert bool(found[0].isfinite().all()), f"{run.label}: a gradient that reads an operand"
        assert bool(found[2].isnan()), f"{run.label}: inf - inf is lost"


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((0, 3, 8), (2, 0, 8)):
            nothing = torch.zeros(shape, dtype=dtype)
            assert run.blend(nothing, nothing.clone(), weight(0.5)).shape == shape
            found = run.blend_backward(nothing, nothing, nothing, weight(0.5))
            assert found[2].item() == 0, f"{run.label}: the sum of nothing"


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_blend(check, runner):
    check(runner)


# --- gradients, through the op


def leaves(dtype=torch.float64, shape=(2, 3, 5)):
    g = generator(11)
    made = [normal(shape, dtype, g).requires_grad_() for _ in range(3)]
    return made, weight(0.3, dtype if dtype is torch.float64 else torch.float32).requires_grad_()


@pytest.mark.parametrize("gate", [None, (5,), (2, 5), (1, 3, 5)], ids=str)
def test_gradients_are_those_of_finite_differences(gate):
    (fresh, cached, x), r = leaves()
    assert gradcheck(ops.blend, (fresh, cached, r))
    by = None if gate is None else normal(gate, torch.float64, generator(12)).requires_grad_()

    def on_x(fresh, cached, r, x, by):
        return ops.blend(fresh, cached, r, x=x, gate=by)

    assert gradcheck(on_x, (fresh, cached, r, x, by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", SERVING)
def test_gradients_are_those_of_torch(backend, dtype):
    """Only of what requires one, and added up over two uses of one router's output."""
    (fresh, cached, x), r = leaves(dtype, (2, 7, 40))
    cached = cached.detach()
    gate = normal((2, 40), dtype, generator(13))
    h = ops.blend(fresh, cached, r, x=x, gate=gate, backend=backend)
    (h * h).sum().backward()
    ours = [t.grad.clone() for t in (fresh, x, r)]
    assert [g.dtype for g in ours] == [dtype, dtype, torch.float32]
    wide = [t.detach().double().requires_grad_() for t in (fresh, x, r)]
    exact = exact_blend(wide[0], cached, wide[2], wide[1], gate)[0]
    (exact * exact).sum().backward()
    for t in (fresh, x, r):
        t.grad = None
    eager = eager_blend(fresh, cached, r, x, gate)[0]
    (eager * eager).sum().backward()
    for name, found, truth, stock in zip(
        ("fresh", "x", "r"), ours, wide, (fresh, x, r), strict=True
    ):
        assert_close(f"gradient of {name}, {backend}", found, truth.grad, stock.grad)


def test_a_constant_cached_costs_no_gradient(monkeypatch):
    (fresh, cached, _), r = leaves(torch.float32)
    seen = []
    from fastdit.backends.cpu import BACKEND

    original = type(BACKEND).blend_backward
    monkeypatch.setattr(
        type(BACKEND),
        "blend_backward",
        lambda self, *a: (seen.append([t is not None for t in a[-3:]]), original(self, *a))[0],
    )
    from fastdit.ops.registry import resolve

    resolve.cache_clear()
    ops.blend(fresh, cached.detach(), r).sum().backward()
    ops.blend(fresh.detach(), cached, r.detach()).sum().backward()
    resolve.cache_clear()
    assert seen == [[True, False, True], [False, True, False]]
    assert fresh.grad is not None
    assert cached.grad is not None


def test_the_blend_is_kept_as_a_constant():
    (fresh, cached, x), r = leaves(torch.float32)
    slot = poisoned(x.shape, x.dtype)
    h = ops.blend(fresh, cached, r, x=x, blended=slot)
    assert h.requires_grad
    assert not slot.requires_grad
    assert torch.equal(slot, ops.blend(fresh, cached, r))


def test_overwriting_what_a_gradient_needs_is_noticed():
    (fresh, cached, x), r = leaves(torch.float32)
    slot = cached.detach().clone()
    h = ops.blend(fresh, slot, r)
    ops.blend(fresh, cached.detach(), r, x=x, blended=slot)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_no_second_derivative():
    (fresh, cached, _), r = leaves()
    (first,) = torch.autograd.grad(ops.blend(fresh, cached, r).square().sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


def test_in_place_has_no_gradient():
    (fresh, cached, x), r = leaves(torch.float32)
    with pytest.raises(ArgumentError, match="gradient"):
        ops.blend(fresh, cached, r, out=torch.empty_like(fresh))
    with torch.no_grad():
        ops.blend(fresh, cached, r, x=x, out=x)


def test_checkpointing_gives_the_same_gradients():
    (fresh, cached, x), r = leaves(torch.float32)

    def block(x):
        return ops.blend(torch.tanh(x) * fresh, cached.detach(), r, x=x)

    block(x).sum().backward()
    plain = [t.grad.clone() for t in (fresh, x, r)]
    for t in (fresh, x, r):
        t.grad = None
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    for found, expected in zip((fresh, x, r), plain, strict=True):
        assert torch.equal(found.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_gradients(backend):
    (fresh, cached, x), r = leaves(torch.float32)
    cached = cached.detach()

    def f(fresh, x, r):
        return ops.blend(fresh * 2, cached, torch.sigmoid(r), x=x) * 3

    f(fresh, x, r).sum().backward()
    plain = [t.grad.clone() for t in (fresh, x, r)]
    for t in (fresh, x, r):
        t.grad = None
    torch.compile(f, fullgraph=True, backend=backend)(fresh, x, r).sum().backward()
    for found, expected in zip((fresh, x, r), plain, strict=True):
        assert torch.equal(found.grad, expected)
