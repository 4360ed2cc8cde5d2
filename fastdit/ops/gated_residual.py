"""out = x + sum_i weights[i] * gates[i] * branches[i]: the residuals of one or of many sub-layers in one pass.

Shapes: x and out [B, K, D], K the active tokens. Without `rows` every branch is [B, K, D]. With
`rows` [B, K] the branch numbered `fresh` is compact [B, K, D], since it was just computed, and all
others are row stores over the full layout [B, N, D], read at rows[b, k]. `cache` [B, N, D] receives
a bit-exact copy of the fresh branch at the active rows and keeps its other rows.

Weights are one number a branch, or one for each branch and active token: an output that is drawn through its last
computed values is a weighted sum of them, so a forecast of order n is n + 1 branches of one gate. They are read where
the kernel runs, never on the host, so that a captured launch can be replayed with others.

Bytes moved: (k + 2) B K D elements for k branches, plus one more for a cache write. Eager torch
moves 5 k. Sums are kept in fp32 and rounded once by every backend but `reference`.

Gates may be fp32 beside an x of 16 bits, all of them: then nothing of a gate is rounded. All else has x's dtype.

It does not choose rows and does not sort them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.backends.base import MAX_BRANCHES
from fastdit.backends.reference import residual_sum
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, new_like, op, requires_grad, resolve, traced

_BRANCHES = tuple(f"branches[{i}]" for i in range(MAX_BRANCHES))  # names for messages, made once
_GATES = tuple(f"gates[{i}]" for i in range(MAX_BRANCHES))

SCHEMA = (
    "gated_residual(Tensor x, Tensor[] branches, Tensor?[] gates, int fresh, Tensor(a!)? cache, "
    "Tensor? rows, Tensor(b!) out, Tensor? weights, str? backend) -> ()"
)


@op
def gated_residual(
    x: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    *,
    weights: Tensor | None = None,
    fresh: int = -1,
    cache: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add gated branches to the residual stream in one pass.

    Args:
        x: [B, K, D], the residual stream at the active tokens; of any strides, such as a patch
            embedding's transposed ones, unless it is also `out`.
        branches: 1 to 128 tensors; see the module text for their shapes.
        gates: one for each branch: None, or [D], [B or 1, D], [B or 1, K or 1, D]; of one dtype, x's or, where that
            has 16 bits, fp32.
        weights: [branches] or [branches, B, K], contiguous, fp32 (fp64 where x is); None for ones.
            No gradient flows to them.
        fresh: number of the branch that was computed in this step; -1 for none.
        cache: row store [B, N, D] to write the fresh branch into.
        rows: int32 or int64 [B, K], sorted and unique in each sample; None for all tokens.
        out: where to write, x itself for in place; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`. A gradient flows where grad is enabled and an input requires it (through
        `reference`); `out` and `cache` are refused then.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> h = gated_residual(h, [attention, cached_mlp], [gate_msa, gate_mlp], fresh=0, out=h)
    """
    if torch.is_grad_enabled() and requires_grad(x, branches, gates):
        if out is not None or cache is not None:
            raise ArgumentError(f"out, cache: {checks.IN_PLACE}")
        _check(x, branches, gates, fresh, None, rows, None, weights)
        return residual_sum(x, branches, gates, fresh, rows, weights)
    if traced():
        out = new_like(x) if out is None else out
        torch.ops.fastdit.gated_residual.default(
            x, branches, gates, fresh, cache, rows, out, weights, backend
        )
        return out
    _check(x, branches, gates, fresh, cache, rows, out, weights)
    if out is None:
        out = new_like(x)
    function = resolve("gated_residual", x.device, x.dtype, backend)
    function(x, branches, gates, fresh, cache, rows, out, weights)
    return out


def _check(x, branches, gates, fresh, cache, rows, out, weights) -> None:
    """`out` is None where it is yet to be allocated: new memory overlaps nothing."""
    shape = checks.state("x", x, any_stride=out is not x)
    dtype, device = x.dtype, x.device
    if rows is not None:
        checks.row_index(rows, shape[0], device)
        if rows.shape[1] != shape[1]:
            raise ArgumentError(
                f"rows: got shape {list(rows.shape)}; accepted is {list(shape[:2])}, one row for "
                "each token of x"
            )
    count = len(branches)
    if not 1 <= count <= MAX_BRANCHES or len(gates) != count:
        raise ArgumentError(
            f"branches, gates: got {count} and {len(gates)} of them; accepted are equal counts "
            f"from 1 to {MAX_BRANCHES}"
        )
    if not -1 <= fresh < count:
        raise ArgumentError(f"fresh: got {fresh}; accepted is -1 to {count - 1}")
    gate_dtype = None
    for i, branch in enumerate(branches):
        if rows is None or i == fresh:
            checks.operand(_BRANCHES[i], branch, shape, dtype, device)
        else:
            checks.store(_BRANCHES[i], branch, shape, dtype, device)
        if gates[i] is not None:
            gate_dtype = gate_dtype or checks.beside(_GATES[i], gates[i], dtype)
            checks.modulation(_GATES[i], gates[i], shape, gate_dtype, device)
    if weights is not None:
        _check_weights(weights, count, x)
    read = tuple(zip(_BRANCHES, branches, strict=False))
    if out is not None:
        if out is not x:
            checks.operand("out", out, shape, dtype, device)
            checks.disjoint_or_same("out", out, "x", x)
        checks.alone("out", out, (*read, *zip(_GATES, gates, strict=False), ("weights", weights)))
    if cache is not None:
        if fresh < 0:
            raise ArgumentError("cache: got a tensor with fresh=-1; accepted is None without fresh")
        check = checks.operand if rows is None else checks.store
        check("cache", cache, shape, dtype, device)
        checks.alone("cache", cache, (("x", x), ("out", out), *read))


def _check_weights(weights, count, x) -> None:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    shapes = (count,), (count, *x.shape[:2])
    if not isinstance(weights, Tensor):
        raise ArgumentError(f"weights: got {type(weights).__name__}; accepted is a tensor or None")
    if weights.shape not in shapes or weights.dtype is not dtype or weights.device != x.device:
        raise ArgumentError(
            f"weights: got {weights.dtype} {list(weights.shape)} on {weights.device}; accepted is {dtype} "
            f"{list(shapes[0])}, or {list(shapes[1])}, on {x.device}"
        )
    if not weights.is_contiguous() or weights.requires_grad:
        raise ArgumentError(
            f"weights: got strides {weights.stride()} and requires_grad={weights.requires_grad}; accepted is a "
            "contiguous tensor without a gradient"
        )


define(SCHEMA, checked("gated_residual", _check))
