"""Patches of a field to tokens of several levels, and back; fastdit/ops/patchify.py has the contract.

field [B, gh, gw, ph, pw, C], tokens [B, n, ph, pw, C], both of any strides, and an int32 table
[B, n, 3] of (level, y, x). One program takes TILE elements of tokens, the column of a patch being
numbered first and the channel last: neighbours of a latent image are neighbours here. It reads each
and writes it, or draws it as large as its token's level says.

Values are copied, not converted. Bytes moved: the tokens, and the cells that are covered. It is
compiled at first use, once for each dtype and patch: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import programs
from triton_kernels.operand import operand

TILE = 1024  # elements, for 4 warps


@triton.jit
def _pixel(line, column, strides, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """From the first pixel of a cell to the one so far below and right of it, in elements."""
    down = line // HEIGHT * strides[1] + line % HEIGHT * strides[3]
    return down + column // WIDTH * strides[2] + column % WIDTH * strides[4]


@triton.jit(do_not_specialize=["count", "total"])
def patchify_kernel(
    field,
    field_strides,  # six
    tokens,
    token_strides,  # five
    table,
    count,  # n
    total,  # elements of all tokens
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DRAW: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    active = at < total
    column = (at % WIDTH).to(tl.int64)
    line = (at // WIDTH % HEIGHT).to(tl.int64)
    channel = (at // (WIDTH * HEIGHT) % CHANNELS).to(tl.int64)
    token = at // (WIDTH * HEIGHT * CHANNELS)
    b = (token // count).to(tl.int64)
    i = (token % count).to(tl.int64)

    place = table.start + b * table.batch + i * table.token
    level = tl.load(place, mask=active, other=0)
    y = tl.load(place + 1, mask=active, other=0).to(tl.int64)
    x = tl.load(place + 2, mask=active, other=0).to(tl.int64)

    from_token = tokens + b * token_strides[0] + i * token_strides[1]
    from_token += line * token_strides[2] + column * token_strides[3] + channel * token_strides[4]
    cell = field + b * field_strides[0] + y * field_strides[1] + x * field_strides[2]
    cell += channel * field_strides[5]
    side = tl.where(active, 1 << level, 0).to(tl.int64)
    line *= side
    column *= side
    if DRAW:
        value = tl.load(from_token, mask=active)
        largest = tl.max(side, axis=0)
        for r in range(largest):
            for q in range(largest):
                to = cell + _pixel(line + r, column + q, field_strides, HEIGHT, WIDTH)
                tl.store(to, value, mask=(r < side) & (q < side))
    else:
        value = tl.load(cell + _pixel(line, column, field_strides, HEIGHT, WIDTH), mask=active)
        tl.store(from_token, value, mask=active)


def patchify(field: Tensor, table: Tensor, tokens: Tensor, draw: bool = False) -> None:
    """Launch on the current stream of the field's device; arguments as the op has checked them."""
    total = tokens.numel()
    if total == 0:
        return
    height, width, channels = field.shape[3:]
    with torch.cuda.device_of(field):
        patchify_kernel[(programs(total, TILE),)](
            field,
            field.stride(),
            tokens,
            tokens.stride(),
            operand(table),
            tokens.shape[1],
            total,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            DRAW=draw,
            TILE=TILE,
            num_warps=4,
        )
