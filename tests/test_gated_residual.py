"""gated_residual on every backend and instruction set, against fp64.

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
from tolerance import assert_close, assert_equal
from truth import eager_gated_residual, exact_gated_residual


def compare(
    run: Runner, what: str, out, x, branches, gates, fresh=-1, rows=None, weights=None
) -> None:
    exact = exact_gated_residual(x, branches, gates, fresh, rows, weights)
    eager = eager_gated_residual(x, branches, gates, fresh, rows, weights)
    assert_close(f"gated_residual on {run.label}, {what}", out, exact, eager)
    if run.backend.name == "reference" and weights is None:  # drawn outputs are not stock's
        assert_equal(f"gated_residual on {run.label} against stock, {what}", out, eager)


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in SHAPES:
            for count in (1, 2, 5):
                g = generator(*shape, count)
                x = normal(shape, dtype, g)
                branches = [normal(shape, dtype, g) for _ in range(count)]
                gates = [normal((shape[0], shape[2]), dtype, g) for _ in range(count)]
                out = run.gated_residual(x, branches, gates)
                compare(run, f"{count} branches", out, x, branches, gates)


def check_many_branches(run: Runner) -> None:
    shape = (2, 3, 72)
    for dtype in run.dtypes():
        for count in (16, 128):
            g = generator(count)
            x = normal(shape, dtype, g)
            branches = [normal(shape, dtype, g) for _ in range(count)]
            gates = [normal((2, 1, 72), dtype, g) if i % 3 else None for i in range(count)]
            out = run.gated_residual(x, branches, gates)
            compare(run, f"{count} branches", out, x, branches, gates)


def check_gates(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in run.dtypes():
        g = generator(1)
        x, branch = normal(shape, dtype, g), normal(shape, dtype, g)
        for kind, gate in gate_kinds(batch, tokens, width, dtype, g).items():
            out = run.gated_residual(x, [branch], [gate])
            compare(run, f"gate {kind}", out, x, [branch], [gate])


def check_strides(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype in run.dtypes():
        g = generator(2)
        x, first, second = (normal(shape, dtype, g) for _ in range(3))
        gate = normal((2, 1, 72), dtype, g)
        plain = run.gated_residual(x, [first, second], [gate, None])
        for view in (misaligned, padded_rows, lambda t: t[:, :1].expand(t.shape)):
            branches, expected = [view(first), second], plain
            if view not in (misaligned, padded_rows):
                expected = run.gated_residual(
                    x, [first[:, :1].repeat(1, 5, 1), second], [gate, None]
                )
            out = padded_rows(poisoned(shape, dtype))
            run.gated_residual(x, branches, [gate, None], out=out)
            assert_equal(f"gated_residual on {run.label}, view of a branch", out, expected)
        out = run.gated_residual(x, [misaligned(first), second], [gate, None])
        assert_equal(f"gated_residual on {run.label}, a branch alone misaligned", out, plain)
        out = run.gated_residual(x, [first, second], [misaligned(gate), None])
        assert_equal(f"gated_residual on {run.label}, a gate alone misaligned", out, plain)
        out = run.gated_residual(padded_rows(x), [misaligned(first, 3), second], [gate, None])
        assert_equal(f"gated_residual on {run.label}, view of x", out, plain)
        transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
        out = run.gated_residual(transposed, [first, second], [gate, None])
        assert_equal(f"gated_residual on {run.label}, transposed x", out, plain)
        store = normal((2, 9, 72), dtype, g)
        out = run.gated_residual(x, [store[:, :5], store[:, 4:]], [gate, gate])
        compare(run, "slices", out, x, [store[:, :5], store[:, 4:]], [gate, gate])


def check_rows(run: Runner) -> None:
    tokens = 19
    for dtype in run.dtypes():
        for batch, active, width in ((1, 1, 7), (2, 17, 64), (3, 5, 528)):
            for fresh in (-1, 0, 1):
                for kind in (torch.int64, torch.int32):
                    g = generator(batch, active, width, fresh)
                    rows = some_rows(batch, active, tokens, g, kind)
                    x = normal((batch, active, width), dtype, g)
                    branches = [normal((batch, tokens, width), dtype, g) for _ in range(3)]
                    if fresh >= 0:
                        branches[fresh] = normal((batch, active, width), dtype, g)
                    gates = [normal((batch, width), dtype, g), None, normal((width,), dtype, g)]
                    out = run.gated_residual(x, branches, gates, fresh=fresh, rows=rows)
                    compare(run, f"rows, fresh {fresh}", out, x, branches, gates, fresh, rows)


def check_rows_of_strided_stores(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(3)
        rows = some_rows(2, 4, 11, g)
        wide = torch.stack([rows, rows], 2).flatten(1)[:, :4]  # a view with a batch stride of 8
        x, fresh = normal((2, 4, 40), dtype, g), normal((2, 4, 40), dtype, g)
        short, long = (padded_rows(normal((2, n, 40), dtype, g)) for n in (11, 13))
        gates = [normal((2, 40), dtype, g)] * 3
        for index in (rows, wide):
            branches = [short, fresh, long]
            out = run.gated_residual(x, branches, gates, fresh=1, rows=index)
            compare(run, "strided stores", out, x, branches, gates, 1, index)


def check_cache(run: Runner) -> None:
    for dtype in run.dtypes():
        for active in (1, 4, 11):
            for sparse in (True, False):
                g = generator(4, active)
                tokens = 11 if sparse else active
                rows = some_rows(2, active, tokens, g) if sparse else None
                x, fresh = (normal((2, active, 40), dtype, g) for _ in range(2))
                fresh[0, 0, :2] = torch.tensor([-0.0, float("nan")], dtype=dtype)
                before = normal((2, tokens, 40), dtype, g)
                expected = before.clone()
                for b in range(2):
                    for k in range(active):
                        expected[b, int(rows[b, k]) if sparse else k] = fresh[b, k]
                for held in (before, padded_rows(before)):
                    guarded = Guarded(before)
                    cache = guarded.tensor if held is before else held
                    run.gated_residual(x, [fresh], [None], fresh=0, cache=cache, rows=rows)
                    what = f"gated_residual on {run.label}, cache"
                    assert_equal(what, cache, expected)
                    guarded.assert_intact(what)


def check_in_place(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((2, 17, 64), (1, 3, 1153)):
            g = generator(5)
            x, first, second = (normal(shape, dtype, g) for _ in range(3))
            gate = normal((shape[0], shape[2]), dtype, g)
            apart = run.gated_residual(x, [first, second], [gate, None])
            run.gated_residual(x, [first, second], [gate, None], out=x)
            assert_equal(f"gated_residual on {run.label}, in place", x, apart)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((1, 1, 1), (2, 3, 71), (1, 2, 513)):
            g = generator(6)
            x, branch, gate = (normal(shape, dtype, g) for _ in range(3))
            rows = some_rows(shape[0], shape[1], shape[1] + 2, g)
            store = normal((shape[0], shape[1] + 2, shape[2]), dtype, g)
            out = Guarded(poisoned(shape, dtype))
            inputs = Untouched(x=x, branch=branch, gate=gate, rows=rows, store=store)
            run.gated_residual(x, [branch, store], [gate, None], fresh=0, rows=rows, out=out.tensor)
            what = f"gated_residual on {run.label}"
            out.assert_intact(what)
            inputs.check(what)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(7)
        x, branch, gate = (normal((2, 17, 1152), dtype, g) for _ in range(3))
        first = run.gated_residual(x, [branch] * 3, [gate] * 3)
        threads = torch.get_num_threads()
        try:
            for i in range(10):
                torch.set_num_threads(1 + i % 2)  # above 32768 elements the kernels do split
                again = run.gated_residual(x, [misaligned(branch, i % 5)] * 3, [gate] * 3)
                assert_equal(f"gated_residual on {run.label}, repeat {i}", again, first)
        finally:
            torch.set_num_threads(threads)


def check_special_values(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(8)
        x, branch = normal((1, 6, 72), dtype, g), normal((1, 6, 72), dtype, g)
        gate = normal((1, 6, 72), dtype, g)
        branch[0, 1, 5], branch[0, 2, 6], x[0, 3, 7] = float("nan"), float("inf"), float("-inf")
        gate[0, 4] = torch.finfo(dtype).max / 8
        x[0, 5], branch[0, 5] = -0.0, 0.0
        gate[0, 5] = -1.0
        out = run.gated_residual(x, [branch], [gate])
        compare(run, "special values", out, x, [branch], [gate])
        assert torch.signbit(out[0, 5]).all(), f"{run.label}: -0.0 + -1.0 * 0.0 is -0.0"


def check_permuted_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(9)
        rows = some_rows(2, 7, 23, g)
        x, store = normal((2, 7, 64), dtype, g), normal((2, 23, 64), dtype, g)
        gate = normal((2, 64), dtype, g)
        order = torch.randperm(7, generator=g)
        plain = run.gated_residual(x, [store], [gate], rows=rows)
        moved = run.gated_residual(
            x[:, order].contiguous(), [store], [gate], rows=rows[:, order].contiguous()
        )
        assert_equal(f"gated_residual on {run.label}, permuted", moved, plain[:, order])


def check_identity_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(10)
        x, branch, store = (normal((2, 9, 64), dtype, g) for _ in range(3))
        gate = normal((2, 64), dtype, g)
        rows = torch.arange(9).expand(2, 9)
        caches = [poisoned((2, 9, 64), dtype) for _ in range(2)]
        args = (x, [store, branch], [gate, gate])
        all_tokens = run.gated_residual(*args, fresh=1, cache=caches[0])
        by_rows = run.gated_residual(*args, fresh=1, cache=caches[1], rows=rows)
        assert_equal(f"gated_residual on {run.label}, identity rows", by_rows, all_tokens)
        assert_equal(f"gated_residual on {run.label}, identity cache", caches[1], caches[0])


def weights_of(shape, dtype, g):
    """Weights that cancel, such as those of a forecast."""
    return normal(shape, torch.float64 if dtype is torch.float64 else torch.float32, g)


def check_weights(run: Runner) -> None:
    for dtype in run.dtypes():
        for batch, tokens, width in ((2, 5, 72), (3, 2, 1153)):
            for count in (1, 2, 6, 85):
                g = generator(11, width, count)
                shape = batch, tokens, width
                x = normal(shape, dtype, g)
                branches = [normal(shape, dtype, g) for _ in range(count)]
                gates = [normal((batch, width), dtype, g) if i % 3 else None for i in range(count)]
                for size in ((count,), (count, batch, tokens)):
                    weights = weights_of(size, dtype, g)
                    out = run.gated_residual(x, branches, gates, weights=weights)
                    compare(run, f"weights {size}", out, x, branches, gates, weights=weights)


def check_weights_of_rows(run: Runner) -> None:
    """A token's weight goes with its place among the active ones, not with its row."""
    for dtype in run.dtypes():
        g = generator(12)
        rows = some_rows(2, 4, 11, g)
        x, fresh = normal((2, 4, 40), dtype, g), normal((2, 4, 40), dtype, g)
        first, second, cache = (normal((2, 11, 40), dtype, g) for _ in range(3))
        branches, gates = [first, fresh, second, first], [normal((2, 40), dtype, g)] * 3 + [None]
        for size in ((4,), (4, 2, 4)):
            weights, held = weights_of(size, dtype, g), cache.clone()
            places = {"fresh": 1, "rows": rows, "weights": weights}
            out = run.gated_residual(x, branches, gates, cache=held, **places)
            compare(run, f"weights {size}, rows", out, x, branches, gates, 1, rows, weights)
            kept = held.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, 40))
            assert_equal(f"gated_residual on {run.label}, unweighted cache", kept, fresh)


def check_weights_of_one(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(13)
        x, first, second = (normal((2, 9, 64), dtype, g) for _ in range(3))
        gates, ones = [normal((2, 64), dtype, g), None], weights_of((2,), dtype, g).fill_(1)
        out = run.gated_residual(x, [first, second], gates, weights=ones)
        compare(run, "weights of 1", out, x, [first, second], gates, weights=ones)
        in_place = x.clone()
        run.gated_residual(in_place, [first, second], gates, weights=ones, out=in_place)
        assert_equal(f"gated_residual on {run.label}, weights in place", in_place, out)


def check_wide_gates(run: Runner) -> None:
    """fp32 beside 16 bits: x is minus each branch where that alone is not zero, so a gate of 1 leaves nothing."""
    for dtype in sixteen_bits(run.dtypes()):
        for shape in ((3, 2, 7), (2, 5, 72), (1, 3, 1153)):
            for count in (1, 2, 5, 17):
                g = generator(14, *shape, count)
                x = normal(shape, dtype, g)
                own = torch.arange(shape[2]) % count
                branches = [-x * (own == i) for i in range(count)]
                gates = [near(1.0, (shape[0], shape[2]), g) for _ in range(count)]
                gates[-1] = gates[-1] if count == 1 else None
                out = run.gated_residual(x, branches, gates)
                compare(run, f"{count} wide gates", out, x, branches, gates)
                halves = 0.5 * weights_of((count,), dtype, g).fill_(1)
                twice = [None if gate is None else 2 * gate for gate in gates]
                out = run.gated_residual(x, branches, twice, weights=halves)
                compare(
                    run, f"{count} wide gates, weights", out, x, branches, twice, weights=halves
                )


def check_wide_gates_of_every_form(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in sixteen_bits(run.dtypes()):
        g = generator(15)
        x, store = normal(shape, dtype, g), normal((batch, 9, width), dtype, g)
        rows = some_rows(batch, tokens, 9, g)
        branch, moved = -x, misaligned(-x)
        for kind, gate in gate_kinds(batch, tokens, width, torch.float32, g).items():
            gate = None if gate is None else 1 + 2.0**-11 * gate
            out = run.gated_residual(x, [branch], [gate])
            compare(run, f"wide gate {kind}", out, x, [branch], [gate])
            apart = run.gated_residual(x, [moved], [gate])
            assert_equal(f"gated_residual on {run.label}, wide, branch misaligned", apart, out)
            given = ([branch, store], [gate, gate], 0, rows)
            out = run.gated_residual(x, *given[:2], fresh=0, rows=rows)
            compare(run, f"wide gate {kind}, rows", out, x, *given)
        gate = near(1.0, (batch, width), g)
        plain = run.gated_residual(x, [branch], [gate])
        out = run.gated_residual(x, [branch], [misaligned(gate)])
        assert_equal(f"gated_residual on {run.label}, a wide gate misaligned", out, plain)
        out = run.gated_residual(x, [branch], [misaligned(gate, 2)])
        assert_equal(f"gated_residual on {run.label}, a wide gate half aligned", out, plain)


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((0, 3, 8), (2, 0, 8)):
            x = torch.zeros(shape, dtype=dtype)
            rows = torch.zeros(shape[:2], dtype=torch.int64)
            cache = torch.full((shape[0], 5, 8), 2.0, dtype=dtype)
            out = run.gated_residual(x, [x.clone()], [None], fresh=0, cache=cache, rows=rows)
            assert out.shape == shape
            assert bool((cache == 2.0).all())


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_gated_residual(check, runner):
    check(runner)
