"""ECAD: an evolved schedule of what to reuse (arXiv 2506.15682), on the runtime of `Cached`.

The schedule is made for one model, sampler and number of steps. Another number is refused, or, if asked, each step
is taken from the schedule's step with the nearest timestep; the paper says nothing of that, and its quality is
not known.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.cached import Cached
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec

#: a folder per model, in it a schedule file per preset
PRESETS = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True)
class ECAD(Cached):
    """This method runs an evolved schedule.

    Attributes:
        source: A :class:`~fastdit.Schedule`, or the path of a schedule file, of this package's layout or of ECAD's.
        resample: What to do in a run of another number of steps: None refuses it; "sigma" takes each step from
            the schedule's step whose timestep is nearest, with a warning that names these.
        family: The only model family it may run on, which a preset knows; None for any.

    Example:
        >>> fastdit.patch(pipe, fastdit.ECAD("ours_fast.json"))
        >>> fastdit.patch(pipe, fastdit.ECAD.preset("tiny", "fast"))
    """

    resample: str | None = None
    family: str | None = None

    name = "ECAD"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resample not in (None, "sigma"):
            raise ArgumentError(f'resample must be None or "sigma", got {self.resample!r}')

    @classmethod
    def preset(cls, model: str, name: str, **arguments: Any) -> ECAD:
        """This runs a schedule that ships with the package, `name` of `model`; `arguments` are the others.

        Raises:
            ArgumentError: There is none; names those that are there.
        """
        source = Schedule.load(shipped(model, name, ".json"))
        return cls(source, **{"family": source.provenance.get("family"), **arguments})

    def schedule(self, spec: ModelSpec, steps: int, timesteps: Any = None) -> Schedule:
        """The schedule is bound to the model, its steps mapped to the run's timesteps where that was asked for.

        Raises:
            ScheduleError: The number of steps does not fit, or no scheduler tells the timesteps.
        """
        source = self.source
        if self.resample is None or not isinstance(source, Schedule) or steps == source.steps:
            return source.bind(spec, steps)
        if timesteps is None:
            raise ScheduleError(
                f"the schedule has {source.steps} steps but the run has {steps}, and no scheduler tells the "
                'timesteps that resample="sigma" needs: run a pipeline, or a schedule made for as many steps'
            )
        taken = nearest(timesteps.of(source.steps), timesteps.of(steps))
        warnings.warn(
            f"ECAD runs a schedule of {source.steps} steps in {steps}, by timestep: its steps {taken}",
            stacklevel=2,
        )
        return source.resampled(taken).bind(spec, steps)


def shipped(model: str, name: str, suffix: str) -> Path:
    """The package has this file for a model; ArgumentError says what there is instead."""
    files = {(path.parent.name, path.stem): path for path in PRESETS.glob(f"*/*{suffix}")}
    if (model, name) not in files:
        known = ", ".join(f"{m}/{n}" for m, n in sorted(files)) or "none"
        raise ArgumentError(f"no preset {name!r} of {model!r}; there are: {known}")
    return files[model, name]


def nearest(made: list[float], wanted: list[float]) -> list[int]:
    """Each wanted timestep gets the index of the nearest one made, the earlier of two."""
    distance = np.abs(np.subtract.outer(np.asarray(wanted), np.asarray(made)))
    return distance.argmin(axis=1).tolist()


METHOD = ECAD
