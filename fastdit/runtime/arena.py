"""Tensors that stay where they are, so that a CUDA graph finds there what it read when it was captured.

What a run keeps between its calls has a place: a dict, a key, and the way from there. The arena has a tensor for each
place and form, and :meth:`Arena.settle` puts what is there into it: outputs that a call has made, and the ring of a
forecast, whose values go one place further. So a state of one form lies at one address, whatever led to it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.programs.state import OBJECTS, TUPLES, Form, Place


class NoRoom(Exception):
    """An arena would hold more bytes than it may."""


class Arena:
    """The tensors of one memory.

    Args:
        most: Bytes that they may take; None for no bound.

    Attributes:
        tensors: All of them.
        nbytes: What they take.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.tensors: dict[Any, Tensor] = {}
        self.nbytes = 0

    def like(self, key: Any, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """The tensor of this key of such a shape and dtype, dense in memory; always the same one.

        Raises:
            NoRoom: There is none yet, and no room for it.
        """
        key = key, tensor.shape, tensor.stride(), tensor.dtype, device or tensor.device
        found = self.tensors.get(key)
        if found is None:
            needed = self.nbytes + tensor.numel() * tensor.element_size()
            if self._most is not None and needed > self._most:
                raise NoRoom(f"caches that stay where they are need more than {self._most} bytes")
            with torch.inference_mode(False):  # written to in whatever mode a later run has
                found = self.tensors[key] = torch.empty_like(
                    tensor, device=device, requires_grad=False
                )
            self.nbytes = needed
        return found

    def settle(self, owner: Any, state: Mapping[str, MutableMapping[Any, Any]]) -> Any:
        """Put the tensors of a state where they stay, and give what tells which lies where.

        Raises:
            NoRoom: There is no room for one of them; nothing has changed then.
            UnknownState: The state holds what nobody knows.
        """
        if not any(state.values()):
            return frozenset()
        form = Form(state)
        places: dict[int, list[Place]] = {}
        leaves = {}
        for place, leaf in form.leaves:
            places.setdefault(id(leaf), []).append(place)
            leaves[id(leaf)] = leaf
        homes = {
            key: self.like((owner, min(places[key], key=_order)), leaf)
            for key, leaf in leaves.items()
        }
        _move([(homes[key], leaf) for key, leaf in leaves.items() if homes[key] is not leaf])
        made: dict[int, Any] = {}
        for (source, key), (value, _) in form.entries.items():
            state[source][key] = _at_home(value, homes, made)
        return frozenset((place, id(homes[id(leaf)])) for place, leaf in form.leaves)

    def clear(self) -> None:
        """They are let go."""
        self.tensors.clear()
        self.nbytes = 0


def _order(place: Place) -> str:
    return repr((place.source, place.steps, place.key))


def _move(moves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor to the first one, none of which is written before what lies there was read."""
    waiting = []
    for home, leaf in moves:
        if _storage(home) != _storage(leaf):
            waiting.append((home, leaf))
        elif not _same_memory(home, leaf):
            waiting.append((home, leaf.clone()))
    while waiting:
        read = {_storage(leaf) for _, leaf in waiting}
        ready = [pair for pair in waiting if _storage(pair[0]) not in read]
        if not ready:  # they go round in a circle
            home, leaf = waiting[0]
            waiting[0] = home, leaf.clone()
            continue
        torch._foreach_copy_([home for home, _ in ready], [leaf for _, leaf in ready])
        waiting = [pair for pair in waiting if _storage(pair[0]) in read]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one storage are the same numbers."""
    return (one.storage_offset(), one.shape, one.stride(), one.dtype) == (
        other.storage_offset(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _at_home(value: Any, homes: Mapping[int, Tensor], made: dict[int, Any]) -> Any:
    """A value with the tensors that stay in place of its own; what several entries share they go on sharing."""
    if isinstance(value, Tensor):
        return homes[id(value)]
    kind = type(value)
    if kind not in TUPLES and kind not in OBJECTS:
        return value
    if id(value) not in made:
        parts = value if kind in TUPLES else tuple(vars(value).values())
        found = tuple(_at_home(part, homes, made) for part in parts)
        if all(new is old for new, old in zip(found, parts, strict=True)):
            made[id(value)] = value
        elif kind in TUPLES:
            made[id(value)] = tuple.__new__(kind, found)
        else:
            copy = made[id(value)] = object.__new__(kind)
            copy.__dict__.update(zip(vars(value), found, strict=True))
    return made[id(value)]
