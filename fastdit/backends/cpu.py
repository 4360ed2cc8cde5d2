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
        # Stores of another length than K need their strides told; see csrc/bindings.cpp.
        operand = _address if rows is None else _strided
        try:
            _C.gated_residual(
                DTYPE_CODES[x.dtype],
                batch,
                tokens,
                width,
                0 if rows is None else _shortest(branches, fresh, cache),
                _address(x),
                x.stride(2),
                _address(out),
                [operand(branch) for branch in branches],
                [_modulation(gate, width) for gate in gates],
                fresh,
                None if cache is None else operand(cache),
                None if rows is None else _row_index(rows),
                get_num_threads(),
            )
        except IndexError as error:
            raise ArgumentError(str(error)) from None

    def norm_modulate(
        self, x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out
    ):
        batch, tokens, width = out.shape
        operand = _address if rows is None else _strided
        try:
            _C.norm_modulate(
                DTYPE_CODES[x.dtype],
                batch,
                tokens,
                width,
                x.shape[1],
                operand(x),
                _address(out),
                _modulation(scale, width),
                _modulation(shift, width),
                _modulation(weight, width),
                _modulation(bias, width),
                eps,
                rms,
                None if branch is None else _address(branch),
                _modulation(gate, width),
                None if cache is None else operand(cache),
                None if rows is None else _row_index(rows),
                get_num_threads(),
            )
        except IndexError as error:
            raise ArgumentError(str(error)) from None


def _address(t: Tensor) -> int | tuple[int, int, int]:
    """The bare address of a contiguous [B, K, D]."""
    return t.data_ptr() if t.is_contiguous() else _strided(t)


def _strided(t: Tensor) -> tuple[int, int, int]:
    stride = t.stride()
    return t.data_ptr(), stride[0], stride[1]


def _modulation(t: Tensor | None, width: int) -> int | tuple[int, int, int] | None:
    """The bare address of a single row; strides of 0 wherever it has one row for all."""
    if t is None:
        return None
    if t.numel() == width:
        return t.data_ptr()
    shape, stride = t.shape, t.stride()
    per_token = stride[1] if len(shape) == 3 and shape[1] > 1 else 0
    return t.data_ptr(), stride[0] if shape[0] > 1 else 0, per_token


def _row_index(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), rows.stride(0), rows.dtype is torch.int64


def _shortest(branches, fresh: int, cache: Tensor | None) -> int:
    """Rows that every store read or written at `rows` has."""
    sizes = [branch.shape[1] for i, branch in enumerate(branches) if i != fresh]
    if cache is not None:
        sizes.append(cache.shape[1])
    return min(sizes, default=1 << 62)


BACKEND = Cpu()
