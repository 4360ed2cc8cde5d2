"""What half of the tokens became since they were computed last, from packed latents of 16 channels, against torch.

Bytes that must move: of half of the tokens the velocity is read, and what was kept of it read and written; for each
token three numbers are read and written.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected

CHANNELS, PATCH = 16, 2
CONTENDERS = ("fastdit", "fastdit allocating", "torch")


def by_torch(field, last, rate, level, levels, inverse):
    """The same with seven passes over the field."""
    now, coming = levels
    computed = inverse >= 0
    moved = (field.float() - last.float()).flatten(3).norm(dim=-1).flatten(1)
    rate.copy_(torch.where(computed, moved / (now - level).abs(), rate))
    level.copy_(torch.where(computed, now, level))
    last.copy_(torch.where(computed.view(*field.shape[:3], 1, 1, 1), field, last))
    return rate * (coming - level).abs()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_token_change(measure, shape, dtype, contender):
    size = (shape.batch, 1, shape.tokens, CHANNELS, PATCH, PATCH)
    field = torch.randn(size, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
    last = torch.randn(size, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
    rate, level = torch.ones(2, shape.batch, shape.tokens)
    inverse = torch.arange(shape.tokens, dtype=torch.int32).expand_as(rate) % 2 - 1
    given = (field, last, rate, level, torch.tensor([0.5, 0.4]))
    moved = field.nbytes * 3 // 2 + 6 * rate.nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype)}
    if contender == "torch":
        measure(lambda: by_torch(*given, inverse), moved, case, contender)
        return
    out = {} if contender.endswith("allocating") else {"score": torch.empty_like(rate)}
    measure(lambda: ops.token_change(*given, inverse=inverse, **out), moved, case, contender)
