"""HarmoniCa (arXiv 2410.01723): reuse component outputs by a learned, input-invariant router.

At inference a router is a static schedule, run as :class:`~fastdit.Cached` runs any. What this adds is the check that
the run is one that the router was trained for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdit.errors import ScheduleError
from fastdit.methods.base import Method, check_noise
from fastdit.methods.cached import drawn_by
from fastdit.methods.ecad import shipped
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.layer import AUTO
from fastdit.schedules.router import TAU, Router, check_tau
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec


@dataclass(frozen=True)
class HarmoniCa(Method):
    """This method runs a router at a threshold.

    Attributes:
        source: A :class:`~fastdit.Router`, or the path of a router file.
        tau: Components with sigmoid(logit) > tau compute.
        strict: Refuse a scheduler, timesteps, size or guidance other than the router was trained for. Where False only
            the number of steps and the model's blocks must fit; how such a run looks is not known.
        order: How what is reused is drawn from what was computed, see :class:`~fastdit.Cached`; None as the router was
            trained.

    Example:
        >>> fastdit.patch(pipe, fastdit.HarmoniCa("router.safetensors", tau=0.1))
        >>> pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
        >>> fastdit.patch(pipe, fastdit.HarmoniCa.preset("tiny"))
    """

    source: Router | str | os.PathLike[str]
    tau: float = TAU
    strict: bool = True
    order: int | str | None = None

    name = "HarmoniCa"
    writes = frozenset({"reuse"})

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if isinstance(self.source, (str, os.PathLike)):
            object.__setattr__(self, "source", Router.load(self.source))
        elif not isinstance(self.source, Router):
            raise ScheduleError(
                f"router must be a Router or a path, got {type(self.source).__name__}"
            )
        self._scheduled()

    @classmethod
    def preset(cls, model: str, **arguments: Any) -> HarmoniCa:
        """This runs the router of `model` that ships with the package; `arguments` are the others.

        Raises:
            ArgumentError: There is none; names the models that have one.
        """
        return cls(shipped(model, "router", ".safetensors"), **arguments)

    @property
    def run_steps(self) -> int:
        return self.source.steps

    def check(self, spec: ModelSpec) -> None:
        """The router must be of the model's family, block kinds, counts and components."""
        self.source.check(spec)

    @property
    def made_for(self) -> Conditions | None:
        """The router was trained for these runs; None where `strict` is off."""
        return self.source.conditions if self.strict else None

    def schedule(self, spec: ModelSpec, steps: int, timesteps: Any = None) -> Schedule:
        """The schedule at the threshold is bound to the model and the number of steps."""
        return self._scheduled().bind(spec, steps)

    def _scheduled(self) -> Schedule:
        found = self.source.schedule(self.tau)
        return found if self.order is None else drawn_by(self.order, found)

    @property
    def adapts(self) -> bool:
        return self.order == AUTO

    @property
    def forecasts(self) -> bool:
        return self.adapts or (self.source.order if self.order is None else self.order) > 0

    @property
    def bars(self) -> Mapping[str, str]:
        """A run in stages has timesteps of its own."""
        if self.made_for is None or self.made_for.timesteps is None:
            return {}
        return {
            "resolution": "was made for the timesteps of its router, and {other} has others; strict=False runs it all "
            "the same"
        }

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        """A router that was trained for a sampler knows its noise; drawn outputs under unlike noise lie on no line."""
        trained = self.source.conditions
        known = self.strict and noise in (trained.scheduler, trained.noise)
        if self.forecasts or not known:
            check_noise(self, noise)


METHOD = HarmoniCa
