"""The plan of a run as one raster: steps to the right, the blocks' components downward, the tokens above them.

As text a line stands for a component of all blocks; `fastdit/cli/raster.py` draws every cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdit.schedules.actions import COMPUTE, order_of
from fastdit.schedules.plan import RunPlan, everywhere
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec

#: what a cell holds; else the order by which its output is drawn, 0 for one that is repeated
ABSENT, COMPUTED = -2, -1
#: where some blocks compute, and where all do
SHADES = "░▒▓█"
#: where none does, by order, and where several orders meet
ORDERS, SEVERAL = "·12", "~"
HEIGHTS = "·▁▂▃▄▅▆▇█"
LEGEND = "█ computed, ░▒▓ in some blocks, · repeated, 1 2 drawn by that order"


@dataclass(frozen=True, eq=False)
class Raster:
    """What each step computes of each component of each block.

    Attributes:
        cells: Block kind -> int8 [steps, blocks, components]: ABSENT, COMPUTED or an order.
        components: Block kind -> names along the last axis.
        shares: Share of the tokens at full size that pass at each step, 0 where the model does not run; empty where all
            pass at each.
        stages: The token layout of each step; empty where it stays.
    """

    cells: Mapping[str, np.ndarray]
    components: Mapping[str, tuple[str, ...]]
    shares: tuple[float, ...] = ()
    stages: tuple[str, ...] = ()

    @classmethod
    def of_plan(
        cls,
        plan: RunPlan,
        spec: ModelSpec,
        shares: Sequence[float] = (),
        stages: Sequence[str] = (),
    ) -> Raster | None:
        """This is the raster of a plan; None where all steps compute all of all tokens."""
        if not plan.actions and not shares:
            return None
        given = tuple(shares), tuple(stages)
        forecasts = plan.forecasts or (0,) * plan.steps
        if not spec.kinds:
            output = np.array([order or COMPUTED for order in forecasts], dtype=np.int8)
            return cls({"model": output[:, None, None]}, {"model": ("output",)}, *given)
        actions = plan.actions or (everywhere(spec, COMPUTE),) * plan.steps
        cells, first = {}, 0
        for kind in spec.kinds:
            found = np.full((plan.steps, kind.count, len(kind.components)), ABSENT, dtype=np.int8)
            for step, order in enumerate(forecasts):
                for block in range(kind.count):
                    for name, flags in actions[step][first + block].items():
                        drawn = COMPUTED if flags & COMPUTE else order_of(flags)
                        found[step, block, kind.components.index(name)] = order or drawn
            cells[kind.name] = found
            first += kind.count
        return cls(cells, {kind.name: kind.components for kind in spec.kinds}, *given)

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> Raster:
        """This is the raster of a schedule, whatever the model."""
        cells = {
            kind: np.where(layer.bits, COMPUTED, layer.orders).astype(np.int8)
            for kind, layer in schedule.layers.items()
        }
        return cls(cells, {kind: layer.components for kind, layer in schedule.layers.items()})

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Raster) and self.like(other)
        beside = same and (self.shares, self.stages) == (other.shares, other.stages)
        return beside and all(
            np.array_equal(part, other.cells[kind]) for kind, part in self.cells.items()
        )

    def __hash__(self) -> int:
        return hash((str(self), self.shares))

    @property
    def steps(self) -> int:
        """It has so many steps."""
        return len(next(iter(self.cells.values())))

    def then(self, other: Raster) -> Raster:
        """The steps of another transformer follow, below the others where its blocks are not the same."""
        beside = self.shares + other.shares, self.stages + other.stages
        if self.like(other):
            cells = {
                kind: np.concatenate([part, other.cells[kind]]) for kind, part in self.cells.items()
            }
            return Raster(cells, self.components, *beside)
        cells, components = {}, {}
        for suffix, raster, around in (
            ("", self, (0, other.steps)),
            (" of the second", other, (self.steps, 0)),
        ):
            for kind, part in raster.cells.items():
                absent = (around, (0, 0), (0, 0))
                cells[kind + suffix] = np.pad(part, absent, constant_values=ABSENT)
                components[kind + suffix] = raster.components[kind]
        return Raster(cells, components, *beside)

    def like(self, other: Raster) -> bool:
        """Whether both are of the same blocks."""
        shapes = [{kind: part.shape[1:] for kind, part in r.cells.items()} for r in (self, other)]
        return self.components == other.components and shapes[0] == shapes[1]

    def rows(self) -> list[tuple[str, str, np.ndarray]]:
        """(kind, component, cells [blocks, steps] of the blocks that have it), downward."""
        found = []
        for kind, names in self.components.items():
            for index, name in enumerate(names):
                part = self.cells[kind][:, :, index].T
                part = part[(part != ABSENT).any(axis=1)]
                if len(part):
                    found.append((kind, name, part))
        return found

    def __str__(self) -> str:
        lines = [(name, "".join(map(_mark, part.T))) for _, name, part in self.rows()]
        if self.shares:
            heights = (HEIGHTS[max(round(8 * share), int(share > 0))] for share in self.shares)
            lines.insert(0, ("tokens", "".join(heights)))
        if self.stages:
            lines.insert(0, ("stage", "".join(stage[0] for stage in self.stages)))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"  {name:>{width}} {marks}" for name, marks in lines)


def _mark(column: Any) -> str:
    """One character for a component of all blocks at a step."""
    share = float((column == COMPUTED).mean())
    if share:
        return SHADES[3 if share == 1 else min(2, int(3 * share))]
    orders = set(column.tolist())
    if orders == {ABSENT}:
        return " "
    return ORDERS[orders.pop()] if len(orders) == 1 else SEVERAL
