"""out = r fresh + (1 - r) cached, or x + gate * that, and the gradients, each in one pass.

All tensors are [B, K, D] with last stride 1, r is one fp32 number that the kernels read themselves.
Values are blended in fp32 and rounded once, to nearest even; an operand of weight 0 is not used,
whatever it holds. out may be x: a program reads its part of x before it writes the same part of out.

dL/dr is a sum over all elements, in two stages of an order that depends on the shape and the launch
alone: each program of the first kernel takes rows of a fixed stride and stores one number, and one
program of the second adds those.

Bytes moved: forward 3 B K D elements, 4 with x, one more with blended; backward 4 for the gradients
of r and fresh, one more for cached's.

It is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, arch, launch_for, programs
from triton_kernels.operand import modulation, operand, pointers

PARTIALS = 1024  # programs of the first stage at most, and elements of one tile of the second


@triton.jit(do_not_specialize=["tokens", "total"])
def blend_kernel(
    fresh,
    cached,
    r,
    x,
    gate,
    blended,
    out,
    tokens,  # K
    total,  # B K
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < total)[:, None] & (col < WIDTH)[None, :]
    b = (row // tokens).to(tl.int64)  # times a stride it can pass 2^31
    k = (row % tokens).to(tl.int64)

    weight = tl.load(r)
    new = tl.load(pointers(fresh, b, k, col), mask=inside, other=0.0).to(tl.float32)
    old = tl.load(pointers(cached, b, k, col), mask=inside, other=0.0).to(tl.float32)
    mixed = tl.fma(weight, new, (1.0 - weight) * old)
    value = tl.where(weight == 1.0, new, tl.where(weight == 0.0, old, mixed))
    dtype = out.start.dtype.element_ty
    if blended is not None:
        tl.store(pointers(blended, b, k, col), value.to(dtype), mask=inside)
    if x is not None:
        stream = tl.load(pointers(x, b, k, col), mask=inside, other=0.0).to(tl.float32)
        if gate is None:
            value = stream + value
        else:
            by = tl.load(pointers(gate, b, k, col), mask=inside, other=0.0).to(tl.float32)
            value = tl.fma(by, value, stream)
    tl.store(pointers(out, b, k, col), value.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "total", "steps"])
def blend_backward_kernel(
    grad,
    fresh,
    cached,
    r,
    gate,
    grad_fresh,
    grad_cached,
    partial,  # None: no gradient of r
    tokens,
    total,
    steps,  # tiles of rows a program takes
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    weight = tl.load(r)
    dtype = grad.start.dtype.element_ty
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(steps):
        row = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        active = row < total
        b = (row // tokens).to(tl.int64)
        k = (row % tokens).to(tl.int64)
        for first in range(0, WIDTH, COLS):
            col = first + tl.arange(0, COLS)
            inside = active[:, None] & (col < WIDTH)[None, :]
            g = tl.load(pointers(grad, b, k, col), mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                g *= tl.load(pointers(gate, b, k, col), mask=inside, other=0.0).to(tl.float32)
            if grad_fresh is not None:
                tl.store(pointers(grad_fresh, b, k, col), (weight * g).to(dtype), mask=inside)
            if grad_cached is not None:
                other = (1.0 - weight) * g
                tl.store(pointers(grad_cached, b, k, col), other.to(dtype), mask=inside)
            if partial is not None:
                new = tl.load(pointers(fresh, b, k, col), mask=inside, other=0.0)
                old = tl.load(pointers(cached, b, k, col), mask=inside, other=0.0)
                sums = tl.fma(g, new.to(tl.float32) - old.to(tl.float32), sums)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(tl.sum(sums, axis=1), axis=0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, count, result, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(result, tl.sum(tl.load(partial + at, mask=at < count, other=0.0), axis=0))


def blend(
    fresh: Tensor,
    cached: Tensor,
    r: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    blended: Tensor | None,
    out: Tensor,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of fresh's device; arguments as the op has checked them.

    Args:
        launch: tile and warps; None for those of the launch table.
    """
    batch, tokens, width = fresh.shape
    if fresh.numel() == 0:
        return
    total = batch * tokens
    launch = launch or launch_for("blend", width, total, arch(fresh.device))
    grid = (programs(total, launch.rows), triton.cdiv(width, launch.cols))
    with torch.cuda.device_of(fresh):
        blend_kernel[grid](
            operand(fresh),
            operand(cached),
            r,
            operand(x),
            modulation(gate),
            operand(blended),
            operand(out),
            tokens,
            total,
            WIDTH=width,
            ROWS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def blend_backward(
    grad: Tensor,
    fresh: Tensor | None,
    cached: Tensor | None,
    r: Tensor,
    gate: Tensor | None,
    grad_fresh: Tensor | None,
    grad_cached: Tensor | None,
    grad_r: Tensor | None,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of grad's device; arguments as the op has checked them."""
    batch, tokens, width = grad.shape
    if grad.numel() == 0:
        if grad_r is not None:
            grad_r.zero_()
        return
    total = batch * tokens
    launch = launch or launch_for("blend", width, total, arch(grad.device))
    tiles = programs(total, launch.rows)
    blocks = min(tiles, PARTIALS)
    partial = None
    if grad_r is not None:
        partial = torch.empty(PARTIALS, dtype=torch.float32, device=grad.device)
    else:
        fresh = cached = None  # not read, and must not make another kernel
    with torch.cuda.device_of(grad):
        blend_backward_kernel[(blocks,)](
            operand(grad),
            operand(fresh),
            operand(cached),
            r,
            modulation(gate),
            operand(grad_fresh),
            operand(grad_cached),
            partial,
            tokens,
            total,
            triton.cdiv(tiles, blocks),
            WIDTH=width,
            ROWS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        if grad_r is not None:
            sum_kernel[(1,)](partial, blocks, grad_r, SIZE=PARTIALS, num_warps=4)
