"""Whether tensors are what they were: the same objects, unwritten since, or equal ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; inference tensors do not."""
    return -1 if tensor.is_inference() else tensor._version


def versions(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The version of each."""
    return tuple(map(version, tensors))


def same(held: Sequence[Tensor], before: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Whether `tensors` are the `held` ones, whose versions were `before`; or, in new memory, equal ones.

    A pipeline passes the same tensors at every step; only hand-written loops that build them anew have them compared.
    """
    return len(held) == len(tensors) and all(
        version(old) == mark and (old is new or torch.equal(old, new))
        for old, mark, new in zip(held, before, tensors, strict=True)
    )
