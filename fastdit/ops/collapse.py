"""sums[0] = sum_i weights[i] branches[i], and sums[g] = the branches of group g added up, in one pass.

What it is for: branches with gates weights[i] + shared[groups[i]], where `shared` is the same for a
whole group. Then

    sum_i (weights[i] + shared[groups[i]]) branches[i] = sums[0] + sum_g shared[g] sums[g]

exactly, so a run of branches that stays while `shared` changes is read once, and every later use
costs the few sums: `gated_residual(h, [*sums], [None, *shared])`.

Shapes: branches [B, K, D]; weights [D], [B, D] and the like, or None for 1; groups of small
integers, 0 for a branch of no group; sums [S, B, K, D], S from 1 to 4, in the branches' dtype or in
fp32. Every backend adds in fp32 and rounds once. More than 64 branches take a pass for every 64,
which adds to the sums of the one before, as stored: in fp32 that changes nothing.

Bytes moved: (k + S) B K D elements for k branches.

Source: adaLN-single (PixArt-alpha, arXiv 2310.00426) makes gates of a table of each block and one
projection of the timestep that all blocks share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.backends.reference import collapsed
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import define, op, requires_grad, resolve, traced

MAX_SUMS = 4
PASS = 64  # branches

SCHEMA = (
    "collapse(Tensor[] branches, Tensor?[] weights, int[] groups, bool accumulate, "
    "Tensor(a!) sums, str? backend) -> ()"
)


@op
def collapse(
    branches: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    groups: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add up branches, weighted and by group, in one pass.

    Args:
        branches: one or more tensors [B, K, D], last stride 1.
        weights: one for each branch: None, or [D], [B or 1, D], [B or 1, K or 1, D]; of one dtype, the branches' or,
            where that has 16 bits, fp32.
        groups: one for each branch: the sum it also counts in, unweighted, from 1 to 3; 0 for none.
        dtype: that of the sums, the branches' (the default) or float32.
        out: [S, B, K, D] to write, with S above every group; a new tensor by default, S as small
            as that.
        accumulate: add to what `out` holds.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        The sums, `out`. A gradient flows where grad is enabled and an input requires it (through
        `reference`); `out` is refused then.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride, memory or value.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> # a block's attention, cross-attention and feed-forward, gates table + tau
        >>> p = collapse([sa, ca, ff], [table_msa, None, table_mlp], [1, 0, 2])
        >>> h = gated_residual(h, [*p], [None, tau_msa, tau_mlp], out=h)
    """
    if accumulate and out is None:
        raise ArgumentError("accumulate: got True without out; accepted is False, or a tensor out")
    if torch.is_grad_enabled() and requires_grad(branches, weights):
        if out is not None:
            raise ArgumentError(f"out: {checks.IN_PLACE}")
        _check(branches, weights, groups, dtype, None)
        sums = collapsed(branches, weights, groups, 1 + max(groups))
        return sums.to(dtype or branches[0].dtype)
    eager = not traced()
    if eager:
        _check(branches, weights, groups, dtype, out)
    first = branches[0]
    if out is None:
        out = first.new_empty((1 + max(groups), *first.shape), dtype=dtype)
    for start in range(0, len(branches), PASS):
        part = slice(start, start + PASS)
        arguments = (branches[part], weights[part], groups[part], accumulate or start > 0, out)
        if eager:
            resolve("collapse", first.device, first.dtype, backend)(*arguments)
        else:
            torch.ops.fastdit.collapse.default(*arguments, backend)
    return out


def _run(branches, weights, groups, accumulate, sums, backend=None) -> None:
    """What torch.ops calls once a trace runs."""
    _check(branches, weights, groups, None, sums)
    if len(branches) > PASS:
        raise ArgumentError(f"branches: got {len(branches)}; accepted is up to {PASS} in a pass")
    first = branches[0]
    function = resolve("collapse", first.device, first.dtype, backend)
    function(branches, weights, groups, accumulate, sums)


define(SCHEMA, _run)


def _check(branches, weights, groups, dtype, out) -> None:
    """`out` is None where it is yet to be allocated: new memory overlaps nothing."""
    count = len(branches)
    if not count or len(weights) != count or len(groups) != count:
        raise ArgumentError(
            f"branches, weights, groups: got {count}, {len(weights)} and {len(groups)} of them; "
            "accepted are equal counts from 1 up"
        )
    first = branches[0]
    shape = checks.state("branches[0]", first)
    weight_dtype = None
    for i, (branch, by, group) in enumerate(zip(branches, weights, groups, strict=True)):
        checks.operand(f"branches[{i}]", branch, shape, first.dtype, first.device)
        if by is not None:
            weight_dtype = weight_dtype or checks.beside(f"weights[{i}]", by, first.dtype)
            checks.modulation(f"weights[{i}]", by, shape, weight_dtype, first.device)
        checks.integer(f"groups[{i}]", group, 0, MAX_SUMS - 1)
    accepted = (first.dtype, torch.promote_types(first.dtype, torch.float32))
    if dtype is not None and dtype not in accepted:
        raise ArgumentError(f"dtype: got {dtype}; accepted is {accepted[0]} or {accepted[1]}")
    if out is not None:
        accepted = (dtype,) if dtype else accepted
        checks.sums("out", out, 1 + max(groups), MAX_SUMS, shape, accepted, first.device)
        read = [(f"branches[{i}]", branch) for i, branch in enumerate(branches)]
        read += [(f"weights[{i}]", by) for i, by in enumerate(weights)]
        checks.alone("out", out, read)
