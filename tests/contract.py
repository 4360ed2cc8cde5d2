"""The exactness contract of whole models: how near to stock diffusers a patched model must be.

Bits on the `reference` backend. Elsewhere by dtype: in fp64 a relative L2 distance to stock, in the
others at most twice the error that stock itself has against stock in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FP64 = 1e-9
RUN_FP64 = 1e-7


def distance(actual: Tensor, truth: Tensor) -> float:
    """Relative L2 distance in fp64."""
    assert actual.shape == truth.shape
    assert torch.isfinite(actual).all()
    truth = truth.double()
    return float((actual.double() - truth).norm() / truth.norm())


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and bits."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"relative L2 distance {distance(actual, expected):.1e}"


def within_contract(
    actual: Tensor, stock: Tensor, truth: Tensor | None = None, bound: float = RUN_FP64
) -> None:
    """`actual` is as near to `stock` as its dtype asks; `truth` is stock's result in fp64, needed in other dtypes."""
    assert actual.dtype == stock.dtype
    if stock.dtype == torch.float64:
        assert distance(actual, stock) <= bound
    else:
        assert distance(actual, truth) <= 2 * distance(stock, truth)
