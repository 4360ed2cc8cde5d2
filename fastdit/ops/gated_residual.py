"""out = x + sum_i gates[i] * branches[i]: the residuals of one or of many sub-layers in one pass.

Shapes: x and out [B, K, D], K the active tokens. Without `rows` every branch is [B, K, D]. With
`rows` [B, K] the branch numbered `fresh` is compact [B, K, D], since it was just computed, and all
others are row stores over the full layout [B, N, D], read at rows[b, k]. `cache` [B, N, D] receives
a bit-exact copy of the fresh branch at the active rows and keeps its other rows.

Bytes moved: (k + 2) B K D elements for k branches, plus one more for a cache write. Eager torch
moves 5 k. Sums are kept in fp32 and rounded once by every backend but `reference`.

It does not choose rows, does not sort them, and does not mix dtypes: cast first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.backends.reference import residual_sum
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import define, requires_grad, resolve, traced

MAX_BRANCHES = 64

SCHEMA = (
    "gated_residual(Tensor x, Tensor[] branches, Tensor?[] gates, int fresh, Tensor(a!)? cache, "
    "Tensor? rows, Tensor(b!) out, str? backend) -> ()"
)


def gated_residual(
    x: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    *,
    fresh: int = -1,
    cache: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add gated branches to the residual stream in one pass.

    Args:
        x: [B, K, D], the residual stream at the active tokens.
        branches: 1 to 64 tensors; see the module text for their shapes.
        gates: one for each branch: None, or [D], [B or 1, D], [B or 1, K or 1, D].
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
            raise ArgumentError(
                "out, cache: got a tensor while an input requires a gradient; accepted is None "
                "(in-place forms have no gradient: use torch.no_grad())"
            )
        _check(x, branches, gates, fresh, cache, rows, x)
        return residual_sum(x, branches, gates, fresh, rows)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if traced():
        torch.ops.fastdit.gated_residual.default(
            x, branches, gates, fresh, cache, rows, out, backend
        )
    else:
        _run(x, branches, gates, fresh, cache, rows, out, backend)
    return out


def _run(x, branches, gates, fresh, cache, rows, out, backend=None) -> None:
    _check(x, branches, gates, fresh, cache, rows, out)
    function = resolve("gated_residual", x.device.type, x.dtype, backend)
    function(x, branches, gates, fresh, cache, rows, out)


define(SCHEMA, _run)


def _check(x, branches, gates, fresh, cache, rows, out) -> None:
    checks.state("x", x)
    shape = x.shape
    if rows is not None:
        checks.row_index(rows, x)
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
    for i, branch in enumerate(branches):
        if rows is None or i == fresh:
            checks.operand("branches", branch, shape, x)
        else:
            checks.store("branches", branch, x)
        gate = gates[i]
        if gate is not None:
            checks.modulation("gates", gate, shape[0], shape[1], x)
    if out is not x:
        checks.operand("out", out, shape, x)
    _check_memory(x, branches, gates, fresh, cache, rows, out)


def _check_memory(x, branches, gates, fresh, cache, rows, out) -> None:
    if cache is not None:
        if fresh < 0:
            raise ArgumentError("cache: got a tensor with fresh=-1; accepted is the fresh branch's")
        if rows is None:
            checks.operand("cache", cache, x.shape, x)
        else:
            checks.store("cache", cache, x)
        checks.written("cache", cache)
        checks.disjoint("cache", cache, "x", x)
        checks.disjoint("cache", cache, "out", out)
        for i, branch in enumerate(branches):
            checks.disjoint("cache", cache, f"branches[{i}]", branch)
    checks.written("out", out)
    checks.disjoint_or_same("out", out, "x", x)
    for i, branch in enumerate(branches):
        checks.disjoint("out", out, f"branches[{i}]", branch)
        if gates[i] is not None:
            checks.disjoint("out", out, f"gates[{i}]", gates[i])
