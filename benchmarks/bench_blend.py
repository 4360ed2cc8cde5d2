"""h + gate (r fresh + (1 - r) cached), and its gradients of r, fresh and h, against torch.

Bytes that must move: forward fresh, cached and h read, out written: 4 B K D; backward the gradient,
fresh and cached read, one gradient written: 4 B K D; gates are left out. `forward` is without grad;
`training` is both, through autograd, and the contenders differ in what they keep for it.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected

CONTENDERS = ("fastdit", "eager", "inductor")


def eager(fresh, cached, r, x, gate):
    return x + gate * (r * fresh + (1 - r) * cached)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("form", ["forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_blend(measure, shape, dtype, form, contender):
    size = (shape.batch, shape.tokens, shape.width)
    training = form == "training"
    fresh, cached, x, grad = (torch.randn(size, dtype=dtype) for _ in range(4))
    gate = torch.randn(shape.batch, 1, shape.width, dtype=dtype)
    r = torch.tensor(0.4)
    for t in (fresh, x, r):
        t.requires_grad_(training)
    moved = (8 if training else 4) * x.nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "form": form}
    function = _function(contender, fresh, cached, r, x, gate)
    with torch.set_grad_enabled(training):
        if training:
            leaves = (fresh, x, r)
            measure(lambda: torch.autograd.grad(function(), leaves, grad), moved, case, contender)
        else:
            measure(function, moved, case, contender)


def _function(contender, fresh, cached, r, x, gate):
    if contender == "fastdit":
        return lambda: ops.blend(fresh, cached, r, x=x, gate=gate)
    expression = torch.compile(eager, dynamic=False) if contender == "inductor" else eager
    return lambda: expression(fresh, cached, r, x, gate)
