"""Some tokens become four of half their size, and the state goes to an earlier, noisier time.

    out = scale * x + deviation * z

A token of `rows` is split: its four children take its value, lie at (y, x), (y, x + h),
(y + h, x) and (y + h, x + h), h half its side, and have one level less. All others stay as they
are. The copies share the noise that was in x; z cancels that. With eps, the standard normal noise
given, and c the correlation, the z of four siblings is, for every channel,

    z_k = eps_k + (sqrt(1 - 4 c) - 1) mean(eps)         covariance I - c, so -c between siblings

and that of a token which is not split is unsplit * eps, unsplit = sqrt(1 - c) by default. Where x
has noise of variance v^2 and deviation^2 c = scale^2 v^2, the noise of `out` is white.

Pixelwise, a token is pixels in the order (C, 2, 2), and what is copied four times is each of them:
child k is pixel k of its parent, four times, so that the token is drawn twice as large. Then it is
the four pixels of a child, in each channel, whose eps and z the line above is of.

x [B, n, C] holds tokens of several levels, their places in a table [B, n, 3] as for patchify; out
is [B, n + 3 K, C] and has a table of its own. The order of both is

* compact: the tokens that stay, in their order, then the children of each that was split;
* raster, where the tokens that come out tile a grid of cells: token (y, x) is number y * raster + x.

eps is read in the order of out. All is computed in fp32 (fp64 where x is), and rounded once.

Source: RALU (arXiv 2507.08422), equations 4 to 7; the root of the covariance in closed form. Bytes
moved: x, noise and out once. No gradient, no random numbers, no wait for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, op, refuse_gradients, resolve, traced

SCHEMA = (
    "resolution_transition(Tensor x, Tensor table, Tensor rows, Tensor noise, float scale, "
    "float deviation, float pull, float unsplit, bool pixelwise, int? raster, Tensor(a!) out, "
    "Tensor(b!) out_table, str? backend) -> ()"
)


@op
def resolution_transition(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor,
    *,
    scale: float,
    deviation: float,
    correlation: float,
    unsplit: float | None = None,
    pixelwise: bool = False,
    raster: int | None = None,
    out: Tensor | None = None,
    out_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Split the tokens of `rows`, scale all, and add noise that undoes what siblings share.

    Args:
        x: [B, n, C], floating, with any batch and token strides.
        table: int32 [B, n, 3], (level, y, x) of each token; may be expanded over the batch.
        rows: int32 or int64 [B, K], the tokens to split, ascending and unique in each sample; of
            level 1 or more. K may be 0 and n.
        noise: fp32 [B, n + 3 K, C], standard normal, in the order of `out`.
        scale: what x is multiplied by.
        deviation: what the noise is multiplied by.
        correlation: c, from 0 to 1/4.
        unsplit: the deviation of z where a token is not split; None for sqrt(1 - c).
        pixelwise: whether children are pixels of their parent, and not copies of it; C is then a
            multiple of 4.
        raster: cells in a row of the grid, for raster order; None for compact order.
        out: [B, n + 3 K, C], where to write; a new tensor by default.
        out_table: int32 [B, n + 3 K, 3], where to write the table of `out`; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out` and `out_table`.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride, memory or value,
            or requires a gradient while grad is enabled. The values of `rows` and `table` are
            looked at on the CPU only.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> x, table = resolution_transition(x, table, rows, noise, scale=0.18, deviation=0.946,
        ...                                  correlation=0.0177)  # 1024 -> 1024 + 3 K tokens
        >>> coarse = torch.arange(1024 - K).expand(B, -1)
        >>> x, table = resolution_transition(x, table, coarse, noise, scale=0.218, deviation=0.902,
        ...                                  correlation=0.0177, raster=64)  # 4096, in order
    """
    refuse_gradients("x, noise", x, noise, out)
    if not isinstance(correlation, (int, float)) or not 0 <= correlation <= 0.25:
        raise ArgumentError(f"correlation: got {correlation!r}; accepted is a number from 0 to 1/4")
    pull = math.sqrt(1 - 4 * correlation) - 1
    unsplit = math.sqrt(1 - correlation) if unsplit is None else unsplit
    how = (scale, deviation, pull, unsplit, pixelwise, raster)
    if traced():
        out, out_table = _new(x, table, rows, out, out_table)
        torch.ops.fastdit.resolution_transition.default(
            x, table, rows, noise, *how, out, out_table, backend
        )
        return out, out_table
    _check(x, table, rows, noise, *how, out, out_table)
    out, out_table = _new(x, table, rows, out, out_table)
    function = resolve("resolution_transition", x.device, x.dtype, backend)
    function(x, table, rows, noise, *how, out, out_table)
    return out, out_table


def _new(x, table, rows, out, out_table) -> tuple[Tensor, Tensor]:
    """What is given of the last two, and new tensors in place of None."""
    batch, tokens, width = x.shape
    tokens += 3 * rows.shape[1]
    out = x.new_empty((batch, tokens, width)) if out is None else out
    return out, table.new_empty((batch, tokens, 3)) if out_table is None else out_table


def _check(
    x, table, rows, noise, scale, deviation, pull, unsplit, pixelwise, raster, out, out_table
) -> None:
    """`out` and `out_table` are None where they are yet to be allocated."""
    batch, tokens, width = checks.state("x", x, any_stride=True)
    dtype, device = x.dtype, x.device
    checks.operand("x", x, (batch, tokens, max(width, 1)), dtype, device)
    checks.operand("table", table, (batch, tokens, 3), torch.int32, device)
    checks.row_index(rows, batch, device)
    if rows.shape[1] > tokens:
        raise ArgumentError(
            f"rows: got shape {list(rows.shape)}; accepted is [{batch}, K], K at most the {tokens} "
            "tokens of x"
        )
    size = (batch, tokens + 3 * rows.shape[1], width)
    checks.operand("noise", noise, size, torch.float32, device)
    numbers = {"scale": scale, "deviation": deviation, "pull": pull, "unsplit": unsplit}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArgumentError(f"{name}: got {value!r}; accepted is a finite number")
    if pixelwise and width % 4:
        raise ArgumentError(
            f"pixelwise: got True with tokens of {width} elements; accepted with it are multiples of 4"
        )
    if raster is not None:
        checks.integer("raster", raster, 1, max(size[1], 1))
    written = []
    if out is not None:
        checks.operand("out", out, size, dtype, device)
        written.append(("out", out))
    if out_table is not None:
        checks.operand("out_table", out_table, (*size[:2], 3), torch.int32, device)
        written.append(("out_table", out_table))
    if written:
        read = (("x", x), ("table", table), ("rows", rows), ("noise", noise))
        checks.all_disjoint(written, read)


define(SCHEMA, checked("resolution_transition", _check))
