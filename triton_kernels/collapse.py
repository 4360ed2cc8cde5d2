"""sums[0] = sum_i weights[i] * branches[i]; sums[g] = the branches of group g added up; in one pass.

Branches are [B, K, D] with last stride 1, sums up to four of the same, in the branches' dtype or in
fp32. One program works on ROWS rows by COLS columns: every element is read once, added in fp32 in
the order of the branches, and each sum is rounded once, to nearest even.

Bytes moved: (k + S) B K D elements for k branches.

The kernel is compiled for each number of branches, 1 to 64, and of sums; which branch counts in
which sum is in three words that the kernel reads bit by bit, so that another schedule is no other
kernel. It is compiled at first use: launch once before a graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.launch import Launch, arch, launch_for, programs
from triton_kernels.operand import modulation, operand, pointers


@triton.jit(do_not_specialize=["tokens", "total"])
def collapse_kernel(
    branches,
    weights,
    first: tl.int64,  # bit i: branch i counts in sums[1]
    second: tl.int64,
    third: tl.int64,
    sums,
    tokens,  # K
    total,  # B K
    ACCUMULATE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < total)[:, None] & (col < WIDTH)[None, :]
    b = (row // tokens).to(tl.int64)  # times a stride it can pass 2^31
    k = (row % tokens).to(tl.int64)

    sum0 = begin(sums, 0, b, k, col, inside, ACCUMULATE)
    sum1 = begin(sums, 1, b, k, col, inside, ACCUMULATE)
    sum2 = begin(sums, 2, b, k, col, inside, ACCUMULATE)
    sum3 = begin(sums, 3, b, k, col, inside, ACCUMULATE)
    for i in tl.static_range(len(branches)):
        branch = tl.load(pointers(branches[i], b, k, col), mask=inside, other=0.0).to(tl.float32)
        if weights[i] is None:
            sum0 += branch
        else:
            weight = tl.load(pointers(weights[i], b, k, col), mask=inside, other=0.0)
            sum0 = tl.fma(weight.to(tl.float32), branch, sum0)
        if len(sums) > 1:
            sum1 = tl.where(((first >> i) & 1) != 0, sum1 + branch, sum1)
        if len(sums) > 2:
            sum2 = tl.where(((second >> i) & 1) != 0, sum2 + branch, sum2)
        if len(sums) > 3:
            sum3 = tl.where(((third >> i) & 1) != 0, sum3 + branch, sum3)
    finish(sums, 0, b, k, col, inside, sum0)
    finish(sums, 1, b, k, col, inside, sum1)
    finish(sums, 2, b, k, col, inside, sum2)
    finish(sums, 3, b, k, col, inside, sum3)


@triton.jit
def begin(sums, S: tl.constexpr, b, k, col, inside, ACCUMULATE: tl.constexpr):
    """What a sum begins with; nothing is read of one that does not exist."""
    value = tl.zeros(inside.shape, tl.float32)
    if ACCUMULATE and len(sums) > S:
        value = tl.load(pointers(sums[S], b, k, col), mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def finish(sums, S: tl.constexpr, b, k, col, inside, value):
    if len(sums) > S:
        dtype = sums[S].start.dtype.element_ty
        tl.store(pointers(sums[S], b, k, col), value.to(dtype), mask=inside)


def collapse(
    branches: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    groups: Sequence[int],
    accumulate: bool,
    sums: Tensor,
    *,
    launch: Launch | None = None,
) -> None:
    """Launch on the current stream of the branches' device; arguments as the op has checked them.

    Args:
        launch: tile and warps; None for those of the launch table.
    """
    x = branches[0]
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    total = batch * tokens
    launch = launch or launch_for("collapse", width, total, arch(x.device))
    grid = (programs(total, launch.rows), triton.cdiv(width, launch.cols))
    with torch.cuda.device_of(x):
        collapse_kernel[grid](
            tuple(operand(branch) for branch in branches),
            tuple(modulation(weight) for weight in weights),
            *(_members(groups, group) for group in (1, 2, 3)),
            tuple(operand(each) for each in sums),
            tokens,
            total,
            ACCUMULATE=accumulate,
            WIDTH=width,
            ROWS=launch.rows,
            COLS=launch.cols,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def _members(groups: Sequence[int], group: int) -> int:
    """Bit i for branch i, as a signed number of 64 bits."""
    bits = sum(1 << i for i, found in enumerate(groups) if found == group)
    return bits - (1 << 64) if bits >= 1 << 63 else bits
