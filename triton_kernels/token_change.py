"""How wrong the velocity kept for each token may be by now; fastdit/ops/token_change.py has the contract.

One program takes TOKENS tokens, a pixel of all of them at a time: how far each computed one is from its
last value, which becomes the one it has, then its rate, level and score.

Bytes moved: the velocity, and the last one read and written, once. Division and square root are those
of IEEE 754. It is compiled at first use, once for each dtype, patch and number of channels: launch once
before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import programs
from triton_kernels.operand import operand

TILE = 1024  # elements a program works on at a time


@triton.jit(do_not_specialize=["tokens", "total", "columns"])
def token_change_kernel(
    velocity,
    strides,  # six
    last,
    last_strides,  # six
    rate,
    level,
    levels,
    inverse,
    score,
    tokens,  # N
    total,  # B N
    columns,  # gw
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    active = at < total
    b = (at // tokens).to(tl.int64)
    token = at % tokens
    computed = active
    if inverse is not None:
        place = tl.load(inverse.start + b * inverse.batch + token, mask=active, other=-1)
        computed = active & (place >= 0)
    row = (token // columns).to(tl.int64)
    column = (token % columns).to(tl.int64)
    channel = tl.arange(0, COLS).to(tl.int64)
    inside = computed[:, None] & (channel < CHANNELS)[None, :]
    patch = (b * strides[0] + row * strides[1] + column * strides[2])[:, None]
    patch += (channel * strides[5])[None, :]
    held = (b * last_strides[0] + row * last_strides[1] + column * last_strides[2])[:, None]
    held += (channel * last_strides[5])[None, :]

    squares = tl.zeros([TOKENS], tl.float32)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            pixel = velocity + patch + (y * strides[3] + x * strides[4])
            value = tl.load(pixel, mask=inside, other=0.0)
            own = last + held + (y * last_strides[3] + x * last_strides[4])
            change = value.to(tl.float32) - tl.load(own, mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(change * change, axis=1)
            tl.store(own, value, mask=inside)

    now = tl.load(levels)
    before = tl.load(level.start + b * level.batch + token, mask=active, other=0.0)
    speed = tl.load(rate.start + b * rate.batch + token, mask=active, other=0.0)
    gap = tl.abs(now - before)
    known = computed & (gap > 0.0)  # which NaN, no level, is not
    speed = tl.where(known, tl.div_rn(tl.sqrt_rn(squares), tl.where(known, gap, 1.0)), speed)
    before = tl.where(computed, now, before)
    off = speed * tl.abs(tl.load(levels + 1) - before)
    tl.store(rate.start + b * rate.batch + token, speed, mask=known)
    tl.store(level.start + b * level.batch + token, before, mask=computed)
    tl.store(score.start + b * score.batch + token, off, mask=active)


def token_change(
    velocity: Tensor,
    last: Tensor,
    rate: Tensor,
    level: Tensor,
    levels: Tensor,
    inverse: Tensor | None,
    score: Tensor,
) -> None:
    """Launch on the current stream of velocity's device; arguments as the op has checked them."""
    batch, height, columns, *patch, channels = velocity.shape
    tokens = height * columns
    total = batch * tokens
    if total == 0:
        return
    cols = triton.next_power_of_2(channels)
    at_once = max(1, TILE // cols)
    with torch.cuda.device_of(velocity):
        token_change_kernel[(programs(total, at_once),)](
            velocity,
            velocity.stride(),
            last,
            last.stride(),
            operand(rate),
            operand(level),
            levels,
            operand(inverse),
            operand(score),
            tokens,
            total,
            columns,
            HEIGHT=patch[0],
            WIDTH=patch[1],
            CHANNELS=channels,
            TOKENS=at_once,
            COLS=cols,
            num_warps=4,
        )
