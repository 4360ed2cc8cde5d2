"""y = norm(x) * (1 + scale) + shift, alone and after a gated branch, against eager and Inductor.

Bytes that must move: x read, y written (2 B K D); with a branch also the branch read and x written
back (4 B K D). Inductor is compiled outside the timing. All write x in place where there is a
branch; the gates are small, so that x stays finite over the rounds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdit import ops
from shapes import selected

CONTENDERS = ("fastdit", "fastdit allocating", "eager", "inductor")


def plain(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def after_branch(x, scale, shift, branch, gate):
    x.copy_(x + gate * branch)
    return plain(x, scale, shift)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("form", ["plain", "branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_norm_modulate(measure, shape, dtype, form, contender):
    size = (shape.batch, shape.tokens, shape.width)
    x, branch = (torch.randn(size, dtype=dtype) for _ in range(2))
    table = torch.randn(shape.batch, 6, shape.width, dtype=dtype) * 1e-3
    scale, shift, gate, *_ = table.chunk(6, dim=1)
    residual = (branch, gate) if form == "branch" else ()
    moved = (4 if residual else 2) * x.nbytes + (3 if residual else 2) * scale.nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "form": form}
    with torch.no_grad():
        function = _function(contender, x, scale, shift, residual)
        measure(function, moved, case, contender)


def _function(contender, x, scale, shift, residual):
    if contender.startswith("fastdit"):
        out = None if contender.endswith("allocating") else torch.empty_like(x)
        named = dict(zip(("branch", "gate"), residual, strict=False))
        return lambda: ops.norm_modulate(x, scale, shift, out=out, **named)
    expression = after_branch if residual else plain
    if contender == "inductor":
        expression = torch.compile(expression, dynamic=False)
    return lambda: expression(x, scale, shift, *residual)
