"""A schedule as the bit vector that the search varies, and which vectors are the same schedule.

The order is that of the ECAD paper's code (spec 5): step by step, block by block of each kind in running order, and the
components of a block in running order; True computes. Step 0 is part of the vector, as there, though its bits decide
nothing. Components that a block does not have are left out.
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
from fastdit.schedules.plan import lower
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec


@dataclass(frozen=True)
class Genome:
    """A model at a number of steps has these bit vectors.

    Attributes:
        spec: The model's block kinds.
        steps: Steps of the run.
    """

    spec: ModelSpec
    steps: int

    @cached_property
    def components(self) -> tuple[tuple[str, int, str], ...]:
        """The bits of one step are of these (kind, block, component), in order."""
        return tuple((kind.name, block, name) for kind, block, name in self.spec.components())

    @property
    def size(self) -> int:
        """A vector has so many bits."""
        return self.steps * len(self.components)

    def schedule(self, vector: np.ndarray, provenance: Mapping[str, Any] | None = None) -> Schedule:
        """A vector, bool [size], stands for this schedule."""
        table = vector.reshape(self.steps, len(self.components))
        bits, named = {}, {}
        for kind in self.spec.kinds:
            present = {name for owner, _, name in self.components if owner == kind.name}
            names = tuple(name for name in kind.components if name in present)
            bits[kind.name] = np.ones((self.steps, kind.count, len(names)), dtype=bool)
            named[kind.name] = names
        for column, (kind_name, block, name) in enumerate(self.components):
            index = named[kind_name].index(name)
            bits[kind_name][:, block, index] = table[:, column]
        return Schedule.from_bits(bits, named, provenance)

    def vector(self, schedule: Schedule) -> np.ndarray:
        """A schedule has this vector, bool [size]; a component that it does not name computes.

        Raises:
            ScheduleError: The schedule is for another model or another number of steps.
        """
        schedule = schedule.bind(self.spec, self.steps)
        table = np.ones((self.steps, len(self.components)), dtype=bool)
        for column, (kind, block, name) in enumerate(self.components):
            layer = schedule.layers[kind]
            if name in layer.components:
                table[:, column] = layer.bits[:, block, layer.components.index(name)]
        return table.ravel()

    def effective(self, vector: np.ndarray) -> np.ndarray:
        """The vector loses what changes nothing: step 0 computes, and what nobody reads does not."""
        return self._flags(vector) & COMPUTE != 0

    def key(self, vector: np.ndarray) -> str:
        """Two vectors share this name if and only if they run the same components at the same steps."""
        flags = self._flags(vector) & (COMPUTE | REUSE)
        return hashlib.sha256(flags.astype(np.uint8).tobytes()).hexdigest()[:32]

    def reused(self, vector: np.ndarray) -> int:
        """So many entries differ from the uncached run."""
        return int((~self.effective(vector)).sum())

    def to_bytes(self, vector: np.ndarray) -> bytes:
        """A byte holds eight bits."""
        return np.packbits(vector).tobytes()

    def from_bytes(self, data: bytes) -> np.ndarray:
        """This reverses :meth:`to_bytes`."""
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        if not self.size <= bits.size < self.size + 8:
            raise ScheduleError(f"{len(data)} bytes cannot hold {self.size} bits")
        return bits[: self.size].astype(bool)

    def _flags(self, vector: np.ndarray) -> np.ndarray:
        """Every entry has COMPUTE, REUSE or neither."""
        actions = lower(self.schedule(vector), self.spec)
        first, offsets = 0, {}
        for kind in self.spec.kinds:
            offsets[kind.name] = first
            first += kind.count
        return np.array(
            [
                blocks[offsets[kind] + block][name]
                for blocks in actions
                for kind, block, name in self.components
            ]
        )
