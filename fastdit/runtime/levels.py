"""A schedule is mapped to the noise levels of a scheduler's runs, and a method may replace them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdit.errors import ScheduleError, UnsupportedModelError
from fastdit.schedules.solvers import step_levels

#: arguments of `set_timesteps` that list the run's own levels
_CUSTOM = ("sigmas", "timesteps")


@dataclass(frozen=True)
class Levels:
    """These are the noise levels of a scheduler's runs, of the one that was set and of others of any number of steps.

    A level is the timestep, which every scheduler has and which rises with the noise (in some families it falls; only
    distances matter).

    Attributes:
        scheduler: A diffusers scheduler.
        arguments: What `set_timesteps` was, or will be, given.
        own: Levels of the run itself, where a method has replaced the scheduler's.
    """

    scheduler: Any
    arguments: Mapping[str, Any]
    own: Sequence[float] | None = None

    def with_own(self, own: Sequence[float]) -> Levels:
        """These are the same with levels of the run itself."""
        return replace(self, own=own)

    def with_sigmas(self, sigmas: Sequence[float]) -> Levels:
        """These are the same with those of a flow-matching run, given as sigmas."""
        unit = self.scheduler.config.num_train_timesteps
        return self.with_own([sigma * unit for sigma in sigmas])

    @property
    def repeat(self) -> bool:
        """This tells whether two calls of the run that was set are at one level, as Heun's are."""
        levels = step_levels(self.scheduler)
        return len(set(levels)) < len(levels)

    def check_default(self, method: str) -> None:
        """This refuses levels of the caller's own where `method` has its own.

        Raises:
            ScheduleError: Naming the argument. The evenly spaced sigmas that pipelines give by themselves are fine.
        """
        for name in _CUSTOM:
            given = self.arguments.get(name)
            if given is None:
                continue
            even = np.linspace(1.0, 1 / len(given), len(given))
            if name == "sigmas" and np.allclose(np.asarray(given, dtype=float), even):
                continue
            raise ScheduleError(
                f"{name} cannot be given to a run whose noise levels {method} decides; leave it out, or run without "
                f"{method}"
            )

    def of(self, steps: int) -> list[float]:
        """This gives the level of each step of a run of `steps` steps, all else the same; it waits for the device.

        Raises:
            ScheduleError: The scheduler cannot make such a run.
        """
        if self.own is not None and steps == len(self.own):
            return list(self.own)
        arguments = self.arguments
        other = {
            name: _resized(arguments[name], steps) for name in _CUSTOM if _given(arguments, name)
        }
        if "num_inference_steps" in arguments or not other:
            other["num_inference_steps"] = steps
        scheduler = copy.deepcopy(self.scheduler)  # without a clock
        try:
            scheduler.set_timesteps(**{**arguments, **other})
        except Exception as error:
            raise ScheduleError(
                f"{type(scheduler).__name__} cannot say the noise levels of {steps} steps: {error}"
            ) from error
        levels = [float(level) for level in scheduler.timesteps]
        if len(levels) != steps:
            raise ScheduleError(
                f"{type(scheduler).__name__} makes {len(levels)} transformer calls of {steps} steps, "
                "so a schedule cannot be mapped to it by noise level"
            )
        return levels


def found_levels(scheduler: Any, given: Mapping[str, Any]) -> Levels:
    """These are the levels of a run whose timesteps were set unseen, with what its pipeline has names for."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    names = [name for name in ("sigmas", "mu") if name in accepted and _given(given, name)]
    return Levels(scheduler, {name: given[name] for name in names})


def predicted_levels(scheduler: Any, steps: int, tokens: int) -> Levels:
    """These are the levels that a pipeline of diffusers will set for pictures of `tokens` image tokens."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    config = getattr(scheduler, "config", {})
    if "mu" not in accepted or not config.get("use_dynamic_shifting"):
        return Levels(scheduler, {"num_inference_steps": steps})
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    sigmas = np.linspace(1, 1 / steps, steps).tolist()
    return Levels(scheduler, {"sigmas": sigmas, "mu": mu})


def _given(arguments: Mapping[str, Any], name: str) -> bool:
    return arguments.get(name) is not None


def _resized(levels: Sequence[float], steps: int) -> list[float]:
    """This draws a list of levels, which ends before 0, through `steps` points."""
    ends = [*(float(level) for level in levels), 0.0]
    places = np.arange(steps) * (len(ends) - 1) / steps
    return np.interp(places, np.arange(len(ends)), ends).tolist()


def check_flow(scheduler: Any) -> None:
    """This refuses a scheduler whose noise levels cannot be replaced: it must take Euler steps along a flow.

    Raises:
        UnsupportedModelError: It is of another class, or draws noise at each step.
    """
    known = "FlowMatchEulerDiscreteScheduler"
    if not any(cls.__name__ == known for cls in type(scheduler).__mro__):
        raise UnsupportedModelError(
            f"scheduler must be a {known} where a method changes the resolution, got {type(scheduler).__name__}"
        )
    for option in ("stochastic_sampling", "invert_sigmas"):
        if getattr(scheduler.config, option, False):
            raise UnsupportedModelError(
                f"scheduler has {option}=True; a method that changes the resolution accepts False only"
            )


def replace_sigmas(scheduler: Any, sigmas: Sequence[float], in_use: bool = False) -> None:
    """This gives a flow-matching scheduler other noise levels than its `set_timesteps` chose; 0 follows the last.

    Args:
        in_use: A pipeline has taken the timesteps already: they are written in place.

    Raises:
        ScheduleError: Those in use begin at another level, which may have been acted on.
    """
    if in_use and scheduler.step_index:
        raise ScheduleError(
            f"the pipeline is at step {scheduler.step_index} of its run, too late for other noise levels; "
            "call fastdit.patch before the run"
        )
    old = scheduler.sigmas
    levels = torch.tensor([*sigmas, 0.0], dtype=old.dtype, device=old.device)
    timesteps = (levels[:-1] * scheduler.config.num_train_timesteps).to(scheduler.timesteps)
    if in_use:
        if len(scheduler.timesteps) != len(timesteps) or not torch.allclose(
            scheduler.timesteps[:1], timesteps[:1]
        ):
            raise ScheduleError(
                f"the pipeline has begun a run of {len(scheduler.timesteps)} steps from timestep "
                f"{float(scheduler.timesteps[0]):g}, which cannot become one of {len(timesteps)} from "
                f"{float(timesteps[0]):g}; call fastdit.patch on this pipeline"
            )
        scheduler.timesteps.copy_(timesteps)
    else:
        scheduler.timesteps = timesteps
    scheduler.sigmas = levels
