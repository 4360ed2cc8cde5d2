"""Which K of N tokens stay active; the contract, and the order, is in fastdit/ops/token_select.py.

Two kernels. token_keys takes TOKENS tokens a program, a pixel of all of them at a time: their
metrics, and the two keys that say when a token is dropped, on the high side and on the low one.
token_select takes one sample a program: radix selects over the keys, eight bits at a time, find
where each side is cut, and a scan over the tokens in raster order, BLOCK at a time, writes the
tables.

Keys are uint32, the smallest dropped first: tokens with a score, by its bits, which without a sign
are in the order of the scores; then those without a metric; then all of this again, with the top
bit set, for those that are too old. All ones is a token that is dropped already.

Bytes moved: the velocity once and its channels a second time from the cache, then about ten times
the keys, which stay there. Division and square root are those of IEEE 754, the exponential is taken
in fp64 and rounded: the same metrics give the same rows as on every backend.

It is compiled at first use, once for each dtype, patch, number of channels and power of two that
holds N: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import programs
from triton_kernels.operand import operand

TILE = 1024  # elements a program of token_keys works on at a time
BLOCK = 4096  # tokens a program of token_select works on at a time

INFINITY_BITS = tl.constexpr(0x7F800000)
FORCED = tl.constexpr(0x80000000)
DROPPED = tl.constexpr(0xFFFFFFFF)


@triton.jit
def finite_or_infinity(x):
    return tl.where(x < float("inf"), x, float("inf"))  # x is not negative; NaN compares false


@triton.jit
def drop_key(metric, times, forced, HIGH: tl.constexpr):
    factor = tl.exp(-times if HIGH else times).to(tl.float32)
    score = finite_or_infinity(metric * factor).to(tl.uint32, bitcast=True)
    key = INFINITY_BITS - score if HIGH else score
    key = tl.where(metric == float("inf"), INFINITY_BITS + 1, key)
    return tl.where(forced, key | FORCED, key)


@triton.jit(do_not_specialize=["tokens", "total", "columns", "high", "starvation", "max_age"])
def token_keys_kernel(
    velocity,
    strides,  # six
    drops,
    age,
    keys,  # [2, B, N]
    tokens,  # N
    total,  # B N
    columns,  # gw
    high,
    starvation,
    max_age,
    NORM: tl.constexpr,
    FORCE: tl.constexpr,
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
    row = (token // columns).to(tl.int64)
    column = (token % columns).to(tl.int64)
    channel = tl.arange(0, COLS).to(tl.int64)
    inside = active[:, None] & (channel < CHANNELS)[None, :]
    patch = (b * strides[0] + row * strides[1] + column * strides[2])[:, None]
    patch += (channel * strides[5])[None, :]

    total_of_pixels = tl.zeros([TOKENS], tl.float32)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            pixel = velocity + patch + (y * strides[3] + x * strides[4])
            value = tl.load(pixel, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares = tl.sum(value * value, axis=1)
            else:
                mean = tl.div_rn(tl.sum(value, axis=1), float(CHANNELS))
                deviation = tl.where(inside, value - mean[:, None], 0.0)
                squares = tl.sum(deviation * deviation, axis=1)
                squares = tl.div_rn(squares, float(max(CHANNELS - 1, 1)))
            total_of_pixels += tl.sqrt_rn(squares)
    metric = finite_or_infinity(tl.div_rn(total_of_pixels, float(HEIGHT * WIDTH)))

    dropped_before = tl.load(drops.start + b * drops.batch + token, mask=active, other=0)
    rate = tl.full([], starvation, tl.float32)  # the interpreter has an unrounded float
    times = rate.to(tl.float64) * dropped_before.to(tl.float64)
    forced = tl.zeros([TOKENS], tl.int1)
    if FORCE:
        old = tl.load(age.start + b * age.batch + token, mask=active, other=0)
        forced = old >= max_age
    first = drop_key(metric, times, forced, True).to(tl.int32, bitcast=True)
    second = drop_key(metric, times, forced, False).to(tl.int32, bitcast=True)
    tl.store(keys + at, first, mask=active & (high > 0))
    tl.store(keys + (total.to(tl.int64) + at), second, mask=active)


@triton.jit
def load_keys(keys, i, tokens):
    """uint32; all ones past the last token, which no cut ever is."""
    return tl.load(keys + i, mask=i < tokens, other=-1).to(tl.uint32, bitcast=True)


@triton.jit
def ranks(mask):
    """How many are set before each one."""
    ones = mask.to(tl.int64)  # the interpreter sums in int64 whatever it is asked for
    return (tl.cumsum(ones, axis=0) - ones).to(tl.int32)


@triton.jit
def find_cut(keys, tokens, count, BLOCK: tl.constexpr):
    """Dropped are all keys below `cut`, and `take` of the `equal` ones that have it."""
    cut = tl.full([], 0, tl.uint32)
    take = count
    equal = count
    digits = tl.arange(0, 256)
    for part in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, tokens, BLOCK):
            i = start + tl.arange(0, BLOCK)
            key = load_keys(keys, i, tokens)
            counted = i < tokens
            if part > 0:
                counted = counted & ((key >> (32 - 8 * part)) == cut)
            digit = ((key >> (24 - 8 * part)) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=counted)
        upto = tl.cumsum(counts, axis=0)
        found = tl.sum((upto < take).to(tl.int32), axis=0)
        here = digits == found
        equal = tl.sum(tl.where(here, counts, 0), axis=0)
        take -= tl.sum(tl.where(here, upto - counts, 0), axis=0)
        cut = (cut << 8) | found.to(tl.uint32)
    return cut, take, equal


@triton.jit(do_not_specialize=["tokens", "total", "high", "low"])
def token_select_kernel(
    keys,
    drops,
    age,
    rows,
    inverse,
    tokens,  # N
    total,  # B N
    high,
    low,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    high_keys = keys + b * tokens
    low_keys = keys + total.to(tl.int64) + b * tokens

    if high > 0:
        cut, take, equal = find_cut(high_keys, tokens, high, BLOCK)
        seen = 0
        for start in range(0, tokens, BLOCK):
            i = start + tl.arange(0, BLOCK)
            key = load_keys(high_keys, i, tokens)
            same = key == cut
            last_ones = same & (seen + ranks(same) >= equal - take)
            tl.store(low_keys + i, -1, mask=(key < cut) | last_ones)
            seen += tl.sum(same.to(tl.int32), axis=0)
        tl.debug_barrier()  # other threads may read those keys

    cut, take, _equal = find_cut(low_keys, tokens, low, BLOCK)
    seen = 0
    position = 0
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < tokens
        key = load_keys(low_keys, i, tokens)
        same = key == cut
        first_ones = same & (seen + ranks(same) < take)
        dropped = (key < cut) | first_ones | (key == DROPPED)
        kept = inside & (dropped == 0)
        at = position + ranks(kept)
        before = tl.load(drops.start + b * drops.batch + i, mask=inside, other=0)
        tl.store(drops.start + b * drops.batch + i, before + 1, mask=inside & dropped)
        tl.store(rows.start + b * rows.batch + at, i, mask=kept)
        tl.store(inverse.start + b * inverse.batch + i, tl.where(kept, at, -1), mask=inside)
        if age is not None:
            old = tl.load(age.start + b * age.batch + i, mask=inside, other=0)
            tl.store(age.start + b * age.batch + i, tl.where(kept, 0, old + 1), mask=inside)
        seen += tl.sum(same.to(tl.int32), axis=0)
        position += tl.sum(kept.to(tl.int32), axis=0)


def token_select(
    velocity: Tensor,
    drops: Tensor,
    age: Tensor | None,
    high: int,
    starvation: float,
    metric: str,
    max_age: int | None,
    rows: Tensor,
    inverse: Tensor,
) -> None:
    """Launch on the current stream of velocity's device; arguments as the op has checked them."""
    batch, height, columns, *patch, channels = velocity.shape
    tokens = height * columns
    total = batch * tokens
    if total == 0:
        return
    keys = torch.empty((2, batch, tokens), dtype=torch.int32, device=velocity.device)
    cols = triton.next_power_of_2(channels)
    at_once = max(1, TILE // cols)
    block = min(BLOCK, max(16, triton.next_power_of_2(tokens)))
    with torch.cuda.device_of(velocity):
        token_keys_kernel[(programs(total, at_once),)](
            velocity,
            velocity.stride(),
            operand(drops),
            operand(age),
            keys,
            tokens,
            total,
            columns,
            high,
            starvation,
            max_age or 0,
            NORM=metric == "l2norm",
            FORCE=max_age is not None,
            HEIGHT=patch[0],
            WIDTH=patch[1],
            CHANNELS=channels,
            TOKENS=at_once,
            COLS=cols,
            num_warps=4,
        )
        token_select_kernel[(batch,)](
            keys,
            operand(drops),
            operand(age),
            operand(rows),
            operand(inverse),
            tokens,
            total,
            high,
            tokens - rows.shape[1] - high,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
