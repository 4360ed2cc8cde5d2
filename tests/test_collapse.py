"""collapse on every backend and instruction set, against fp64.

Each `check_*` takes a Runner and raises where the backend is wrong; test_faults.py runs the same
functions on backends with planted faults.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    near,
    normal,
    padded_rows,
    poisoned,
    sixteen_bits,
)
from tolerance import assert_close, assert_equal
from truth import (
    eager_collapse,
    eager_gated_residual,
    exact_collapse,
    exact_gated_residual,
)


def dtypes_of(run: Runner):
    """The branches' dtypes, each with those its sums may have."""
    for dtype in run.dtypes():
        yield dtype, dtype
        if dtype.itemsize == 2:
            yield dtype, torch.float32


def compare(run: Runner, what: str, sums, branches, weights, groups) -> None:
    count = sums.shape[0]
    exact = exact_collapse(branches, weights, groups, count=count)
    eager = eager_collapse(branches, weights, groups, count=count, dtype=sums.dtype)
    for s in range(count):
        assert_close(f"collapse on {run.label}, {what}, sum {s}", sums[s], exact[s], eager[s])


def operands(shape, count, dtype, *key):
    """Branches, weights [B, D] or None, and groups that leave none of 0 to 3 out."""
    g = generator(*shape, count, *key)
    branches = [normal(shape, dtype, g) for _ in range(count)]
    weights = [normal((shape[0], shape[2]), dtype, g) if i % 3 != 1 else None for i in range(count)]
    return branches, weights, [(7 * i + 1) % 4 for i in range(count)]


def check_sizes(run: Runner) -> None:
    for dtype, sums in dtypes_of(run):
        for i, shape in enumerate(SHAPES):
            count = (1, 2, 5)[i % 3]
            given = operands(shape, count, dtype)
            compare(run, f"{count} branches", run.collapse(*given, dtype=sums), *given)


def check_many_branches(run: Runner) -> None:
    for dtype, sums in dtypes_of(run):
        for count in (16, 64):
            given = operands((2, 3, 72), count, dtype)
            compare(run, f"{count} branches", run.collapse(*given, dtype=sums), *given)


def check_groups(run: Runner) -> None:
    """Every number of sums, with groups that have no branch."""
    shape = (2, 3, 40)
    for dtype in run.dtypes():
        branches, weights, _ = operands(shape, 3, dtype, 1)
        for groups in ([0, 0, 0], [1, 0, 1], [2, 2, 0], [3, 1, 3], [0, 3, 0]):
            sums = run.collapse(branches, weights, groups)
            compare(run, f"groups {groups}", sums, branches, weights, groups)
            out = poisoned((4, *shape), dtype)
            run.collapse(branches, weights, groups, out=out)
            compare(run, f"groups {groups} of four", out, branches, weights, groups)


def check_weights(run: Runner) -> None:
    batch, tokens, width = shape = (3, 5, 72)
    for dtype in run.dtypes():
        g = generator(2)
        branches = [normal(shape, dtype, g) for _ in range(2)]
        for kind, weight in gate_kinds(batch, tokens, width, dtype, g).items():
            given = (branches, [weight, None], [1, 0])
            compare(run, f"weight {kind}", run.collapse(*given), *given)


def check_strides(run: Runner) -> None:
    shape = (2, 5, 72)
    for dtype, kind in dtypes_of(run):
        branches, weights, groups = operands(shape, 3, dtype, 3)
        plain = run.collapse(branches, weights, groups, dtype=kind)
        what = f"collapse on {run.label}"
        for view in (misaligned, padded_rows):
            for one in (0, 2):
                moved = [view(b) if i == one else b for i, b in enumerate(branches)]
                buffer = poisoned((4, *shape), kind)
                sums = torch.stack([buffer] * 2, 3).flatten(3)[..., :72]  # rows 144 apart
                run.collapse(moved, weights, groups, out=sums)
                assert_equal(f"{what}, view of branch {one}", sums, plain)
        moved = [misaligned(weights[0]), *weights[1:]]
        sums = run.collapse(branches, moved, groups, dtype=kind)
        assert_equal(f"{what}, a weight alone misaligned", sums, plain)
        sums = misaligned(plain)
        run.collapse(branches, weights, groups, out=sums)
        assert_equal(f"{what}, sums alone misaligned", sums, plain)
        once = [b[:, :1].expand(shape) for b in branches]
        sums = run.collapse(once, weights, groups, dtype=kind)
        whole = run.collapse([b.clone() for b in once], weights, groups, dtype=kind)
        assert_equal(f"{what}, expanded", sums, whole)


def check_accumulate(run: Runner) -> None:
    """Two passes are one, bit for bit where the sums are not rounded between them."""
    for dtype, kind in dtypes_of(run):
        branches, weights, groups = operands((1, 1, 2100), 4, dtype, 4)
        whole = run.collapse(branches, weights, groups, dtype=kind)
        sums = poisoned(whole.shape, kind)
        first, rest = slice(0, 2), slice(2, 4)
        run.backend.collapse(branches[first], weights[first], groups[first], False, sums)
        half = sums.clone()
        run.backend.collapse(branches[rest], weights[rest], groups[rest], True, sums)
        if kind in (torch.float32, torch.float64):
            assert_equal(f"collapse on {run.label}, in two passes", sums, whole)
        given = (branches[rest], weights[rest], groups[rest], half, 4)
        exact, eager = exact_collapse(*given), eager_collapse(*given, dtype=kind)
        assert_close(f"collapse on {run.label}, second pass", sums, exact, eager)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype, kind in dtypes_of(run):
        for shape in ((1, 1, 1), (2, 3, 71), (1, 2, 513)):
            branches, weights, groups = operands(shape, 3, dtype, 5)
            named = {f"branch {i}": b for i, b in enumerate(branches)}
            inputs = Untouched(**named, weight=weights[0])
            sums = Guarded(poisoned((1 + max(groups), *shape), kind))
            run.collapse(branches, weights, groups, out=sums.tensor)
            sums.assert_intact(f"collapse on {run.label}")
            inputs.check(f"collapse on {run.label}")


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        branches, weights, groups = operands((2, 17, 1152), 5, dtype, 6)
        first = run.collapse(branches, weights, groups)
        threads = torch.get_num_threads()
        try:
            for i in range(4):
                torch.set_num_threads(1 + i % 2)  # above 32768 elements the kernels do split
                moved = [misaligned(branches[0], i % 5), *branches[1:]]
                again = run.collapse(moved, weights, groups)
                assert_equal(f"collapse on {run.label}, repeat {i}", again, first)
        finally:
            torch.set_num_threads(threads)


def check_special_values(run: Runner) -> None:
    """What is not finite stays in its element, and in the sums of its branch."""
    for dtype in run.dtypes():
        branches, weights, _ = operands((1, 6, 72), 3, dtype, 7)
        branches[0][0, 1, 5], branches[1][0, 2, 6] = float("nan"), float("inf")
        weights[0] = weights[0].clone()
        weights[0][0, 7] = float("-inf")
        given = (branches, weights, [1, 2, 1])
        compare(run, "special values", run.collapse(*given), *given)


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for shape in ((0, 3, 8), (2, 0, 8)):
            nothing = torch.zeros(shape, dtype=dtype)
            sums = Guarded(poisoned((2, *shape), dtype))
            assert run.collapse([nothing], [None], [1], out=sums.tensor).shape == (2, *shape)
            sums.assert_intact(f"collapse on {run.label}, of nothing")


def check_wide_weights(run: Runner) -> None:
    """fp32 beside 16 bits: each branch comes twice, once negated, so what rounding takes is all there is."""
    for dtype, kind in dtypes_of(run):
        if dtype not in sixteen_bits([dtype]):
            continue
        for shape in ((3, 2, 7), (2, 5, 72), (1, 3, 2100)):
            for pairs in (1, 4):
                g = generator(9, *shape, pairs)
                first = [normal(shape, dtype, g) for _ in range(pairs)]
                branches = [sign * branch for branch in first for sign in (1, -1)]
                weights = [near(1.0, (shape[0], shape[2]), g) for _ in branches]
                given = (branches, weights, [1, 2] * pairs)
                what = f"{2 * pairs} wide weights"
                sums = run.collapse(*given, dtype=kind)
                compare(run, what, sums, *given)
                weights[0] = misaligned(weights[0])
                again = run.collapse(*given, dtype=kind)
                assert_equal(f"collapse on {run.label}, {what}, misaligned", again, sums)
        for form, weight in gate_kinds(2, 5, 72, torch.float32, generator(10)).items():
            given = ([normal((2, 5, 72), dtype, generator(11))] * 2, [weight, None], [1, 0])
            compare(run, f"wide weight {form}", run.collapse(*given, dtype=kind), *given)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_collapse(check, runner):
    check(runner)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [65, 84, 130])
def test_more_branches_than_a_pass_takes(count, kind, backend):
    """Sums that are rounded are so after every 64 branches."""
    given = operands((2, 3, 40), count, torch.bfloat16, 8)
    sums = ops.collapse(*given, dtype=kind, backend=backend)
    eager = None
    for start in range(0, count, 64):
        part = [each[start : start + 64] for each in given]
        eager = eager_collapse(*part, eager, 4, kind)
    exact = exact_collapse(*given, count=4)
    assert_close(f"collapse on {backend}, {count} branches", sums, exact, eager)


# --- what it is for


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.integers(0, 2), min_size=1, max_size=84),
    seed=st.integers(0, 1000),
)
def test_a_collapsed_run_is_the_run(groups, seed):
    """sum_i (weight_i + shared[group_i]) branch_i in fp64, with gates of one sample each."""
    g = generator(seed)
    shape, count = (2, 3, 8), len(groups)
    h, *branches = (normal(shape, torch.float64, g) for _ in range(count + 1))
    weights = [normal((8,), torch.float64, g) for _ in range(count)]
    shared = [torch.zeros(2, 8), *(normal((2, 8), torch.float64, g) for _ in range(2))]
    gates = [weight + shared[group] for weight, group in zip(weights, groups, strict=True)]
    expected = exact_gated_residual(h, branches, gates)
    sums = ops.collapse(branches, weights, groups, out=torch.empty(3, *shape, dtype=torch.float64))
    actual = ops.gated_residual(h, [*sums], [None, *shared[1:]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * count)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_sums_in_sixteen_bits_are_nearer_than_adding_one_by_one(kind, tau):
    """28 blocks of three, as diffusers adds them, gates rounded as it rounds them: the rule holds for
    sums in the model's own dtype, whatever share of a gate is shared."""
    g = generator(9)
    shape = (2, 16, 1152)
    h, *branches = (normal(shape, kind, g) for _ in range(85))
    tables = [normal((1152,), kind, g) / 28**0.5 for _ in range(56)]
    msa, mlp = ((tau * normal((2, 1152), torch.float32, g)).to(kind) for _ in range(2))
    weights = [w for b in range(28) for w in (tables[2 * b], None, tables[2 * b + 1])]
    gates = [None if w is None else w + (msa if i % 3 == 0 else mlp) for i, w in enumerate(weights)]
    sums = ops.collapse(branches, weights, [1, 0, 2] * 28)
    out = ops.gated_residual(h, [*sums], [None, msa, mlp])
    eager = eager_gated_residual(h, branches, gates)
    wide = [None if w is None else w.double() for w in weights]
    for i, w in enumerate(wide):
        if w is not None:
            wide[i] = w + (msa if i % 3 == 0 else mlp).double()
    exact = exact_gated_residual(h, branches, wide)
    assert_close(f"a collapsed run of 84, tau {tau}", out, exact, eager)


def test_gradients():
    branches, weights, groups = operands((2, 3, 5), 4, torch.float64, 10)
    leaves = [*branches, *(w for w in weights if w is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    assert gradcheck(lambda *_: ops.collapse(branches, weights, groups), leaves, fast_mode=True)
    with pytest.raises(ArgumentError, match="gradient"):
        ops.collapse(branches, weights, groups, out=torch.empty(4, 2, 3, 5).double())
