"""silu(gate) * value, of halves of one product's output, against torch in two passes.

Bytes that must move: gate and value read, out written: 3 B N D, with D four times the hidden state's width. `fp32 silu`
is what Lumina's feed-forward says in 16 bits, with casts.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdit import ops
from shapes import selected

CONTENDERS = ("fastdit", "eager", "fp32 silu", "inductor")


def eager(gate, value):
    return F.silu(gate) * value


def widened(gate, value):
    return F.silu(gate.float()).to(gate.dtype) * value


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_swiglu(measure, shape, dtype, contender):
    if contender == "fp32 silu" and dtype is torch.float32:
        pytest.skip("it is eager in fp32")
    size = (shape.batch, shape.tokens, 4 * shape.width)
    gate, value = torch.randn(*size[:2], 2 * size[2], dtype=dtype).chunk(2, dim=-1)
    moved = 3 * gate.numel() * gate.itemsize
    case = {"shape": shape.name, "size": size, "dtype": str(dtype)}
    with torch.no_grad():
        measure(_function(contender, gate, value), moved, case, contender)


def _function(contender, gate, value):
    if contender == "fastdit":
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        return lambda: ops.swiglu(gate, value, out=out)
    expression = {"eager": eager, "fp32 silu": widened}.get(contender)
    expression = expression or torch.compile(eager, dynamic=False)
    return lambda: expression(gate, value)
