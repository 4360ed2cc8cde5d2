"""Three sums over the branches of a run, 3 to 84 of them, against torch in as many passes.

Bytes that must move: every branch read once, three sums written: (k + 3) B K D; weights are left
out. The eager expression adds in fp32 for sums in the branches' dtype, one operation after the
other, as the sums need; Inductor has it for 12 branches only.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected

COUNTS = (3, 12, 84)
COMPILED = 12
CONTENDERS = ("fastdit", "eager", "inductor")


def eager(branches, weights, groups):
    sums = [0.0, 0.0, 0.0]
    for branch, weight, group in zip(branches, weights, groups, strict=True):
        branch = branch.float()
        sums[0] = sums[0] + (branch if weight is None else weight * branch)
        if group:
            sums[group] = sums[group] + branch
    return [each.to(branches[0].dtype) for each in sums]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_collapse(measure, shape, dtype, count, contender):
    if contender == "inductor" and count != COMPILED:
        pytest.skip(f"compiled for {COMPILED} branches only")
    size = (shape.batch, shape.tokens, shape.width)
    branches = [torch.randn(size, dtype=dtype) for _ in range(count)]
    table = torch.randn(count, shape.width, dtype=dtype)
    weights = [None if i % 3 == 1 else table[i] for i in range(count)]
    groups = [(1, 0, 2)[i % 3] for i in range(count)]
    moved = (count + 3) * branches[0].nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "branches": count}
    with torch.no_grad():
        measure(_function(contender, branches, weights, groups), moved, case, contender)


def _function(contender, branches, weights, groups):
    if contender == "fastdit":
        out = branches[0].new_empty(3, *branches[0].shape)
        return lambda: ops.collapse(branches, weights, groups, out=out)
    expression = torch.compile(eager, dynamic=False) if contender == "inductor" else eager
    return lambda: expression(branches, weights, groups)
