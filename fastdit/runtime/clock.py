"""The clock of a run, read off the scheduler: `set_timesteps` starts a run, `step` ends a step.

A scheduler leads one run of each patched model that follows it. A run may replace the noise levels when it starts, and
write into the latents that a step returns.

The scheduler instance's class is swapped (`disguise.py`) for one whose two methods keep their signatures, since
pipelines inspect them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastdit.errors import ScheduleError, UnsupportedModelError
from fastdit.methods.base import Step
from fastdit.runtime.disguise import disguise, put_on, take_off
from fastdit.runtime.install import LINK


class Follower:
    """A patched model that follows a scheduler.

    Attributes:
        patched: Weak reference to it.
        run: Its run that the scheduler leads now.
    """

    __slots__ = ("_claim", "patched", "run")

    def __init__(self, patched: Any) -> None:
        self.patched = weakref.ref(patched)
        self.run: Any = None
        self._claim: dict[str, Any] = {}

    def claim(self, owner: Any) -> Any:
        """Who alone may begin a run now: `owner`, or who claimed that before. One step of a dict, so no lock is needed,
        which an interrupt could leave behind locked.
        """
        return self._claim.setdefault("by", owner)

    def unclaim(self, owner: Any) -> None:
        """Let others begin runs again, if `owner` claimed it."""
        if self._claim.get("by") is owner:
            self._claim.pop("by", None)


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

    def check_default(self, method: str) -> None:
        """Refuse levels of the caller's own where `method` has its own.

        Raises:
            ScheduleError: Naming the argument. The evenly spaced sigmas that pipelines give by themselves are fine.
        """
        for name in _CUSTOM:
            given = self._arguments.get(name)
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


def found_levels(scheduler: Any, given: Mapping[str, Any]) -> Levels:
    """The levels of a run whose timesteps were set unseen, with the arguments that its pipeline has names for."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    names = [name for name in ("sigmas", "mu") if name in accepted and _given(given, name)]
    return Levels(scheduler, {name: given[name] for name in names})


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


def attach(scheduler: Any, patched: Any) -> Follower:
    """Let the scheduler lead the runs of `patched`, beside those of other models that follow it.

    Raises:
        UnsupportedModelError: See :func:`check_scheduler`.
    """
    check_scheduler(scheduler)
    followers = scheduler.__dict__.setdefault(LINK, [])
    found = follower_of(scheduler, patched)
    if found is None:
        found = Follower(patched)
        followers.append(found)
    put_on(scheduler, _clocked)
    return found


def follower_of(scheduler: Any, patched: Any) -> Follower | None:
    """How `patched` follows the scheduler; None if it does not."""
    followers = getattr(scheduler, "__dict__", {}).get(LINK, ())
    return next((one for one in followers if one.patched() is patched), None)


def check_scheduler(scheduler: Any) -> None:
    """Refuse an object that cannot be a clock.

    Raises:
        UnsupportedModelError: Its class has no `set_timesteps` or `step` of its own, or none of which another can be
            made: what hands calls on to a scheduler inside is not one.
    """
    cls = type(scheduler)
    for method in ("set_timesteps", "step"):
        if not callable(getattr(cls, method, None)):
            delegates = callable(getattr(scheduler, method, None))
            why = f", whose {method} is not of its class" if delegates else f" without {method}"
            raise UnsupportedModelError(
                f"scheduler must have set_timesteps and step, got {cls.__name__}{why}"
            )
    if not hasattr(scheduler, "__dict__") or any(
        base.__dict__.get("__slots__") for base in cls.__mro__
    ):
        raise UnsupportedModelError(
            f"scheduler must be an ordinary object, got {cls.__name__}, whose class has __slots__"
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


def replace_sigmas(scheduler: Any, sigmas: Sequence[float], in_use: bool = False) -> None:
    """Give a flow-matching scheduler other noise levels than its `set_timesteps` chose; 0 follows the last.

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


def detach(scheduler: Any, patched: Any) -> None:
    """Undo :func:`attach`; with its last follower the scheduler is as it was."""
    followers = scheduler.__dict__.get(LINK, [])
    followers[:] = [one for one in followers if one.patched() not in (None, patched)]
    if followers:
        return
    take_off(scheduler)


@functools.cache
def _clocked(base: type) -> type:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        followers = [(one, one.patched()) for one in self.__dict__.get(LINK, ())]
        if not followers:
            return base.set_timesteps(self, *args, **kwargs)
        owners: list[Any] = []
        try:
            for one, patched in followers:
                owners.append(patched and patched.runs.claim(one, self))
            result = base.set_timesteps(self, *args, **kwargs)
            arguments = inspect.signature(base.set_timesteps).bind(self, *args, **kwargs).arguments
            arguments.pop("self", None)
            for (one, patched), owner in zip(followers, owners, strict=True):
                if patched is not None:
                    patched.runs.start_led(one, owner, self, Levels(self, arguments))
        finally:
            for (one, _), owner in zip(followers, owners, strict=False):
                one.unclaim(owner)
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs = []
        for one in self.__dict__.get(LINK, ()):
            if one.run is not None:
                runs.append(one.run)
        if not runs:
            return base.step(self, *args, **kwargs)
        velocity, timestep, sample = (
            args[place] if place < len(args) else kwargs.get(name)
            for place, name in enumerate(("model_output", "timestep", "sample"))
        )
        for run in runs:
            run.begin_step(self, velocity, timestep, sample)
        delta = _sigma_step(self)
        result = base.step(self, *args, **kwargs)
        for run in runs:
            run.end_step(Step(velocity, delta, result[0], self))
        return result

    return disguise(base, set_timesteps=set_timesteps, step=step)


def _sigma_step(scheduler: Any) -> Any:
    """sigma of the coming step minus that of this one, as the scheduler holds it; 1 where it has no sigmas."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None:
        return 1.0
    index = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return sigmas[index + 1] - sigmas[index] if index + 1 < len(sigmas) else 1.0
