"""The one pass rule for kernels: as good as the same expression in the same dtype, within an ulp.

max|actual - exact| <= 2 max|eager - exact| + 1 ulp of the output's scale, where `exact` is the same
mathematics in fp64 without casts and `eager` is stock torch in the dtype. No tolerance is picked by
hand anywhere. What is not finite in `exact` must be the same in `actual`; where the dtype overflows
(`eager` is not finite although `exact` is) only a NaN of its own counts against `actual`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mismatch(AssertionError):
    """A result is outside the rule; the message says where and by how much."""


def ulp(scale: float, dtype: torch.dtype) -> float:
    """The distance between neighbours of `dtype` at `scale`."""
    limits = torch.finfo(dtype)
    scale = min(max(scale, limits.tiny), limits.max)
    return limits.eps * 2.0 ** math.floor(math.log2(scale))


def assert_close(
    what: str, actual: Tensor, exact: Tensor, eager: Tensor, stock: float = 0.0
) -> None:
    """Raise Mismatch unless `actual` obeys the rule; `what` names op, backend and case.

    `stock` is what stock torch was seen to err by in more of the same: its largest error of a few outputs is luck.
    """
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise Mismatch(f"{what}: {list(actual.shape)} {actual.dtype}, expected {eager.dtype}")
    if actual.numel() == 0:
        return
    found, near = actual.double(), eager.double()
    _assert_same_special(what, found, exact, near)
    usable = exact.isfinite() & near.isfinite()
    if not usable.any():
        return
    nothing = torch.zeros_like(exact)
    error = torch.where(usable, (found - exact).abs(), nothing)
    stock = max(stock, torch.where(usable, (near - exact).abs(), nothing).max().item())
    scale = torch.where(usable, exact.abs(), nothing).max().item()
    allowed = 2 * stock + ulp(scale, actual.dtype)
    worst = int(error.argmax())
    # Written so that a NaN error fails too.
    if not error.flatten()[worst].item() <= allowed:
        raise Mismatch(_report(what, actual, exact, worst, allowed))


def assert_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raise Mismatch unless both hold the same bits (NaN payloads, signs of zero)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Mismatch(f"{what}: {list(actual.shape)} {actual.dtype} is not {expected.dtype}")
    differ = bits(actual) != bits(expected)
    if differ.any():
        raise Mismatch(_report(what, actual, expected, int(differ.int().argmax()), 0.0))


def bits(t: Tensor) -> Tensor:
    """The payload of t as integers."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[t.element_size()]
    return t.contiguous().view(width)


def _assert_same_special(what: str, found: Tensor, exact: Tensor, near: Tensor) -> None:
    special = ~exact.isfinite()
    same = (found == exact) | (found.isnan() & exact.isnan())
    wrong = (special & ~same) | (~special & found.isnan() & ~near.isnan())
    if wrong.any():
        raise Mismatch(_report(what, found, exact, int(wrong.int().argmax()), 0.0))


def _report(what: str, actual: Tensor, expected: Tensor, flat: int, allowed: float) -> str:
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    got, want = actual[at].item(), expected[at].item()
    return (
        f"{what}, shape {list(actual.shape)} {str(actual.dtype).removeprefix('torch.')}: "
        f"worst at {at}: got {got!r}, expected {want!r}, "
        f"error {abs(got - want):.3g}, allowed {allowed:.3g}"
    )
