"""Tensors are what they were if they are the same objects, unwritten since, or equal ones.

Torch counts the writes to a tensor, but not to one made under `torch.inference_mode`: of such a one a copy is kept and
compared, which waits for its device. Of others that are the same objects nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: what tells a write to a tensor: the count of them, or what the tensor held
Version = int | Tensor


def versions(tensors: Sequence[Tensor]) -> tuple[Version, ...]:
    """This notes of tensors as they are now what :func:`same` needs to know."""
    return tuple(t.clone() if t.is_inference() else t._version for t in tensors)


def same(held: Sequence[Tensor], before: Sequence[Version], tensors: Sequence[Tensor]) -> bool:
    """This tells whether `tensors` are the `held` ones, whose versions were `before`; or, in new memory, equal ones.

    A pipeline passes the same tensors at every step; only hand-written loops that build them anew have them compared.
    """
    if len(held) != len(tensors):
        return False
    pairs = []
    for old, mark, new in zip(held, before, tensors, strict=True):
        if isinstance(mark, Tensor):
            pairs.append((mark, new))
        elif old._version != mark:
            return False
        elif old is not new:
            pairs.append((old, new))
    alike = all(
        a.shape == b.shape and a.dtype is b.dtype and a.device == b.device for a, b in pairs
    )
    return alike and _equal(pairs)


def _equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """This tells whether the tensors of each pair hold the same; it waits once for each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for a, b in pairs:
        if a.device.type != "cpu":
            found.setdefault(a.device, []).append((a == b).all())
        elif not torch.equal(a, b):
            return False
    return all(bool(torch.stack(masks).all()) for masks in found.values())
