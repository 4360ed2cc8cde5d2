"""y = norm(x) * (1 + scale) + shift, alone and after a gated branch, against eager and Inductor.

Bytes that must move: x read, y written (2 B K D); with a branch also the branch read and x written
back (4 B K D); y in fp8 is a byte an element, with a number for each row. Inductor is compiled
outside the timing. All write x in place where there is a branch; the gates are small, so that x
stays finite over the rounds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdit import ops
from shapes import selected

CONTENDERS = ("fastdit", "fastdit allocating", "eager", "inductor")
FP8 = torch.float8_e4m3fn


def plain(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def after_branch(x, scale, shift, branch, gate):
    x.copy_(x + gate * branch)
    return plain(x, scale, shift)


def quantised(x, scale, shift, *residual):
    """As torchao quantises by row what the norm gives."""
    y = after_branch(x, scale, shift, *residual) if residual else plain(x, scale, shift)
    row_scale = y.abs().amax(-1, keepdim=True).float() / torch.finfo(FP8).max
    return (y.float() / row_scale).clamp(-448, 448).to(FP8), row_scale


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("form", ["plain", "branch", "branch, fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_norm_modulate(measure, shape, dtype, form, contender):
    size = (shape.batch, shape.tokens, shape.width)
    x, branch = (torch.randn(size, dtype=dtype) for _ in range(2))
    table = torch.randn(shape.batch, 6, shape.width, dtype=dtype) * 1e-3
    scale, shift, gate, *_ = table.chunk(6, dim=1)
    residual = (branch, gate) if "branch" in form else ()
    fp8 = "fp8" in form
    moved = (4 if residual else 2) * x.nbytes + (3 if residual else 2) * scale.nbytes
    if fp8:
        moved -= x.nbytes - x.numel() - 4 * shape.batch * shape.tokens
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "form": form}
    with torch.no_grad():
        function = _function(contender, x, scale, shift, residual, fp8)
        measure(function, moved, case, contender)


def _function(contender, x, scale, shift, residual, fp8):
    if contender.startswith("fastdit"):
        dtype = FP8 if fp8 else x.dtype
        out = None if contender.endswith("allocating") else torch.empty_like(x, dtype=dtype)
        named = dict(zip(("branch", "gate"), residual, strict=False))
        if fp8:
            named["row_scale"] = torch.empty(x.shape[:2])
        return lambda: ops.norm_modulate(x, scale, shift, out=out, **named)
    expression = quantised if fp8 else after_branch if residual else plain
    if contender == "inductor":
        expression = torch.compile(expression, dynamic=False)
    return lambda: expression(x, scale, shift, *residual)
