"""Plain torch: diffusers' own expressions, with their order and casts, so bit-equal to stock.

A residual is `x = x + gate * branch`, one branch after the other, each operation rounded in the
dtype; of an fp32 gate in fp32, and the sum in x's again. A norm is `layer_norm(x) * (1 + scale) + shift`, in fp32
where one of its vectors is, and rounded once, as Wan's; the RMS norm takes its mean square in fp32,
as diffusers' RMSNorm does, whatever the dtype. Heads are normed, rounded to the dtype, rotated in
fp32 and rounded again, as its attention processors do. A selection of tokens is two stable sorts.
Tokens are copied by index, cell by cell; where they are split, noise is added in fp32.
A blend is taken in fp32 and rounded before its gate. A collapse adds in fp32. A SiLU is rounded before it multiplies.
Runs wherever torch does, and is what the ops differentiate through. It is not fast: every operation
is a pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.backends._fp8 import quantised_rows
from fastdit.backends._values import check_places, check_range
from fastdit.backends.base import Backend
from fastdit.errors import ArgumentError

INFINITY_BITS = 0x7F800000  # of fp32
FORCED = 1 << 31  # above all keys of tokens that are not forced
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def residual_sum(
    x: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    fresh: int = -1,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """x + sum_i weights[i] * gates[i] * branches[i]; branches other than `fresh` are read at `rows`.

    With weights, which cancel, sums are wide and rounded once.
    """
    total = x if weights is None else x.to(weights.dtype)
    for i, (branch, gate) in enumerate(zip(branches, gates, strict=True)):
        if rows is not None and i != fresh:
            branch = gather_rows(branch, rows)
        if weights is not None:
            branch = branch * (weights[i] if weights.ndim == 1 else weights[i].unsqueeze(-1))
        total = total + (branch if gate is None else per_token(gate) * branch)
        if weights is None:
            total = total.to(x.dtype)  # of an fp32 gate the sum is taken in fp32
    return total.to(x.dtype)


def gated_silu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value."""
    return F.silu(gate) * value


def modulated_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """norm(x) * (1 + scale) + shift over the last dimension; in fp32 where any of these is wider than x."""
    vectors = (scale, shift, weight, bias)
    if any(t is not None and t.itemsize > x.itemsize for t in vectors):
        vectors = (None if t is None else t.float() for t in vectors)
        return modulated_norm(x.float(), *vectors, eps, rms).to(x.dtype)
    if rms:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        y = (x * torch.rsqrt(variance + eps)).to(x.dtype)
        if weight is not None:
            y = y * weight
        if bias is not None:
            y = y + bias
    else:
        y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if scale is not None:
        y = y * (1 + per_token(scale))
    if shift is not None:
        y = y + per_token(shift)
    return y


def normed_heads(
    x: Tensor,
    dim: int,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """x [B, K, heads dim] -> [B, K, heads, dim], normed."""
    if norm == "layer":
        x = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    elif norm == "rms_across":
        x = F.rms_norm(x, (x.shape[-1],), weight, eps)
    x = x.unflatten(-1, (x.shape[-1] // dim, dim))
    if norm == "rms":
        return F.rms_norm(x, (dim,), weight, eps)
    if norm == "rms_rounded":
        return modulated_norm(x, weight=weight, eps=eps, rms=True)
    return x


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x [B, K, heads, d] turned by cos and sin [K, d/2] or [B, K, d/2]."""
    cos, sin = (t.repeat_interleave(2, dim=-1).unsqueeze(-2) for t in (cos, sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def blended_with(fresh: Tensor, cached: Tensor, r: Tensor) -> Tensor:
    """r fresh + (1 - r) cached in fp32, or fp64 if they are; all of one where r is 1 or 0."""
    fresh, cached, r = widened(fresh, cached, r)
    mixed = r * fresh + (1 - r) * cached
    return torch.where(r == 1, fresh, torch.where(r == 0, cached, mixed))


def gate_gradient(grad: Tensor, fresh: Tensor, cached: Tensor, r: Tensor, gate: Tensor) -> Tensor:
    """dL/dgate of gate * blend, in the shape and dtype of gate."""
    product = widened(grad)[0] * blended_with(fresh, cached, r)
    return product.sum_to_size(per_token(gate).shape).view(gate.shape).to(gate.dtype)


def collapsed(
    branches: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    groups: Sequence[int],
    count: int,
    start: Tensor | None = None,
) -> Tensor:
    """`count` sums in fp32, or fp64 if the branches are; `start` is what they begin with."""
    (first,) = widened(branches[0])
    sums = [torch.zeros_like(first)] * count if start is None else list(start.to(first.dtype))
    for branch, by, group in zip(branches, weights, groups, strict=True):
        (branch,) = widened(branch)
        sums[0] = sums[0] + (branch if by is None else per_token(by) * branch)
        if group:
            sums[group] = sums[group] + branch
    return torch.stack(sums)


def widened(*tensors: Tensor) -> list[Tensor]:
    """In fp32, or in fp64 where the first is."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.to(wide) for t in tensors]


def per_token(modulation: Tensor) -> Tensor:
    """[B, D] as [B, 1, D], so that it broadcasts over tokens; [D] and rank 3 do already."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def gather_rows(store: Tensor, rows: Tensor) -> Tensor:
    """store [B, N, D] at rows [B, K] -> [B, K, D]."""
    return store[_batch_index(rows), rows]


def scatter_rows(store: Tensor, rows: Tensor | None, values: Tensor) -> None:
    """store [B, N, D] at rows [B, K] = values [B, K, D]; all rows where rows is None."""
    if rows is None:
        store.copy_(values)
    else:
        store[_batch_index(rows), rows] = values


def token_metric(velocity: Tensor, metric: str) -> Tensor:
    """[B, gh, gw, ph, pw, C] -> fp32 [B, N], +inf wherever it is not finite."""
    values, channels = velocity.to(torch.float32), velocity.shape[-1]
    if metric == "std":
        values = values - values.sum(-1, keepdim=True) / channels
    squares = values.square().sum(-1)
    if metric == "std":
        squares = squares / max(channels - 1, 1)
    pixels = squares.sqrt().flatten(3).sum(-1) / (velocity.shape[3] * velocity.shape[4])
    return _finite_or_infinity(pixels.flatten(1))


def drop_keys(metric: Tensor, factor: Tensor, forced: Tensor | None, largest: bool) -> Tensor:
    """int64 [B, N], the smallest of which is dropped first: finite, then not, then forced."""
    score = _finite_or_infinity(metric * factor.to(torch.float32))
    keys = score.view(torch.int32).to(torch.int64)  # in the order of the scores, which have no sign
    if largest:
        keys = INFINITY_BITS - keys
    keys = torch.where(metric.isinf(), INFINITY_BITS + 1, keys)
    return keys if forced is None else keys + forced.to(torch.int64) * FORCED


def covering_token(table: Tensor, height: int, width: int) -> Tensor:
    """The number of the token over each cell, int64 [B, height, width]; -1 where there is none."""
    level, y, x = table.to(torch.int64).unbind(-1)
    cells = height * width
    number = torch.arange(table.shape[1], device=table.device).expand_as(level)
    owner = number.new_full((table.shape[0], cells + 1), -1)  # the last one for other levels
    for size in reversed(range(max(height, width).bit_length())):
        grid = owner[:, :cells].unflatten(1, (height, width))
        for dim in (1, 2):  # each square so far is four of this size
            grid = torch.maximum(grid, grid.roll(1 << size, dim))
        owner[:, :cells] = grid.flatten(1)
        first = torch.where(level == size, y * width + x, cells)
        owner.scatter_reduce_(1, first, number, "amax")
    return owner[:, :cells].unflatten(1, (height, width))


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def split_tokens(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which token each one comes from, int64 [B, n + 3 K], and its table; in compact order."""
    rows = rows.to(torch.int64)
    split = torch.zeros(table.shape[:2], dtype=torch.uint8, device=table.device)
    split.scatter_(1, rows, 1)
    staying = split.argsort(dim=1, stable=True)[:, : table.shape[1] - rows.shape[1]]
    children = gather_rows(table, rows.repeat_interleave(4, dim=1))
    level, y, x = children.unbind(-1)
    level = level - 1
    number = torch.arange(4, device=table.device, dtype=table.dtype).repeat(rows.shape[1])
    half = 1 << level
    children = torch.stack([level, y + number // 2 * half, x + number % 2 * half], dim=-1)
    source = torch.cat([staying, rows.repeat_interleave(4, dim=1)], dim=1)
    return source, torch.cat([gather_rows(table, staying), children], dim=1)


def pixels_of_children(copies: Tensor) -> Tensor:
    """Of four copies [B, 4 K, C 4] of each token, child k with pixel k in place of all four."""
    pixels = copies.unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # [B, K, child, C, pixel]
    own = pixels.diagonal(dim1=2, dim2=4).transpose(2, 3)  # [B, K, child, C]
    return own.unsqueeze(-1).expand(*own.shape, 4).flatten(3).flatten(1, 2)


def _finite_or_infinity(t: Tensor) -> Tensor:
    return torch.where(t.isfinite(), t, float("inf"))


def _batch_index(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device, dtype=rows.dtype).unsqueeze(1)


def _check_split(table: Tensor, rows: Tensor, raster: int | None, tokens: int) -> None:
    """Of `tokens` that come out."""
    if table.device.type != "cpu":
        return
    check_range(rows, table.shape[1])
    if (rows[:, 1:] <= rows[:, :-1]).any():
        raise ArgumentError("rows: got some that do not ascend; accepted are ascending ones")
    parents = gather_rows(table, rows)
    wrong = (parents[..., 0] < 1) | (parents[..., 0] > 30)
    if wrong.any():
        raise ArgumentError(
            f"rows: found the token {parents[wrong][0].tolist()} (level, y, x); accepted are those "
            "of level 1 to 30"
        )
    if raster is None:
        return
    places = split_tokens(table, rows)[1].to(torch.int64)
    level, y, x = places.unbind(-1)
    inside = (level == 0) & (y >= 0) & (x >= 0) & (x < raster) & (y * raster + x < tokens)
    if not inside.all():
        raise ArgumentError(
            f"table: found the token {places[~inside][0].tolist()} (level, y, x); accepted with "
            f"raster are those that tile its {tokens // raster} x {raster} cells"
        )


class Reference(Backend):
    name = "reference"
    priority = 0

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in FLOATING else f"{dtype} is not a floating dtype it knows"

    def gated_residual(self, x, branches, gates, fresh, cache, rows, out, weights=None):
        for i, store in enumerate(branches):
            if i != fresh:
                check_range(rows, store.shape[1])
        if cache is not None:
            check_range(rows, cache.shape[1])
            scatter_rows(cache, rows, branches[fresh])
        out.copy_(residual_sum(x, branches, gates, fresh, rows, weights))

    def norm_modulate(
        self, x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out,
        row_scale=None,
    ):  # fmt: skip
        check_range(rows, x.shape[1])
        active = x if rows is None else gather_rows(x, rows)
        if branch is not None:
            active = residual_sum(active, [branch], [gate])
            scatter_rows(x, rows, active)
            if cache is not None:
                scatter_rows(cache, rows, branch)
        y = modulated_norm(active, scale, shift, weight, bias, eps, rms)
        if row_scale is None:
            out.copy_(y)
        else:
            quantised_rows(y, out, row_scale)

    def token_select(self, velocity, drops, age, high, starvation, metric, max_age, rows, inverse):
        tokens, keep = drops.shape[1], rows.shape[1]
        values = token_metric(velocity, metric)
        forced = None if max_age is None else age >= max_age
        rate = torch.full((), starvation, dtype=torch.float32, device=drops.device).double()
        times = rate * drops
        # A stable sort of the negated keys ends with the first to be dropped, the last index first.
        order = (-drop_keys(values, (-times).exp(), forced, True)).argsort(dim=1, stable=True)
        dropped = torch.zeros_like(drops, dtype=torch.bool)
        dropped.scatter_(1, order[:, tokens - high :], True)
        keys = drop_keys(values, times.exp(), forced, False).masked_fill(dropped, 2 * FORCED)
        order = keys.argsort(dim=1, stable=True)
        dropped.scatter_(1, order[:, : tokens - keep - high], True)
        rows.copy_(dropped.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep])
        kept = ~dropped
        inverse.copy_(torch.where(dropped, -1, kept.cumsum(1) - 1))
        drops.add_(dropped)
        if age is not None:
            age.add_(1).masked_fill_(kept, 0)

    def token_change(self, velocity, last, rate, level, levels, inverse, score):
        now, coming = levels.unbind()
        computed = torch.ones_like(rate, dtype=torch.bool) if inverse is None else inverse >= 0
        exact = torch.promote_types(velocity.dtype, torch.float32)
        moved = (velocity.to(exact) - last.to(exact)).flatten(3).norm(dim=-1).flatten(1)
        gap = (now - level).abs()
        rate.copy_(torch.where(computed & (gap > 0), moved.to(torch.float32) / gap, rate))
        level.copy_(torch.where(computed, now, level))
        patches = computed.view(*velocity.shape[:3], 1, 1, 1)
        last.copy_(torch.where(patches, velocity, last))
        score.copy_(rate * (coming - level).abs())

    def qkv_prologue(
        self, q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset,
        norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin,
    ):  # fmt: skip
        tokens, dim = q.shape[1], q_out.shape[3]
        stored = k_cache.shape[1] if cos is None else min(k_cache.shape[1], cos.shape[-2])
        check_range(rows, stored - kv_offset)
        q = normed_heads(q, dim, norm, q_weight, q_bias, eps)
        k = normed_heads(k, dim, norm, k_weight, k_bias, eps)
        end = None if rows is not None else kv_offset + tokens
        if cos is not None:
            cos, sin = (_at(t[..., kv_offset:end, :], rows) for t in (cos, sin))
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        q_out[:, q_offset : q_offset + tokens] = q
        scatter_rows(k_cache[:, kv_offset:end], rows, k)
        scatter_rows(v_cache[:, kv_offset:end], rows, v.unflatten(-1, k.shape[2:]))

    def patchify(self, field, table, tokens):
        check_places(table, field)
        level, y, x = table.to(torch.int64).unbind(-1)
        height, width = field.shape[3:5]
        lines = y[..., None] * height + (_numbers(height, table) << level[..., None])
        columns = x[..., None] * width + (_numbers(width, table) << level[..., None])
        lines, columns = lines[..., :, None], columns[..., None, :]
        batch = torch.arange(len(table), device=table.device).view(-1, 1, 1, 1)
        cell, inside = (lines // height, columns // width), (lines % height, columns % width)
        tokens.copy_(field[(batch, *cell, *inside)])

    def unpatchify(self, tokens, table, field):
        check_places(table, field)
        if tokens.shape[1] == 0:
            return
        _, rows, columns, height, width, _ = field.shape
        owner = covering_token(table, rows, columns)
        level, y, x = gather_rows(table.to(torch.int64), owner.clamp(min=0).flatten(1)).unbind(-1)
        level, y, x = (t.unflatten(1, (rows, columns)).unsqueeze(-1) for t in (level, y, x))
        y, x = _numbers(rows, table)[:, None, None] - y, _numbers(columns, table)[:, None] - x
        # Where no token is, any pixel will do.
        line = ((y * height + _numbers(height, table)) >> level).clamp(0, height - 1)
        column = ((x * width + _numbers(width, table)) >> level).clamp(0, width - 1)
        batch = torch.arange(len(table), device=table.device).view(-1, 1, 1, 1, 1)
        owner = owner[..., None, None]
        found = tokens[batch, owner.clamp(min=0), line[..., :, None], column[..., None, :]]
        field.copy_(torch.where(owner.unsqueeze(-1) < 0, field, found))

    def resolution_transition(
        self, x, table, rows, noise, scale, deviation, pull, unsplit, pixelwise, raster, out,
        out_table,
    ):  # fmt: skip
        _check_split(table, rows, raster, out.shape[1])
        source, places = split_tokens(table, rows)
        dtype = torch.promote_types(x.dtype, torch.float32)
        _, y_cell, x_cell = places.to(torch.int64).unbind(-1)
        order = None if raster is None else y_cell * raster + x_cell
        noise = (noise if order is None else gather_rows(noise, order)).to(dtype)
        staying = x.shape[1] - rows.shape[1]
        value = gather_rows(x, source).to(dtype)
        plain, family = noise[:, :staying], noise[:, staying:]
        if pixelwise:
            value[:, staying:] = pixels_of_children(value[:, staying:])
            family = family.unflatten(2, (-1, 4))
            family = (family + pull * family.mean(3, keepdim=True)).flatten(2)
        else:
            family = family.unflatten(1, (-1, 4))
            family = (family + pull * family.mean(2, keepdim=True)).flatten(1, 2)
        y = scale * value + deviation * torch.cat([unsplit * plain, family], dim=1)
        scatter_rows(out, order, y.to(x.dtype))
        scatter_rows(out_table, order, places)

    def blend(self, fresh, cached, r, x, gate, blended, out):
        mixed = blended_with(fresh, cached, r).to(fresh.dtype)
        if blended is not None:
            blended.copy_(mixed)
        out.copy_(mixed if x is None else residual_sum(x, [mixed], [gate]))

    def blend_backward(self, grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
        g, weight = widened(grad, r)
        if gate is not None:
            g = per_token(gate) * g
        if grad_fresh is not None:
            grad_fresh.copy_(weight * g)
        if grad_cached is not None:
            grad_cached.copy_((1 - weight) * g)
        if grad_r is not None:
            fresh, cached = widened(fresh, cached)
            grad_r.copy_((g * (fresh - cached)).sum(dtype=torch.float64))

    def collapse(self, branches, weights, groups, accumulate, sums):
        start = sums if accumulate else None
        sums.copy_(collapsed(branches, weights, groups, sums.shape[0], start))

    def swiglu(self, gate, value, out):
        out.copy_(gated_silu(gate, value))


def _at(table: Tensor, rows: Tensor | None) -> Tensor:
    """table [P, d/2] or [B, P, d/2] at rows [B, K]."""
    if rows is None:
        return table
    return table[rows] if table.dim() == 2 else gather_rows(table, rows)


BACKEND = Reference()
