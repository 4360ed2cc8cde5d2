"""Norm and rotation of queries and keys, and the scatter of keys and values, in one launch.

    q_out[:, q_offset + i] = rotate(norm(q))[:, i]
    k_cache[b, kv_offset + rows[b, i]] = rotate(norm(k))[b, i]
    v_cache[b, kv_offset + rows[b, i]] = v[b, i]

q [B, K, H d], k and v [B, K, G d], q_out [B, Q, H, d], caches [B, S, G, d]. The norm is RMSNorm over
the d elements of a head or all heads of a token, or LayerNorm over these; the rotation turns interleaved
pairs by cos and sin [P, d / 2] or [B, P, d / 2] at kv_offset + rows[b, i].

One program takes HEADS heads of one token's q, k or v, or all of them where the norm spans them, as a
tile of COLS columns, the power of two above d, that is read once and stays in registers. A reshape
makes pairs of neighbouring columns; each thread holds whole pairs, so it moves nothing.

Bytes moved: 2 B K (H + 2 G) d elements. Sums are fp32; the result is rounded once. Variance takes
two passes over the registers, as in norm_modulate.

It does not sort or check rows, and it is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.exact import inverse_root, mean_of
from triton_kernels.launch import Launch, programs
from triton_kernels.operand import operand, stored_rows

TILE = 1024  # elements, for 4 warps of 16-byte accesses


@triton.jit
def some_heads(
    x,
    to,
    b,
    k,
    stored,  # the token of `to`
    first,
    weight,
    bias,
    cos,  # of the token
    sin,
    eps,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,  # "rms", "rms_across", "layer", or None for a copy where there is no cos either
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
):
    head = first + tl.arange(0, HEADS)
    col = tl.arange(0, COLS)
    inside = (head < COUNT)[:, None] & (col < DIM)[None, :]
    offset = head[:, None] * DIM + col[None, :]
    value = tl.load(x.start + (b * x.batch + k * x.token) + offset, mask=inside, other=0.0)
    if NORM is not None or cos is not None:
        # What all heads share is loaded for each, from L1: then it lies as the tile does.
        every = tl.zeros([HEADS, 1], tl.int32)
        y = value.to(tl.float32)
        if NORM == "rms":
            y *= inverse_root(mean_of(tl.sum(y * y, axis=1), DIM) + eps)[:, None]
            if weight is not None:
                at = weight + every + col[None, :]
                y *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
        elif NORM is not None:
            if NORM == "layer":
                mean = mean_of(tl.sum(tl.sum(y, axis=1), axis=0), COUNT * DIM)
                deviation = tl.where(inside, y - mean, 0.0)
                rest = mean_of(tl.sum(tl.sum(deviation, axis=1), axis=0), COUNT * DIM)
                squares = tl.sum(tl.sum(deviation * deviation, axis=1), axis=0)
                variance = mean_of(squares, COUNT * DIM) - rest * rest
                y = (y - mean - rest) * inverse_root(tl.maximum(variance, 0.0) + eps)
            else:
                squares = tl.sum(tl.sum(y * y, axis=1), axis=0)
                y *= inverse_root(mean_of(squares, COUNT * DIM) + eps)
            if weight is not None:
                y *= tl.load(weight + offset, mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                y += tl.load(bias + offset, mask=inside, other=0.0).to(tl.float32)
        if cos is not None:
            pair = every + tl.arange(0, COLS // 2)[None, :]
            c = tl.load(cos + pair, mask=pair < DIM // 2, other=0.0)
            s = tl.load(sin + pair, mask=pair < DIM // 2, other=0.0)
            real, imaginary = tl.split(tl.reshape(y, [HEADS, COLS // 2, 2]))
            turned = tl.join(real * c - imaginary * s, imaginary * c + real * s)
            y = tl.reshape(turned, [HEADS, COLS])
        value = y.to(to.start.dtype.element_ty)
    tl.store(to.start + (b * to.batch + stored * to.token) + offset, value, mask=inside)


@triton.jit(do_not_specialize=["q_offset", "kv_offset", "tokens", "stored"])
def qkv_prologue_kernel(
    q,
    k,
    v,
    q_out,
    k_cache,
    v_cache,
    rows,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    cos,
    sin,
    cos_batch,  # stride between samples
    sin_batch,
    eps,
    q_offset,
    kv_offset,
    tokens,  # K
    stored,  # rows behind kv_offset that the caches, cos and sin have
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    COS_ROW: tl.constexpr,  # stride between positions, known so that alignment is
    SIN_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0)
    part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    b = (token // tokens).to(tl.int64)  # times a stride it can pass 2^31
    i = (token % tokens).to(tl.int64)
    row = kv_offset + stored_rows(rows, b, i, i < tokens, stored)
    if cos is not None:
        cos += b * cos_batch + row * COS_ROW
        sin += b * sin_batch + row * SIN_ROW
    if part < Q_PARTS:
        some_heads(
            q, q_out, b, i, q_offset + i, part * HEADS, q_weight, q_bias, cos, sin, eps,
            Q_HEADS, DIM, NORM, HEADS, COLS,
        )  # fmt: skip
    elif part < Q_PARTS + KV_PARTS:
        some_heads(
            k, k_cache, b, i, row, (part - Q_PARTS) * HEADS, k_weight, k_bias, cos, sin,
            eps, KV_HEADS, DIM, NORM, HEADS, COLS,
        )  # fmt: skip
    else:
        some_heads(
            v, v_cache, b, i, row, (part - Q_PARTS - KV_PARTS) * HEADS, None, None, None, None,
            eps, KV_HEADS, DIM, None, HEADS, COLS,
        )  # fmt: skip


def qkv_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor | None,
    q_offset: int,
    kv_offset: int,
    norm: str | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of q's device; arguments as the op has checked them.

    Args:
        launch: heads (as rows) and columns of a tile, and warps; None for those of `tile`.
    """
    batch, tokens, _ = q.shape
    if batch * tokens == 0:
        return
    heads = q_out.shape[2]
    _, stored, kv_heads, dim = k_cache.shape
    if cos is not None:
        stored = min(stored, cos.shape[-2])
    launch = launch or tile(heads, dim, norm in ("layer", "rms_across"))
    parts = triton.cdiv(heads, launch.rows) + 2 * triton.cdiv(kv_heads, launch.rows)
    with torch.cuda.device_of(q):
        qkv_prologue_kernel[(programs(batch * tokens, 1), parts)](
            operand(q),
            operand(k),
            operand(v),
            operand(q_out),
            operand(k_cache),
            operand(v_cache),
            operand(rows),
            q_weight,
            q_bias,
            k_weight,
            k_bias,
            cos,
            sin,
            _between_samples(cos),
            _between_samples(sin),
            eps,
            q_offset,
            kv_offset,
            tokens,
            stored - kv_offset,
            Q_HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            NORM="rms" if norm == "rms_rounded" else norm,
            COS_ROW=0 if cos is None else cos.stride(-2),
            SIN_ROW=0 if sin is None else sin.stride(-2),
            HEADS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


@functools.cache
def tile(heads: int, dim: int, whole: bool) -> Launch:
    """Heads of one program, all of them where it is to be whole."""
    cols = triton.next_power_of_2(dim)
    rows = triton.next_power_of_2(heads)
    if not whole:
        rows = min(rows, max(1, TILE // cols))
    return Launch(rows, cols, max(1, min(16, rows * cols // 256)))


def _between_samples(table: Tensor | None) -> int:
    """Of [P, d / 2] or [B, P, d / 2]."""
    return table.stride(0) if table is not None and table.dim() == 3 else 0
