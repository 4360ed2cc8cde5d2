"""Tokens that become four, and noise for all; fastdit/ops/resolution_transition.py has the contract.

x [B, n, C] and an int32 table [B, n, 3] of (level, y, x), rows [B, K] the tokens to split, ascending,
noise fp32 [B, n + 3 K, C] in the order of out [B, n + 3 K, C]. One program takes one token: it counts
the rows before its own, so it knows where it goes, and works on a tile of its four children, or of
itself in the place of the first. Noise is shared down a column of the tile, or pixelwise by four
neighbours in a row of it.

Bytes moved: x, noise and out once, and K numbers a token, which stay in the cache. Computed in fp32,
rounded once. It does not sort or check rows, and it is compiled at first use, once for each dtype,
width and order: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import programs
from triton_kernels.operand import operand

COLUMNS = 256  # of a tile, at most: 1024 elements for 4 warps
BLOCK = 1024  # of rows, counted at a time


@triton.jit(
    do_not_specialize=["tokens", "split", "scale", "deviation", "pull", "unsplit", "raster"]
)
def resolution_transition_kernel(
    x,
    table,
    rows,
    noise,
    out,
    out_table,
    tokens,  # n
    split,  # K
    scale,
    deviation,
    pull,
    unsplit,
    raster,
    WIDTH: tl.constexpr,
    PIXELWISE: tl.constexpr,
    RASTER: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // tokens).to(tl.int64)
    i = (tl.program_id(0) % tokens).to(tl.int64)
    before = tl.zeros([], tl.int64)
    here = tl.zeros([], tl.int64)
    for start in range(0, split, BLOCK):
        k = start + tl.arange(0, BLOCK)
        row = tl.load(rows.start + b * rows.batch + k, mask=k < split, other=tokens).to(tl.int64)
        before += tl.sum((row < i).to(tl.int64), axis=0)
        here += tl.sum((row == i).to(tl.int64), axis=0)
    is_split = here > 0

    place = table.start + b * table.batch + i * table.token
    number = tl.arange(0, 4)
    level = tl.load(place) - here.to(tl.int32)
    half = tl.where(is_split, 1 << tl.maximum(level, 0), 0)
    y = tl.load(place + 1) + number // 2 * half
    x_cell = tl.load(place + 2) + number % 2 * half
    live = is_split | (number == 0)
    if RASTER:
        to = y.to(tl.int64) * raster + x_cell
    else:
        to = tl.where(is_split, tokens - split + 4 * before + number, i - before)
    place = out_table.start + b * out_table.batch + to * out_table.token
    tl.store(place, level + 0 * number, mask=live)
    tl.store(place + 1, y, mask=live)
    tl.store(place + 2, x_cell, mask=live)

    for start in range(0, WIDTH, COLS):
        col = start + tl.arange(0, COLS)
        inside = live[:, None] & (col < WIDTH)[None, :]
        row = noise.start + (b * noise.batch + to * noise.token)[:, None]
        eps = tl.load(row + col[None, :], mask=inside, other=0.0)
        own = x.start + b * x.batch + i * x.token
        if PIXELWISE:
            first = (col // 4 * 4)[None, :]
            mean = tl.zeros([4, COLS], tl.float32)
            for j in tl.static_range(4):
                mean += tl.load(row + first + j, mask=inside, other=0.0)
            own += tl.where(is_split, first + number[:, None], col[None, :])
            value = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        else:
            mean = tl.sum(eps, axis=0)[None, :]
            value = tl.load(own + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
        z = tl.where(is_split, eps + pull * (mean * 0.25), unsplit * eps)
        result = scale * value + deviation * z
        of = out.start + (b * out.batch + to * out.token)[:, None] + col[None, :]
        tl.store(of, result.to(out.start.dtype.element_ty), mask=inside)


def resolution_transition(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor,
    scale: float,
    deviation: float,
    pull: float,
    unsplit: float,
    pixelwise: bool,
    raster: int | None,
    out: Tensor,
    out_table: Tensor,
) -> None:
    """Launch on the current stream of x's device; arguments as the op has checked them."""
    batch, tokens, width = x.shape
    if batch * tokens == 0:
        return
    cols = max(16, min(COLUMNS, triton.next_power_of_2(width)))
    with torch.cuda.device_of(x):
        resolution_transition_kernel[(programs(batch * tokens, 1),)](
            operand(x),
            operand(table),
            operand(rows),
            operand(noise),
            operand(out),
            operand(out_table),
            tokens,
            rows.shape[1],
            scale,
            deviation,
            pull,
            unsplit,
            raster or 0,
            WIDTH=width,
            PIXELWISE=pixelwise,
            RASTER=raster is not None,
            COLS=cols,
            BLOCK=BLOCK,
            num_warps=max(1, cols // 64),
        )
