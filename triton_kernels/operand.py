"""How a tensor reaches a kernel: where it starts and two strides; the last dimension has stride 1.

An operand is [B, K, D]. A modulation (gate, scale, shift) broadcasts: a stride is 0 wherever it has
one row for all samples or all tokens, so a kernel reads every form of it in one way. Absent tensors
are None, which the compiler sees: code for them does not exist in the compiled kernel.

Many operands pass as a tuple. The compiler unrolls over it, so a kernel takes any number of them
without a table of pointers, which would have to be allocated and copied to the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Operand(NamedTuple):
    """A tensor as the kernels see it; strides in elements."""

    start: Any
    batch: Any  # stride between samples
    token: Any  # stride between tokens


def operand(t: Tensor | None) -> Operand | None:
    """[B, K, D], or a row index [B, K] with its one stride."""
    if t is None:
        return None
    stride = t.stride()
    return Operand(t, stride[0], stride[1])


def modulation(t: Tensor | None) -> Operand | None:
    """[D], [B or 1, D] or [B or 1, K or 1, D]."""
    if t is None:
        return None
    shape, stride = t.shape, t.stride()
    batch = stride[0] if len(shape) > 1 and shape[0] > 1 else 0
    token = stride[1] if len(shape) == 3 and shape[1] > 1 else 0
    return Operand(t, batch, token)


@triton.jit
def pointers(of, b, k, col):
    """Addresses [ROWS, COLS] of the elements `col` of the rows (b, k); b and k are int64."""
    return of.start + (b * of.batch + k * of.token)[:, None] + col[None, :]


@triton.jit
def stored_rows(rows, b, k, active, stored):
    """The rows of a store that the tokens k stand for: rows[b, k], or k itself.

    Out of range is undefined, as on every device; a debug build (TRITON_DEBUG=1) stops on it.
    """
    if rows is None:
        at = k
    else:
        at = tl.load(rows.start + b * rows.batch + k, mask=active, other=0).to(tl.int64)
        tl.device_assert((at >= 0) & (at < stored), "rows: outside of its store", mask=active)
    return at
