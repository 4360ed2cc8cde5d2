"""The part of a schedule that is one block kind's, and the checks of what makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdit.errors import ScheduleError
from fastdit.schedules.forecast import MAX_ORDER
from fastdit.spec import BlockKind

#: in place of an order: where whole steps are drawn, each picture's run says whether by 1 or by 0
AUTO = "auto"


@dataclass(frozen=True, eq=False)
class Layer:
    """One block kind has ``bits`` (bool) and ``orders`` (uint8), read-only arrays [steps, blocks, components]."""

    components: tuple[str, ...]
    bits: np.ndarray
    orders: np.ndarray

    def filled(self, kind: BlockKind) -> tuple[np.ndarray, np.ndarray]:
        """Bits and orders get all components of the model's kind; one that the layer does not name computes."""
        shape = len(self.bits), kind.count, len(kind.components)
        bits, orders = np.ones(shape, dtype=bool), np.zeros(shape, dtype=np.uint8)
        places = [kind.components.index(name) for name in self.components]
        bits[:, :, places], orders[:, :, places] = self.bits, self.orders
        return bits, orders


def ungrouped(layer: Layer, kind: BlockKind) -> Layer:
    """Every group of the layer gives way to its components."""
    parts = [
        (component, index)
        for index, name in enumerate(layer.components)
        for component in kind.groups.get(name, (name,))
    ]
    names, places = zip(*parts, strict=True)
    places = list(places)
    return make_layer(kind.name, layer.bits[:, :, places], names, layer.orders[:, :, places])


def check_order(order: Any) -> None:
    """This raises ScheduleError for what is no order of a forecast."""
    if type(order) is not int or not 0 <= order <= MAX_ORDER:
        raise ScheduleError(f"order must be 0, 1 or 2, got {order!r}")


def check_kinds(**parts: Mapping[Any, Any]) -> None:
    """This raises ScheduleError for mappings by block kind that have none, or not the same ones."""
    first, *others = map(set, parts.values())
    if not first or any(kinds != first for kinds in others):
        said = (f"{name} has block kinds {sorted(map(str, part))}" for name, part in parts.items())
        raise ScheduleError(f"{', '.join(said)}; they must be the same and not empty")


def check_steps(name: str, steps: Mapping[str, int]) -> None:
    """This raises ScheduleError for block kinds of unlike numbers of steps."""
    if len(set(steps.values())) > 1:
        raise ScheduleError(
            f"{name} must have the same number of steps for every block kind, got {steps}"
        )


def check_names(kind: Any, components: Any) -> tuple[str, ...]:
    """Component names are distinct strings that can be printed, as the kind's name is; others are a ScheduleError."""
    if isinstance(components, str) or not isinstance(components, Sequence):
        raise ScheduleError(
            f"components of {kind!r} must be a sequence of names, got {components!r}"
        )
    names = tuple(components)
    if (
        not names
        or not all(isinstance(name, str) and name and name.isprintable() for name in (kind, *names))
        or len(set(names)) < len(names)
    ):
        raise ScheduleError(
            f"components of {kind!r} must be distinct non-empty strings of printable characters, and so must the "
            f"block kind, got {names!r}"
        )
    return names


def make_layer(kind: str, bits: Any, components: Any, orders: Any = 0) -> Layer:
    names = check_names(kind, components)
    try:
        array = np.asarray(bits)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"bits of {kind!r} must be a regular [step][block][component] array: {error}"
        ) from error
    if array.dtype != bool and not (
        np.issubdtype(array.dtype, np.integer) and array.size and np.isin(array, (0, 1)).all()
    ):
        raise ScheduleError(
            f"bits of {kind!r} must be bool or 0/1, got {array.dtype} with shape {array.shape}"
        )
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != len(names):
        raise ScheduleError(
            f"bits of {kind!r} must have shape [steps, blocks, {len(names)}] without empty axes, got {array.shape}"
        )
    array = array.astype(bool)
    array[0] = True  # there is nothing to reuse at the first step
    try:
        drawn = np.broadcast_to(np.asarray(orders), array.shape)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"orders of {kind!r} must be shaped like its bits, {array.shape}: {error}"
        ) from error
    if not np.issubdtype(drawn.dtype, np.integer) or not np.isin(drawn, range(MAX_ORDER + 1)).all():
        raise ScheduleError(f"orders of {kind!r} must be 0, 1 or 2")
    drawn = np.where(array, 0, drawn).astype(np.uint8)  # what computes is not drawn
    for each in (array, drawn):
        each.setflags(write=False)
    return Layer(names, array, drawn)
