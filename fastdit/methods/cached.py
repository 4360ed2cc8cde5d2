"""Component outputs are reused by a static schedule: FORA's, ECAD's (arXiv 2506.15682), or a learned one.

What is cached is the component's raw output, before the gate: the current step's gate multiplies it (ECAD spec 3.4).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

from fastdit.checks import whole
from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import Method, check_noise
from fastdit.schedules.layer import AUTO
from fastdit.schedules.schedule import Every, Schedule
from fastdit.spec import ModelSpec

CACHE_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Cached(Method):
    """This method runs a caching schedule.

    Attributes:
        source: A :class:`~fastdit.Schedule`, ``Schedule.every(n)``, or the path of a schedule file.
        max_cache_bytes: Most bytes that caches may hold at once. A run that needs more is refused at its first
            transformer call, with the number it needs.
        cache_dtype: "bfloat16" or "float16": keep reused outputs so, in a model of higher precision.
        order: How all that is reused is drawn from what was computed; None as the schedule says. 0 repeats an output,
            1 draws the line through its last two computed values, 2 the parabola through three, at the sampler's own
            sigmas. Where a whole step is reused the model's output is extrapolated and no block visited: a
            linear multistep method on the sampler's grid.

    Example:
        >>> fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
    """

    source: Schedule | Every | str | os.PathLike[str]
    max_cache_bytes: int | None = None
    cache_dtype: str | None = None
    order: int | str | None = None

    name = "Cached"
    writes = frozenset({"reuse"})

    def __post_init__(self) -> None:
        if isinstance(self.source, (str, os.PathLike)):
            object.__setattr__(self, "source", Schedule.load(self.source))
        elif not isinstance(self.source, (Schedule, Every)):
            raise ScheduleError(
                f"source must be a Schedule, Schedule.every(n) or a path, got {type(self.source).__name__}; "
                "Schedule.from_bits(bits, components) makes one of an array"
            )
        if self.max_cache_bytes is not None:
            whole("max_cache_bytes", self.max_cache_bytes, 0)
        if self.order is not None:
            object.__setattr__(self, "source", drawn_by(self.order, self.source))
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ArgumentError(
                f"cache_dtype must be a name, {' or '.join(map(repr, CACHE_DTYPES))}, or None, got {self.cache_dtype!r}"
            )

    @property
    def run_steps(self) -> int | None:
        """A schedule has its number of steps; `Schedule.every` none."""
        return self.source.steps if isinstance(self.source, Schedule) else None

    @property
    def skips_steps(self) -> bool:
        """Every reused step of such a schedule is forecast as a whole."""
        return self.forecasts and isinstance(self.source, Every)

    @property
    def adapts(self) -> bool:
        return self.order == AUTO

    @property
    def forecasts(self) -> bool:
        return self.source.forecasts

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        """What is reused is of a picture with other noise; a searched schedule knows its sampler."""
        check_noise(self, noise)
        made_for = (
            self.source.provenance.get("scheduler") if isinstance(self.source, Schedule) else None
        )
        if made_for and scheduler not in ("", made_for):
            warnings.warn(
                f"the schedule was searched under {made_for}, this run has {scheduler}: it runs, but how far its "
                "pictures are then from the solution is not known",
                stacklevel=2,
            )

    def check(self, spec: ModelSpec) -> None:
        """The schedule must have the model's block kinds, counts and components."""
        super().check(spec)
        self.source.check(spec)

    def schedule(self, spec: ModelSpec, steps: int, timesteps: Any = None) -> Schedule:
        return self.source.bind(spec, steps)


def drawn_by(order: int | str, source: Schedule | Every) -> Schedule | Every:
    """A schedule that forecasts by an order, or by "auto".

    Raises:
        ScheduleError: The order is none of them, or "auto" was given for a schedule that separates the components of a
            block: drawn apart they are further off than repeated.
    """
    if order != AUTO:
        return source.with_order(order)
    apart = source.separates() if isinstance(source, Schedule) else None
    if apart is not None:
        step, kind, block = apart
        raise ScheduleError(
            f'order="auto" takes a schedule that computes or reuses a block as a whole, but step {step} computes a '
            f"part of block {block} of {kind}; give order=1 to draw what it reuses all the same, or 0 to repeat it"
        )
    return source.with_order(1)


METHOD = Cached
