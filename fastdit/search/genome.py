"""A schedule as the bit vector that the search varies, and which vectors are the same schedule.

The order is that of the ECAD paper's code (spec 5): step by step, block by block of each kind in running order, and the
components of a block in running order; True computes. Step 0 is part of the vector, as there, though its bits decide
nothing. Components that a block does not have are left out.

Where forecasts are searched too, a step's bits are followed by as many for each order beyond the first: an entry that
reuses is drawn by the order whose place in the list is the number of its bits that are set.

Where more than a schedule is searched, the bits of `knobs.py` follow the last step. A run of fewer steps takes those of
the longest that lie at the same part of it, so that a schedule keeps its shape; the other rows then mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastdit.errors import ScheduleError
from fastdit.schedules.actions import COMPUTE, REUSE
from fastdit.schedules.plan import lower, whole_forecasts
from fastdit.schedules.schedule import Schedule
from fastdit.search.knobs import Knobs, Run
from fastdit.spec import ModelSpec

MANY_TOKENS = 4096  # of a picture whose sparse steps are the most there can be
_ORDER, _WHOLE = 4, 1 << 7  # of the codes that `key` is made of


@dataclass(frozen=True)
class Genome:
    """A model at a number of steps has these bit vectors.

    Attributes:
        spec: The model's block kinds.
        steps: Steps of a schedule: the transformer's calls, of which Heun's sampler makes more than it has steps.
        orders: By which a reused output may be drawn, rising from 0.
        repeats: Whether some calls are at the sigma of the one before, as Heun's are.
        knobs: What is searched beside the schedule. Where that is the number of steps, `steps` is the largest.
    """

    spec: ModelSpec
    steps: int
    orders: tuple[int, ...] = (0,)
    repeats: bool = False
    knobs: Knobs = field(default_factory=Knobs)

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
    def table(self) -> int:
        """So many bits come before those of the knobs."""
        return self.steps * self.width

    @property
    def size(self) -> int:
        """A vector has so many bits."""
        return self.table + self.knobs.size

    def run(self, vector: np.ndarray) -> Run:
        """A vector's run is made so."""
        return self.knobs.read(vector[self.table :])

    def alone(self, run: Run) -> Genome:
        """Schedules of one run have this genome, without knobs."""
        return Genome(self.spec, run.steps or self.steps, self.orders, self.repeats)

    def taken(self, run: Run) -> np.ndarray:
        """A run's steps take these rows."""
        steps = run.steps or self.steps
        return np.arange(steps) * self.steps // steps

    def embed(self, vector: np.ndarray, run: Run) -> np.ndarray:
        """A vector of `alone(run)` becomes one of this genome."""
        rows = np.zeros((self.steps, self.width), dtype=bool)
        rows[self.taken(run)] = vector.reshape(-1, self.width)
        return np.concatenate([rows.ravel(), self.knobs.write(run)])

    def own(self, vector: np.ndarray) -> np.ndarray:
        """This reverses :meth:`embed`."""
        rows = vector[: self.table].reshape(self.steps, self.width)
        return rows[self.taken(self.run(vector))].ravel()

    def parts(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, bool [..., size], say what computes and by which orders all is drawn: [..., steps, components].

        Rows that no step takes compute nothing.
        """
        shape = (*vectors.shape[:-1], self.steps, len(self.orders), len(self.components))
        table = vectors[..., : self.table].reshape(shape)
        if self.knobs.steps:
            masks = np.zeros((len(self.knobs.steps), self.steps), dtype=bool)
            for mask, steps in zip(masks, self.knobs.steps, strict=True):
                mask[self.taken(Run(steps))] = True
            place = self.knobs.places(vectors[..., self.table :])[..., 0]
            table = table & masks[place][..., None, None]
        raised = table[..., 1:, :].sum(axis=-2)
        return table[..., 0, :], np.array(self.orders, dtype=np.uint8)[raised]

    def join(self, computes: np.ndarray, orders: Any = 0, run: Run | None = None) -> np.ndarray:
        """This reverses :meth:`parts` for one schedule; `orders` may be one for all.

        Args:
            computes: bool [steps, components].
            orders: Shaped like it, or one.
            run: The uncached run's if left out.

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
        run = run or next(self.knobs.runs())
        return np.concatenate([np.stack(planes, axis=1).ravel(), self.knobs.write(run)])

    def schedule(self, vector: np.ndarray, provenance: Mapping[str, Any] | None = None) -> Schedule:
        """A vector, bool [size], stands for this schedule, of its run's steps."""
        rows = self.taken(self.run(vector))
        table, drawn = (part[rows] for part in self.parts(vector))
        bits, orders, named = {}, {}, {}
        for kind in self.spec.kinds:
            present = {name for owner, _, name in self.components if owner == kind.name}
            names = tuple(name for name in kind.components if name in present)
            shape = (len(rows), kind.count, len(names))
            bits[kind.name] = np.ones(shape, dtype=bool)
            orders[kind.name] = np.zeros(shape, dtype=np.uint8)
            named[kind.name] = names
        for column, (kind_name, block, name) in enumerate(self.components):
            index = named[kind_name].index(name)
            bits[kind_name][:, block, index] = table[:, column]
            orders[kind_name][:, block, index] = drawn[:, column]
        return Schedule.from_bits(bits, named, provenance, orders)

    def vector(self, schedule: Schedule) -> np.ndarray:
        """A schedule of the uncached run has this vector, bool [size]; a component that it does not name computes.

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
        run = self.run(vector)
        flags, whole = self._flags(vector)
        orders = self.parts(vector)[1][self.taken(run)]
        drawn = (flags & REUSE != 0) | (whole > 0)[:, None]
        alone = self.alone(run).join(flags & COMPUTE != 0, np.where(drawn, orders, 0))
        return self.embed(alone, run)

    def key(self, vector: np.ndarray) -> str:
        """Two vectors share this name if and only if they run the same components at the same steps, drawn alike.

        A forecast through fewer outputs than its order asks for is one of a lower order. Under RAS a few names may
        stand for the same, never one for two.
        """
        run = self.run(vector)
        flags, whole = self._flags(vector)
        codes = flags & (COMPUTE | REUSE)
        orders = self.parts(vector)[1][self.taken(run)] * (codes == REUSE)
        made = np.cumsum(codes & COMPUTE, axis=0, dtype=int)
        codes += np.minimum(orders, np.maximum(made, 1) - 1) << _ORDER
        runs = 0
        for step, order in enumerate(whole.tolist()):
            if order:
                codes[step] = _WHOLE + (max(1, min(order, runs - 1)) << _ORDER)
            else:
                runs += 1
        said = astuple(run)[: None if run.coarse else -1]  # names are as before there were stages
        turned = repr(said).encode() if self.knobs.size else b""
        return hashlib.sha256(codes.astype(np.uint8).tobytes() + turned).hexdigest()[:32]

    def reused(self, vector: np.ndarray) -> int:
        """So many entries of the uncached run's are not computed, or not for all tokens."""
        computes, run = self.parts(self.effective(vector))[0], self.run(vector)
        some, coarse = self._sparse(run), run.coarse_steps(run.steps or self.steps)
        rows = computes[self.taken(run)]
        fewer = rows[:coarse].sum() + (rows[some].sum() if run.ras else 0)
        return int((~computes).sum() + fewer)

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
        run = self.run(vector)
        schedule, partial = self.schedule(vector), self._sparse(run)
        coarse = run.coarse_steps(schedule.steps)
        fresh = [0, coarse] if coarse else []
        whole = whole_forecasts(schedule, self.spec, fresh)
        actions = lower(schedule, self.spec, partial, fresh, whole, self.repeats)
        first, offsets = 0, {}
        for kind in self.spec.kinds:
            offsets[kind.name] = first
            first += kind.count
        flags = [
            [blocks[offsets[kind] + block][name] for kind, block, name in self.components]
            for blocks in actions
        ]
        return np.array(flags), np.array(whole)

    def _sparse(self, run: Run) -> np.ndarray:
        """These steps of a run leave out tokens, bool [steps]; empty without RAS."""
        if run.ras is None:
            return np.zeros(0, dtype=bool)
        steps = run.steps or self.steps
        first = run.coarse_steps(steps)
        planned = run.ras.active(steps - first, MANY_TOKENS)
        return np.array([False] * first + [step is not None for step in planned])
