"""out = softmax(scale q k^T) v: a few queries against all keys, the work shared evenly by all processors.

q and out [B, Q, H, d], k and v [B, S, G, d], H a multiple of G. One tile is M queries of one head; its
program goes over the keys, N at a time, with the softmax taken as it goes: the largest score so far
and the sum of exponentials are kept, and what was added before is scaled down when the largest grows.

Tiles rarely fill the processors a whole number of times, and at few queries the last, half-empty
wave is much of the time. So only full waves of tiles are done whole; the keys of every other tile are
split into equal parts (`waves` in launch.py), each of a program of its own, which writes its sum
unscaled, in fp32, and a second kernel adds the parts up. Parts are added in order: no atomics, the
same bits on every run.

Columns are the power of two below d and the rest: 72 is 64 + 8 (as 16, the least a matrix unit
takes) and 96 is 64 + 32, where 128 would waste 44 % and 25 % of the arithmetic.

Products of 16-bit numbers are summed in fp32, as are weights and outputs; the weights are rounded to the
dtype before they meet v. fp32 is multiplied in fp32 proper, without the matrix units.

The partial sums are scratch, which torch allocates. It is compiled at first use, once for each dtype, d
and tile: launch once before a graph capture.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, faster_than_torch, waves
from triton_kernels.operand import operand

LOG2_E = 1.4426950408889634
ADDED_ROWS = 16  # queries of one program of the second kernel


@triton.jit
def columns(of, b, head, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """[rows, WIDTH] from column FIRST of a head on; 0 past d and where not `inside`, None for all."""
    col = FIRST + tl.arange(0, WIDTH)
    at = of.start + (b * of.batch + head * DIM) + (rows[:, None] * of.token + col[None, :])
    if inside is None:
        if FIRST + WIDTH > DIM:
            found = tl.load(at, mask=(col < DIM)[None, :], other=0.0)
        else:
            found = tl.load(at)
    else:
        found = tl.load(at, mask=inside[:, None] & (col < DIM)[None, :], other=0.0)
    return found


@triton.jit
def store_columns(
    rows, values, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Where `columns` would load from; `rows` are addresses."""
    col = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (col < DIM)[None, :]
    tl.store(rows[:, None] + col[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def finite_or_zero(top):
    """What exponents are taken from: -inf - -inf would be NaN where 0 is meant."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def attend(
    acc,
    acc_rest,
    total,
    top,
    q_main,
    q_rest,
    k,
    v,
    b,
    head,
    scale,
    start,
    end,
    keys,
    MASKED: tl.constexpr,  # whether the last of these keys may not exist
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    N: tl.constexpr,
):
    """The state of a tile after the keys from start to end."""
    for first in range(start, end, N):
        key = first + tl.arange(0, N)
        rows = key.to(tl.int64)
        inside = None
        if MASKED:
            inside = key < keys
        part = columns(k, b, head, rows, inside, 0, MAIN, DIM)
        scores = tl.dot(q_main, tl.trans(part), input_precision="ieee")
        if REST > 0:
            part = columns(k, b, head, rows, inside, MAIN, REST, DIM)
            scores = tl.dot(q_rest, tl.trans(part), scores, input_precision="ieee")
        scores *= scale
        if MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = finite_or_zero(higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
        weights = weights.to(v.start.dtype.element_ty)
        part = columns(v, b, head, rows, inside, 0, MAIN, DIM)
        acc = tl.dot(weights, part, acc * shrink[:, None], input_precision="ieee")
        if REST > 0:
            part = columns(v, b, head, rows, inside, MAIN, REST, DIM)
            acc_rest = tl.dot(weights, part, acc_rest * shrink[:, None], input_precision="ieee")
    return acc, acc_rest, total, top


@triton.jit(do_not_specialize=["queries", "keys", "whole", "parts", "slots"])
def sparse_attention_kernel(
    q,
    k,
    v,
    out,
    sums,  # fp32 [tiles past `whole`, parts, M, d]
    peaks,  # fp32 [2, tiles past `whole`, parts, M]: the largest score, the sum of exponentials
    scale,  # times log2(e)
    queries,  # Q
    keys,  # S
    whole,  # tiles done by one program
    parts,  # programs of every other tile
    slots,  # tiles past `whole`, times parts
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    program = tl.program_id(0)
    slot = program - whole
    split = slot >= 0
    tile = tl.where(split, whole + slot // parts, program)
    part = tl.where(split, slot % parts, 0)
    count = tl.where(split, parts, 1)

    tiles = tl.cdiv(queries, M)  # of a head
    head = (tile // tiles) % HEADS
    kv_head = head // GROUP
    b = (tile // tiles // HEADS).to(tl.int64)  # times a stride it can pass 2^31
    row = tile % tiles * M + tl.arange(0, M)
    active = row < queries
    at = row.to(tl.int64)
    q_main = columns(q, b, head, at, active, 0, MAIN, DIM)
    acc = tl.zeros([M, MAIN], tl.float32)
    q_rest, acc_rest = q_main, acc  # read by nobody; triton 3.6 cannot return a None
    if REST > 0:
        q_rest = columns(q, b, head, at, active, MAIN, REST, DIM)
        acc_rest = tl.zeros([M, REST], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)

    blocks = tl.cdiv(keys, N)
    start = blocks * part // count * N
    end = blocks * (part + 1) // count * N
    full = tl.maximum(start, tl.minimum(end, keys // N * N))
    acc, acc_rest, total, top = attend(
        acc, acc_rest, total, top, q_main, q_rest, k, v, b, kv_head, scale, start, full,
        keys, False, DIM, MAIN, REST, N,
    )  # fmt: skip
    acc, acc_rest, total, top = attend(
        acc, acc_rest, total, top, q_main, q_rest, k, v, b, kv_head, scale, full, end,
        keys, True, DIM, MAIN, REST, N,
    )  # fmt: skip

    if split:
        lane = slot.to(tl.int64) * M + tl.arange(0, M)
        tl.store(peaks + lane, top)
        tl.store(peaks + slots.to(tl.int64) * M + lane, total)
        store_columns(sums + lane * DIM, acc, row >= 0, 0, MAIN, DIM)
        if REST > 0:
            store_columns(sums + lane * DIM, acc_rest, row >= 0, MAIN, REST, DIM)
    else:
        to = out.start + (b * out.batch + head * DIM) + at * out.token
        store_columns(to, acc / total[:, None], active, 0, MAIN, DIM)
        if REST > 0:
            store_columns(to, acc_rest / total[:, None], active, MAIN, REST, DIM)


@triton.jit(do_not_specialize=["queries", "whole", "parts", "slots"])
def added_parts_kernel(
    out,
    sums,
    peaks,
    queries,
    whole,
    parts,
    slots,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The outputs of ROWS queries of one split tile."""
    lane = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0).to(tl.int64) * parts * M
    beyond = slots.to(tl.int64) * M
    col = tl.arange(0, COLS)
    inside = (col < DIM)[None, :]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(peaks + first + part * M + lane))
    base = finite_or_zero(top)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in range(parts):
        at = first + part * M + lane
        weight = tl.exp2(tl.load(peaks + at) - base)
        total += weight * tl.load(peaks + beyond + at)
        acc += weight[:, None] * tl.load(sums + at[:, None] * DIM + col, mask=inside, other=0.0)

    tile = whole + tl.program_id(0)
    tiles = tl.cdiv(queries, M)
    head = (tile // tiles) % HEADS
    b = (tile // tiles // HEADS).to(tl.int64)
    row = tile % tiles * M + lane
    to = out.start + (b * out.batch + head * DIM) + row.to(tl.int64)[:, None] * out.token
    acc = (acc / total[:, None]).to(out.start.dtype.element_ty)
    tl.store(to + col[None, :], acc, mask=(row < queries)[:, None] & inside)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    out: Tensor,
    *,
    launch: Launch | None = None,
    shares: tuple[int, int] | None = None,
) -> None:
    """Launch on the current stream of q's device; arguments as the op has checked them.

    Args:
        launch: queries (as rows) and keys (as columns) of a tile, warps and stages; None for what was
            measured at these sizes, or else those of `tile`.
        shares: tiles done whole, and parts of every other one; None for those of `waves`.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if out.numel() == 0:
        return
    launch = launch or faster_than_torch(q, k) or tile(queries, q.itemsize, dim)
    tiles = batch * heads * triton.cdiv(queries, launch.rows)
    blocks = triton.cdiv(keys, launch.cols)
    whole, parts = shares or waves(tiles, blocks, slots(q.device, launch.warps))
    split = (tiles - whole) * parts
    sums = q.new_empty((split, launch.rows, dim), dtype=torch.float32)
    peaks = q.new_empty((2, split, launch.rows), dtype=torch.float32)
    main, rest = pieces(dim)
    with torch.cuda.device_of(q):
        sparse_attention_kernel[(whole + split,)](
            operand(q),
            operand(k),
            operand(v),
            operand(out),
            sums,
            peaks,
            scale * LOG2_E,
            queries,
            keys,
            whole,
            parts,
            split,
            HEADS=heads,
            GROUP=heads // kv_heads,
            DIM=dim,
            MAIN=main,
            REST=rest,
            M=launch.rows,
            N=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        if split:
            added_parts_kernel[(tiles - whole, launch.rows // ADDED_ROWS)](
                operand(out),
                sums,
                peaks,
                queries,
                whole,
                parts,
                split,
                HEADS=heads,
                DIM=dim,
                COLS=triton.next_power_of_2(dim),
                M=launch.rows,
                ROWS=ADDED_ROWS,
                num_warps=4,
            )


@functools.cache
def pieces(dim: int) -> tuple[int, int]:
    """Columns of the two products d is cut into: the power of two up to d, and one that holds the rest."""
    main = max(16, 1 << dim.bit_length() - 1)
    rest = dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@functools.cache
def tile(queries: int, itemsize: int, dim: int) -> Launch:
    """128 queries, as many as two groups of four warps multiply at a time, or fewer where there are.

    Above d = 128 half as many of both, and less in flight: 96 KiB of shared memory, which all devices have. In fp32,
    which does without matrix units, what the registers of a thread can hold.
    """
    if itemsize == 4:
        return Launch(16, 16, 4, 2)
    rows = min(128 if dim <= 128 else 64, max(16, triton.next_power_of_2(queries)))
    if dim > 128:
        return Launch(rows, 32, 8 if rows == 64 else 4, 2)
    return Launch(rows, 64, 8 if rows == 128 else 4, 3)


@functools.cache
def slots(device: torch.device, warps: int) -> int:
    """Programs that run at once: 8 warps to a processor, where each thread may have 255 registers."""
    if device.type != "cuda":
        return 16
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 8 // warps)
