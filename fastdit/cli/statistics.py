"""What a schedule's bits say about themselves: the figures by which the ECAD paper's schedules are described.

Step 0 always computes here, whatever a file says. Everything follows from the bits, and for the dead work from which
component reads which (a :class:`~fastdit.spec.ModelSpec`); costs, which need a model, are `account/cost.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastdit.schedules.actions import COMPUTE
from fastdit.schedules.layer import Layer
from fastdit.schedules.plan import lower
from fastdit.schedules.schedule import Schedule
from fastdit.spec import BlockKind, ModelSpec


@dataclass(frozen=True)
class ScheduleStatistics:
    """These are the figures. A step has one bit for each component of each block.

    Attributes:
        steps, components: Steps, and bits of one step.
        reused: Bits that reuse, over all steps.
        idle_steps: Steps at which nothing computes.
        computed: Component -> how often it computes, over all steps and blocks.
        blocks_per_step: Component -> the number of blocks in which it computes, at each step.
        longest_reuse: The most steps in a row that a component is reused.
        mean_age: Mean number of steps since a reused value was computed; 0 where nothing is reused.
        never_renewed: Components that compute at step 0 only, as (kind, block, component).
        whole_blocks: Block kind -> share of the (step, block) in which all components compute or all are reused.
        runs: Maximal runs of reused components in running order within a step.
        dead: Component -> how often it computes although nobody reads the value before it is replaced.
        stale_outputs: Computed consumers (FLUX's `single_proj_out`) whose inputs are all reused and unchanged since
            they last computed, so that they give what they gave before.
    """

    steps: int
    components: int
    reused: int
    idle_steps: tuple[int, ...]
    computed: Mapping[str, int]
    blocks_per_step: Mapping[str, tuple[int, ...]]
    longest_reuse: int
    mean_age: float
    never_renewed: tuple[tuple[str, int, str], ...]
    whole_blocks: Mapping[str, float]
    runs: int
    dead: Mapping[str, int]
    stale_outputs: int

    @property
    def reuse_share(self) -> float:
        """This share of all bits reuses."""
        return self.reused / (self.steps * self.components)

    @property
    def traffic(self) -> tuple[int, int, int]:
        """Reused components make so many passes over a cached tensor (ECAD spec section 10): eager, with one fused
        update each, with one fused update per run.
        """
        return 5 * self.reused, 3 * self.reused, self.reused + 2 * self.runs


def statistics(schedule: Schedule, spec: ModelSpec | None = None) -> ScheduleStatistics:
    """This counts the figures of a schedule; without a model's `spec`, no component is read by another."""
    spec = spec or spec_of(schedule)
    bound = schedule.bind(spec, schedule.steps)
    parts = [
        (kind, layer, _present(kind, layer.components))  # the last ff_context of SD3 is none
        for kind in spec.kinds
        for layer in (bound.layers[kind.name],)
    ]
    flat = np.concatenate([layer.bits[:, present] for _, layer, present in parts], axis=1)
    names = [
        (kind.name, int(block), layer.components[component])
        for kind, layer, present in parts
        for block, component in np.argwhere(present)
    ]
    ages = _ages(flat)
    edges = np.diff(np.pad(~flat, ((0, 0), (1, 0))).astype(np.int8), axis=1)
    computed: dict[str, int] = {}
    per_step: dict[str, np.ndarray] = {}
    for column, (_, _, component) in enumerate(names):
        computed[component] = computed.get(component, 0) + int(flat[:, column].sum())
        per_step[component] = per_step.get(component, 0) + flat[:, column].astype(int)
    return ScheduleStatistics(
        steps=schedule.steps,
        components=flat.shape[1],
        reused=int((~flat).sum()),
        idle_steps=tuple(np.flatnonzero(~flat.any(axis=1)).tolist()),
        computed=computed,
        blocks_per_step={name: tuple(counts.tolist()) for name, counts in per_step.items()},
        longest_reuse=int(ages.max()),
        mean_age=float(ages[~flat].mean()) if (~flat).any() else 0.0,
        never_renewed=tuple(names[i] for i in np.flatnonzero(~flat[1:].any(axis=0)))
        if schedule.steps > 1
        else (),
        whole_blocks={kind.name: _whole(layer.bits, present) for kind, layer, present in parts},
        runs=int((edges == 1).sum()),
        dead=_dead(bound, spec),
        stale_outputs=sum(_stale_outputs(kind, layer) for kind, layer, _ in parts),
    )


def spec_of(schedule: Schedule) -> ModelSpec:
    """This is a model of which the schedule says all there is to know."""
    kinds = (
        BlockKind(name, layer.bits.shape[1], layer.components)
        for name, layer in schedule.layers.items()
    )
    return ModelSpec("any", tuple(kinds))


def _present(kind: BlockKind, components: tuple[str, ...]) -> np.ndarray:
    return np.array(
        [[(block, name) not in kind.absent for name in components] for block in range(kind.count)]
    )


def _ages(computes: np.ndarray) -> np.ndarray:
    """These are the steps since each component last computed, [steps, components]."""
    steps = np.arange(len(computes))[:, None]
    return steps - np.maximum.accumulate(np.where(computes, steps, 0), axis=0)


def _whole(bits: np.ndarray, present: np.ndarray) -> float:
    """This is the share of the (step, block) whose present components all compute or all reuse."""
    return float(((bits | ~present).all(axis=2) | ~(bits & present).any(axis=2)).mean())


def _dead(schedule: Schedule, spec: ModelSpec) -> dict[str, int]:
    actions = lower(schedule, spec)
    found: dict[str, int] = {}
    first = 0
    for kind in spec.kinds:
        layer = schedule.layers[kind.name]
        for name in set(layer.components) & set(kind.consumers):
            bits = layer.bits[:, :, layer.components.index(name)]
            found[name] = sum(
                bool(bits[step, block])
                and (block, name) not in kind.absent
                and not actions[step][first + block][name] & COMPUTE
                for step, block in np.ndindex(*bits.shape)
            )
        first += kind.count
    return found


def _stale_outputs(kind: BlockKind, layer: Layer) -> int:
    total = 0
    for output in sorted(set(kind.consumers.values()) & set(layer.components)):
        inputs = [name for name in layer.components if kind.consumers.get(name) == output]
        computes = layer.bits[:, :, layer.components.index(output)]
        fresh = np.any([layer.bits[:, :, layer.components.index(name)] for name in inputs], axis=0)
        for block in range(layer.bits.shape[1]):
            changed = True
            for step in range(layer.bits.shape[0]):
                changed |= bool(fresh[step, block])
                if computes[step, block]:
                    total += not changed
                    changed = False
    return total
