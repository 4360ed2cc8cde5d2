"""The C++ kernels of csrc on the CPU: one pass over memory, sums in fp32, one rounding at the end.

fp32, bf16 and fp16; fp64 is left to `reference`. Threads follow torch.get_num_threads(), with one
thread below 32768 elements. Results do not depend on the thread count or on alignment; they do on
the instruction set, which is the best this processor has.
"""

from __future__ import annotations

import warnings

import torch
from torch import get_num_threads

from fastdit.backends._compiled import DTYPE_CODES, Compiled, load, strided

_C, _MISSING = load("_C")
if _C is None:  # every wheel has it: most likely a checkout, started in, stands before the wheel
    _MISSING += "; install fastdit, and start Python outside of its source folder"
    warnings.warn(f"fastdit runs on slower backends: {_MISSING}", RuntimeWarning, stacklevel=1)


#: sizes of sparse_attention from which, or up to which, it was measured to be faster than torch's
LEAST_QUERIES, LEAST_KEYS, MOST_HEAD = 32, 128, 128


class Cpu(Compiled):
    name = "cpu"
    priority = 10

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the cpu, not on {device.type}"
        if dtype not in DTYPE_CODES:
            return f"it has float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        return None if self.module else _MISSING

    def _context(self, x, stored):
        return stored, get_num_threads()

    attends = True

    def sparse_attention(self, q, k, v, scale, out):
        batch, queries, heads, head = q.shape
        self.module.sparse_attention(
            DTYPE_CODES[q.dtype],
            batch,
            queries,
            k.shape[1],
            heads,
            k.shape[2],
            head,
            strided(q),
            strided(k),
            strided(v),
            scale,
            strided(out),
            *self._context(q, 0),
        )

    def outruns_torch(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """In fp32 with AVX-512, where the work is worth a tile and each thread has a head."""
        return (
            self.supports("sparse_attention", q.device, q.dtype) is None
            and q.dtype is torch.float32
            and self.module.build_info()["isa"] == "avx512"
            and q.shape[1] >= LEAST_QUERIES
            and k.shape[1] >= LEAST_KEYS
            and q.shape[3] <= MOST_HEAD
            and q.shape[0] * q.shape[2] >= get_num_threads()
        )


BACKEND = Cpu(_C)
