"""A schedule as the bit vector that the search varies, and which vectors are the same schedule.

The order is that of the ECAD paper's code (spec 5): step by step, block by block of each kind in running order, and the
components of a block in running order; True computes. Step 0 is part of the vector, as there, though its bits decide
nothing. Components that a block does not have are left out.

Where forecasts are searched too, a step's bits are followed by as many for each order beyond the first: an entry that
reuses is drawn by the order whose place in the list is the number of its bits that are set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastdit.errors import ScheduleError
from fastdit.schedules.actions import COMPUTE, REUSE
from fastdit.schedules.plan import lower, whole_forecasts
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec

_ORDER, _WHOLE = 4, 1 << 7  # of the codes that `key` is made of


@dataclass(frozen=True)
class Genome:
    """A model at a number of steps has these bit vectors.

    Attributes:
        spec: The model's block kinds.
        steps: Steps of a schedule: the transformer's calls, of which Heun's sampler makes more than it has steps.
        orders: By which a reused output may be drawn, rising from 0.
        repeats: Whether some calls are at the sigma of the one before, as Heun's are.
    """

    spec: ModelSpec
    steps: int
    orders: tuple[int, ...] = (0,)
    repeats: bool = False

    @cached_property
    def components(self) -> tuple[tuple[str, int, str], ...]:
        """The bits of one step are of these (kind, block, component), in order."""
        return tuple((kind.name, block, name) for kind, block, name in self.spec.components())

    @property
    def cells(self) -> int:
        """A schedule has so many entries."""
        return self.steps * len(self.components)

    @property
    def width(self) -> int:
        """A step has so many bits."""
        return len(self.components) * len(self.orders)

    @property
    def size(self) -> int:
        """A vector has so many bits."""
        return self.steps * self.width

    def parts(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, bool [..., size], say what computes and by which orders all is drawn: [..., steps, components]."""
        shape = (*vectors.shape[:-1], self.steps, len(self.orders), len(self.components))
        table = vectors.reshape(shape)
        raised = table[..., 1:, :].sum(axis=-2)
        return table[..., 0, :], np.array(self.orders, dtype=np.uint8)[raised]

    def join(self, computes: np.ndarray, orders: Any = 0) -> np.ndarray:
        """This reverses :meth:`parts` for one schedule; `orders` may be one for all.

        Raises:
            ScheduleError: An order is none that is searched.
        """
        orders = np.broadcast_to(orders, computes.shape)
        if not np.isin(orders, self.orders).all():
            raise ScheduleError(
                f"the schedule has orders {np.unique(orders).tolist()}, the search has {list(self.orders)}"
            )
        place = np.searchsorted(self.orders, orders)
        planes = [computes.astype(bool), *(place > p for p in range(len(self.orders) - 1))]
        return np.stack(planes, axis=1).reshape(self.size)

    def schedule(self, vector: np.ndarray, provenance: Mapping[str, Any] | None = None) -> Schedule:
        """A vector, bool [size], stands for this schedule."""
        table, drawn = self.parts(vector)
        bits, orders, named = {}, {}, {}
        for kind in self.spec.kinds:
            present = {name for owner, _, name in self.components if owner == kind.name}
            names = tuple(name for name in kind.components if name in present)
            shape = (self.steps, kind.count, len(names))
            bits[kind.name] = np.ones(shape, dtype=bool)
            orders[kind.name] = np.zeros(shape, dtype=np.uint8)
            named[kind.name] = names
        for column, (kind_name, block, name) in enumerate(self.components):
            index = named[kind_name].index(name)
            bits[kind_name][:, block, index] = table[:, column]
            orders[kind_name][:, block, index] = drawn[:, column]
        return Schedule.from_bits(bits, named, provenance, orders)

    def vector(self, schedule: Schedule) -> np.ndarray:
        """A schedule has this vector, bool [size]; a component that it does not name computes.

        Raises:
            ScheduleError: The schedule is for another model or another number of steps, or has orders that are not
                searched.
        """
        schedule = schedule.bind(self.spec, self.steps)
        table = np.ones((self.steps, len(self.components)), dtype=bool)
        orders = np.zeros(table.shape, dtype=np.uint8)
        for column, (kind, block, name) in enumerate(self.components):
            layer = schedule.layers[kind]
            if name in layer.components:
                place = layer.components.index(name)
                table[:, column] = layer.bits[:, block, place]
                orders[:, column] = layer.orders[:, block, place]
        return self.join(table, orders)

    def effective(self, vector: np.ndarray) -> np.ndarray:
        """The vector loses what changes nothing.

        Step 0 computes, what nobody reads does not, and only what is reused has an order.
        """
        flags, whole = self._flags(vector)
        orders = self.parts(vector)[1]
        drawn = (flags & REUSE != 0) | (whole > 0)[:, None]
        return self.join(flags & COMPUTE != 0, np.where(drawn, orders, 0))

    def key(self, vector: np.ndarray) -> str:
        """Two vectors share this name if and only if they run the same components at the same steps, drawn alike.

        A forecast through fewer outputs than its order asks for is one of a lower order.
        """
        flags, whole = self._flags(vector)
        codes = flags & (COMPUTE | REUSE)
        orders = self.parts(vector)[1] * (codes == REUSE)
        made = np.cumsum(codes & COMPUTE, axis=0, dtype=int)
        codes += np.minimum(orders, np.maximum(made, 1) - 1) << _ORDER
        runs = 0
        for step, order in enumerate(whole.tolist()):
            if order:
                codes[step] = _WHOLE + (max(1, min(order, runs - 1)) << _ORDER)
            else:
                runs += 1
        return hashlib.sha256(codes.astype(np.uint8).tobytes()).hexdigest()[:32]

    def reused(self, vector: np.ndarray) -> int:
        """So many entries differ from the uncached run."""
        return int((~self.parts(self.effective(vector))[0]).sum())

    def to_bytes(self, vector: np.ndarray) -> bytes:
        """A byte holds eight bits."""
        return np.packbits(vector).tobytes()

    def from_bytes(self, data: bytes) -> np.ndarray:
        """This reverses :meth:`to_bytes`."""
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        if not self.size <= bits.size < self.size + 8:
            raise ScheduleError(f"{len(data)} bytes cannot hold {self.size} bits")
        return bits[: self.size].astype(bool)

    def _flags(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every entry, [steps, components], has COMPUTE, REUSE or neither; every step the order it is forecast by."""
        schedule = self.schedule(vector)
        whole = whole_forecasts(schedule, self.spec)
        actions = lower(schedule, self.spec, forecasts=whole, repeats=self.repeats)
        first, offsets = 0, {}
        for kind in self.spec.kinds:
            offsets[kind.name] = first
            first += kind.count
        flags = [
            [blocks[offsets[kind] + block][name] for kind, block, name in self.components]
            for blocks in actions
        ]
        return np.array(flags), np.array(whole)
