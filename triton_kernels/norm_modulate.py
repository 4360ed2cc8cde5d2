"""y = norm(x) * (1 + scale) + shift, with the preceding gated residual folded in when it is given.

norm is LayerNorm, or RMSNorm with RMS, over the D elements of a row, then times weight plus bias
where given. With branch, x <- x + gate * branch first, in place, rounded as it is stored; cache
[B, N, D] receives a bit-exact copy of branch. With rows [B, K] this happens to the rows
x[b, rows[b, k]] only, while branch and y are compact [B, K, D].

With row_scale y is written in fp8, each row over its largest magnitude by 448: of y as it would be
stored, so that the result is that of quantising what the kernel gives without. Bytes of fp8 are made
of integers, since Triton converts to fp8 on some architectures only.

One program works on ROWS whole rows, in CHUNKS pieces of COLS columns that stay in registers: x is
read once. COLS is a power of two, as Triton asks; the pieces fit the widths of the models better
than one power of two does (3072 = 6 x 512, where 4096 would idle a quarter of the lanes).

Bytes moved: 2 B K D elements; 4 with a branch; one more for a cache write; y in fp8 is a byte each.

The residual is the same fma and the same rounding as in gated_residual: both give the same bits.
Variance takes two passes over the registers, never E[x^2] - m^2. The mean of the first pass is
rounded, so the second also sums the deviations themselves: that remainder corrects mean and
variance, and a row with mean 1e4 and deviation 1e-2 keeps its digits. Sums are fp32, in an order
that only the tile decides.

It does not sort or check rows, and it is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.exact import divided, fp8_bits, inverse_root, mean_of
from triton_kernels.launch import Launch, arch, launch_for, programs
from triton_kernels.operand import modulation, operand, pointers, stored_rows


@triton.jit(do_not_specialize=["tokens", "total", "stored"])
def norm_modulate_kernel(
    x,
    out,
    scale,
    shift,
    weight,
    bias,
    branch,
    gate,
    cache,
    rows,
    row_scale,
    eps,
    tokens,  # K
    total,  # B K
    stored,  # N
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = row < total
    b = (row // tokens).to(tl.int64)  # times a stride it can pass 2^31
    k = (row % tokens).to(tl.int64)
    at = stored_rows(rows, b, k, active, stored)

    values = ()
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for c in tl.static_range(CHUNKS):
        col = c * COLS + tl.arange(0, COLS)
        inside = active[:, None] & (col < WIDTH)[None, :]
        value = tl.load(pointers(x, b, at, col), mask=inside, other=0.0)
        if branch is not None:
            update = tl.load(pointers(branch, b, k, col), mask=inside, other=0.0)
            if cache is not None:
                tl.store(pointers(cache, b, at, col), update, mask=inside)
            if gate is None:
                added = value.to(tl.float32) + update.to(tl.float32)
            else:
                by = tl.load(pointers(gate, b, k, col), mask=inside, other=0.0)
                added = tl.fma(by.to(tl.float32), update.to(tl.float32), value.to(tl.float32))
            value = added.to(x.start.dtype.element_ty)
            tl.store(pointers(x, b, at, col), value, mask=inside)
        value = value.to(tl.float32)
        values += (value,)
        if RMS:
            acc += value * value
        else:
            acc += value

    if RMS:
        mean = tl.zeros([ROWS], tl.float32)
        variance = mean_of(tl.sum(acc, axis=1), WIDTH)
    else:
        mean = mean_of(tl.sum(acc, axis=1), WIDTH)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        squares = tl.zeros([ROWS, COLS], tl.float32)
        for c in tl.static_range(CHUNKS):
            col = c * COLS + tl.arange(0, COLS)
            deviation = tl.where((col < WIDTH)[None, :], values[c] - mean[:, None], 0.0)
            acc += deviation
            squares += deviation * deviation
        rest = mean_of(tl.sum(acc, axis=1), WIDTH)
        variance = mean_of(tl.sum(squares, axis=1), WIDTH) - rest * rest
        variance = tl.maximum(variance, 0.0)  # an all-equal row can end an ulp below zero
    inverse = inverse_root(variance + eps)

    made = ()
    largest = tl.zeros([ROWS, COLS], tl.int32)
    for c in tl.static_range(CHUNKS):
        col = c * COLS + tl.arange(0, COLS)
        wide = (col < WIDTH)[None, :]
        inside = active[:, None] & wide
        if RMS:
            y = values[c] * inverse[:, None]
        else:
            y = (values[c] - mean[:, None] - rest[:, None]) * inverse[:, None]
        if weight is not None:
            y *= tl.load(weight + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            y *= 1.0 + tl.load(pointers(scale, b, k, col), mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            y += tl.load(pointers(shift, b, k, col), mask=inside, other=0.0).to(tl.float32)
        if row_scale is None:
            tl.store(pointers(out, b, k, col), y.to(out.start.dtype.element_ty), mask=inside)
        else:
            y = y.to(x.start.dtype.element_ty).to(tl.float32)
            made += (y,)
            # As integers infinity, and then NaN, are above all numbers.
            magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.where(inside, magnitude, 0))

    if row_scale is not None:
        by = divided(tl.max(largest, axis=1).to(tl.float32, bitcast=True), 448.0)
        by = by.to(x.start.dtype.element_ty).to(tl.float32)
        by = tl.where(by < 1.17549435e-38, 0.0, by)  # a row that is too small is zeros
        tl.store(row_scale.start + b * row_scale.batch + k * row_scale.token, by, mask=active)
        for c in tl.static_range(CHUNKS):
            col = c * COLS + tl.arange(0, COLS)
            inside = active[:, None] & (col < WIDTH)[None, :]
            quotient = tl.where((by == 0.0)[:, None], 0.0, divided(made[c], by[:, None]))
            tl.store(pointers(out, b, k, col), fp8_bits(quotient), mask=inside)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    branch: Tensor | None,
    gate: Tensor | None,
    cache: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    row_scale: Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of x's device; arguments as the op has checked them.

    Args:
        launch: tile and warps; None for those of the launch table.
    """
    batch, tokens, width = out.shape
    if out.numel() == 0:
        return
    total = batch * tokens
    launch = launch or launch_for("norm_modulate", width, total, arch(x.device))
    with torch.cuda.device_of(x):
        norm_modulate_kernel[(programs(total, launch.rows),)](
            operand(x),
            operand(out if row_scale is None else out.view(torch.uint8)),
            modulation(scale),
            modulation(shift),
            weight,
            bias,
            operand(branch),
            modulation(gate),
            operand(cache),
            operand(rows),
            operand(row_scale),
            eps,
            tokens,
            total,
            x.shape[1],
            RMS=rms,
            WIDTH=width,
            ROWS=launch.rows,
            COLS=launch.cols,
            CHUNKS=triton.cdiv(width, launch.cols),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
