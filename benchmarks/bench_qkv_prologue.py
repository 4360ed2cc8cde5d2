"""Norm, rotation and scatter of q, k and v in the forms of the models, against eager and Inductor.

Bytes that must move: q, k and v read, q and the active rows of both caches written. Tables and
weights are left out. Inductor is compiled outside the timing. The shapes are those of the models
(prologue.py), or tiny ones with FASTDIT_BENCH_SHAPES=tiny.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from prologue import FORMS, TINY_FORMS, chain, inputs
from shapes import TINY, selected

CONTENDERS = ("fastdit", "eager", "inductor")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "form", TINY_FORMS if selected() == TINY else FORMS, ids=lambda f: f"{f.shape.name}-{f.name}"
)
def bench_qkv_prologue(measure, form, dtype, contender):
    tensors, named = inputs(form, torch.device("cpu"), dtype)
    moved = 2 * sum(t.nbytes for t in tensors[:3])
    case = {"shape": form.shape.name, "form": form.name, "dtype": str(dtype)}
    with torch.no_grad():
        measure(_function(contender, form, tensors, named), moved, case, contender)


def _function(contender, form, tensors, named):
    if contender == "fastdit":
        return lambda: ops.qkv_prologue(*tensors, **named, norm=form.norm)
    expression = chain(form)
    if contender == "inductor":
        expression = torch.compile(expression, dynamic=False)
    return lambda: expression(*tensors, **named)
