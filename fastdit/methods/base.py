"""What a method is: a frozen config that says, before a run, which fields of the plan it fills and with what.

A method knows block kinds and component names (a :class:`~fastdit.spec.ModelSpec`), never a model family, a backend or
a tensor. Adding one is adding a file here that exposes ``METHOD``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastdit.conditions import Conditions
from fastdit.errors import ScheduleError
from fastdit.schedule import Schedule
from fastdit.spec import ModelSpec


class NoiseLevels(Protocol):
    """The noise levels of runs of any number of steps, see :class:`fastdit.clock.Levels`."""

    def of(self, steps: int) -> list[float]: ...

    def with_own(self, own: Sequence[float]) -> NoiseLevels: ...


class Method:
    """Base of all methods; does nothing by itself.

    Attributes:
        name: How errors, `explain` and `report` call it.
        writes: The plan fields it decides; two methods that share one do not compose.
        max_cache_bytes: Most bytes that caches may hold at once; None for no bound.
        cache_dtype: The precision in which reused outputs are kept, where it is less than the model's; None for the
            model's own.
        family: The model family that a preset's settings are for; None for settings that fit any.
    """

    name: str = ""
    writes: frozenset[str] = frozenset()
    max_cache_bytes: int | None = None
    cache_dtype: str | None = None
    family: str | None = None

    @property
    def run_steps(self) -> int | None:
        """The number of steps it was made for, or None when it fits any."""
        return None

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps it does not fit; called when a run starts."""

    @property
    def made_for(self) -> Conditions | None:
        """The only runs it fits, which is checked at a run's first transformer call; None when it fits any."""
        return None

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model it cannot run on; called when patching, before anything changes.

        Raises:
            ScheduleError: Naming what differs.
        """
        if self.family not in (None, spec.family):
            raise ScheduleError(
                f"this {self.name} has settings for {self.family} models, the model is of the {spec.family} family; "
                "dataclasses.replace(method, family=None) runs them all the same"
            )

    def schedule(
        self, spec: ModelSpec, steps: int, levels: NoiseLevels | None = None
    ) -> Schedule | None:
        """The schedule of reused components for a run of `steps` steps, for methods that write ``"reuse"``.

        `levels` knows the run's noise levels; None where no scheduler leads the run.
        """
        return None

    def staged_schedule(
        self, spec: ModelSpec, stages: Sequence[int], levels: NoiseLevels | None = None
    ) -> Schedule | None:
        """The same for a run in stages of so many steps; a run that is in none is a single one."""
        return self.schedule(spec, sum(stages), levels)
