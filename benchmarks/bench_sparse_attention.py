"""Attention of the active tokens over all, through the op and by torch alone.

On a CPU the op is a kernel of its own in fp32 with AVX-512; elsewhere it is torch's attention and must cost nothing. On
a GPU `gpu_check.py` compares it with the kernel of `triton` and with each backend of torch. Bytes are those of q, k, v
and the output. The shapes are those of the models (attention.py), or tiny ones with FASTDIT_BENCH_SHAPES=tiny.
"""

from __future__ import annotations

import pytest
import torch

from attention import MODELS, TINY_MODELS, inputs
from fastdit import ops
from fastdit.backends.base import attention
from shapes import TINY, selected


@pytest.mark.parametrize("contender", ["fastdit", "eager"])
@pytest.mark.parametrize("share", [0.5, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "form", TINY_MODELS if selected() == TINY else MODELS, ids=lambda f: f.model
)
def bench_sparse_attention(measure, form, dtype, share, contender):
    q, k, v = inputs(form, share, torch.device("cpu"), dtype)
    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    case = {"model": form.model, "share": share, "dtype": str(dtype)}
    calls = {
        "fastdit": lambda: ops.sparse_attention(q, k, v),
        "eager": lambda: attention(q, k, v, None),
    }
    with torch.no_grad():
        measure(calls[contender], moved, case, contender)
