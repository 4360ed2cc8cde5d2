"""Reuse component outputs by a static schedule: the runtime of FORA, ECAD (arXiv 2506.15682) and learned schedules
alike.

What is cached is the component's raw output, before the gate: the current step's gate multiplies it (ECAD spec 3.4).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import Method, NoiseLevels
from fastdit.schedules.schedule import Every, Schedule
from fastdit.spec import ModelSpec

CACHE_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Cached(Method):
    """Run a caching schedule.

    Attributes:
        source: A :class:`~fastdit.Schedule`, ``Schedule.every(n)``, or the path of a schedule file.
        max_cache_bytes: Most bytes that caches may hold at once. A run that needs more is refused at its first
            transformer call, with the number it needs.
        cache_dtype: "bfloat16" or "float16": keep reused outputs so, in a model of higher precision.

    Example:
        >>> fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
    """

    source: Schedule | Every | str | os.PathLike[str]
    max_cache_bytes: int | None = None
    cache_dtype: str | None = None

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

        most = self.max_cache_bytes
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise ArgumentError(
                f"max_cache_bytes must be an int of at least 0 or None, got {most!r}"
            )
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ArgumentError(
                f"cache_dtype must be a name, {' or '.join(map(repr, CACHE_DTYPES))}, or None, got {self.cache_dtype!r}"
            )

    @property
    def run_steps(self) -> int | None:
        """The schedule's number of steps; None for `Schedule.every`."""
        return self.source.steps if isinstance(self.source, Schedule) else None

    def check(self, spec: ModelSpec) -> None:
        """The schedule must have the model's block kinds, counts and components."""
        super().check(spec)
        self.source.check(spec)

    def schedule(self, spec: ModelSpec, steps: int, levels: NoiseLevels | None = None) -> Schedule:
        """The schedule bound to the model and the number of steps."""
        return self.source.bind(spec, steps)


METHOD = Cached
