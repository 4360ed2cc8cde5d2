"""out = x + sum_i gate_i * branch_i for 1 to 16 branches, against eager torch and Inductor.

Bytes that must move: every branch and x read once, out written once, the gates: (k + 2) B K D.
Contenders: fastdit into a given out; fastdit allocating; eager, which allocates two tensors a
branch; Inductor, allocating, compiled outside the timing, for 1 and 8 branches only.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected

COUNTS = (1, 2, 4, 8, 16)
CONTENDERS = ("fastdit", "fastdit allocating", "eager", "inductor")
COMPILED_COUNTS = (1, 8)


def eager(x, branches, gates):
    for branch, gate in zip(branches, gates, strict=True):
        x = x + gate * branch
    return x


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_gated_residual(measure, shape, dtype, count, contender):
    if contender == "inductor" and count not in COMPILED_COUNTS:
        pytest.skip("compiled for 1 and 8 branches only")
    size = (shape.batch, shape.tokens, shape.width)
    x = torch.randn(size, dtype=dtype)
    branches = [torch.randn(size, dtype=dtype) for _ in range(count)]
    table = torch.randn(shape.batch, count, shape.width, dtype=dtype)
    gates = list(table.chunk(count, dim=1))
    moved = (count + 2) * x.nbytes + table.nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "branches": count}
    with torch.no_grad():
        function = _function(contender, x, branches, gates)
        measure(function, moved, case, contender)


def _function(contender, x, branches, gates):
    if contender == "fastdit":
        out = torch.empty_like(x)
        return lambda: ops.gated_residual(x, branches, gates, out=out)
    if contender == "fastdit allocating":
        return lambda: ops.gated_residual(x, branches, gates)
    expression = torch.compile(eager, dynamic=False) if contender == "inductor" else eager
    return lambda: expression(x, branches, gates)
