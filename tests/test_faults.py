"""The checks of the ops catch planted faults: each fault names the checks that must refuse it.

A fault is the reference backend with one thing wrong. The functions called are the very ones that
the tests of the ops call, and each of them has to catch something.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastdit import ops
from fastdit.backends import reference
from fastdit.backends.reference import Reference, gather_rows, per_token, scatter_rows
from inputs import Runner, checks_of, normal
from tolerance import Mismatch, assert_close

pytestmark = pytest.mark.kernels

CORRECT = Reference()


class Faulty(Reference):
    """Named apart, so that the checks call it directly and do not ask it to be bit-equal to stock."""

    name = "faulty"


# --- gated_residual: each is called with the backend's own arguments


def next_row(x, branches, gates, fresh, cache, rows, out, weights=None):
    moved = [
        b if rows is None or i == fresh else b.roll(-1, dims=1) for i, b in enumerate(branches)
    ]
    CORRECT.gated_residual(x, moved, gates, fresh, cache, rows, out, weights)


def wrong_batch_gate(x, branches, gates, fresh, cache, rows, out, weights=None):
    gates = [g if g is None or g.dim() == 1 else g.roll(1, dims=0) for g in gates]
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def first_token_gate(x, branches, gates, fresh, cache, rows, out, weights=None):
    gates = [g[:, :1] if g is not None and g.dim() == 3 else g for g in gates]
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def ungated(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, [None] * len(gates), fresh, cache, rows, out, weights)


def sixteen_branches_at_most(x, branches, gates, fresh, cache, rows, out, weights=None):
    weights = None if weights is None else weights[:16]
    CORRECT.gated_residual(x, branches[:16], gates[:16], fresh, cache, rows, out, weights)


def contiguous_branches_assumed(x, branches, gates, fresh, cache, rows, out, weights=None):
    dense = [b.as_strided(b.shape, (b.shape[1] * b.shape[2], b.shape[2], 1)) for b in branches]
    CORRECT.gated_residual(x, dense, gates, fresh, cache, rows, out, weights)


def fresh_read_at_rows(x, branches, gates, fresh, cache, rows, out, weights=None):
    if fresh >= 0 and rows is not None:
        clamped = rows.clamp(max=branches[fresh].shape[1] - 1)
        branches = [gather_rows(b, clamped) if i == fresh else b for i, b in enumerate(branches)]
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def cache_unwritten(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, None, rows, out, weights)


def cache_at_next_row(x, branches, gates, fresh, cache, rows, out, weights=None):
    if cache is not None:
        index = torch.arange(x.shape[1]).expand(x.shape[:2]) if rows is None else rows
        scatter_rows(cache, (index + 1) % cache.shape[1], branches[fresh])
    CORRECT.gated_residual(x, branches, gates, fresh, None, rows, out, weights)


def other_cache_rows_cleared(x, branches, gates, fresh, cache, rows, out, weights=None):
    if cache is not None:
        cache.zero_()
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def cache_by_arithmetic(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if cache is not None:
        cache.add_(0.0)


def tail_unwritten(x, branches, gates, fresh, cache, rows, out, weights=None):
    before = out.clone()
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    whole = out.shape[-1] // 8 * 8
    out[..., whole:] = before[..., whole:]


def tail_overrun(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    end = out.storage_offset() + out.numel()
    if out.is_contiguous() and end + 1 < out.untyped_storage().nbytes() // out.element_size():
        out.as_strided((1,), (1,), end).fill_(0.0)


def out_written_before_x_is_read(x, branches, gates, fresh, cache, rows, out, weights=None):
    out.zero_()
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def input_overwritten(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    branches[0].neg_()


def coarse_sums(x, branches, gates, fresh, cache, rows, out, weights=None):
    coarse = torch.float32 if x.dtype is torch.float64 else torch.bfloat16
    total = reference.residual_sum(x, branches, gates, fresh, rows, weights)
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    out.copy_(total.to(coarse))


def depends_on_threads(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    step = torch.finfo(out.dtype).eps
    out.mul_(1 + step * torch.get_num_threads())


def depends_on_position(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if rows is not None:
        step = torch.finfo(out.dtype).eps
        out.mul_(1 + step * torch.arange(out.shape[1], dtype=out.dtype).view(1, -1, 1))


def rows_take_another_path(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if rows is not None:
        out.mul_(1 + torch.finfo(out.dtype).eps)


def nan_hidden(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    out.nan_to_num_()


def zero_without_sign(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    out.add_(0.0)


def cache_written_without_rows_to_write(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if cache is not None and x.numel() == 0:
        cache.zero_()


def unweighted(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out)


def weight_of_the_first_branch(x, branches, gates, fresh, cache, rows, out, weights=None):
    weights = None if weights is None else weights[:1].expand(weights.shape).contiguous()
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def weight_of_the_row(x, branches, gates, fresh, cache, rows, out, weights=None):
    if weights is not None and weights.ndim > 1 and rows is not None:
        index = rows.long().clamp(max=x.shape[1] - 1).expand(weights.shape)
        weights = weights.gather(2, index)
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def cache_weighted(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if weights is not None and cache is not None:
        cache.mul_(2)


def weighted_sums_are_coarse(x, branches, gates, fresh, cache, rows, out, weights=None):
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
    if weights is not None:
        out.mul_(1 + 64 * torch.finfo(out.dtype).eps)


def wide_gates_rounded(x, branches, gates, fresh, cache, rows, out, weights=None):
    gates = [None if gate is None else gate.to(x.dtype) for gate in gates]
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


def wide_gate_of_the_first_sample(x, branches, gates, fresh, cache, rows, out, weights=None):
    gates = [
        g[:1] if g is not None and g.itemsize > x.itemsize and g.dim() > 1 else g for g in gates
    ]
    CORRECT.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)


RESIDUAL_FAULTS = {
    next_row: ["check_rows", "check_rows_of_strided_stores"],
    wrong_batch_gate: ["check_sizes", "check_gates", "check_rows"],
    first_token_gate: ["check_gates"],
    ungated: ["check_sizes", "check_gates"],
    sixteen_branches_at_most: ["check_many_branches"],
    contiguous_branches_assumed: ["check_strides"],
    fresh_read_at_rows: ["check_rows"],
    cache_unwritten: ["check_cache"],
    cache_at_next_row: ["check_cache"],
    other_cache_rows_cleared: ["check_cache"],
    cache_by_arithmetic: ["check_cache"],
    tail_unwritten: ["check_sizes"],
    tail_overrun: ["check_inputs_and_guards"],
    out_written_before_x_is_read: ["check_in_place"],
    input_overwritten: ["check_inputs_and_guards"],
    coarse_sums: ["check_sizes"],
    depends_on_threads: ["check_repeats"],
    depends_on_position: ["check_permuted_rows"],
    rows_take_another_path: ["check_identity_rows"],
    nan_hidden: ["check_special_values"],
    zero_without_sign: ["check_special_values"],
    cache_written_without_rows_to_write: ["check_empty"],
    unweighted: ["check_weights"],
    weight_of_the_first_branch: ["check_weights"],
    weight_of_the_row: ["check_weights_of_rows"],
    cache_weighted: ["check_weights_of_rows"],
    weighted_sums_are_coarse: ["check_weights", "check_weights_of_one"],
    wide_gates_rounded: ["check_wide_gates", "check_wide_gates_of_every_form"],
    wide_gate_of_the_first_sample: ["check_wide_gates", "check_wide_gates_of_every_form"],
}


# --- norm_modulate: each changes the arguments, or the parts of the reference's expression


class NormFault(Faulty):
    """norm_modulate in fp64 parts, so that a fault changes one."""

    def statistics(self, x, eps, rms):
        mean = 0.0 if rms else x.mean(-1, keepdim=True)
        square = (x - mean).square().mean(-1, keepdim=True)
        return mean, torch.rsqrt(square + eps)

    def modulate(self, y, scale, shift):
        y = y if scale is None else y * (1 + scale)
        return y if shift is None else y + shift

    def update(self, x, branch, gate, cache, rows, active):
        scatter_rows(x, rows, active)
        if cache is not None:
            scatter_rows(cache, rows, branch)

    def quantise(self, y, out, row_scale):
        reference.quantised_rows(y, out, row_scale)

    def norm_modulate(
        self, x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out,
        row_scale=None,
    ):  # fmt: skip
        dtype = x.dtype
        active = x if rows is None else gather_rows(x, rows)
        if branch is not None:
            active = reference.residual_sum(active, [branch], [gate])
            self.update(x, branch, gate, cache, rows, active)
        active, scale, shift, weight, bias = (
            None if t is None else per_token(t).double()
            for t in (active, scale, shift, weight, bias)
        )
        mean, inverse = self.statistics(active, eps, rms)
        y = (active - mean) * inverse
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        y = self.modulate(y, scale, shift)
        if row_scale is None:
            out.copy_(y)
        else:
            self.quantise(y.to(dtype), out, row_scale)


class SwappedScaleAndShift(NormFault):
    def modulate(self, y, scale, shift):
        return super().modulate(y, shift, scale)


class ScaleWithoutOne(NormFault):
    def modulate(self, y, scale, shift):
        return super().modulate(y, None if scale is None else scale - 1, shift)


class WrongBatchScale(NormFault):
    def modulate(self, y, scale, shift):
        return super().modulate(y, None if scale is None else scale.roll(1, dims=0), shift)


class VarianceFromSquares(NormFault):
    def statistics(self, x, eps, rms):
        x = x.float()
        mean = 0.0 if rms else x.mean(-1, keepdim=True)
        square = (x.square().mean(-1, keepdim=True) - mean * mean).clamp(min=0)
        return mean, torch.rsqrt(square + eps)


class VarianceOfASample(NormFault):
    def statistics(self, x, eps, rms):
        if rms:
            return super().statistics(x, eps, rms)
        mean = x.mean(-1, keepdim=True)
        count = max(x.shape[-1] - 1, 1)
        return mean, torch.rsqrt((x - mean).square().sum(-1, keepdim=True) / count + eps)


class NoEps(NormFault):
    def statistics(self, x, eps, rms):
        return super().statistics(x, 0.0, rms)


class CentredRms(NormFault):
    def statistics(self, x, eps, rms):
        return super().statistics(x, eps, False)


class WeightLost(NormFault):
    def norm_modulate(self, x, scale, shift, weight, *rest):
        super().norm_modulate(x, scale, shift, None, *rest)


class StatisticsOfTheWholeBatch(NormFault):
    def statistics(self, x, eps, rms):
        mean, inverse = super().statistics(x, eps, rms)
        return mean, inverse.mean(1, keepdim=True).expand_as(inverse)


class XNotUpdated(NormFault):
    def update(self, x, branch, gate, cache, rows, active):
        if cache is not None:
            scatter_rows(cache, rows, branch)


class CacheUnwritten(NormFault):
    def update(self, x, branch, gate, cache, rows, active):
        super().update(x, branch, gate, None, rows, active)


class CacheHoldsGatedBranch(NormFault):
    def update(self, x, branch, gate, cache, rows, active):
        super().update(
            x, branch if gate is None else per_token(gate) * branch, gate, cache, rows, active
        )


class OtherRowsOfXCleared(NormFault):
    def update(self, x, branch, gate, cache, rows, active):
        x.zero_()
        super().update(x, branch, gate, cache, rows, active)


class NextRow(NormFault):
    def norm_modulate(self, x, *rest):
        *middle, rows, out = rest
        rows = None if rows is None else (rows + 1) % x.shape[1]
        super().norm_modulate(x, *middle, rows, out)


class DependsOnThreads(NormFault):
    def modulate(self, y, scale, shift):
        return super().modulate(y, scale, shift) * (1 + 0.01 * torch.get_num_threads())


class ContiguousXAssumed(NormFault):
    def norm_modulate(self, x, *rest):
        dense = (x.shape[1] * x.shape[2], x.shape[2], 1)
        super().norm_modulate(x.as_strided(x.shape, dense), *rest)


class OutIsScratch(NormFault):
    def norm_modulate(self, x, *rest):
        rest[-1].fill_(1.0)
        super().norm_modulate(x, *rest)


class BranchOverwritten(NormFault):
    def update(self, x, branch, gate, cache, rows, active):
        super().update(x, branch, gate, cache, rows, active)
        branch.neg_()


class DependsOnPosition(NormFault):
    def modulate(self, y, scale, shift):
        y = super().modulate(y, scale, shift)
        return y * (1 + 0.01 * torch.arange(y.shape[1]).view(1, -1, 1))


class RowsTakeAnotherPath(NormFault):
    def norm_modulate(self, *arguments):
        super().norm_modulate(*arguments)
        if arguments[-2] is not None:
            arguments[-1].mul_(1.01)


class ClearsXWithoutRows(NormFault):
    def norm_modulate(self, x, *rest):
        super().norm_modulate(x, *rest)
        if rest[-1].numel() == 0:
            x.zero_()


class WideVectorsRounded(NormFault):
    def norm_modulate(self, x, *rest):
        vectors = [None if t is None else t.to(x.dtype) for t in rest[:4]]
        super().norm_modulate(x, *vectors, *rest[4:])


class WideGateRounded(NormFault):
    def norm_modulate(self, x, *rest):
        rest = [*rest]
        rest[7] = None if rest[7] is None else rest[7].to(x.dtype)
        super().norm_modulate(x, *rest)


class WideScaleOfTheFirstSample(NormFault):
    def norm_modulate(self, x, scale, *rest):
        if scale is not None and scale.itemsize > x.itemsize and scale.dim() > 1:
            scale = scale[:1]
        super().norm_modulate(x, scale, *rest)


class OneScaleForASample(NormFault):
    def quantise(self, y, out, row_scale):
        super().quantise(y.flatten(1).unsqueeze(1), out.flatten(1).unsqueeze(1), row_scale[:, :1])
        row_scale.copy_(row_scale[:, :1].clone().expand_as(row_scale))


class ScaleUnwritten(NormFault):
    def quantise(self, y, out, row_scale):
        super().quantise(y, out, torch.empty_like(row_scale))


class ScaleInverted(NormFault):
    def quantise(self, y, out, row_scale):
        super().quantise(y, out, row_scale)
        row_scale.reciprocal_()


class ScaleOfTheLargestNumber(NormFault):
    """Not of its magnitude."""

    def quantise(self, y, out, row_scale):
        super().quantise(y.clamp(min=0), out, row_scale)
        scaled = y.float() / row_scale[..., None]
        out.copy_(scaled.clamp(-448, 448).to(out.dtype))


class RowsOfZerosDivided(NormFault):
    def quantise(self, y, out, row_scale):
        super().quantise(y, out, row_scale)
        out.copy_((y.float() / row_scale[..., None]).clamp(-448, 448).to(out.dtype))


class QuantisedTwice(NormFault):
    def quantise(self, y, out, row_scale):
        super().quantise(y, out, row_scale)
        super().quantise(out.float() * row_scale[..., None] * 1.01, out, row_scale)


NORM_FAULTS = {
    OneScaleForASample: ["check_fp8", "check_fp8_rows"],
    ScaleUnwritten: ["check_fp8", "check_fp8_rows"],
    ScaleInverted: ["check_fp8"],
    ScaleOfTheLargestNumber: ["check_fp8"],
    RowsOfZerosDivided: ["check_fp8_values"],
    QuantisedTwice: ["check_fp8"],
    SwappedScaleAndShift: ["check_sizes", "check_optional_parts", "check_modulations"],
    ScaleWithoutOne: ["check_sizes", "check_modulations"],
    WrongBatchScale: ["check_sizes", "check_modulations"],
    VarianceFromSquares: ["check_offset_rows"],
    VarianceOfASample: ["check_sizes"],
    NoEps: ["check_constant_rows"],
    CentredRms: ["check_sizes"],
    WeightLost: ["check_optional_parts"],
    StatisticsOfTheWholeBatch: ["check_sizes", "check_special_values"],
    XNotUpdated: ["check_branch", "check_rows", "check_fused_equals_two_ops"],
    CacheUnwritten: ["check_rows", "check_cache_without_rows"],
    CacheHoldsGatedBranch: ["check_rows"],
    OtherRowsOfXCleared: ["check_rows"],
    NextRow: ["check_rows"],
    DependsOnThreads: ["check_repeats"],
    ContiguousXAssumed: ["check_strides"],
    OutIsScratch: ["check_in_place"],
    BranchOverwritten: ["check_inputs_and_guards"],
    DependsOnPosition: ["check_permuted_rows"],
    RowsTakeAnotherPath: ["check_identity_rows"],
    ClearsXWithoutRows: ["check_empty"],
    WideVectorsRounded: ["check_wide_vectors"],
    WideGateRounded: ["check_a_wide_gate"],
    WideScaleOfTheFirstSample: ["check_wide_vectors_of_every_form"],
}


# --- token_select: one step of it replaced


def every_sample_as_the_first(velocity, *rest):
    CORRECT.token_select(velocity[:1].expand_as(velocity), *rest)


def contiguous_velocity_assumed(velocity, *rest):
    shape, stride = velocity.shape, [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    CORRECT.token_select(velocity.as_strided(shape, stride), *rest)


def one_pass_deviation(velocity, *rest):
    mean = velocity.float().sum(-1) / velocity.shape[-1]
    squares = velocity.float().square().sum(-1) / velocity.shape[-1] - mean.square()
    spread = squares.clamp(min=0).sqrt()
    spread = torch.where(velocity.isfinite().all(-1), spread, float("nan"))
    arguments = list(rest)
    if arguments[4] == "std":
        velocity, arguments[4] = spread.unsqueeze(-1), "l2norm"
    CORRECT.token_select(velocity, *arguments)


def metrics_swapped(velocity, drops, age, high, starvation, metric, *rest):
    other = "std" if metric == "l2norm" else "l2norm"
    CORRECT.token_select(velocity, drops, age, high, starvation, other, *rest)


def first_pixel_only(velocity, *rest):
    CORRECT.token_select(velocity[:, :, :, :1, :1], *rest)


def nan_is_no_deviation(velocity, *rest):
    CORRECT.token_select(velocity.nan_to_num(0.0, 0.0, 0.0), *rest)


def published_sign(velocity, drops, age, high, starvation, *rest):
    if high:
        starvation = -starvation
    CORRECT.token_select(velocity, drops, age, high, starvation, *rest)


def starvation_left_out(velocity, drops, age, high, starvation, *rest):
    CORRECT.token_select(velocity, drops, age, high, 0.0, *rest)


def age_left_out(velocity, drops, age, high, starvation, metric, max_age, *rest):
    CORRECT.token_select(velocity, drops, age, high, starvation, metric, None, *rest)


def kept_once_too_often(velocity, drops, age, high, starvation, metric, max_age, *rest):
    limit = None if max_age is None else max_age + 1
    CORRECT.token_select(velocity, drops, age, high, starvation, metric, limit, *rest)


def equals_by_the_other_end(velocity, drops, age, *rest):
    rows, inverse = rest[-2:]
    turned = [t if t is None else t.flip(1) for t in (drops, age, inverse)]
    CORRECT.token_select(velocity.flip(1, 2), *turned[:2], *rest[:-2], rows, turned[2])
    for table, found in zip((drops, age), turned[:2], strict=True):
        if table is not None:
            table.copy_(found.flip(1))
    rows.copy_(drops.shape[1] - 1 - rows.flip(1))
    inverse.copy_(torch.where(turned[2] < 0, -1, rows.shape[1] - 1 - turned[2]).flip(1))


def tables_taken_to_be_contiguous(velocity, *rest):
    found = [
        t.as_strided(t.shape, (t.shape[1], 1)) if isinstance(t, torch.Tensor) else t for t in rest
    ]
    CORRECT.token_select(velocity, *found)


def inverse_overrun(*arguments):
    CORRECT.token_select(*arguments)
    tail_of(arguments[-1])


def drops_not_counted(velocity, drops, *rest):
    CORRECT.token_select(velocity, drops.clone(), *rest)


def tokens_past_4096_forgotten(velocity, drops, *rest):
    CORRECT.token_select(velocity, drops, *rest)
    rest[-1][:, 4096:] = -1


def shuffled_equals(velocity, *rest):
    noise = 1 + 1e-3 * torch.rand(velocity.shape[:3]).view(*velocity.shape[:3], 1, 1, 1)
    CORRECT.token_select((velocity * noise).to(velocity.dtype), *rest)


def rows_of_an_empty_batch_refused(velocity, *rest):
    if len(velocity) == 0:
        raise AssertionError("no sample")
    CORRECT.token_select(velocity, *rest)


def tail_of(table):
    """Writes behind a contiguous table."""
    end = table.storage_offset() + table.numel()
    if end < table.untyped_storage().nbytes() // table.element_size():
        table.as_strided((1,), (1,), end).fill_(0)


SELECT_FAULTS = {
    every_sample_as_the_first: ["check_samples_are_apart", "check_sizes"],
    contiguous_velocity_assumed: ["check_layouts"],
    one_pass_deviation: ["check_offset_fields"],
    metrics_swapped: ["check_patches", "check_sizes"],
    first_pixel_only: ["check_sizes", "check_patches"],
    nan_is_no_deviation: ["check_special_values"],
    published_sign: ["check_every_token_is_kept", "check_starvation", "check_ties"],
    starvation_left_out: ["check_every_token_is_kept", "check_starvation"],
    age_left_out: ["check_max_age", "check_a_bounded_age"],
    kept_once_too_often: ["check_max_age", "check_a_bounded_age"],
    equals_by_the_other_end: ["check_all_equal", "check_ties", "check_one_side_of_a_tie"],
    tables_taken_to_be_contiguous: ["check_strided_tables"],
    inverse_overrun: ["check_inputs_and_guards"],
    drops_not_counted: ["check_sizes", "check_every_token_is_kept"],
    tokens_past_4096_forgotten: ["check_many_tokens"],
    shuffled_equals: ["check_repeats", "check_ties"],
    rows_of_an_empty_batch_refused: ["check_empty"],
}


# --- token_change: each is given the arguments by name

CHANGE_NAMES = ("velocity", "last", "rate", "level", "levels", "inverse", "score")


class ChangeFault(Faulty):
    """Runs the reference on arguments that a fault may have changed."""

    def __init__(self, fault=None):
        self.fault = fault

    def token_change(self, *arguments):
        call = dict(zip(CHANGE_NAMES, arguments, strict=True))
        if self.fault is None:
            noted(call)
        else:
            self.fault(call)


def noted(call, **changes) -> None:
    CORRECT.token_change(**(call | changes))


def every_token_taken_for_computed(call):
    noted(call, inverse=None)


def last_value_not_kept(call):
    noted(call, last=call["last"].clone())


def level_not_kept(call):
    noted(call, level=call["level"].clone())


def rate_over_no_distance(call):
    level = call["level"]
    level.copy_(torch.where(level == call["levels"][0], level - 1e-6, level))
    noted(call)


def aged_by_the_last_step(call):
    noted(call)
    now, coming = call["levels"]
    call["score"].copy_(call["rate"] * (coming - now).abs())


def levels_are_to_fall(call):
    noted(call)
    gap = call["level"] - call["levels"][1]
    call["score"].copy_(call["rate"] * gap)


def contiguous_last_assumed(call):
    last = call["last"]
    noted(call, last=last.as_strided(last.shape, torch.empty(last.shape).stride()))


def numbers_taken_to_be_contiguous(call):
    narrow = {
        name: call[name].as_strided(call[name].shape, (call[name].shape[1], 1))
        for name in ("rate", "level", "score")
    }
    noted(call, **narrow)


def distance_from_squares(call):
    v, last = (call[name].float() for name in ("velocity", "last"))
    computed = call["inverse"] is None or call["inverse"] >= 0
    squares = (v.square() - 2 * v * last + last.square()).flatten(3).sum(-1).flatten(1)
    gap = (call["levels"][0] - call["level"]).abs()
    noted(call)
    found = torch.where(computed & (gap > 0), squares.clamp(min=0).sqrt() / gap, call["rate"])
    call["rate"].copy_(found)


def first_channel_only(call):
    last = call["last"].clone()
    noted(call, velocity=call["velocity"][..., :1], last=last[..., :1])
    call["last"].copy_(torch.where(last == call["last"], last, call["velocity"]))


def samples_share_a_level(call):
    level = call["level"]
    level.copy_(level[:1].expand_as(level))
    noted(call)


def no_number_is_no_change(call):
    noted(call, velocity=call["velocity"].nan_to_num(0.0, 0.0, 0.0))


def a_first_value_has_a_rate(call):
    call["level"].nan_to_num_(0.0)
    noted(call)


def score_overrun(call):
    noted(call)
    tail_of(call["score"])


def change_by_threads(call):
    noted(call)
    if torch.get_num_threads() > 1:
        call["score"].mul_(1.01)


def changes_of_an_empty_batch_refused(call):
    if len(call["velocity"]) == 0:
        raise AssertionError("no sample")
    noted(call)


CHANGE_FAULTS = {
    every_token_taken_for_computed: ["check_tokens_that_were_left_out", "check_sizes"],
    last_value_not_kept: ["check_sizes", "check_patches"],
    level_not_kept: ["check_sizes"],
    rate_over_no_distance: ["check_equal_levels"],
    aged_by_the_last_step: ["check_tokens_that_were_left_out", "check_sizes"],
    levels_are_to_fall: ["check_rising_levels"],
    contiguous_last_assumed: ["check_layouts"],
    numbers_taken_to_be_contiguous: ["check_strided_tables"],
    distance_from_squares: ["check_small_changes"],
    first_channel_only: ["check_sizes", "check_patches"],
    samples_share_a_level: ["check_samples_are_apart"],
    no_number_is_no_change: ["check_special_values"],
    a_first_value_has_a_rate: ["check_first_values"],
    score_overrun: ["check_inputs_and_guards"],
    change_by_threads: ["check_repeats"],
    changes_of_an_empty_batch_refused: ["check_empty"],
}


# --- qkv_prologue: each is given the arguments by name, and changes them or what comes of them

PROLOGUE_NAMES = (
    "q", "k", "v", "q_out", "k_cache", "v_cache", "rows", "q_offset", "kv_offset",
    "norm", "q_weight", "q_bias", "k_weight", "k_bias", "eps", "cos", "sin",
)  # fmt: skip


class PrologueFault(Faulty):
    """Runs the reference on arguments that a fault may have changed."""

    def __init__(self, fault=None):
        self.fault = fault

    def qkv_prologue(self, *arguments):
        call = dict(zip(PROLOGUE_NAMES, arguments, strict=True))
        if self.fault is None:
            CORRECT.qkv_prologue(**call)
        else:
            self.fault(call)


def run(call, **changes) -> None:
    CORRECT.qkv_prologue(**(call | changes))


def negative_sine(call):
    run(call, sin=None if call["sin"] is None else -call["sin"])


def queries_alone_left_out(call):
    if call["k_cache"].shape[2]:
        run(call)


def k_unrotated(call):
    run(call)
    run(call, q_out=call["q_out"].clone(), cos=None, sin=None)


def v_normed(call):
    v = call["v"]
    run(call, v=F.rms_norm(v, v.shape[-1:]) if call["norm"] else v)


def k_weighed_as_q(call):
    across = call["norm"] in ("layer", "rms_across")
    run(call, k_weight=call["k_weight"] if across else call["q_weight"])


def last_columns_lost(call):
    run(call)
    if call["q_out"].shape[-1] % 8:
        call["q_out"][..., -2:] = 0


def sixteen_heads_at_most(call):
    run(call)
    call["q_out"][:, :, 16:] = 0


def bias_lost(call):
    run(call, q_bias=None)


def stored_one_row_off(call):
    run(call, rows=None if call["rows"] is None else call["rows"].roll(1, dims=1))


def table_of_the_first_sample(call):
    cos = call["cos"]
    run(call, cos=cos[:1].expand_as(cos) if cos is not None and cos.dim() == 3 else cos)


def other_rows_cleared(call):
    call["k_cache"].zero_()
    run(call)


def contiguous_q_assumed(call):
    q = call["q"]
    run(call, q=q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1)))


def positions_from_zero(call):
    tables = {} if call["cos"] is None else {name: call[name] for name in ("cos", "sin")}
    run(call, **{name: t.roll(call["kv_offset"], dims=-2) for name, t in tables.items()})


def depends_on_position(call):
    run(call)
    q_out = call["q_out"]
    q_out *= 1 + 0.01 * torch.arange(q_out.shape[1]).view(1, -1, 1, 1)


def rows_take_another_path(call):
    run(call)
    if call["rows"] is not None:
        call["q_out"].mul_(1.01)


def depends_on_threads(call):
    run(call)
    if torch.get_num_threads() > 1:
        call["q_out"].mul_(1.01)


def heads_share_statistics(call):
    run(call)
    if call["norm"] not in ("rms", "rms_rounded"):
        return
    heads = call["q_out"].shape[2]
    weight = call["q_weight"]
    q = F.rms_norm(
        call["q"], call["q"].shape[-1:], None if weight is None else weight.repeat(heads)
    )
    run(call, q=q, norm=None, k_cache=call["k_cache"].clone())


def all_heads_normed_by_head(call):
    run(call)
    if call["norm"] == "rms_across":
        q = call["q"].unflatten(-1, (-1, call["q_out"].shape[3]))
        q = F.rms_norm(q, q.shape[-1:], eps=call["eps"]).flatten(2)
        q = q if call["q_weight"] is None else q * call["q_weight"]
        run(call, q=q, norm=None, k_cache=call["k_cache"].clone())


def variance_from_squares(call):
    run(call)
    if call["norm"] != "layer":
        return
    x = call["q"]
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    y = (x - mean) * torch.rsqrt(variance + call["eps"])
    y = y if call["q_weight"] is None else y * call["q_weight"] + call["q_bias"]
    run(call, q=y, norm=None, k_cache=call["k_cache"].clone())


def eps_left_out(call):
    run(call, eps=0.0)


def clears_caches_without_tokens(call):
    run(call)
    if call["q"].numel() == 0:
        call["k_cache"].zero_()


PROLOGUE_FAULTS = {
    negative_sine: ["check_sizes", "check_rows", "check_model_heads"],
    queries_alone_left_out: ["check_queries_alone"],
    k_unrotated: ["check_sizes"],
    v_normed: ["check_sizes"],
    k_weighed_as_q: ["check_sizes"],
    last_columns_lost: ["check_odd_head_dims"],
    sixteen_heads_at_most: ["check_model_heads"],
    bias_lost: ["check_optional_parts"],
    stored_one_row_off: ["check_rows"],
    table_of_the_first_sample: ["check_rows"],
    other_rows_cleared: ["check_other_rows"],
    contiguous_q_assumed: ["check_strides"],
    positions_from_zero: ["check_two_streams_fill_one_buffer"],
    depends_on_position: ["check_permuted_rows"],
    rows_take_another_path: ["check_identity_rows"],
    depends_on_threads: ["check_repeats"],
    heads_share_statistics: ["check_special_values"],
    all_heads_normed_by_head: ["check_sizes", "check_model_heads"],
    variance_from_squares: ["check_offset_rows"],
    eps_left_out: ["check_constant_heads"],
    clears_caches_without_tokens: ["check_empty"],
}


# --- patchify and unpatchify: given whether tokens are drawn, and the tensors


class PatchifyFault(Faulty):
    """Runs the reference, with a fault on the way."""

    def __init__(self, fault=None):
        self.fault = fault or copied

    def patchify(self, field, table, tokens):
        self.fault(False, field, table, tokens)

    def unpatchify(self, tokens, table, field):
        self.fault(True, field, table, tokens)


def copied(draw, field, table, tokens):
    if draw:
        CORRECT.unpatchify(tokens, table, field)
    else:
        CORRECT.patchify(field, table, tokens)


def drawn_over_one_cell(draw, field, table, tokens):
    copied(draw, field, table * torch.tensor([not draw, 1, 1], dtype=torch.int32), tokens)


def drawn_in_copies(draw, field, table, tokens):
    """A token whole in every cell, and read from its first: right for patches of one pixel."""
    side = 1 << table[..., 0]
    for r, q in itertools.product(range(int(side.max()) if draw and side.numel() else 1), repeat=2):
        here = (r < side) & (q < side)
        cell = table.clone()
        cell[..., 0] = 0
        cell[..., 1] += here * r
        cell[..., 2] += here * q
        copied(draw, field, cell, tokens)


def last_cell_read(draw, field, table, tokens):
    cells = table.clone()
    if not draw:
        cells[..., 1:] += (1 << table[..., :1]) - 1
        cells[..., 0] = 0
    copied(draw, field, cells, tokens)


def table_of_the_first_image(draw, field, table, tokens):
    copied(draw, field, table[:1].expand_as(table), tokens)


def patches_mirrored(draw, field, table, tokens):
    if draw:
        copied(draw, field, table, tokens.flip(3))
    else:
        copied(draw, field, table, tokens)
        tokens.copy_(tokens.flip(3))


def contiguous_field_assumed(draw, field, table, tokens):
    strides = torch.empty(field.shape, device="meta").stride()
    copied(draw, field.as_strided(field.shape, strides), table, tokens)


def tokens_taken_to_be_packed(draw, field, table, tokens):
    width = tokens.shape[2:].numel()
    strides = (tokens.shape[1] * width, width, *tokens.stride()[2:])
    copied(draw, field, table, tokens.as_strided(tokens.shape, strides))


def other_cells_cleared(draw, field, table, tokens):
    if draw:
        field.zero_()
    copied(draw, field, table, tokens)


def negative_zero_lost(draw, field, table, tokens):
    copied(draw, field, table, tokens)
    (field if draw else tokens).add_(0)


def drawn_one_token_off(draw, field, table, tokens):
    copied(draw, field, table, tokens.roll(1, dims=1) if draw else tokens)


def written_behind_the_tokens(draw, field, table, tokens):
    copied(draw, field, table, tokens)
    tail_of(tokens)


def tokens_past_512_forgotten(draw, field, table, tokens):
    copied(draw, field, table, tokens)
    if not draw:
        tokens[:, 512:] = 0


def no_tokens_refused(draw, field, table, tokens):
    if tokens.numel() == 0:
        raise AssertionError("no token")
    copied(draw, field, table, tokens)


PATCHIFY_FAULTS = {
    drawn_over_one_cell: ["check_sizes", "check_strided_tokens_and_tables"],
    drawn_in_copies: ["check_sizes", "check_other_cells_stay"],
    last_cell_read: ["check_sizes", "check_orders"],
    table_of_the_first_image: ["check_sizes", "check_other_cells_stay"],
    patches_mirrored: ["check_orders", "check_sizes"],
    contiguous_field_assumed: ["check_layouts"],
    tokens_taken_to_be_packed: ["check_strided_tokens_and_tables"],
    other_cells_cleared: ["check_other_cells_stay"],
    negative_zero_lost: ["check_bits_are_kept"],
    drawn_one_token_off: ["check_there_and_back", "check_sizes"],
    written_behind_the_tokens: ["check_inputs_and_guards"],
    tokens_past_512_forgotten: ["check_many_tokens"],
    no_tokens_refused: ["check_empty"],
}


# --- resolution_transition: each is given the arguments by name

TRANSITION_NAMES = (
    "x", "table", "rows", "noise", "scale", "deviation", "pull", "unsplit", "pixelwise", "raster",
    "out", "out_table",
)  # fmt: skip


class TransitionFault(Faulty):
    """Runs the reference on arguments that a fault may have changed."""

    def __init__(self, fault=None):
        self.fault = fault or moved_on

    def resolution_transition(self, *arguments):
        self.fault(dict(zip(TRANSITION_NAMES, arguments, strict=True)))


def moved_on(call, **changes):
    CORRECT.resolution_transition(**(call | changes))


def siblings_independent(call):
    moved_on(call, pull=0.0)


def pixels_as_copies(call):
    moved_on(call, pixelwise=False)


def unsplit_noise_as_drawn(call):
    moved_on(call, unsplit=1.0)


def columns_before_rows(call):
    moved_on(call)
    if call["raster"] is None:
        children = call["out_table"][:, call["x"].shape[1] - call["rows"].shape[1] :]
        children.copy_(children.unflatten(1, (-1, 4))[:, :, [0, 2, 1, 3]].flatten(1, 2))


def level_kept(call):
    moved_on(call)
    children = call["out_table"][:, call["x"].shape[1] - call["rows"].shape[1] :]
    children[..., 0] += 1


def level_one_assumed(call):
    moved_on(call, table=call["table"].clamp(max=torch.tensor([1, 99, 99], dtype=torch.int32)))


def rows_of_the_first_image(call):
    moved_on(call, rows=call["rows"][:1].expand_as(call["rows"]))


def noise_of_another_row(call):
    moved_on(call, noise=call["noise"].flip(1) if call["raster"] else call["noise"])


def raster_left_out(call):
    moved_on(call, raster=None)


def token_off_by_one(call):
    moved_on(call, x=call["x"].roll(1, dims=1))


def channels_mixed(call):
    x = call["x"]
    moved_on(call, x=x + 0 * x.sum(-1, keepdim=True))


def contiguous_x_assumed(call):
    x = call["x"]
    moved_on(call, x=x.as_strided(x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1)))


def written_behind_the_table(call):
    moved_on(call)
    tail_of(call["out_table"])


def other_values_on_two_threads(call):
    moved_on(call)
    if torch.get_num_threads() > 1:
        call["out"].mul_(1.01)


def no_image_refused(call):
    if len(call["x"]) == 0:
        raise AssertionError("no image")
    moved_on(call)


TRANSITION_FAULTS = {
    siblings_independent: ["check_covariance", "check_sizes", "check_pixelwise"],
    pixels_as_copies: ["check_pixelwise", "check_a_picture_twice_as_large"],
    unsplit_noise_as_drawn: ["check_numbers", "check_sizes"],
    columns_before_rows: ["check_a_published_vector", "check_sizes"],
    level_kept: ["check_both_transitions"],
    level_one_assumed: ["check_larger_tokens"],
    rows_of_the_first_image: ["check_samples_are_apart"],
    noise_of_another_row: ["check_both_transitions"],
    raster_left_out: ["check_a_published_vector", "check_both_transitions"],
    token_off_by_one: ["check_a_published_vector", "check_sizes"],
    channels_mixed: ["check_special_values"],
    contiguous_x_assumed: ["check_layouts"],
    written_behind_the_table: ["check_inputs_and_guards"],
    other_values_on_two_threads: ["check_repeats_and_threads"],
    no_image_refused: ["check_empty"],
}


# --- sparse_attention: each is called with the backend's own arguments


def scale_left_out(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, 1.0, out)


def first_key_head_for_all(q, k, v, scale, out):
    CORRECT.sparse_attention(q, *(t[:, :, :1].expand_as(t) for t in (k, v)), scale, out)


def sixty_four_columns_at_most(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, scale, out)
    out[..., 64:] = 0


def last_key_left_out(q, k, v, scale, out):
    keys = max(1, k.shape[1] - 1)
    CORRECT.sparse_attention(q, k[:, :keys], v[:, :keys], scale, out)


def exponentials_unshifted(q, k, v, scale, out):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2).float() for t in (k, v))
    weights = (torch.einsum("bqhd,bshd->bhqs", q.float(), k) * scale).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    out.copy_(torch.einsum("bhqs,bshd->bqhd", weights, v))


def first_block_shifts_all(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, scale, out)
    if k[:, :64].isinf().all():
        out.fill_(float("nan"))


def nan_is_dropped(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, scale, out)
    out.nan_to_num_()


def contiguous_k_assumed(q, k, v, scale, out):
    _, keys, heads, dim = k.shape
    dense = k.as_strided(k.shape, (keys * heads * dim, heads * dim, dim, 1))
    CORRECT.sparse_attention(q, dense, v, scale, out)


def keys_are_changed(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, scale, out)
    k.mul_(2)


def keys_of_the_first_sample(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k[:1].expand_as(k), v[:1].expand_as(v), scale, out)


def parts_added_in_any_order(q, k, v, scale, out):
    CORRECT.sparse_attention(q, k, v, scale, out)
    out.mul_(1 + 0.1 * torch.rand(()).to(out))


ATTENTION_FAULTS = {
    scale_left_out: ["check_sizes", "check_scale"],
    first_key_head_for_all: ["check_groups"],
    sixty_four_columns_at_most: ["check_head_dims"],
    last_key_left_out: ["check_every_key_is_read", "check_all_keys_alike"],
    exponentials_unshifted: ["check_huge_logits"],
    first_block_shifts_all: ["check_impossible_keys"],
    nan_is_dropped: ["check_special_queries"],
    contiguous_k_assumed: ["check_strides"],
    keys_are_changed: ["check_inputs_and_guards"],
    keys_of_the_first_sample: ["check_samples_are_apart"],
    parts_added_in_any_order: ["check_repeats"],
}


# --- blend and collapse: each is called with the backend's own arguments


def blend_swapped(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(cached, fresh, r, x, gate, blended, out)


def blend_ungated(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(fresh, cached, r, x, None, blended, out)


def blend_gate_of_another_sample(fresh, cached, r, x, gate, blended, out):
    gate = gate if gate is None or gate.dim() == 1 else gate.roll(1, dims=0)
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)


def weight_of_zero_multiplied(fresh, cached, r, x, gate, blended, out):
    blend = (r * fresh.double() + (1 - r) * cached.double()).to(fresh.dtype)
    CORRECT.blend(blend, blend, torch.tensor(1.0), x, gate, blended, out)


def blend_kept_with_its_gate(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)
    if blended is not None and gate is not None:
        blended.mul_(per_token(gate))


def contiguous_blend_assumed(fresh, cached, r, x, gate, blended, out):
    dense = cached.as_strided(cached.shape, (cached.shape[1] * cached.shape[2], cached.shape[2], 1))
    CORRECT.blend(fresh, dense, r, x, gate, blended, out)


def blend_out_written_first(fresh, cached, r, x, gate, blended, out):
    out.zero_()
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)


def blend_input_overwritten(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)
    cached.neg_()


def blend_depends_on_threads(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)
    out.mul_(1 + torch.finfo(out.dtype).eps * torch.get_num_threads())


def blend_without_nan(fresh, cached, r, x, gate, blended, out):
    CORRECT.blend(fresh, cached, r, x, gate, blended, out)
    out.nan_to_num_()


BLEND_FAULTS = {
    blend_swapped: ["check_sizes", "check_one_operand_alone"],
    blend_ungated: ["check_sizes", "check_gates"],
    blend_gate_of_another_sample: ["check_gates"],
    weight_of_zero_multiplied: ["check_one_operand_alone"],
    blend_kept_with_its_gate: ["check_sizes"],
    contiguous_blend_assumed: ["check_strides"],
    blend_out_written_first: ["check_in_place"],
    blend_input_overwritten: ["check_inputs_and_guards"],
    blend_depends_on_threads: ["check_repeats"],
    blend_without_nan: ["check_special_values"],
}


def gradient_ungated(grad, fresh, cached, r, gate, *outs):
    CORRECT.blend_backward(grad, fresh, cached, r, None, *outs)


def gradients_swapped(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
    CORRECT.blend_backward(grad, fresh, cached, r, gate, grad_cached, grad_fresh, grad_r)


def coarse_gradient_of_r(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
    CORRECT.blend_backward(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r)
    if grad_r is not None:
        grad_r.copy_(grad_r.to(torch.bfloat16))


def a_thousand_rows_at_most(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
    CORRECT.blend_backward(grad, fresh, cached, r, gate, grad_fresh, grad_cached, None)
    if grad_r is not None:
        first = [t.clone() for t in (grad, fresh)]
        first[0].flatten(0, 1)[1000:] = 0
        CORRECT.blend_backward(*first, cached, r, gate, None, None, grad_r)


def gradient_of_r_only_beside_others(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
    with_r = grad_r if grad_fresh is not None else None
    CORRECT.blend_backward(grad, fresh, cached, r, gate, grad_fresh, grad_cached, with_r)


def gradient_of_r_unwritten_without_rows(grad, fresh, cached, r, gate, *outs):
    if grad.numel():
        CORRECT.blend_backward(grad, fresh, cached, r, gate, *outs)


def gradient_depends_on_alignment(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
    CORRECT.blend_backward(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r)
    if grad_r is not None and fresh.data_ptr() % 16:
        grad_r.mul_(1 + torch.finfo(grad_r.dtype).eps)


BLEND_BACKWARD_FAULTS = {
    gradient_ungated: ["check_gates", "check_backward_sizes"],
    gradients_swapped: ["check_backward_sizes"],
    coarse_gradient_of_r: ["check_backward_sizes"],
    a_thousand_rows_at_most: ["check_backward_sizes"],
    gradient_of_r_only_beside_others: ["check_each_gradient_alone"],
    gradient_of_r_unwritten_without_rows: ["check_empty"],
    gradient_depends_on_alignment: ["check_repeats"],
}


def group_weighted(branches, weights, groups, accumulate, sums):
    weighted = [
        b if w is None else (b.double() * per_token(w)).to(b.dtype)
        for b, w in zip(branches, weights, strict=True)
    ]
    CORRECT.collapse(weighted, [None] * len(weights), groups, accumulate, sums)


def unweighted(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, [None] * len(weights), groups, accumulate, sums)


def weight_of_another_sample(branches, weights, groups, accumulate, sums):
    weights = [w if w is None or w.dim() == 1 else w.roll(1, dims=0) for w in weights]
    CORRECT.collapse(branches, weights, groups, accumulate, sums)


def sixteen_collapsed_at_most(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches[:16], weights[:16], groups[:16], accumulate, sums)


def third_group_lost(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, [g % 3 for g in groups], accumulate, sums)


def empty_groups_unwritten(branches, weights, groups, accumulate, sums):
    before = sums.clone()
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    for group in set(range(1, sums.shape[0])) - set(groups):
        sums[group] = before[group]


def contiguous_branches_collapsed(branches, weights, groups, accumulate, sums):
    dense = [b.as_strided(b.shape, (b.shape[1] * b.shape[2], b.shape[2], 1)) for b in branches]
    CORRECT.collapse(dense, weights, groups, accumulate, sums)


def sums_begun_anew(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, False, sums)


def branch_overwritten(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    branches[-1].neg_()


def sums_depend_on_threads(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    sums.mul_(1 + torch.finfo(sums.dtype).eps * torch.get_num_threads())


def groups_by_multiplication(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    for branch in branches:
        sums += 0.0 * branch


def coarse_collapse(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    sums.copy_(sums.to(torch.float32 if sums.dtype is torch.float64 else torch.bfloat16))


def element_of_nothing_written(branches, weights, groups, accumulate, sums):
    CORRECT.collapse(branches, weights, groups, accumulate, sums)
    if sums.numel() == 0:
        sums.as_strided((1,), (1,), sums.storage_offset()).zero_()


def wide_weights_rounded(branches, weights, groups, accumulate, sums):
    weights = [None if by is None else by.to(branches[0].dtype) for by in weights]
    CORRECT.collapse(branches, weights, groups, accumulate, sums)


COLLAPSE_FAULTS = {
    group_weighted: ["check_sizes"],
    unweighted: ["check_sizes", "check_weights"],
    weight_of_another_sample: ["check_weights"],
    sixteen_collapsed_at_most: ["check_many_branches"],
    third_group_lost: ["check_groups"],
    empty_groups_unwritten: ["check_groups"],
    contiguous_branches_collapsed: ["check_strides"],
    sums_begun_anew: ["check_accumulate"],
    branch_overwritten: ["check_inputs_and_guards"],
    sums_depend_on_threads: ["check_repeats"],
    groups_by_multiplication: ["check_special_values"],
    coarse_collapse: ["check_sizes"],
    element_of_nothing_written: ["check_empty"],
    wide_weights_rounded: ["check_wide_weights"],
}


# --- swiglu: each is called with the backend's own arguments


def gate_and_value_swapped(gate, value, out):
    CORRECT.swiglu(value, gate, out)


def sigmoid_alone(gate, value, out):
    out.copy_(gate.sigmoid() * value)


def silu_by_tanh(gate, value, out):
    out.copy_(F.gelu(1.702 * gate, approximate="tanh") / 1.702 * value)


def exponential_overflows(gate, value, out):
    by = gate.exp()
    out.copy_(gate * by / (1 + by) * value)


def negative_gates_cut_off(gate, value, out):
    CORRECT.swiglu(torch.where(gate < -6, torch.zeros_like(gate), gate), value, out)


def gate_assumed_before_its_value(gate, value, out):
    if not gate.is_contiguous():
        gate, value = sorted((gate, value), key=torch.Tensor.data_ptr)
    CORRECT.swiglu(gate, value, out)


def contiguous_value_assumed(gate, value, out):
    dense = value.as_strided(value.shape, (value.shape[1] * value.shape[2], value.shape[2], 1))
    CORRECT.swiglu(gate, dense, out)


def product_out_written_first(gate, value, out):
    out.zero_()
    CORRECT.swiglu(gate, value, out)


def gate_replaced_by_its_silu(gate, value, out):
    CORRECT.swiglu(gate, value, out)
    if gate.data_ptr() != out.data_ptr():
        gate.copy_(F.silu(gate))


def product_depends_on_threads(gate, value, out):
    CORRECT.swiglu(gate, value, out)
    out.mul_(1 + torch.finfo(out.dtype).eps * torch.get_num_threads())


def product_without_nan(gate, value, out):
    CORRECT.swiglu(gate, value, out)
    out.nan_to_num_()


def product_of_nothing_written(gate, value, out):
    CORRECT.swiglu(gate, value, out)
    if out.numel() == 0:
        out.as_strided((1,), (1,), out.storage_offset()).zero_()


def four_thousand_columns_at_most(gate, value, out):
    CORRECT.swiglu(gate[..., :4096], value[..., :4096], out[..., :4096])


def last_column_unwritten(gate, value, out):
    CORRECT.swiglu(gate[..., :-1], value[..., :-1], out[..., :-1])


SWIGLU_FAULTS = {
    gate_and_value_swapped: ["check_sizes", "check_halves"],
    sigmoid_alone: ["check_sizes"],
    silu_by_tanh: ["check_sizes", "check_each_gate"],
    exponential_overflows: ["check_special_values"],
    negative_gates_cut_off: ["check_each_gate"],
    gate_assumed_before_its_value: ["check_halves"],
    contiguous_value_assumed: ["check_halves", "check_strides"],
    product_out_written_first: ["check_in_place"],
    gate_replaced_by_its_silu: ["check_inputs_and_guards"],
    product_depends_on_threads: ["check_repeats"],
    product_without_nan: ["check_special_values"],
    product_of_nothing_written: ["check_empty"],
    four_thousand_columns_at_most: ["check_wide_rows"],
    last_column_unwritten: ["check_sizes"],
}


def refuses(check, runner: Runner) -> bool:
    try:
        check(runner)
    except AssertionError:  # Mismatch is one
        return True
    return False


FAULTS = {
    "blend": BLEND_FAULTS,
    "blend_backward": BLEND_BACKWARD_FAULTS,
    "collapse": COLLAPSE_FAULTS,
    "gated_residual": RESIDUAL_FAULTS,
    "norm_modulate": NORM_FAULTS,
    "patchify": PATCHIFY_FAULTS,
    "qkv_prologue": PROLOGUE_FAULTS,
    "resolution_transition": TRANSITION_FAULTS,
    "sparse_attention": ATTENTION_FAULTS,
    "swiglu": SWIGLU_FAULTS,
    "token_change": CHANGE_FAULTS,
    "token_select": SELECT_FAULTS,
}
#: how a fault gets into a backend, or none does, where it does not stand for the whole function
CARRIERS = {
    "norm_modulate": lambda fault=NormFault: fault(),
    "patchify": PatchifyFault,
    "qkv_prologue": PrologueFault,
    "resolution_transition": TransitionFault,
    "token_change": ChangeFault,
}
FILES = {op: op.removesuffix("_backward") for op in FAULTS}


def carried(op, fault):
    if op in CARRIERS:
        return CARRIERS[op](fault)
    backend = Faulty()
    setattr(backend, op, fault)
    return backend


@pytest.mark.parametrize(
    ("op", "fault", "check"),
    [
        pytest.param(op, fault, check, id=f"{op}-{fault.__name__}-{check}")
        for op, faults in FAULTS.items()
        for fault, checks in faults.items()
        for check in checks
    ],
)
def test_a_fault_is_caught(op, fault, check):
    assert refuses(checks_of(FILES[op])[check], Runner(carried(op, fault), fault.__name__))


@pytest.mark.parametrize("file", ops.FILES)
def test_every_check_catches_something(file):
    faults = [names for op in FAULTS if FILES[op] == file for names in FAULTS[op].values()]
    assert set(checks_of(file)) == {name for names in faults for name in names}


@pytest.mark.parametrize("file", ops.FILES)
def test_a_fault_is_not_caught_for_its_carrier(file):
    for check in checks_of(file).values():
        check(Runner(CARRIERS.get(file, Faulty)(), "carrier"))


def test_the_rule_tells_an_error_of_three_times_stock():
    g = torch.Generator().manual_seed(0)
    exact = normal((1, 4, 64), torch.float64, g)
    eager = exact.to(torch.bfloat16)
    error = (eager.double() - exact).abs().max()
    unit = torch.finfo(torch.bfloat16).eps * 2
    assert_close("eager itself", eager, exact, eager)
    worse = exact.clone()
    worse[0, 2, 7] += 3 * error + unit
    with pytest.raises(Mismatch, match=r"worst at \(0, 2, 7\): got .* expected .* allowed"):
        assert_close("one element off", worse.to(torch.bfloat16), exact, eager)
    with pytest.raises(Mismatch):
        assert_close("unwritten", torch.full_like(eager, float("nan")), exact, eager)
