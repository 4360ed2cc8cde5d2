"""A way of drawing as data: a solver, a number of steps, and what is patched in."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from fastdit.errors import UnsupportedModelError
from fastdit.schedules.solvers import converted, follows_flow, recommend
from fastdit.search import solution
from fastdit.search.ab2 import AB2Scheduler, TrailingScheduler

SOLVERS = ("euler", "unipc", "ab2")
#: what a few steps may be made with in place of the pipeline's own solver
RIVALS = (*SOLVERS, "dpm++")


@dataclass(frozen=True)
class Arm:
    """One way of drawing.

    Attributes:
        solver: "euler", "ab2" (both on the trailing grid, unless `sigmas` says another), "unipc", "dpm++" (2M) or
            "heun" (on their own), "solution" (of many steps), or "stock" (as loaded).
        steps: Steps of the pipeline.
        method: Makes what is patched in, one method or several, for a pipeline and this arm's steps; None for the
            unpatched model.
        sigmas: The noise levels of the steps, where they are not the solver's own.
        nodes: Steps at which the whole model runs, where that is all that ever runs.
        alone: Pictures are drawn one by one.
        seed: Another than 0 draws other noise, as a control.
        around: A context manager that draws run in.
        key: What a name does not say, such as the hash of a schedule: pictures that are kept are known by both.
    """

    solver: str
    steps: int
    method: Callable[[Any, int], Any] | None = None
    sigmas: tuple[float, ...] | None = None
    nodes: tuple[int, ...] = ()
    alone: bool = False
    seed: int = 0
    around: Callable[[], Any] = contextlib.nullcontext
    key: str = ""

    def prepare(self, pipe: Any) -> dict[str, Any]:
        """This puts the scheduler in, and gives the arguments of the call; the own one is `pipe.stock_scheduler`.

        Raises:
            UnsupportedModelError: The solver cannot stand for the pipeline's own.
        """
        config = pipe.stock_scheduler.config
        arguments: dict[str, Any] = {"num_inference_steps": self.steps}
        if self.solver == "unipc":
            pipe.scheduler = pipe.stock_scheduler
            pipe.scheduler = recommend(pipe, self.steps).scheduler
        elif self.solver == "solution":
            pipe.scheduler = solution.solver(pipe, self.steps)
        elif self.solver == "heun":
            pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(config)
        elif self.solver == "dpm++":
            pipe.scheduler = converted(
                pipe.stock_scheduler, DPMSolverMultistepScheduler, final_sigmas_type="zero"
            )
        elif self.solver == "stock":
            # Levels that are given are those of the run, to be shifted no more.
            shift = {"shift": 1.0} if self.sigmas else {}
            pipe.scheduler = type(pipe.stock_scheduler).from_config(config, **shift)
        else:
            told = "sigmas" in inspect.signature(type(pipe).__call__).parameters
            euler = FlowMatchEulerDiscreteScheduler if told else TrailingScheduler
            cls = AB2Scheduler if self.solver == "ab2" else euler
            pipe.scheduler = converted(pipe.stock_scheduler, cls)
            if self.sigmas:
                pipe.scheduler = cls.from_config(pipe.scheduler.config, shift=1.0)
            elif told:
                arguments["sigmas"] = np.linspace(1, 1 / self.steps, self.steps).tolist()
        if self.sigmas:
            arguments["sigmas"] = list(self.sigmas)
        return arguments


#: a near exact solution, and the one that tells its error
TRUTH, COARSER = Arm("heun", 60), Arm("heun", 30)


def plain(solver: str, steps: int) -> tuple[str, Arm]:
    """This is a baseline of so many evaluations."""
    return f"{solver} {steps}", Arm(solver, steps)


@contextlib.contextmanager
def prepared(pipe: Any, arm: Arm) -> Iterator[dict[str, Any]]:
    """Inside, the pipeline has an arm's solver and runs under what surrounds it; afterwards it has its own again."""
    own = pipe.scheduler
    pipe.stock_scheduler = own
    try:
        with arm.around():
            yield arm.prepare(pipe)
    finally:
        pipe.scheduler = own
        del pipe.stock_scheduler


def check_solver(pipe: Any, solver: str) -> None:
    """This refuses a solver that cannot stand for a pipeline's own.

    Raises:
        UnsupportedModelError: Naming why.
    """
    own = pipe.scheduler
    if solver in ("euler", "ab2") and not follows_flow(own):
        raise UnsupportedModelError(f"{solver} follows a flow, {type(own).__name__} does not")
    if solver != "stock" and own.config.get("clip_sample"):
        raise UnsupportedModelError(
            f"{type(own).__name__} clips what it takes to be the picture, {solver} does not"
        )
    if solver == "unipc" and recommend(pipe, 10).scheduler is own:
        raise UnsupportedModelError(recommend(pipe, 10).why)
    with prepared(pipe, Arm(solver, 10)):
        pass
