"""y = norm(x) * (1 + scale) + shift, with the preceding gated residual folded in when it is given.

norm is LayerNorm (no affine unless weight or bias), or RMSNorm with `rms`, over the last dimension.
With `branch`, x <- x + gate * branch first, in place: that is one read and one write of x in place
of two reads and one write by separate ops. `cache` [B, N, D] receives a bit-exact copy of branch.

With `row_scale` y comes in fp8 (e4m3fn), each row divided by a number of its own: the result of
torchao's dynamic quantisation by row of what the op gives without. The number is
max|y| / 448 of the row, rounded to x's dtype. A row of zeros stays one, where torchao makes NaN of it.

Shapes: x [B, N, D], y [B, K, D]. Without `rows`, K = N. With `rows` [B, K] the op works on the rows
x[b, rows[b, k]] only: branch and y are compact, the updated rows go back into x, the other rows of
x and of the cache stay as they were.

Bytes moved: 2 B K D elements; 4 with a branch; one more for a cache write; y in fp8 is a byte each.
Variance is taken in two passes in fp32, over the values of x as they are stored, so the fused form
equals the two ops.

Each of scale, shift, weight, bias and gate may be fp32 beside an x of 16 bits: then nothing of it is rounded.

It has no gradient through the in-place form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.backends.base import FP8
from fastdit.backends.reference import gather_rows, modulated_norm
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, op, requires_grad, resolve, traced

# Two schemas, so that tracers know x to be written only where it is.
SCHEMA = (
    "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "float eps, bool rms, Tensor? rows, Tensor(a!) out, Tensor(b!)? row_scale, "
    "str? backend) -> ()"
)
RESIDUAL_SCHEMA = (
    "residual_norm_modulate(Tensor(a!) x, Tensor? scale, Tensor? shift, Tensor? weight, "
    "Tensor? bias, float eps, bool rms, Tensor branch, Tensor? gate, Tensor(b!)? cache, "
    "Tensor? rows, Tensor(c!) out, Tensor(d!)? row_scale, str? backend) -> ()"
)


@op
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    cache: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise and modulate, after adding a gated branch to x where one is given.

    Args:
        x: [B, N, D]; updated in place where branch is given.
        scale, shift: None, or [D], [B or 1, D], [B or 1, K or 1, D]; each in x's dtype or, where that has 16 bits, in
            fp32, as weight, bias and gate.
        weight, bias: [D], the norm's own affine parameters.
        eps: added to the variance or mean square.
        rms: RMSNorm in place of LayerNorm.
        branch: [B, K, D], the sub-layer output to add first.
        gate: its gate, shaped like scale; None adds the branch as it is.
        cache: row store [B, N, D] to write the branch into.
        rows: int32 or int64 [B, K], sorted and unique in each sample; None for all tokens.
        out: [B, K, D], where to write; a new tensor by default. In float8_e4m3fn with row_scale.
        row_scale: float32 [B, K], where to write what each row of out is to be multiplied by.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`. A gradient flows where grad is enabled and an input requires it (through
        `reference`); `branch`, `cache`, `out` and `row_scale` are refused then, since they write in place.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> y = norm_modulate(h, scale_mlp, shift_mlp, branch=attention, gate=gate_msa)
    """
    norm = (scale, shift, weight, bias, eps, rms)
    if torch.is_grad_enabled() and requires_grad(x, scale, shift, weight, bias, branch, gate):
        if out is not None or branch is not None or row_scale is not None:
            raise ArgumentError(
                f"branch, out, row_scale: {checks.IN_PLACE}, or gated_residual first"
            )
        _check(x, *norm, branch, gate, cache, rows, None, None)
        active = x if rows is None else gather_rows(x, rows)
        return modulated_norm(active, *norm)
    if traced():
        out = _new_out(x, rows, row_scale) if out is None else out
        if branch is None:
            _refuse_without_branch(gate, cache)
            torch.ops.fastdit.norm_modulate.default(x, *norm, rows, out, row_scale, backend)
        else:
            torch.ops.fastdit.residual_norm_modulate.default(
                x, *norm, branch, gate, cache, rows, out, row_scale, backend
            )
        return out
    _check(x, *norm, branch, gate, cache, rows, out, row_scale)
    if out is None:
        out = _new_out(x, rows, row_scale)
    function = resolve("norm_modulate", x.device, x.dtype, backend)
    function(x, *norm, branch, gate, cache, rows, out, row_scale)
    return out


def _new_out(x: Tensor, rows: Tensor | None, row_scale: Tensor | None) -> Tensor:
    if rows is None and row_scale is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = x.shape if rows is None else (*rows.shape, x.shape[-1])
    return x.new_empty(shape, dtype=x.dtype if row_scale is None else FP8)


def _check(
    x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out, row_scale
) -> None:
    """`out` is None where it is yet to be allocated: new memory overlaps nothing."""
    shape = checks.state("x", x)
    dtype, device = x.dtype, x.device
    if rows is not None:
        checks.row_index(rows, shape[0], device)
        shape = (shape[0], rows.shape[1], shape[2])
    if scale is not None:
        checks.modulation("scale", scale, shape, checks.beside("scale", scale, dtype), device)
    if shift is not None:
        checks.modulation("shift", shift, shape, checks.beside("shift", shift, dtype), device)
    if weight is not None:
        checks.operand("weight", weight, shape[2:], checks.beside("weight", weight, dtype), device)
    if bias is not None:
        checks.operand("bias", bias, shape[2:], checks.beside("bias", bias, dtype), device)
    if branch is None:
        _refuse_without_branch(gate, cache)
    else:
        checks.operand("branch", branch, shape, dtype, device)
        if gate is not None:
            checks.modulation("gate", gate, shape, checks.beside("gate", gate, dtype), device)
        checks.alone("x", x, (("branch", branch), ("gate", gate)))
        if cache is not None:
            checks.operand("cache", cache, x.shape, dtype, device)
            checks.alone("cache", cache, (("x", x), ("branch", branch)))
    if out is not None:
        checks.operand("out", out, shape, dtype if row_scale is None else FP8, device)
        in_place = branch is None and rows is None and row_scale is None
        check = checks.disjoint_or_same if in_place else checks.disjoint
        check("out", out, "x", x)
        small = (("scale", scale), ("shift", shift), ("weight", weight), ("bias", bias))
        checks.alone("out", out, (("branch", branch), ("gate", gate), ("cache", cache), *small))
    if row_scale is not None:
        checks.operand("row_scale", row_scale, shape[:2], torch.float32, device)
        small = (("scale", scale), ("shift", shift), ("weight", weight), ("bias", bias))
        large = (("x", x), ("branch", branch), ("gate", gate), ("cache", cache), ("out", out))
        checks.alone("row_scale", row_scale, (*large, *small))


def _refuse_without_branch(gate, cache) -> None:
    if gate is not None or cache is not None:
        raise ArgumentError("gate, cache: got a tensor without branch; accepted is None")


_run = checked("norm_modulate", _check)


def _without_branch(*given) -> tuple:
    *arguments, rows, out, row_scale = given
    return *arguments, None, None, None, rows, out, row_scale


def _run_without_branch(*given) -> None:
    *arguments, backend = given
    _run(*_without_branch(*arguments), backend)


define(SCHEMA, _run_without_branch, order=_without_branch)
define(RESIDUAL_SCHEMA, _run, "norm_modulate")
