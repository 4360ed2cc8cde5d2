"""The clock of a run, read off the scheduler: `set_timesteps` starts a run, `step` ends a step.

A listener may replace the noise levels when a run starts, and write into the latents that a step returns.

The scheduler instance's class is swapped for a cached dynamic subclass of the same name whose two methods keep their
signatures (pipelines inspect them). isinstance, save_pretrained and from_config keep working; a copy, a pickle, and
anything made `from_config`, is an ordinary scheduler again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fastdit.errors import ScheduleError, UnsupportedModelError

LINK = "_fastdit"


class Listener(Protocol):
    """Who wants to know."""

    def start_run(self, steps: int, scheduler: Any, levels: Levels) -> None: ...

    def begin_step(self, scheduler: Any, velocity: Any, timestep: Any, sample: Any) -> None: ...

    def end_step(self, scheduler: Any, velocity: Any, delta: Any, latents: Any) -> None: ...


class Levels:
    """The noise levels of a scheduler's runs: of the one that was set, and of the same with other numbers of steps.

    A level is the timestep, which every scheduler has and which rises with the noise (in some families it falls; only
    distances matter).

    Args:
        scheduler: A diffusers scheduler.
        arguments: What `set_timesteps` was, or will be, given.
        own: Levels of the run itself, where a method has replaced the scheduler's.
    """

    def __init__(
        self, scheduler: Any, arguments: Mapping[str, Any], own: Sequence[float] | None = None
    ) -> None:
        self._scheduler = scheduler
        self._arguments = dict(arguments)
        self._own = own

    def with_own(self, own: Sequence[float]) -> Levels:
        """The same with levels of the run itself."""
        return Levels(self._scheduler, self._arguments, own)

    def with_sigmas(self, sigmas: Sequence[float]) -> Levels:
        """The same with those of a flow-matching run, given as sigmas."""
        unit = self._scheduler.config.num_train_timesteps
        return self.with_own([sigma * unit for sigma in sigmas])

    def of(self, steps: int) -> list[float]:
        """The level of each step of a run of `steps` steps with otherwise the same arguments; waits for the device.

        Raises:
            ScheduleError: The scheduler cannot make such a run.
        """
        if self._own is not None and steps == len(self._own):
            return list(self._own)
        arguments = self._arguments
        other = {
            name: _resized(arguments[name], steps) for name in _CUSTOM if _given(arguments, name)
        }
        if "num_inference_steps" in arguments or not other:
            other["num_inference_steps"] = steps
        scheduler = copy.deepcopy(self._scheduler)  # without a clock
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


def predicted_levels(scheduler: Any, steps: int, tokens: int) -> Levels:
    """The levels before a run sets them, for pictures of `tokens` image tokens, as diffusers' pipelines set them."""
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


#: arguments of `set_timesteps` that list the run's own levels
_CUSTOM = ("sigmas", "timesteps")


def _given(arguments: Mapping[str, Any], name: str) -> bool:
    return arguments.get(name) is not None


def _resized(levels: Sequence[float], steps: int) -> list[float]:
    """A list of levels that ends before 0, drawn through `steps` points."""
    ends = [*(float(level) for level in levels), 0.0]
    places = np.arange(steps) * (len(ends) - 1) / steps
    return np.interp(places, np.arange(len(ends)), ends).tolist()


def attach(scheduler: Any, listener: Listener) -> None:
    """Report the scheduler's runs and steps to `listener`. A second call replaces the listener.

    Raises:
        UnsupportedModelError: See :func:`check_scheduler`.
    """
    check_scheduler(scheduler)
    scheduler.__dict__[LINK] = listener
    if not is_attached(scheduler):
        scheduler.__class__ = _clocked(type(scheduler))


def check_scheduler(scheduler: Any) -> None:
    """Refuse an object that cannot be a clock.

    Raises:
        UnsupportedModelError: The object has no `set_timesteps` or `step`.
    """
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise UnsupportedModelError(
                f"scheduler must have set_timesteps and step, got {type(scheduler).__name__} without {method}"
            )


def check_flow(scheduler: Any) -> None:
    """Refuse a scheduler whose noise levels cannot be replaced: it must take Euler steps along a flow.

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


def replace_sigmas(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Give a flow-matching scheduler other noise levels than its `set_timesteps` chose; 0 follows the last."""
    old = scheduler.sigmas
    levels = torch.tensor([*sigmas, 0.0], dtype=old.dtype, device=old.device)
    timesteps = levels[:-1] * scheduler.config.num_train_timesteps
    scheduler.sigmas = levels
    scheduler.timesteps = timesteps.to(scheduler.timesteps)


def detach(scheduler: Any) -> None:
    """Undo :func:`attach`. Does nothing on a scheduler that has no clock."""
    if is_attached(scheduler):
        scheduler.__class__ = type(scheduler).__mro__[1]
    scheduler.__dict__.pop(LINK, None)


def is_attached(scheduler: Any, listener: Listener | None = None) -> bool:
    """Whether the scheduler reports, and to `listener` if one is given."""
    clocked = "_fastdit_clocked" in type(scheduler).__dict__
    return clocked and (listener is None or scheduler.__dict__.get(LINK) is listener)


@functools.cache
def _clocked(base: type) -> type:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        if LINK in self.__dict__:
            arguments = inspect.signature(base.set_timesteps).bind(self, *args, **kwargs).arguments
            arguments.pop("self", None)
            self.__dict__[LINK].start_run(len(self.timesteps), self, Levels(self, arguments))
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if LINK not in self.__dict__:
            return base.step(self, *args, **kwargs)
        velocity, timestep, sample = (
            args[place] if place < len(args) else kwargs.get(name)
            for place, name in enumerate(("model_output", "timestep", "sample"))
        )
        self.__dict__[LINK].begin_step(self, velocity, timestep, sample)
        delta = _sigma_step(self)
        result = base.step(self, *args, **kwargs)
        if LINK in self.__dict__:
            self.__dict__[LINK].end_step(self, velocity, delta, result[0])
        return result

    def reduce_ex(self: Any, protocol: int) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != LINK}
        return base.__new__, (base,), state

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_fastdit_clocked": True,
        "set_timesteps": set_timesteps,
        "step": step,
    }
    return type(base.__name__, (base,), members)


def _sigma_step(scheduler: Any) -> Any:
    """sigma of the coming step minus that of this one, as the scheduler holds it; 1 where it has no sigmas."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None:
        return 1.0
    index = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return sigmas[index + 1] - sigmas[index] if index + 1 < len(sigmas) else 1.0
