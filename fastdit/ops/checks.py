"""The boundary checks the ops share. Each passes quickly, or raises an ArgumentError that says why.

Kernels do not check again. A check reads attributes only, never values, so none waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastdit.errors import ArgumentError

FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
ROW_DTYPES = frozenset((torch.int64, torch.int32))


def state(name: str, x: Tensor) -> None:
    """The tensor all others are compared with: floating, of rank 3."""
    if not isinstance(x, Tensor):
        _refuse(name, type(x).__name__, "a tensor [B, tokens, D]")
    if x.dim() != 3:
        _refuse(name, f"shape {list(x.shape)}", "rank 3: [B, tokens, D]")
    if x.dtype not in FLOATING:
        _refuse(name, str(x.dtype), "float64, float32, bfloat16 or float16")
    if not x.is_contiguous():
        _unit_stride(name, x)


def operand(name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """A tensor of exactly this shape, with the dtype and device of x."""
    if (
        isinstance(t, Tensor)
        and t.shape == shape
        and t.dtype is x.dtype
        and t.device == x.device
        and (t.is_contiguous() or t.stride(-1) == 1)
    ):
        return
    _same_kind(name, t, x)
    if tuple(t.shape) != tuple(shape):
        _refuse(name, f"shape {list(t.shape)}", f"shape {list(shape)}")
    _unit_stride(name, t)


def store(name: str, t: Tensor, x: Tensor) -> None:
    """A row store over the full token layout: [B, N, D] with any N."""
    if not isinstance(t, Tensor) or t.dim() != 3:
        found = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        _refuse(name, str(found), "a row store [B, N, D]")
    operand(name, t, (x.shape[0], t.shape[1], x.shape[2]), x)


def modulation(name: str, t: Tensor, batch: int, tokens: int, x: Tensor) -> None:
    """A gate, scale or shift: [D], [B or 1, D] or [B or 1, K or 1, D]."""
    _same_kind(name, t, x)
    shape = t.shape
    rank = len(shape)
    width = x.shape[-1]
    fits = (
        1 <= rank <= 3
        and shape[-1] == width
        and (rank == 1 or shape[0] == batch or shape[0] == 1)
        and (rank < 3 or shape[1] == tokens or shape[1] == 1)
    )
    if not fits:
        accepted = f"[{width}], [{batch} or 1, {width}] or [{batch} or 1, {tokens} or 1, {width}]"
        _refuse(name, f"shape {list(shape)}", accepted)
    if not t.is_contiguous():
        _unit_stride(name, t)


def row_index(rows: Tensor, x: Tensor) -> None:
    """int64 or int32 [B, K]; sorted and unique by contract, which only the values could show."""
    if not isinstance(rows, Tensor):
        _refuse("rows", type(rows).__name__, "a tensor [B, K]")
    if rows.dtype not in ROW_DTYPES:
        _refuse("rows", str(rows.dtype), "int64 or int32")
    if rows.device != x.device:
        _refuse("rows", f"on {rows.device}", f"on {x.device}, where x is")
    if rows.dim() != 2 or rows.shape[0] != x.shape[0]:
        _refuse("rows", f"shape {list(rows.shape)}", f"shape [{x.shape[0]}, K]")
    if not rows.is_contiguous():
        _unit_stride("rows", rows)


def written(name: str, t: Tensor) -> None:
    """A tensor that is written must not overlap itself."""
    if t.is_contiguous():
        return
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size > 1 and stride == 0:
            _refuse(name, f"strides {t.stride()}", "a tensor without expanded dimensions")


def disjoint(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """`t` is written while `other` is still read, so they must not share elements."""
    if _overlap(t, other):
        _refuse(name, f"memory it shares with {other_name}", "a tensor of its own")


def disjoint_or_same(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Writing in place is fine; a shifted view of the tensor that is read is not."""
    same = t.data_ptr() == other.data_ptr() and t.stride() == other.stride()
    if not same:
        disjoint(name, t, other_name, other)


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = (a, b) if a.data_ptr() <= b.data_ptr() else (b, a)
    offset = second.data_ptr() - first.data_ptr()
    if a.numel() == 0 or b.numel() == 0 or offset >= _extent(first) * first.element_size():
        return False
    # Side by side within each batch row of one buffer, like store[:, :T] and store[:, T:].
    if a.dim() == b.dim() == 3 and a.stride(0) == b.stride(0) > 0:
        row = a.stride(0) * a.element_size()
        start = offset % row
        return start < _extent(first[0]) * a.element_size() or (
            start + _extent(second[0]) * a.element_size() > row
        )
    return True


def _extent(t: Tensor) -> int:
    """Elements from the first to the last of t, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _same_kind(name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        _refuse(name, type(t).__name__, "a tensor")
    if t.dtype is not x.dtype:
        _refuse(name, str(t.dtype), f"{x.dtype}, the dtype of x")
    if t.device != x.device:
        _refuse(name, f"on {t.device}", f"on {x.device}, where x is")


def _unit_stride(name: str, t: Tensor) -> None:
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        _refuse(name, f"strides {t.stride()}", "a last stride of 1 (call .contiguous())")


def _refuse(name: str, found: str, accepted: str) -> NoReturn:
    raise ArgumentError(f"{name}: got {found}; accepted is {accepted}")
