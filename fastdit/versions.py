"""Tensors are what they were if they are the same objects, unwritten since, or equal ones.

Torch counts the writes to a tensor, but not to one made under `torch.inference_mode`: of such a one a copy is kept and
compared, which waits for its device. Of others that are the same objects nothing is read.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

#: what tells a write to a tensor: the count of them, or what the tensor held
Version = int | Tensor
_VERSION = operator.attrgetter("_version")


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
        elif not _is_one_memory(old, new):
            pairs.append((old, new))
    alike = all(
        a.shape == b.shape and a.dtype is b.dtype and a.device == b.device for a, b in pairs
    )
    return alike and _equal(pairs)


def _is_one_memory(old: Tensor, new: Tensor) -> bool:
    """Whether they are one tensor, or views cut alike of one; `old` is still held, so nobody else has its memory."""
    return old is new or (
        old.data_ptr() == new.data_ptr()
        and old.shape == new.shape
        and old.stride() == new.stride()
        and old.dtype is new.dtype
        and old.device == new.device
    )


def _equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """This tells whether the tensors of each pair hold the same; it waits once for each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for a, b in pairs:
        if a.device.type != "cpu":
            found.setdefault(a.device, []).append((a == b).all())
        elif not torch.equal(a, b):
            return False
    return all(bool(torch.stack(masks).all()) for masks in found.values())


class Watched:
    """Weights in the dicts of modules: another tensor in a place, or one that was written to, is a change.

    Nobody can tell of inference tensors, nor of those that are offloaded between two looks.
    """

    def __init__(self, places: Sequence[dict[str, Tensor | None]]) -> None:
        self._places = places
        self._look()

    def changed(self) -> bool:
        """Whether there was one since the last look."""
        if self._is_still():
            return False
        before, marks = self._told, self._marks
        self._look()
        return marks != self._marks or not all(map(operator.is_, before, self._told))

    def _is_still(self) -> bool:
        held, marks = self._held, list(map(_VERSION, self._told))
        now = list(itertools.chain.from_iterable(map(dict.values, self._places)))
        return marks == self._marks and len(now) == len(held) and all(map(operator.is_, now, held))

    def _look(self) -> None:
        self._held = list(itertools.chain.from_iterable(map(dict.values, self._places)))
        self._told = [t for t in self._held if not (t is None or t.is_meta or t.is_inference())]
        self._marks = list(map(_VERSION, self._told))
