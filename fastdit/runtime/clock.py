"""The clock of a run is the scheduler: its `set_timesteps` starts a run, and its `step` ends a step.

A scheduler leads one run of each patched model that follows it. The instance's class is swapped (`disguise.py`) for one
whose two methods keep their signatures, since pipelines inspect them.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

from fastdit.errors import ScheduleError, UnsupportedModelError
from fastdit.methods.base import Step
from fastdit.runtime import owners
from fastdit.runtime.disguise import disguise, is_ordinary, put_on, take_off
from fastdit.runtime.install import LINK
from fastdit.runtime.timesteps import Timesteps
from fastdit.schedules.solvers import CHURN, noise_of


class Follower:
    """A follower is a patched model that a scheduler tells of its steps.

    Attributes:
        patched: Weak reference to the model.
        run: Its run that the scheduler leads now.
    """

    def __init__(self, patched: Any) -> None:
        self.patched = weakref.ref(patched)
        self.run: Any = None
        self._claim: dict[str, Any] = {}

    def claim(self, owner: Any, scheduler: Any) -> None:
        """From now on `owner` alone may begin a run that `scheduler` leads, until it gives the claim back.

        A claim is one step of a dict, so that it needs no lock, which an interrupt could leave behind locked.

        Raises:
            ScheduleError: The scheduler leads somebody else's run, or is about to.
        """
        before = self._claim.setdefault("by", owner)
        while before is not owner and before.over:  # it was interrupted
            self.unclaim(before)
            before = self._claim.setdefault("by", owner)
        run = self.run
        leads = None if run is None or not run.live else run.owner()
        # A loop that has not begun, or was given up here or where nothing runs any more, is in nobody's way.
        begun = isinstance(leads, owners.PipelineCall) or (
            leads is not None and run.first is not None
        )
        if before is not owner or (begun and leads is not owner and not leads.over):
            self.unclaim(owner)
            raise ScheduleError(
                f"this {type(scheduler).__name__} leads a run that is in progress, and one scheduler cannot lead two; "
                "give each pipeline its own: Pipeline.from_pipe(pipe, "
                "scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))"
            )

    def unclaim(self, owner: Any) -> None:
        """Others may begin runs again, if `owner` had the claim."""
        if self._claim.get("by") is owner:
            self._claim.pop("by", None)


def attach(scheduler: Any, patched: Any) -> None:
    """From now on the scheduler leads the runs of `patched`, beside those of other models that follow it."""
    if follower_of(scheduler, patched) is None:
        scheduler.__dict__.setdefault(LINK, []).append(Follower(patched))
    put_on(scheduler, _clocked)


def follower_of(scheduler: Any, patched: Any) -> Follower | None:
    """This finds what the scheduler knows of `patched`; None if that does not follow it."""
    followers = getattr(scheduler, "__dict__", {}).get(LINK, ())
    return next((one for one in followers if one.patched() is patched), None)


def relieve(run: Any) -> None:
    """A run makes its first call: a pipeline's other transformer that had calls, but none in this step, has done its
    part, and frees its caches.
    """
    for one in getattr(run.scheduler, "__dict__", {}).get(LINK, ()):
        other = one.run
        if other is None or other is run or other.owner() is not run.owner():
            continue
        if other.first is not None and not other.calls:
            other.drop_caches()


def check_scheduler(scheduler: Any) -> None:
    """This refuses an object that cannot be a clock.

    Raises:
        UnsupportedModelError: Its class has no `set_timesteps` or `step` of its own, or none of which another can be
            made: what hands calls on to a scheduler inside is not one.
    """
    if scheduler is None:
        raise UnsupportedModelError(
            "scheduler must have set_timesteps and step, got a pipeline without one; "
            "give patch its transformer where a loop of your own draws"
        )
    cls = type(scheduler)
    for method in ("set_timesteps", "step"):
        if not callable(getattr(cls, method, None)):
            delegates = callable(getattr(scheduler, method, None))
            why = f", whose {method} is not of its class" if delegates else f" without {method}"
            raise UnsupportedModelError(
                f"scheduler must have set_timesteps and step, got {cls.__name__}{why}"
            )
    if not is_ordinary(scheduler):
        raise UnsupportedModelError(
            f"scheduler must be an ordinary object, got {cls.__name__}, whose class has __slots__"
        )


def detach(scheduler: Any, patched: Any) -> None:
    """This undoes :func:`attach`; without its last follower the scheduler is as it was."""
    followers = scheduler.__dict__.get(LINK, [])
    followers[:] = [one for one in followers if one.patched() not in (None, patched)]
    if not followers:
        take_off(scheduler)


@functools.cache
def _clocked(base: type) -> type:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = [(one, one.patched()) for one in self.__dict__.get(LINK, ())]
        followers = [(one, patched) for one, patched in found if patched is not None]
        if not followers:
            return base.set_timesteps(self, *args, **kwargs)
        owner = owners.setting(self) or owners.here()
        try:
            for one, _ in followers:
                one.claim(owner, self)
            result = base.set_timesteps(self, *args, **kwargs)
            arguments = inspect.signature(base.set_timesteps).bind(self, *args, **kwargs).arguments
            arguments.pop("self", None)
            for one, patched in followers:
                patched.runs.begin_led(one, owner, Timesteps(self, arguments))
        finally:
            for one, _ in followers:
                one.unclaim(owner)
        return result

    churns = any(name in inspect.signature(base.step).parameters for name in CHURN)

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs = [run for one in self.__dict__.get(LINK, ()) if (run := one.run) is not None]
        if not runs:
            return base.step(self, *args, **kwargs)
        velocity, timestep, sample = (
            args[place] if place < len(args) else kwargs.get(name)
            for place, name in enumerate(("model_output", "timestep", "sample"))
        )
        noise = noise_of(self, kwargs) if churns else ""
        for run in runs:
            if noise:
                run.patched.check_sampler(noise)
            run.begin_step(self, velocity, timestep, sample)
        delta = _sigma_step(self)
        result = base.step(self, *args, **kwargs)
        for run in runs:
            run.end_step(Step(velocity, delta, result[0], self))
        return result

    return disguise(base, set_timesteps=set_timesteps, step=step)


def _sigma_step(scheduler: Any) -> Any:
    """This is sigma of the coming step minus that of this one, as the scheduler holds it; 1 where it has no sigmas."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None:
        return 1.0
    index = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return sigmas[index + 1] - sigmas[index] if index + 1 < len(sigmas) else 1.0
