"""Reuse component outputs by a static schedule: the runtime of FORA, ECAD (arXiv 2506.15682) and learned schedules
alike.

What is cached is the component's raw output, before the gate: the current step's gate multiplies it (ECAD spec 3.4).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastdit.errors import ScheduleError
from fastdit.methods.base import Method, NoiseLevels
from fastdit.schedule import Every, Schedule
from fastdit.spec import ModelSpec


@dataclass(frozen=True)
class Cached(Method):
    """Run a caching schedule.

    Attributes:
        source: A :class:`~fastdit.Schedule`, ``Schedule.every(n)``, or the path of a schedule file.

    Example:
        >>> fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
    """

    source: Schedule | Every | str | os.PathLike[str]

    name = "Cached"
    writes = frozenset({"reuse"})

    def __post_init__(self) -> None:
        if isinstance(self.source, (str, os.PathLike)):
            object.__setattr__(self, "source", Schedule.load(self.source))
        elif not isinstance(self.source, (Schedule, Every)):
            raise ScheduleError(
                f"schedule must be a Schedule, Schedule.every(n) or a path, got {type(self.source).__name__}"
            )

    @property
    def run_steps(self) -> int | None:
        """The schedule's number of steps; None for `Schedule.every`."""
        return self.source.steps if isinstance(self.source, Schedule) else None

    def check(self, spec: ModelSpec) -> None:
        """The schedule must have the model's block kinds, counts and components."""
        self.source.check(spec)

    def schedule(self, spec: ModelSpec, steps: int, levels: NoiseLevels | None = None) -> Schedule:
        """The schedule bound to the model and the number of steps."""
        return self.source.bind(spec, steps)


METHOD = Cached
