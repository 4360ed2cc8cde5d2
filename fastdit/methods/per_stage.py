"""One schedule of reused components for each stage of a run, beside a method that makes stages (RALU).

The tokens of two stages differ, and so may what is worth reusing in them. Caches drop where a stage begins, so its
first step computes whatever its schedule says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import Method
from fastdit.methods.cached import Cached
from fastdit.schedules.schedule import Every, Schedule
from fastdit.spec import ModelSpec


@dataclass(frozen=True, init=False)
class PerStage(Method):
    """This method runs a caching method of its own in each stage.

    Args:
        methods: One for each stage that has steps, in running order: such as :class:`~fastdit.Cached` or
            :class:`~fastdit.ECAD`, whose schedule has the steps of its stage, or None to reuse nothing there.

    Example:
        >>> every = fastdit.Schedule.every
        >>> fastdit.patch(
        ...     pipe, fastdit.RALU.preset("sd3-2x"), fastdit.PerStage(None, None, fastdit.Cached(every(3)))
        ... )
    """

    methods: tuple[Method | None, ...]

    name = "PerStage"
    writes = frozenset({"reuse"})
    needs = MappingProxyType(
        {
            "resolution": "has a method for each stage of a run, and no method beside it makes stages, as RALU does; "
            "give RALU too, or one of its methods alone"
        }
    )

    def __init__(self, *methods: Method | None) -> None:
        object.__setattr__(self, "methods", methods)
        given = self._given()
        for method in given:
            if getattr(method, "writes", None) != {"reuse"} or isinstance(method, PerStage):
                raise ArgumentError(
                    "PerStage takes one method for each stage that reuses components, such as Cached(schedule), or "
                    f"None, got {method!r}"
                )
            if method.made_for is not None:
                raise ArgumentError(
                    f"{method.name} was made for whole runs, with their timesteps and size, and cannot run in a "
                    "stage; strict=False lets it"
                )
            if method.guard:
                raise ArgumentError(
                    f"guard=True compares outputs of all tokens and whole runs, and {method.name} in a stage has "
                    "neither; leave it out"
                )
            if getattr(method, "book", None) is not None:
                raise ArgumentError(
                    f"{method.name} goes by a plan book, which was measured on whole runs, and cannot run in a stage; "
                    "leave the book out"
                )
        if len({method.adapts for method in given if method.forecasts}) > 1:
            raise ArgumentError(
                'order="auto" must be that of all stages that forecast, got it for some; give it to all of them or to '
                "none"
            )
        if not given:
            raise ArgumentError("PerStage must be given a method for at least one stage, got none")
        dtypes = {method.cache_dtype for method in given}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ArgumentError(f"cache_dtype must be the same in all stages, got {names}")
        most = [m.max_cache_bytes for m in given if m.max_cache_bytes is not None]
        object.__setattr__(self, "cache_dtype", dtypes.pop())
        object.__setattr__(self, "max_cache_bytes", min(most, default=None))

    @property
    def adapts(self) -> bool:
        return any(method.adapts for method in self._given())

    @property
    def forecasts(self) -> bool:
        return any(method.forecasts for method in self._given())

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        for method in self._given():
            method.check_sampler(noise, scheduler)

    def check(self, spec: ModelSpec) -> None:
        for method in self._given():
            method.check(spec)

    def staged_schedule(
        self, spec: ModelSpec, stages: Sequence[int], timesteps: Any = None
    ) -> Schedule:
        """The stages' schedules follow one another.

        Raises:
            ScheduleError: The run has another number of stages, or a schedule does not fit its stage.
        """
        if len(stages) != len(self.methods):
            raise ScheduleError(
                f"PerStage was given {len(self.methods)} stages, but the run has {len(stages)}; it belongs to a method "
                "that makes stages, such as RALU, and has one entry for each stage with steps"
            )
        own = None if timesteps is None else timesteps.of(sum(stages))
        parts, first = [], 0
        for index, (method, steps) in enumerate(zip(self.methods, stages, strict=True)):
            here = None if own is None else replace(timesteps, own=own[first : first + steps])
            try:
                part = (method or Cached(Every(1))).schedule(spec, steps, here)
            except ScheduleError as error:
                raise ScheduleError(
                    f"stage {index + 1} of {len(stages)}, with {steps} steps: {error}"
                ) from error
            parts.append(part)
            first += steps
        return _joined(spec, parts)

    def _given(self) -> list[Method]:
        return [method for method in self.methods if method is not None]


def _joined(spec: ModelSpec, parts: Sequence[Schedule]) -> Schedule:
    """One schedule has the steps of all stages; what a stage's schedule does not name computes."""
    bits, orders = {}, {}
    for kind in spec.kinds:
        filled = [part.layers[kind.name].filled(kind) for part in parts]
        bits[kind.name], orders[kind.name] = map(np.concatenate, zip(*filled, strict=True))
    components = {kind.name: kind.components for kind in spec.kinds}
    joined = Schedule.from_bits(bits, components, orders=orders)
    if not any(part.taken for part in parts):
        return joined
    return replace(
        joined, taken=tuple(step for part in parts for step in part.taken or range(part.steps))
    )


METHOD = PerStage
