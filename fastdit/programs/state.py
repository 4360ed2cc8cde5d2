"""What a run keeps between its calls, taken apart: which tensors are where, and in what.

A state is a few named dicts. Two states of one form lead a call through the same code, so a form is part of a kind of
call, and the tensors are its program's inputs. Values in the dicts are tensors, plain ones, tuples of them, and objects
of the classes in :data:`OBJECTS`; of any other nothing is known, and no program is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: classes whose objects are taken apart by their attributes, or as tuples by their fields; :func:`know` adds to them
OBJECTS: set[type] = set()
TUPLES: set[type] = {tuple}
#: values that are part of a form
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

State = Mapping[str, Mapping[Any, Any]]


@dataclass(frozen=True)
class Place:
    """Where a tensor is: in which dict, under which key, and how to get there from the value.

    Attributes:
        steps: Indices, as ints, and names of attributes.
    """

    source: str
    key: Any
    steps: tuple[int | str, ...] = ()


def know(*classes: type) -> None:
    """Objects of these classes are nothing but what they hold, and nobody changes one."""
    for cls in classes:
        (TUPLES if issubclass(cls, tuple) else OBJECTS).add(cls)


class Moment(int):
    """The number of the step that something was made at; a form tells only which are the same, and which later."""


class UnknownState(Exception):
    """Something in a state is of a class that is not known."""


class Form:
    """A state at one moment.

    Attributes:
        key: Equal for states of one form.
        entries: (dict, key) -> (the value, what it looks like).
        leaves: Each tensor with its place.
        moments: The steps in it, latest first.

    Args:
        lists: There may be lists and dicts, too: what a call is given, nobody changes meanwhile.
    """

    def __init__(self, state: State, lists: bool = False) -> None:
        self._lists = lists
        self._moments: set[Moment] = set()
        self.entries: dict[tuple[str, Any], tuple[Any, Any]] = {}
        self.leaves: list[tuple[Place, Tensor]] = []
        for source, values in state.items():
            for key, value in values.items():
                looks = self._look(value, Place(source, key))
                self.entries[source, key] = value, looks
        places: dict[int, list[Place]] = {}
        for place, leaf in self.leaves:
            places.setdefault(id(leaf), []).append(place)
        shared = frozenset(frozenset(several) for several in places.values() if len(several) > 1)
        self.moments = tuple(sorted(self._moments, reverse=True))
        ranks = {moment: rank for rank, moment in enumerate(self.moments)}
        looks = frozenset(
            (*where, _ranked(looks, ranks) if ranks else looks)
            for where, (_, looks) in self.entries.items()
        )
        self.key = looks, shared

    def _look(self, value: Any, place: Place) -> Any:
        if isinstance(value, Tensor):
            self.leaves.append((place, value))
            return look(value)
        kind = type(value)
        if kind in PLAIN:
            return kind, value
        if kind is Moment:
            self._moments.add(value)
            return kind, value
        if self._lists and kind is dict:
            parts = value.items()
        elif kind in TUPLES or (self._lists and kind is list):
            parts = enumerate(value)
        elif kind in OBJECTS:
            parts = vars(value).items()
        else:
            raise UnknownState(f"{place.source} hold a {kind.__name__}")
        found = []
        for name, part in parts:
            inner = Place(place.source, place.key, (*place.steps, name))
            found.append((name, self._look(part, inner)))
        return kind, tuple(found)


def _ranked(looks: Any, ranks: Mapping[int, int]) -> Any:
    """What something looks like, with the rank of a step in place of its number."""
    if type(looks) is not tuple:
        return looks
    if len(looks) == 2 and looks[0] is Moment:
        return Moment, ranks[looks[1]]
    return tuple(_ranked(part, ranks) for part in looks)


def look(tensor: Tensor) -> Any:
    """What code can see of a tensor without reading it.

    Raises:
        UnknownState: It is of a class of its own, which may do as it likes.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UnknownState(f"a tensor is a {type(tensor).__name__}")
    return (
        tensor.shape,
        tensor.dtype,
        tensor.device,
        tensor.stride(),
        tensor.is_inference(),
    )
