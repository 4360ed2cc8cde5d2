"""The C++ kernels of csrc on the CPU: one pass over memory, sums in fp32, one rounding at the end.

fp32, bf16 and fp16; fp64 is left to `reference`. Threads follow torch.get_num_threads(), with one
thread below 32768 elements. Results do not depend on the thread count or on alignment; they do on
the instruction set, which is the best this processor has.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from fastdit.backends.base import Backend
from fastdit.errors import ArgumentError

try:
    from fastdit import _C
except ImportError as error:  # a checkout that was never built
    _C = None
    _MISSING = f"the compiled module fastdit._C is missing ({error}): run pip install again"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/operand.h


class Cpu(Backend):
    name = "cpu"
    priority = 10

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the cpu, not on {device.type}"
        if dtype not in DTYPE_CODES:
            return f"it has float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        return _MISSING if _C is None else None

    def gated_residual(self, x, branches, gates, fresh, cache, rows, out):
        batch, tokens, width = x.shape
        try:
            _C.gated_residual(
                DTYPE_CODES[x.dtype],
                batch,
                tokens,
                width,
                0 if rows is None else _shortest(branches, fresh, cache),
                _operand(x),
                _operand(out),
                [_operand(branch) for branch in branches],
                [None if gate is None else _broadcast(gate) for gate in gates],
                fresh,
                None if cache is None else _operand(cache),
                None if rows is None else _row_index(rows),
                get_num_threads(),
            )
        except IndexError as error:
            raise ArgumentError(str(error)) from None

    def norm_modulate(
        self, x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out
    ):
        batch, tokens, width = out.shape
        try:
            _C.norm_modulate(
                DTYPE_CODES[x.dtype],
                batch,
                tokens,
                width,
                x.shape[1],
                _operand(x),
                _operand(out),
                None if scale is None else _broadcast(scale),
                None if shift is None else _broadcast(shift),
                None if weight is None else _broadcast(weight),
                None if bias is None else _broadcast(bias),
                eps,
                rms,
                None if branch is None else _operand(branch),
                None if gate is None else _broadcast(gate),
                None if cache is None else _operand(cache),
                None if rows is None else _row_index(rows),
                get_num_threads(),
            )
        except IndexError as error:
            raise ArgumentError(str(error)) from None


def _operand(t: Tensor) -> tuple[int, int, int]:
    stride = t.stride()
    return t.data_ptr(), stride[0], stride[1]


def _broadcast(t: Tensor) -> tuple[int, int, int]:
    """A modulation as [B, K, D]: stride 0 where it has one row for all."""
    shape = t.shape
    rank = len(shape)
    if rank == 1:
        return t.data_ptr(), 0, 0
    stride = t.stride()
    per_batch = stride[0] if shape[0] > 1 else 0
    return t.data_ptr(), per_batch, stride[1] if rank == 3 and shape[1] > 1 else 0


def _row_index(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), rows.stride(0), rows.dtype is torch.int64


def _shortest(branches, fresh: int, cache: Tensor | None) -> int:
    """Rows that every store read or written at `rows` has."""
    sizes = [branch.shape[1] for i, branch in enumerate(branches) if i != fresh]
    if cache is not None:
        sizes.append(cache.shape[1])
    return min(sizes, default=1 << 62)


BACKEND = Cpu()
