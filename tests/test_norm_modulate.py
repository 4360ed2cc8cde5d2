"""norm_modulate on every backend and instruction set, against fp64.

Each `check_*` takes a Runner and raises where the backend is wrong; test_faults.py runs the same
functions on backends with planted faults.
"""

from __future__ import annotations

import pytest
import torch

from inputs import (
    SHAPES,
    Guarded,
    Runner,
    Untouched,
    gate_kinds,
    generator,
    misaligned,
    near,
    normal,
    padded_rows,
    poisoned,
    sixteen_bits,
    some_rows,
)
from tolerance import Mismatch, assert_close, assert_equal
from truth import dequantised, eager_norm_modulate, exact_norm_modulate, quantised

FP8 = torch.float8_e4m3fn


def compare(run: Runner, what: str, y, x, *modulation, updated=None, **options) -> None:
    """y, and the updated x where given, for x as it was before the call."""
    exact_y, exact_x = exact_norm_modulate(x, *modulation, **options)
    eager_y, eager_x = eager_norm_modulate(x, *modulation, **options)
    what = f"norm_modulate on {run.label}, {what}"
    assert_close(what, y, exact_y, eager_y)
    if updated is not None:
        assert_close(f"{what}, x", updated, exact_x, eager_x)
    if run.backend.name == "reference":
        assert_equal(f"{what}, against stock", y, eager_y)


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in SHAPES:
            for rms in (False, True):
                g = generator(*shape, rms)
                x = normal(shape, dtype, g)
                scale, shift = (normal((shape[0], shape[2]), dtype, g) for _ in range(2))
                y = run.norm_modulate(x, scale, shift, rms=rms)
                compare(run, f"rms {rms}", y, x, scale, shift, rms=rms)


def check_optional_parts(run: Runner) -> None:
    shape = (2, 3, 72)
    for dtype in run.dtypes():
        for rms in (False, True):
            for given in range(16):
                g = generator(given, rms)
                x = normal(shape, dtype, g)
                scale, shift = (normal((2, 72), dtype, g) if given & i else None for i in (1, 2))
                weight, bias = (normal((72,), dtype, g) if given & i else None for i in (4, 8))
                options = {"weight": weight, "bias": bias, "rms": rms, "eps": 1e-5}
                y = run.norm_modulate(x, scale, shift, **options)
                compare(run, f"parts {given:04b}", y, x, scale, shift, **options)


def check_modulations(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in run.dtypes():
        g = generator(1)
        x = normal(shape, dtype, g)
        shift = normal((batch, 1, width), dtype, g)
        for kind, m in gate_kinds(batch, tokens, width, dtype, g).items():
            compare(run, f"scale {kind}", run.norm_modulate(x, m, shift), x, m, shift)
            compare(run, f"shift {kind}", run.norm_modulate(x, shift, m), x, shift, m)


def check_branch(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((1, 1, 1), (3, 2, 7), (2, 17, 64), (1, 3, 1153)):
            for gate_shape in (None, (shape[0], 1, shape[2]), shape):
                for rms in (False, True):
                    g = generator(*shape, rms)
                    x, branch = normal(shape, dtype, g), normal(shape, dtype, g)
                    scale, shift = (normal((shape[0], shape[2]), dtype, g) for _ in range(2))
                    gate = None if gate_shape is None else normal(gate_shape, dtype, g)
                    before = x.clone()
                    y = run.norm_modulate(x, scale, shift, rms=rms, branch=branch, gate=gate)
                    options = {"rms": rms, "branch": branch, "gate": gate}
                    compare(run, "branch", y, before, scale, shift, updated=x, **options)


def check_fused_equals_two_ops(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(2)
        x, branch = normal((2, 5, 72), dtype, g), normal((2, 5, 72), dtype, g)
        scale, shift, gate = (normal((2, 72), dtype, g) for _ in range(3))
        first = run.gated_residual(x, [branch], [gate])
        second = run.norm_modulate(first, scale, shift)
        y = run.norm_modulate(x, scale, shift, branch=branch, gate=gate)
        assert_equal(f"norm_modulate on {run.label}, x by two ops", x, first)
        assert_equal(f"norm_modulate on {run.label}, y by two ops", y, second)


def check_rows(run: Runner) -> None:
    tokens = 19
    for dtype in run.dtypes():
        for batch, active, width in ((1, 1, 7), (2, 17, 64), (3, 5, 528), (2, 19, 40)):
            for kind in (torch.int64, torch.int32):
                g = generator(batch, active, width)
                rows = some_rows(batch, active, tokens, g, kind)
                x = normal((batch, tokens, width), dtype, g)
                branch = normal((batch, active, width), dtype, g)
                scale, shift, gate = (normal((batch, width), dtype, g) for _ in range(3))
                before, cache = x.clone(), normal((batch, tokens, width), dtype, g)
                picked = _picked(before, rows)
                y = run.norm_modulate(x, scale, shift, rows=rows)
                compare(run, "rows", y, picked, scale, shift)
                assert_equal(f"norm_modulate on {run.label}, x is read only", x, before)
                expected = cache.clone()
                residual = {"branch": branch, "gate": gate}
                y = run.norm_modulate(x, scale, shift, rows=rows, cache=cache, **residual)
                now = _picked(x, rows)
                compare(run, "rows, branch", y, picked, scale, shift, updated=now, **residual)
                for b in range(batch):
                    for k in range(active):
                        expected[b, int(rows[b, k])] = branch[b, k]
                        before[b, int(rows[b, k])] = x[b, int(rows[b, k])]
                assert_equal(f"norm_modulate on {run.label}, cache", cache, expected)
                assert_equal(f"norm_modulate on {run.label}, other rows of x", x, before)


def _picked(store, rows):
    return torch.stack([store[b, rows[b].long()] for b in range(store.shape[0])])


def check_cache_without_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(3)
        x, branch = normal((2, 3, 71), dtype, g), normal((2, 3, 71), dtype, g)
        branch[0, 0, :2] = torch.tensor([-0.0, float("nan")], dtype=dtype)
        cache = Guarded(poisoned((2, 3, 71), dtype))
        run.norm_modulate(x, branch=branch, cache=cache.tensor)
        assert_equal(f"norm_modulate on {run.label}, cache", cache.tensor, branch)
        cache.assert_intact(f"norm_modulate on {run.label}, cache")


def check_strides(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype in run.dtypes():
        g = generator(4)
        x, branch = normal(shape, dtype, g), normal(shape, dtype, g)
        scale, shift, gate = (normal((2, 72), dtype, g) for _ in range(3))
        plain_x = x.clone()
        plain = run.norm_modulate(plain_x, scale, shift, branch=branch, gate=gate)
        for view in (misaligned, padded_rows):
            viewed, out = view(x), view(poisoned(shape, dtype))
            cache = view(poisoned(shape, dtype))
            residual = {"branch": view(branch), "gate": gate, "cache": cache}
            run.norm_modulate(viewed, scale, shift, out=out, **residual)
            what = f"norm_modulate on {run.label}, {view.__name__}"
            assert_equal(f"{what}, y", out, plain)
            assert_equal(f"{what}, x", viewed, plain_x)
            assert_equal(f"{what}, cache", cache, branch)
        plain = run.norm_modulate(x, scale, shift)
        for one in (misaligned(scale), misaligned(shift)):
            pair = (one, shift) if torch.equal(one, scale) else (scale, one)
            y = run.norm_modulate(x, *pair)
            assert_equal(f"norm_modulate on {run.label}, one modulation misaligned", y, plain)


def check_in_place(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((2, 17, 64), (1, 3, 1153)):
            g = generator(5)
            x, scale = normal(shape, dtype, g), normal((shape[0], shape[2]), dtype, g)
            apart = run.norm_modulate(x, scale, None)
            run.norm_modulate(x, scale, None, out=x)
            assert_equal(f"norm_modulate on {run.label}, in place", x, apart)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for batch, active, width in ((1, 1, 1), (2, 3, 71), (1, 2, 513)):
            g = generator(6)
            shape = (batch, active, width)
            rows = some_rows(batch, active, active + 2, g)
            x = Guarded(normal((batch, active + 2, width), dtype, g))
            branch, scale, shift, gate = (normal(shape, dtype, g) for _ in range(4))
            out = Guarded(poisoned(shape, dtype))
            inputs = Untouched(branch=branch, scale=scale, shift=shift, gate=gate, rows=rows)
            residual = {"branch": branch, "gate": gate}
            run.norm_modulate(x.tensor, scale, shift, rows=rows, out=out.tensor, **residual)
            what = f"norm_modulate on {run.label}"
            x.assert_intact(what)
            out.assert_intact(what)
            inputs.check(what)
            plain = Untouched(x=x.tensor)
            run.norm_modulate(x.tensor, scale, shift, rows=rows, out=out.tensor)
            plain.check(what)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(7)
        x, scale, shift = (normal((2, 17, 1152), dtype, g) for _ in range(3))
        first = run.norm_modulate(x, scale, shift)
        threads = torch.get_num_threads()
        try:
            for i in range(run.repeats(10)):
                torch.set_num_threads(1 + i % 2)  # above 32768 elements the kernels do split
                again = run.norm_modulate(x, misaligned(scale, i % 5), shift)
                assert_equal(f"norm_modulate on {run.label}, repeat {i}", again, first)
        finally:
            torch.set_num_threads(threads)


def check_offset_rows(run: Runner) -> None:
    """A mean of 1e4 with a deviation of 1e-2: E[x^2] - m^2 has no digit left."""
    for dtype in run.dtypes():
        for width in (64, 1152):
            g = generator(8, width)
            x = (1e4 + 1e-2 * normal((2, 3, width), torch.float64, g)).to(dtype)
            compare(run, "mean 1e4, deviation 1e-2", run.norm_modulate(x), x)


def check_constant_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        for value in (0.0, 1.0, 0.1, -3.3e4, 1e-7):
            for rms in (False, True):
                x = torch.full((1, 2, 71), value, dtype=dtype)
                y = run.norm_modulate(x, rms=rms)
                compare(run, f"all elements {value}", y, x, rms=rms)


def check_special_values(run: Runner) -> None:
    for dtype in run.dtypes():
        for rms in (False, True):
            g = generator(9)
            x = normal((1, 6, 72), dtype, g)
            plain = run.norm_modulate(x, rms=rms)
            x[0, 1, 5], x[0, 3, 6] = float("nan"), float("inf")
            y = run.norm_modulate(x, rms=rms)
            what = f"norm_modulate on {run.label}, rows beside NaN and infinity"
            assert_equal(what, y[:, ::2], plain[:, ::2])
            compare(run, "special values", y, x, rms=rms)
            scale = normal((1, 6, 72), dtype, g)
            scale[0, 4] = torch.finfo(dtype).max / 8
            compare(run, "huge scale", run.norm_modulate(x, scale, rms=rms), x, scale, rms=rms)


def check_permuted_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(10)
        rows = some_rows(2, 7, 23, g)
        x, scale = normal((2, 23, 64), dtype, g), normal((2, 64), dtype, g)
        order = torch.randperm(7, generator=g)
        plain = run.norm_modulate(x, scale, rows=rows)
        moved = run.norm_modulate(x, scale, rows=rows[:, order].contiguous())
        assert_equal(f"norm_modulate on {run.label}, permuted", moved, plain[:, order])


def check_identity_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(11)
        x, branch = normal((2, 9, 64), dtype, g), normal((2, 9, 64), dtype, g)
        scale, shift, gate = (normal((2, 64), dtype, g) for _ in range(3))
        xs, rows = [x.clone(), x.clone()], torch.arange(9).expand(2, 9)
        caches = [poisoned((2, 9, 64), dtype) for _ in range(2)]
        residual = {"branch": branch, "gate": gate}
        dense = run.norm_modulate(xs[0], scale, shift, cache=caches[0], **residual)
        by_rows = run.norm_modulate(xs[1], scale, shift, cache=caches[1], rows=rows, **residual)
        for name, a, b in (("y", by_rows, dense), ("x", *xs), ("cache", *caches)):
            assert_equal(f"norm_modulate on {run.label}, identity rows, {name}", a, b)


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((0, 3, 8), (2, 0, 8)):
            x = torch.full((shape[0], 5, 8), 2.0, dtype=dtype)
            rows = torch.zeros(shape[:2], dtype=torch.int64)
            branch = torch.zeros(shape, dtype=dtype)
            assert run.norm_modulate(x, rows=rows, branch=branch).shape == shape
            assert bool((x == 2.0).all())


def check_fp8(run: Runner) -> None:
    """As near to fp64 as quantising what stock makes; the same bits as quantising what the op makes."""
    for dtype in run.dtypes():
        for shape in SHAPES:
            for rms in (False, True):
                g = generator(*shape, rms)
                x, branch = normal(shape, dtype, g), normal(shape, dtype, g)
                scale, shift, gate = (normal((shape[0], shape[2]), dtype, g) for _ in range(3))
                residual = {"branch": branch, "gate": gate} if rms else {}
                before, other = x.clone(), x.clone()
                y, row_scale = _in_fp8(run, x, scale, shift, rms=rms, **residual)
                what = f"norm_modulate on {run.label}, fp8, rms {rms}"
                exact, _ = exact_norm_modulate(before, scale, shift, rms=rms, **residual)
                eager, _ = eager_norm_modulate(before, scale, shift, rms=rms, **residual)
                assert_close(what, dequantised(y, row_scale), exact, dequantised(*quantised(eager)))
                plain = run.norm_modulate(other, scale, shift, rms=rms, **residual)
                _assert_quantised(what, y, row_scale, plain)
                assert_equal(f"{what}, x", x, other)


def check_fp8_values(run: Runner) -> None:
    """Whatever is quantised: ties, subnormals, rows of zeros, what is too small to divide by, infinity, NaN."""
    infinity, nan = float("inf"), float("nan")
    for dtype in run.dtypes():
        limits = torch.finfo(dtype)
        tiny = max(limits.tiny, 1e-36)
        steps = torch.arange(-448.0, 448.0, 0.5, dtype=torch.float64)
        rows = [
            steps,  # all halves, so all ties from 16 on
            steps * 0.875,  # ties of quotients that a product with the inverse misses
            torch.cat([torch.tensor([448.0]).double(), steps / 2**13]),  # ties of subnormals
            torch.cat([torch.tensor([3.0]).double(), steps / 2**10]),
            torch.zeros(5).double(),
            torch.tensor([tiny, -tiny]).double(),
            torch.tensor([limits.max, -limits.max, limits.max / 3]).double(),
            torch.tensor([1.0, infinity, -infinity, 0.0]).double(),
            torch.tensor([1.0, nan, 3.0]).double(),
            torch.tensor([infinity, nan]).double(),
            *(normal((700,), torch.float64, generator(n)) * 10.0 ** (n - 3) for n in range(7)),
        ]
        width = max(map(len, rows))
        shift = torch.stack([torch.cat([r, r.new_zeros(width - len(r))]) for r in rows]).to(dtype)
        g = generator(12)
        x, none = normal((1, *shift.shape), dtype, g), torch.full((width,), -1.0, dtype=dtype)
        y, row_scale = _in_fp8(run, x, none, shift[None])  # times 0, and so the shift
        _assert_quantised(f"norm_modulate on {run.label}, values", y, row_scale, shift[None])
        most = shift.abs().amax(dim=-1).double()
        usable = most.isfinite() & (most > 500 * 2.0**-126)
        error = (dequantised(y, row_scale)[0] - shift.double())[usable].abs()
        rounding = limits.eps * most + most / 448 * 2.0**-9 + shift.double().abs().T / 16
        if dtype is not torch.float16:  # whose scales are subnormal there
            assert bool((error <= rounding.T[usable]).all())


def check_fp8_rows(run: Runner) -> None:
    """Of rows, in views, beside guards."""
    for dtype in run.dtypes():
        for width in (64, 71, 1160):
            g = generator(13, width)
            rows = some_rows(2, 5, 9, g)
            x, branch = normal((2, 9, width), dtype, g), normal((2, 5, width), dtype, g)
            modulation = [normal((2, 1, width), dtype, g) for _ in range(2)]
            residual = {"branch": branch, "gate": modulation[0], "rows": rows}
            expected_x, cache = x.clone(), poisoned(x.shape, dtype)
            plain = run.norm_modulate(expected_x, *modulation, **residual)
            data = Guarded(torch.zeros(2, 7, width + 8, dtype=torch.uint8))
            numbers = Guarded(torch.zeros(2, 7))
            out, row_scale = data.tensor.view(FP8)[:, 1:6, :width], numbers.tensor[:, 1:6]
            outputs = {"out": out, "row_scale": row_scale, "cache": cache}
            run.norm_modulate(x, *modulation, **residual, **outputs)
            what = f"norm_modulate on {run.label}, fp8 rows of {width}"
            _assert_quantised(what, out, row_scale, plain)
            assert_equal(f"{what}, x", x, expected_x)
            assert_equal(
                f"{what}, cache",
                torch.stack([c[r] for c, r in zip(cache, rows, strict=True)]),
                branch,
            )
            for kept in (data, numbers):
                kept.assert_intact(what)
                if bool(kept.tensor[:, [0, 6]].any()):
                    raise Mismatch(f"{what}: wrote rows that are no part of it")
            if bool(data.tensor[..., width:].any()):
                raise Mismatch(f"{what}: wrote past the end of a row")


def _in_fp8(run, x, *modulation, **options):
    row_scale = poisoned(x.shape[:2], torch.float32)
    return run.norm_modulate(x, *modulation, row_scale=row_scale, **options), row_scale


def _assert_quantised(what: str, y, row_scale, plain) -> None:
    """The bits of `plain` in fp8, but for the sign of a NaN."""
    expected, expected_scale = quantised(plain)
    if not torch.equal(y.float().isnan(), expected.float().isnan()):
        raise Mismatch(f"{what}: NaN elsewhere")
    y, expected = (t.float().nan_to_num(nan=-500.0) for t in (y, expected))
    assert_equal(f"{what}, y", y + 0.0, expected + 0.0)
    assert_equal(
        f"{what}, row_scale", row_scale.nan_to_num(nan=-1.0), expected_scale.nan_to_num(nan=-1.0)
    )


def check_wide_vectors(run: Runner) -> None:
    """fp32 beside 16 bits: x is 1 and -1 in turn, its own norm, and what is near to it is taken off again."""
    for dtype in sixteen_bits(run.dtypes()):
        for width in (8, 72, 1154):
            for rms in (False, True):
                g = generator(14, width, rms)
                signs = 1.0 - 2.0 * (torch.arange(width) % 2)
                x = signs.to(dtype).expand(2, 3, width).contiguous()
                options = {"rms": rms, "eps": 0.0}
                for modulation in (
                    (near(1.0, (2, width), g), near(-2 * signs, (2, 1, width), g)),
                    (near(1.0, (2, 3, width), g), near(-2 * signs, (2, 3, width), g)),
                    (near(-1.0, (width,), g), None),
                    (None, near(-signs, (1, width), g)),
                ):
                    y = run.norm_modulate(x, *modulation, **options)
                    compare(run, "wide scale and shift", y, x, *modulation, **options)
                affine = {"weight": near(1.0, (width,), g), "bias": near(-signs, (width,), g)}
                for given in (affine, {"bias": affine["bias"]}):
                    y = run.norm_modulate(x, **given, **options)
                    compare(run, "wide weight and bias", y, x, **given, **options)
                scale, both = normal((2, width), dtype, g), affine | options
                y = run.norm_modulate(x, scale, **both)
                compare(run, "wide weight beside a scale", y, x, scale, **both)
                scale, narrow = near(-1.0, (2, width), g), {"weight": scale[0], **options}
                y = run.norm_modulate(x, scale, **narrow)
                compare(run, "a wide scale beside a weight", y, x, scale, **narrow)


def check_a_wide_gate(run: Runner) -> None:
    for dtype in sixteen_bits(run.dtypes()):
        for shape in ((3, 2, 7), (2, 5, 72), (1, 3, 1153)):
            for gate_shape in ((shape[0], shape[2]), shape):
                g = generator(15, *shape)
                x = normal(shape, dtype, g)
                scale, shift = (normal((shape[0], shape[2]), dtype, g) for _ in range(2))
                residual = {"branch": -x, "gate": near(1.0, gate_shape, g)}
                before, first = x.clone(), run.gated_residual(x, [-x], [residual["gate"]])
                y = run.norm_modulate(x, scale, shift, eps=1e-8, **residual)
                options = {"eps": 1e-8} | residual
                compare(run, "a wide gate", y, before, scale, shift, updated=x, **options)
                assert_equal(f"norm_modulate on {run.label}, wide gate by two ops", x, first)


def check_wide_vectors_of_every_form(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in sixteen_bits(run.dtypes()):
        g = generator(16)
        x, other = normal(shape, dtype, g), normal((batch, width), torch.float32, g)
        plain = run.norm_modulate(x, other, other)
        for moved in (misaligned(other), misaligned(other, 2)):
            for pair in ((moved, other), (other, moved)):
                y = run.norm_modulate(x, *pair)
                assert_equal(f"norm_modulate on {run.label}, a wide vector misaligned", y, plain)
        for kind, m in gate_kinds(batch, tokens, width, torch.float32, g).items():
            compare(run, f"wide scale {kind}", run.norm_modulate(x, m, other), x, m, other)
            compare(run, f"wide shift {kind}", run.norm_modulate(x, other, m), x, other, m)
        half = other.to(dtype)
        for pair in ((other, half), (half, other)):
            y = run.norm_modulate(x, *pair)
            compare(run, "a wide vector beside one that is not", y, x, *pair)
        row_scale = poisoned(x.shape[:2], torch.float32)
        y = run.norm_modulate(x, other, half, row_scale=row_scale)
        plain = run.norm_modulate(x, other, half)
        _assert_quantised(f"norm_modulate on {run.label}, wide, fp8", y, row_scale, plain)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_norm_modulate(check, runner):
    check(runner)
