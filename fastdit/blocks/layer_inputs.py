"""What adaLN layers are given, of several steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerInputs:
    """Where adaLN layers get their inputs from.

    Attributes:
        make: The layers' inputs of timesteps [n B], steps one after the other: tensors of as many rows.
        tensors: What `make` closes over; another tensor here, or one written into, makes other inputs.
        joins: Whether the model has them one after the other in one tensor.
    """

    make: Callable[[Tensor], tuple[Any, ...]]
    tensors: tuple[Tensor, ...]
    joins: bool = False


def repeated(tensor: Tensor, rows: int, batch: int) -> Tensor:
    """[B or 1, ...] as [n B, ...], the batch again for each step; of one step as it is, which a model is given too."""
    if rows == batch:
        return tensor
    return tensor.expand(batch, *tensor.shape[1:]).repeat(rows // batch, *[1] * (tensor.ndim - 1))
