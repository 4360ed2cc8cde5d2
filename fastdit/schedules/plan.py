"""What happens at each step, as data: the merge of what the methods want, lowered for the block loop.

A method fills in some fields of a plan: which components are reused, which image tokens are active, what resolution
there is. Two methods that fill the same field do not compose, which is checked when patching.

:func:`lower` turns a bound schedule into one small set of flags per (step, block, component), see `actions.py`.
No tensors here, and no models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastdit.errors import CompositionError
from fastdit.schedules.actions import COMPUTE, DRAWN, KEEP, REUSE, BlockActions, drawn, order_of
from fastdit.schedules.collapse import StepSums, find_sums
from fastdit.schedules.forecast import Fitted
from fastdit.spec import BlockKind, ModelSpec

if TYPE_CHECKING:
    from fastdit.schedules.schedule import Schedule

#: the ops of every run, and those of runs whose methods decide a field of the plan
OPS = ("gated_residual", "norm_modulate")
OPS_OF_FIELD = {
    "rows": ("qkv_prologue", "token_change", "token_select"),
    "resolution": ("patchify", "unpatchify", "resolution_transition"),
}


class PlanningMethod(Protocol):
    """Planning needs this part of a method."""

    name: str
    writes: frozenset[str]
    needs: Mapping[str, str]
    bars: Mapping[str, str]

    def staged_schedule(
        self, spec: ModelSpec, stages: Sequence[int], timesteps: Any
    ) -> Schedule | None: ...

    def weights(self, steps: int, timesteps: Any) -> Fitted: ...


@dataclass(frozen=True, eq=False)
class RunPlan:
    """One run follows this plan.

    Attributes:
        steps: Number of transformer steps.
        reuse: The bound schedule, or None when everything computes.
        actions: ``actions[step][block]`` -> flags per component, blocks of all kinds in running order. Empty when
            everything computes.
        sums: Which reused outputs are kept as sums at each step; empty where none are.
        forecasts: Of which order the forecast is that stands for the model's whole output at each step, 0 where the
            model runs; empty where it always runs.
        weights: Of forecasts, where they are not those of their orders.
    """

    steps: int
    reuse: Schedule | None
    actions: Sequence[Sequence[BlockActions]]
    sums: Sequence[StepSums] = ()
    forecasts: Sequence[int] = ()
    weights: Fitted = dataclasses.field(default_factory=dict)

    def part(self, first: int, last: int) -> RunPlan:
        """This gives the steps from `first` to before `last`, for counting."""
        parts = (each[first:last] for each in (self.actions, self.sums, self.forecasts))
        return RunPlan(last - first, self.reuse, *parts)

    def beginning(self) -> RunPlan:
        """This gives the same for a model that has run no step before: its first one computes everything."""
        if not self.actions:
            return self
        first = tuple(
            {name: (flags | COMPUTE) & ~REUSE for name, flags in row.items()}
            for row in self.actions[0]
        )
        forecasts = (0, *self.forecasts[1:]) if self.forecasts else ()
        return replace(self, actions=(first, *self.actions[1:]), forecasts=forecasts)

    def forecast_order(self, step: int) -> int:
        """This tells the order of the step's forecast; 0 where the model runs, and beyond the end."""
        return self.forecasts[step] if step < len(self.forecasts) else 0


def check_composition(methods: Sequence[PlanningMethod]) -> None:
    """This refuses methods that write the same field of a plan, and what they bar or need and do not find.

    Raises:
        CompositionError: Naming both methods, the field or why, and what to do.
    """
    owner: dict[str, str] = {}
    for method in methods:
        for field in sorted(method.writes):
            if field in owner:
                raise CompositionError(
                    f"{owner[field]} and {method.name} both decide {field!r} and cannot be composed; give one of them"
                )
            owner[field] = method.name
    for method in methods:
        for field in sorted(method.needs.keys() - owner.keys()):
            raise CompositionError(f"{method.name} {method.needs[field]}")
        for field in sorted(method.bars.keys() & owner.keys()):
            why = method.bars[field].format(other=owner[field])
            raise CompositionError(f"{method.name} {why}")


def ops_of(methods: Sequence[PlanningMethod]) -> tuple[str, ...]:
    """Runs with these methods call the ops of these names."""
    written = {field for method in methods for field in method.writes}
    return (*OPS, *(op for field, ops in OPS_OF_FIELD.items() if field in written for op in ops))


def plan_run(
    methods: Sequence[PlanningMethod],
    spec: ModelSpec,
    steps: int,
    partial: Sequence[bool] = (),
    timesteps: Any = None,
    collapse: bool = False,
    repeats: bool = False,
    stays: bool = False,
) -> RunPlan:
    """This merges what the methods want for a run of `steps` steps; `partial` steps compute some of the tokens only.

    `timesteps` are the run's (`runtime/timesteps.py`), for schedules made for other numbers of steps. `collapse`
    allows sums of reused outputs; where a step computes a part of a value, they would have to be made anew. With
    `repeats` some steps are at the sigma of the one before, whose outputs they replace in forecasts. With `stays` what
    is kept at any step is kept at all, as CUDA graphs have it; so steps that compute alike are told alike.

    Raises:
        ScheduleError: A schedule does not fit the model or the number of steps.
    """
    stages = [s for m in methods if "resolution" in m.writes for s in m.stages()]
    fresh = [stage.first for stage in stages]
    lengths = [stage.steps for stage in stages] or [steps]
    reusing = (method for method in methods if "reuse" in method.writes)
    reuse = next((method.staged_schedule(spec, lengths, timesteps) for method in reusing), None)
    forecasts = whole_forecasts(reuse, spec, fresh) if reuse is not None and reuse.forecasts else ()
    forecasts = forecasts if any(forecasts) else ()
    weights = weights_of(methods, steps, timesteps)
    for step, nodes in weights:
        forecasts = (*forecasts[:step], max(1, len(nodes) - 1), *forecasts[step + 1 :])
    given = spec, partial, fresh, forecasts, repeats, stays
    actions = lower(reuse, *given) if reuse is not None else ()
    sums = _sums(actions, spec, repeats) if actions and collapse and not any(partial) else ()
    return RunPlan(steps, reuse, actions, sums, forecasts, weights)


def weights_of(methods: Sequence[PlanningMethod], steps: int, timesteps: Any) -> Fitted:
    """This gives the weights of forecasts that a method has fitted for such a run of its own, with no other beside."""
    return methods[0].weights(steps, timesteps) if len(methods) == 1 else {}


def whole_forecasts(
    schedule: Schedule, spec: ModelSpec, fresh: Sequence[int] = ()
) -> tuple[int, ...]:
    """This gives the order of each step's forecast where all of it is drawn by one, 0 elsewhere."""
    layers = [
        tuple(part[:, _present(kind)] for part in schedule.layers[kind.name].filled(kind))
        for kind in spec.kinds
    ]
    if not layers:  # a model without blocks that are known, whose schedule is of its output
        layers = [(layer.bits, layer.orders) for layer in schedule.layers.values()]
    bits, orders = (
        np.concatenate([each.reshape(schedule.steps, -1) for each in parts], axis=1)
        for parts in zip(*layers, strict=True)
    )
    whole = ~bits.any(axis=1) & (orders == orders[:, :1]).all(axis=1)
    whole[list(fresh)] = False
    return tuple(int(order) if step else 0 for step, order in zip(whole, orders[:, 0], strict=True))


def _present(kind: BlockKind) -> np.ndarray:
    """This tells which entries of a step there are, bool [blocks, components]; the others decide nothing."""
    return np.array(
        [
            [(block, name) not in kind.absent for name in kind.components]
            for block in range(kind.count)
        ]
    )


def _sums(
    actions: Sequence[Sequence[BlockActions]], spec: ModelSpec, repeats: bool
) -> Sequence[StepSums]:
    """There are sums where a model's gates allow them and its schedule makes them pay.

    Where steps repeat a sigma nobody knows here which outputs a forecast is drawn through.
    """
    if not spec.shared_gates and not spec.common_gates:
        return ()
    slots = [(block, name) for block, row in enumerate(actions[0]) for name in row]
    kinds = [kind.name for kind in spec.kinds for _ in range(kind.count)]
    flags = np.array([[step[block][name] for block, name in slots] for step in actions], dtype=int)
    if repeats and (flags & DRAWN).any():
        return ()
    computes, reads = ((flags & each).astype(bool) for each in (COMPUTE, REUSE))
    alike = [(kinds[block], name) for block, name in slots] if spec.common_gates else None
    sums = find_sums(computes, slots, reads, order_of(flags), alike)
    return sums if any(step.made for step in sums) else ()


def everywhere(spec: ModelSpec, flags: int) -> list[dict[str, int]]:
    """Each component that there is gets the same flags, per block of all kinds in running order."""
    return [
        {name: flags for name in kind.components if (block, name) not in kind.absent}
        for kind in spec.kinds
        for block in range(kind.count)
    ]


def lower(
    schedule: Schedule,
    spec: ModelSpec,
    partial: Sequence[bool] = (),
    fresh: Sequence[int] = (),
    forecasts: Sequence[int] = (),
    repeats: bool = False,
    stays: bool = False,
) -> list[list[dict[str, int]]]:
    """This gives flags per step, block (all kinds, in running order) and component; see :func:`plan_run`.

    Computing at a `partial` step replaces a part of a value only, so the rest of it must have been kept until then.
    At a `fresh` step the tokens are others than before, so everything computes. Where the whole output is one of the
    `forecasts`, no slot is read.
    """
    some = np.array(partial, dtype=bool) if len(partial) else np.zeros(schedule.steps, dtype=bool)
    actions: list[list[dict[str, int]]] = [[] for _ in range(schedule.steps)]
    for kind in spec.kinds:
        bits, orders = schedule.layers[kind.name].filled(kind)
        bits[list(fresh)] = True
        flags = _lower_kind(kind, bits, orders, some, forecasts, repeats, stays)
        for step, blocks in enumerate(actions):
            blocks += (
                {
                    component: int(flags[component][step, block])
                    for component in kind.components
                    if (block, component) not in kind.absent
                }
                for block in range(kind.count)
            )
    return actions


def _lower_kind(
    kind: BlockKind,
    bits: np.ndarray,
    orders: np.ndarray,
    partial: np.ndarray,
    forecasts: Sequence[int],
    repeats: bool,
    stays: bool,
) -> dict[str, np.ndarray]:
    flags: dict[str, np.ndarray] = {}
    # A consumer is lowered before what it consumes: whether it runs decides whether its inputs are read.
    for component in sorted(kind.components, key=lambda c: c in kind.consumers):
        consumer = kind.consumers.get(component)
        # With partial steps an attention that nobody reads still renews keys and values, so it runs.
        dead = consumer is not None and not partial.any()
        read = np.ones(bits.shape[:2], dtype=bool)
        if dead:
            read = (flags[consumer] & COMPUTE).astype(bool)
        read[np.array(forecasts, dtype=bool).nonzero()] = False
        place = kind.components.index(component)
        order = orders[:, :, place]
        renews = partial | repeats if order.any() else partial
        flags[component] = _lower_component(bits[:, :, place], read, renews, order, stays)
    return flags


def _lower_component(
    bits: np.ndarray, read: np.ndarray, renews: np.ndarray, orders: np.ndarray, stays: bool
) -> np.ndarray:
    """This is liveness analysis, backward over the steps; all but `renews` [steps] are [steps, blocks].

    `bits` (compute) and `read` (value is used) are bool; a reused value is drawn through one more than `orders` values,
    and a step that `renews` may replace the last of them, or a part of it.
    """
    flags = np.zeros(bits.shape, dtype=np.uint16)
    # How many of the last computed values, counted from after the step, later steps read.
    after = np.zeros(bits.shape, dtype=np.uint16)
    wanted = after[-1]
    for step in reversed(range(len(bits))):
        after[step] = wanted
        compute = bits[step] & (read[step] | (wanted > 0))
        reuse = ~bits[step] & read[step]
        flags[step] = compute * COMPUTE + reuse * REUSE
        before = wanted if renews[step] else np.maximum(wanted, 1) - 1
        wanted = np.where(bits[step], before, np.maximum(wanted, reuse * (orders[step] + 1)))
    if stays:
        after[:] = after.max(axis=0)
    flags += (after > 0) * np.uint16(KEEP)
    made = np.cumsum(flags & COMPUTE, axis=0)
    several = (orders > 0).any(axis=0)
    return flags + several * drawn(orders, np.minimum(after, made).astype(np.uint16))
