"""The boundary checks the ops share. Each passes quickly, or raises an ArgumentError that says why.

Kernels do not check again. A check reads attributes only, never values, so none waits for a device.
They run on every eager call, so the test that passes comes first and is flat; what went wrong is
worked out afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastdit.errors import ArgumentError

FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
ROW_DTYPES = frozenset((torch.int64, torch.int32))
#: what an op with a gradient says of tensors that it would write
IN_PLACE = (
    "got a tensor while an input requires a gradient; accepted is None (in-place forms have no "
    "gradient: use torch.no_grad())"
)


def state(name: str, x: Tensor, any_stride: bool = False) -> torch.Size:
    """The tensor all others are compared with: floating, of rank 3. Returns its shape."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        _refuse(name, _form(x), "a tensor of rank 3: [B, tokens, D]")
    if x.dtype not in FLOATING:
        _refuse(name, str(x.dtype), "float64, float32, bfloat16 or float16")
    if not (any_stride or x.is_contiguous()):
        _unit_stride(name, x)
    return x.shape


def operand(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor of exactly this shape, dtype and device, with a last stride of 1."""
    if (
        isinstance(t, Tensor)
        and t.shape == shape
        and t.dtype is dtype
        and t.device == device
        and (t.is_contiguous() or t.stride(-1) == 1)
    ):
        return
    _same_kind(name, t, dtype, device, f"a tensor {list(shape)}")
    if tuple(t.shape) != tuple(shape):
        _refuse(name, f"shape {list(t.shape)}", f"shape {list(shape)}")
    _unit_stride(name, t)


def store(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor [B, n, D] with any n: a row store over the full token layout, or a table of tokens."""
    batch, _, width = shape
    if not isinstance(t, Tensor) or t.dim() != 3:
        _refuse(name, _form(t), f"a tensor [{batch}, n, {width}] with any n")
    operand(name, t, (batch, t.shape[1], width), dtype, device)


def heads(name: str, t: Tensor, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """[B, tokens, heads, d] of any batch and token strides, the heads of a token in one piece."""
    if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device:
        _same_kind(name, t, dtype, device)
    if t.dim() != 4 or t.shape[0] != batch:
        _refuse(name, f"shape {list(t.shape)}", f"shape [{batch}, tokens, heads, d]")
    if t.is_contiguous() or t.numel() == 0:
        return
    _unit_stride(name, t)
    if t.shape[2] > 1 and t.stride(2) != t.shape[3]:
        _refuse(name, f"strides {t.stride()}", f"a stride of {t.shape[3]} between heads")


def beside(name: str, t: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a modulation beside a tensor of `dtype`: the same, or fp32 beside 16 bits."""
    if not isinstance(t, Tensor) or t.dtype is dtype:
        return dtype
    if t.dtype is not torch.float32 or dtype.itemsize > 2:
        _refuse(name, str(t.dtype), f"{dtype}{' or torch.float32' * (dtype.itemsize == 2)}")
    return torch.float32


def modulation(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """A gate, scale or shift: [D], [B or 1, D] or [B or 1, K or 1, D]."""
    if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device:
        _same_kind(name, t, dtype, device)
    batch, tokens, width = shape
    found = t.shape
    rank = len(found)
    if not (
        1 <= rank <= 3
        and found[-1] == width
        and (rank == 1 or found[0] == batch or found[0] == 1)
        and (rank < 3 or found[1] == tokens or found[1] == 1)
    ):
        accepted = f"[{width}], [{batch} or 1, {width}] or [{batch} or 1, {tokens} or 1, {width}]"
        _refuse(name, f"shape {list(found)}", accepted)
    if not t.is_contiguous():
        _unit_stride(name, t)


def scalar(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """A number without dimensions, in fp32; in fp64 where the first argument, of `dtype`, is."""
    if not isinstance(t, Tensor) or t.dim() != 0:
        _refuse(name, _form(t), "a tensor of no dimensions")
    if t.dtype is not torch.float32 and (t.dtype, dtype) != (torch.float64, torch.float64):
        _refuse(name, str(t.dtype), "torch.float32, or torch.float64 with float64")
    if t.device != device:
        _refuse_device(name, t, device)


def row_index(rows: Tensor, batch: int, device: torch.device) -> None:
    """int64 or int32 [B, K]; sorted and unique by contract, which only the values could show."""
    if not isinstance(rows, Tensor):
        _refuse("rows", type(rows).__name__, "a tensor [B, K]")
    if rows.dtype not in ROW_DTYPES:
        _refuse("rows", str(rows.dtype), "int64 or int32")
    if rows.device != device:
        _refuse_device("rows", rows, device)
    if rows.dim() != 2 or rows.shape[0] != batch:
        _refuse("rows", f"shape {list(rows.shape)}", f"shape [{batch}, K]")
    if not rows.is_contiguous():
        _unit_stride("rows", rows)


def sums(
    name: str,
    t: Tensor,
    fewest: int,
    most: int,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Several tensors of one shape, one after the other: [S, B, K, D]."""
    if not isinstance(t, Tensor) or t.shape[1:] != shape or not fewest <= len(t) <= most:
        _refuse(name, _form(t), f"a tensor [{fewest} to {most}, {', '.join(map(str, shape))}]")
    if t.dtype not in dtypes:
        _refuse(name, str(t.dtype), " or ".join(str(d) for d in dict.fromkeys(dtypes)))
    if t.device != device:
        _refuse_device(name, t, device)
    if not t.is_contiguous():
        _unit_stride(name, t)


def field(name: str, t: Tensor) -> torch.Size:
    """A field in patches: floating, of rank 6, with any strides. Returns its shape."""
    if not isinstance(t, Tensor) or t.dim() != 6 or 0 in t.shape[1:]:
        accepted = "a tensor of rank 6, none of it empty: [B, gh, gw, ph, pw, C]"
        _refuse(name, _form(t), accepted)
    if t.dtype not in FLOATING:
        _refuse(name, str(t.dtype), "float64, float32, bfloat16 or float16")
    return t.shape


def like(name: str, t: Tensor, first: Tensor) -> None:
    """A tensor of the shape, dtype and device of the first argument, with any strides."""
    _same_kind(name, t, first.dtype, first.device)
    if t.shape != first.shape:
        _refuse(name, f"shape {list(t.shape)}", f"shape {list(first.shape)}")


def integer(name: str, value: int, low: int, high: int) -> None:
    """A Python int from low to high, both included."""
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(name, repr(value), "an int")
    if not low <= value <= high:
        _refuse(name, str(value), f"{low} to {high}")


def _unexpanded(name: str, t: Tensor) -> None:
    """A tensor that is written must not overlap itself."""
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size > 1 and stride == 0:
            _refuse(name, f"strides {t.stride()}", "a tensor without expanded dimensions")


def alone(name: str, t: Tensor, others: Iterable[tuple[str, Tensor | None]]) -> None:
    """A tensor that is written must overlap neither itself nor others."""
    if not t.is_contiguous():
        _unexpanded(name, t)
    for other_name, other in others:
        if other is not None:
            disjoint(name, t, other_name, other)


def disjoint(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """`t` is written while `other` is still read, so they must not share elements."""
    first, second = (t, other) if t.data_ptr() <= other.data_ptr() else (other, t)
    offset = second.data_ptr() - first.data_ptr()
    reach = first.nbytes if first.is_contiguous() else _extent(first) * first.itemsize
    if offset >= reach or second.numel() == 0:
        return
    # Side by side within each sample of one buffer, like store[:, :T] and store[:, T:], or within
    # each token of one, like kv[:, :, 0] and kv[:, :, 1].
    if not (_side_by_side(first, second, offset, 1) or _side_by_side(first, second, offset, 2)):
        _refuse(name, f"memory it shares with {other_name}", "a tensor of its own")


def all_disjoint(
    written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor | None]]
) -> None:
    """What :func:`alone` says of several tensors that are written; quicker than one by one."""
    for name, t in written:
        if not t.is_contiguous():
            _unexpanded(name, t)
    spans = [(t.data_ptr(), _bytes(t), True) for _, t in written]
    spans += [(t.data_ptr(), _bytes(t), False) for _, t in read if t is not None]
    spans.sort()
    end = written_end = 0  # of all so far, and of the written ones
    for start, size, is_written in spans:
        if start < (end if is_written else written_end):
            break
        end = max(end, start + size)
        written_end = end if is_written else written_end
    else:
        return
    for i, (name, t) in enumerate(written):
        for other_name, other in (*written[:i], *read):
            if other is not None:
                disjoint(name, t, other_name, other)


def disjoint_or_same(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Writing in place is fine; a shifted view of the tensor that is read is not."""
    same = t.data_ptr() == other.data_ptr() and t.stride() == other.stride()
    if not same:
        disjoint(name, t, other_name, other)


def _side_by_side(first: Tensor, second: Tensor, offset: int, outer: int) -> bool:
    """Whether both repeat with one period, the stride of the last of their `outer` dimensions, and
    take different parts of it."""
    if min(first.dim(), second.dim()) <= outer or first.element_size() != second.element_size():
        return False
    period = first.stride(outer - 1)
    strides = (*first.stride()[:outer], *second.stride()[:outer])
    if period <= 0 or any(stride % period for stride in strides):
        return False
    size = first.element_size()
    start = offset % (period * size)
    one = (0,) * outer
    return start >= _extent(first[one]) * size and (
        start + _extent(second[one]) * size <= period * size
    )


def _bytes(t: Tensor) -> int:
    """From the first to the last element, both included."""
    if t.is_contiguous() or t.numel() == 0:
        return t.nbytes
    return _extent(t) * t.itemsize


def _extent(t: Tensor) -> int:
    """Elements from the first to the last of t, both included."""
    stride = t.stride()
    return 1 + sum(map(operator.mul, t.shape, stride)) - sum(stride)


def _same_kind(
    name: str, t: Tensor, dtype: torch.dtype, device: torch.device, accepted: str = "a tensor"
) -> None:
    if not isinstance(t, Tensor):
        _refuse(name, type(t).__name__, accepted)
    if t.dtype is not dtype:
        _refuse(name, str(t.dtype), str(dtype))
    if t.device != device:
        _refuse_device(name, t, device)


def _unit_stride(name: str, t: Tensor) -> None:
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        _refuse(name, f"strides {t.stride()}", "a last stride of 1 (call .contiguous())")


def _form(t: Any) -> str:
    return f"shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__


def _refuse_device(name: str, t: Tensor, device: torch.device) -> NoReturn:
    _refuse(name, f"a tensor on {t.device}", f"one on {device}, as the first argument")


def _refuse(name: str, found: str, accepted: str) -> NoReturn:
    raise ArgumentError(f"{name}: got {found}; accepted is {accepted}")
