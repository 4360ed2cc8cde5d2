"""out = x + sum_i weights[i] * gates[i] * branches[i], with a row gather and a cache write, in one pass.

x and out are [B, K, D]. With rows [B, K], branch number `fresh` is [B, K, D] and all others are row
stores [B, N, D] read at rows[b, k]; cache [B, N, D] receives a bit-exact copy of the fresh branch
there. One program works on ROWS rows by COLS columns: every element is read once, summed in fp32
in the order of the branches, rounded once, to nearest even. out may be x: a program reads its part
of x before it writes the same part of out. Only x may have a last stride other than 1 (the patch
embedding's output is transposed); a stride of 1 is compiled in, so it costs the others nothing.

Bytes moved: (k + 2) B K D elements for k branches, one more for a cache write.

The kernel is compiled for each number of branches, 1 to 128: the branches are a tuple that the
compiler unrolls, so any number is one pass and one rounding. What grows with it is the time to
compile (5 s for 85 branches, 14 s for 128) and the argument list (128 are 6 KiB of the 32 that a
launch may pass). Sizes are not part of what is compiled, except D.

It does not sort or check rows, and it is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, arch, launch_for, programs
from triton_kernels.operand import modulation, operand, pointers, stored_rows


@triton.jit(do_not_specialize=["tokens", "total", "stored"])
def gated_residual_kernel(
    x,
    x_step,  # stride of x between columns
    out,
    branches,
    gates,
    weights,  # [branches] or [branches, B K]; None for ones
    cache,
    rows,
    tokens,  # K
    total,  # B K
    stored,  # N, of the shortest store
    BY_TOKEN: tl.constexpr,
    WIDTH: tl.constexpr,
    FRESH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    active = row < total
    inside = active[:, None] & (col < WIDTH)[None, :]
    b = (row // tokens).to(tl.int64)  # times a stride it can pass 2^31
    k = (row % tokens).to(tl.int64)
    at = stored_rows(rows, b, k, active, stored)

    x_col = col.to(tl.int64) * x_step
    acc = tl.load(pointers(x, b, k, x_col), mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(len(branches)):
        if i == FRESH:
            branch = tl.load(pointers(branches[i], b, k, col), mask=inside, other=0.0)
            if cache is not None:
                tl.store(pointers(cache, b, at, col), branch, mask=inside)
        else:
            branch = tl.load(pointers(branches[i], b, at, col), mask=inside, other=0.0)
        value = branch.to(tl.float32)
        if weights is not None:
            if BY_TOKEN:
                # times the number of branches the rows can pass 2^31
                own = weights + i * total.to(tl.int64) + row
                value *= tl.load(own, mask=active, other=0.0)[:, None]
            else:
                value *= tl.load(weights + i)
        if gates[i] is None:
            acc += value
        else:
            gate = tl.load(pointers(gates[i], b, k, col), mask=inside, other=0.0)
            acc = tl.fma(gate.to(tl.float32), value, acc)
    tl.store(pointers(out, b, k, col), acc.to(out.start.dtype.element_ty), mask=inside)


def gated_residual(
    x: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    fresh: int,
    cache: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    weights: Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of x's device; arguments as the op has checked them.

    Args:
        launch: tile and warps; None for those of the launch table.
    """
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    total = batch * tokens
    if rows is None and cache is None:
        fresh = -1  # it makes no difference then, and must not make another kernel
    launch = launch or launch_for("gated_residual", width, total, arch(x.device))
    grid = (programs(total, launch.rows), triton.cdiv(width, launch.cols))
    with torch.cuda.device_of(x):
        gated_residual_kernel[grid](
            operand(x),
            x.stride(2),
            operand(out),
            tuple(operand(branch) for branch in branches),
            tuple(modulation(gate) for gate in gates),
            weights,
            operand(cache),
            operand(rows),
            tokens,
            total,
            0 if rows is None else _shortest(branches, fresh, cache),
            BY_TOKEN=weights is not None and weights.ndim > 1,
            WIDTH=width,
            FRESH=fresh,
            ROWS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def _shortest(branches: Sequence[Tensor], fresh: int, cache: Tensor | None) -> int:
    """Rows that every store read or written at `rows` has; only a debug build looks at it."""
    sizes = [branch.shape[1] for i, branch in enumerate(branches) if i != fresh]
    if cache is not None:
        sizes.append(cache.shape[1])
    return min(sizes, default=0)
