"""The timesteps of a scheduler's runs, by which a schedule is mapped to them; a method may replace a run's sigmas."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdit.errors import ScheduleError, UnsupportedModelError
from fastdit.schedules.solvers import step_sigmas

#: arguments of `set_timesteps` that list the run's own timesteps or sigmas
_CUSTOM = ("sigmas", "timesteps")


@dataclass(frozen=True)
class Timesteps:
    """These are the timesteps of a scheduler's runs, of the one that was set and of others of any number of steps.

    Every scheduler has timesteps, which rise with the noise (in some families they fall; only distances matter).

    Attributes:
        scheduler: A diffusers scheduler.
        arguments: What `set_timesteps` was, or will be, given.
        own: Those of the run itself, where a method has replaced the scheduler's.
    """

    scheduler: Any
    arguments: Mapping[str, Any]
    own: Sequence[float] | None = None

    def with_sigmas(self, sigmas: Sequence[float]) -> Timesteps:
        """These are the same with those of a flow-matching run, given as sigmas."""
        unit = self.scheduler.config.num_train_timesteps
        return replace(self, own=[sigma * unit for sigma in sigmas])

    @property
    def repeat(self) -> bool:
        """This tells whether two calls of the run that was set are at one sigma, as Heun's are."""
        sigmas = step_sigmas(self.scheduler)
        return len(set(sigmas)) < len(sigmas)

    def check_default(self, method: str) -> None:
        """This refuses sigmas or timesteps of the caller's own where `method` has its own.

        Raises:
            ScheduleError: Naming the argument. The evenly spaced sigmas that pipelines give by themselves are fine.
        """
        for name, given in self._custom().items():
            even = np.linspace(1.0, 1 / len(given), len(given))
            if name == "sigmas" and np.allclose(np.asarray(given, dtype=float), even):
                continue
            raise ScheduleError(
                f"{name} cannot be given to a run whose sigmas {method} decides; leave it out, or run without {method}"
            )

    def of(self, steps: int) -> list[float]:
        """This gives the timestep of each step of a run of `steps` steps, all else the same; it waits for the device.

        Raises:
            ScheduleError: The scheduler cannot make such a run.
        """
        if self.own is not None and steps == len(self.own):
            return list(self.own)
        other = {name: _resized(given, steps) for name, given in self._custom().items()}
        if "num_inference_steps" in self.arguments or not other:
            other["num_inference_steps"] = steps
        scheduler = copy.deepcopy(self.scheduler)  # without a clock
        try:
            scheduler.set_timesteps(**{**self.arguments, **other})
        except Exception as error:
            raise ScheduleError(
                f"{type(scheduler).__name__} cannot say the timesteps of {steps} steps: {error}"
            ) from error
        found = [float(timestep) for timestep in scheduler.timesteps]
        if len(found) != steps:
            raise ScheduleError(
                f"{type(scheduler).__name__} makes {len(found)} transformer calls of {steps} steps, "
                "so a schedule cannot be mapped to it by timestep"
            )
        return found

    def sigmas_of(self, steps: int) -> list[float]:
        """This gives the sigma of each step: of the run that was set, or of a flow's run of `steps` steps to come."""
        sigmas = step_sigmas(self.scheduler)
        if len(sigmas) == steps:
            return sigmas
        return [each / self.scheduler.config.num_train_timesteps for each in self.of(steps)]

    def _custom(self) -> dict[str, Any]:
        given = {name: self.arguments.get(name) for name in _CUSTOM}
        return {name: values for name, values in given.items() if values is not None}


def found_timesteps(scheduler: Any, given: Mapping[str, Any]) -> Timesteps:
    """These are those of a run whose timesteps were set unseen, with what its pipeline has names for."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    found = {name: given.get(name) for name in ("sigmas", "mu") if name in accepted}
    return Timesteps(scheduler, {name: value for name, value in found.items() if value is not None})


def predicted_timesteps(scheduler: Any, steps: int, tokens: int) -> Timesteps:
    """These are the timesteps that a pipeline of diffusers will set for pictures of `tokens` image tokens."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    config = getattr(scheduler, "config", {})
    if "mu" not in accepted or not config.get("use_dynamic_shifting"):
        return Timesteps(scheduler, {"num_inference_steps": steps})
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    sigmas = np.linspace(1, 1 / steps, steps).tolist()
    return Timesteps(scheduler, {"sigmas": sigmas, "mu": mu})


def _resized(values: Sequence[float], steps: int) -> list[float]:
    """This draws a list of sigmas or timesteps, which ends before 0, through `steps` points."""
    ends = [*map(float, values), 0.0]
    places = np.arange(steps) * (len(ends) - 1) / steps
    return np.interp(places, np.arange(len(ends)), ends).tolist()


def check_flow(scheduler: Any) -> None:
    """This refuses a scheduler whose sigmas cannot be replaced: it must take Euler steps along a flow, or UniPC's.

    Raises:
        UnsupportedModelError: It is of another class, has no sigmas of a flow, or draws noise at each step.
    """
    known, multistep = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if not names & {known, multistep}:
        raise UnsupportedModelError(
            f"scheduler must be a {known}, or a {multistep} of a flow, where a method changes the resolution, got "
            f"{type(scheduler).__name__}"
        )
    config = scheduler.config
    if multistep in names and not (
        config.get("use_flow_sigmas")
        and config.prediction_type == "flow_prediction"
        and config.solver_p is None
    ):
        raise UnsupportedModelError(
            f"a {multistep} must have use_flow_sigmas=True, prediction_type='flow_prediction' and solver_p=None where "
            "a method changes the resolution, got "
            f"{config.get('use_flow_sigmas')}, {config.prediction_type!r} and {config.solver_p!r}"
        )
    for option in ("stochastic_sampling", "invert_sigmas"):
        if getattr(scheduler.config, option, False):
            raise UnsupportedModelError(
                f"scheduler has {option}=True; a method that changes the resolution accepts False only"
            )


def replace_sigmas(scheduler: Any, sigmas: Sequence[float], in_use: bool = False) -> None:
    """This gives a flow-matching scheduler other sigmas than its `set_timesteps` chose; 0 follows the last.

    Args:
        in_use: A pipeline has taken the timesteps already: they are written in place.

    Raises:
        ScheduleError: Those in use begin at another timestep, which may have been acted on.
    """
    if in_use and scheduler.step_index:
        raise ScheduleError(
            f"the pipeline is at step {scheduler.step_index} of its run, too late for other sigmas; "
            "call fastdit.patch before the run"
        )
    old, before = scheduler.timesteps, scheduler.sigmas
    new = torch.tensor([*sigmas, 0.0], dtype=before.dtype, device=before.device)
    if hasattr(scheduler, "lower_order_nums"):  # which takes the logarithm of what is no noise
        new[:1].clamp_(max=1 - 1e-6)
    timesteps = (new[:-1] * scheduler.config.num_train_timesteps).to(old)
    if not in_use:
        scheduler.timesteps = timesteps
    elif len(old) == len(timesteps) and torch.allclose(old[:1], timesteps[:1]):
        old.copy_(timesteps)
    else:
        raise ScheduleError(
            f"the pipeline has begun a run of {len(old)} steps from timestep {float(old[0]):g}, which cannot become "
            f"one of {len(timesteps)} from {float(timesteps[0]):g}; call fastdit.patch on this pipeline"
        )
    scheduler.sigmas = new
