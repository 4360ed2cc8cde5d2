"""Half of the tokens dropped, from packed latents of 16 channels, against torch's topk and sort.

Bytes that must move: the velocity read, drops read and written, rows and inverse written. That is so
little that a call is its own overhead and, on a CPU, the selection itself.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected

CHANNELS, PATCH = 16, 2
STARVATION = 0.1
CONTENDERS = ("fastdit", "fastdit allocating", "topk and sort")


def topk_and_sort(field, drops, keep, high):
    """The same selection without an order among equals."""
    metric = field.float().std(-1).mean((3, 4)).flatten(1)
    factor = (STARVATION * drops).exp()
    tokens = metric.shape[1]
    dropped = torch.zeros_like(metric, dtype=torch.bool)
    dropped.scatter_(1, (metric / factor).topk(high).indices, True)
    score = (metric * factor).masked_fill_(dropped, float("inf"))
    dropped.scatter_(1, score.topk(tokens - keep - high, largest=False).indices, True)
    index = torch.arange(tokens, device=metric.device).masked_fill(dropped, tokens)
    rows = index.sort(1).values[:, :keep].int()
    inverse = ((~dropped).cumsum(1) - 1).masked_fill_(dropped, -1).int()
    drops += dropped
    return rows, inverse


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("share", [0.0, 0.3], ids=["low", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_token_select(measure, shape, dtype, share, contender):
    size = (shape.batch, 1, shape.tokens, CHANNELS, PATCH, PATCH)
    field = torch.randn(size, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
    drops = torch.zeros(shape.batch, shape.tokens, dtype=torch.int32)
    keep = max(1, shape.tokens // 2)
    high = int(share * (shape.tokens - keep))
    moved = field.nbytes + 3 * drops.nbytes + drops.nbytes * keep // shape.tokens
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "keep": keep, "high": high}
    measure(_function(contender, field, drops, keep, high), moved, case, contender)


def _function(contender, field, drops, keep, high):
    if not contender.startswith("fastdit"):
        return lambda: topk_and_sort(field, drops, keep, high)
    out = {}
    if not contender.endswith("allocating"):
        out = {"rows": drops.new_empty(len(drops), keep), "inverse": torch.empty_like(drops)}
    options = {"high": high, "starvation": STARVATION}
    return lambda: ops.token_select(field, drops, keep, **options, **out)
