"""out = silu(gate) * value in one pass.

All tensors are [B, K, D] with last stride 1. One program works on ROWS rows by COLS columns: every
element is read once, computed in fp32 and rounded once, to nearest even. out may be gate or value: a
program reads its part of both before it writes the same part of out.

silu(g) is g e / (1 + e) under 0 and g / (1 + e) from there, with e = exp(-|g|): nothing overflows.

Bytes moved: 3 B K D elements. It is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, arch, launch_for, programs
from triton_kernels.operand import operand, pointers


@triton.jit(do_not_specialize=["tokens", "total"])
def swiglu_kernel(
    gate,
    value,
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

    g = tl.load(pointers(gate, b, k, col), mask=inside, other=0.0).to(tl.float32)
    v = tl.load(pointers(value, b, k, col), mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(g))
    silu = g * tl.where(g < 0.0, e, 1.0) / (1.0 + e)
    dtype = out.start.dtype.element_ty
    tl.store(pointers(out, b, k, col), (silu * v).to(dtype), mask=inside)


def swiglu(gate: Tensor, value: Tensor, out: Tensor, *, launch: Launch | None = None) -> None:
    """Launch on the current stream of gate's device; arguments as the op has checked them.

    Args:
        launch: tile and warps; None for those of the launch table.
    """
    batch, tokens, width = gate.shape
    if gate.numel() == 0:
        return
    total = batch * tokens
    launch = launch or launch_for("swiglu", width, total, arch(gate.device))
    grid = (programs(total, launch.rows), triton.cdiv(width, launch.cols))
    with torch.cuda.device_of(gate):
        swiglu_kernel[grid](
            operand(gate),
            operand(value),
            operand(out),
            tokens,
            total,
            WIDTH=width,
            ROWS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
