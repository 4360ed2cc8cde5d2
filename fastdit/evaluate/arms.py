"""A way of drawing as data: a solver, a number of steps, and what is patched in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import FlowMatchHeunDiscreteScheduler

from fastdit.evaluate.ab2 import AB2Scheduler
from fastdit.schedules.solvers import recommend

SOLVERS = ("euler", "unipc", "ab2")


@dataclass(frozen=True)
class Arm:
    """One way of drawing.

    Attributes:
        solver: "euler", "ab2" (both on the trailing grid, unless `sigmas` says another), "unipc" or "heun" (on their
            own), or "stock" (as loaded).
        steps: Steps of the pipeline.
        method: Makes what is patched in, one method or several, for a pipeline and this arm's steps; None for the
            unpatched model.
        sigmas: The noise levels of the steps, where they are not the solver's own.
        nodes: Steps at which the whole model runs, where that is all that ever runs.
        alone: Pictures are drawn one by one.
        seed: Another than 0 draws other noise, as a control.
        around: A context manager that draws run in.
    """

    solver: str
    steps: int
    method: Callable[[Any, int], Any] | None = None
    sigmas: tuple[float, ...] | None = None
    nodes: tuple[int, ...] = ()
    alone: bool = False
    seed: int = 0
    around: Callable[[], Any] = contextlib.nullcontext

    def prepare(self, pipe: Any) -> dict[str, Any]:
        """This puts the scheduler in, and gives the arguments of the call."""
        config = pipe.stock_scheduler.config
        arguments: dict[str, Any] = {"num_inference_steps": self.steps}
        if self.solver == "unipc":
            pipe.scheduler = pipe.stock_scheduler
            pipe.scheduler = recommend(pipe, self.steps).scheduler
        elif self.solver == "heun":
            pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(config)
        else:
            cls = AB2Scheduler if self.solver == "ab2" else type(pipe.stock_scheduler)
            # Levels that are given are those of the run, to be shifted no more.
            shift = {"shift": 1.0} if self.sigmas else {}
            pipe.scheduler = cls.from_config(config, **shift)
        if self.sigmas:
            arguments["sigmas"] = list(self.sigmas)
        elif self.solver in ("euler", "ab2"):
            arguments["sigmas"] = np.linspace(1, 1 / self.steps, self.steps).tolist()
        return arguments


#: a near exact solution, and the one that tells its error
TRUTH, COARSER = Arm("heun", 60), Arm("heun", 30)


def plain(solver: str, steps: int) -> tuple[str, Arm]:
    """This is a baseline of so many evaluations."""
    return f"{solver} {steps}", Arm(solver, steps)
