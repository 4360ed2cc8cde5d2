"""Ways of drawing that the testbed sets beside each other, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import FlowMatchHeunDiscreteScheduler

import fastdit
from ab2 import AB2Scheduler
from fastdit import Schedule

SOLVERS = ("euler", "unipc", "ab2")
EVALUATIONS = (5, 7, 10, 14)


@dataclass(frozen=True)
class Arm:
    """One way of drawing.

    Attributes:
        solver: "euler", "ab2" (both on the trailing grid), "unipc" or "heun" (on their own), or "stock" (as loaded).
        steps: Steps of the pipeline.
        method: Makes what is patched in, for a pipeline and this arm's steps; None for the unpatched model.
    """

    solver: str
    steps: int
    method: Callable[[Any, int], Any] | None = None

    def prepare(self, pipe: Any) -> dict[str, Any]:
        """This puts the scheduler in, and gives the arguments of the call."""
        config = pipe.stock_scheduler.config
        arguments: dict[str, Any] = {"num_inference_steps": self.steps}
        if self.solver == "unipc":
            pipe.scheduler = pipe.stock_scheduler
            pipe.scheduler = fastdit.recommend(pipe, self.steps).scheduler
        elif self.solver == "heun":
            pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(config)
        else:
            cls = AB2Scheduler if self.solver == "ab2" else type(pipe.stock_scheduler)
            pipe.scheduler = cls.from_config(config)
        if self.solver in ("euler", "ab2"):
            arguments["sigmas"] = np.linspace(1, 1 / self.steps, self.steps).tolist()
        return arguments


def plain(solver: str, steps: int) -> tuple[str, Arm]:
    """This is a baseline of so many evaluations."""
    return f"{solver} {steps}", Arm(solver, steps)


def halves(pipe: Any, steps: int) -> Any:
    """Each half of the depth computes at every other step, the other one is drawn by order 1."""
    spec = fastdit.patch(pipe.transformer)
    fastdit.unpatch(pipe.transformer)
    bits, names = {}, {}
    for name, (count, components) in spec.explain(steps=steps).blocks.items():
        depth = np.arange(count) < count // 2
        own = (np.arange(steps)[:, None] % 2 == 0) == depth
        own[:2] = True
        bits[name] = np.repeat(own[:, :, None], len(components), axis=2)
        names[name] = components
    return fastdit.Cached(Schedule.from_bits(bits, names, orders=1))


def every(n: int, order: int) -> Callable[[Any, int], Any]:
    return lambda pipe, steps: fastdit.Cached(Schedule.every(n), order=order)


def arms() -> Iterator[tuple[str, Arm]]:
    """All but the plain ones, which are added for as many evaluations as each of these takes."""
    for count in EVALUATIONS:
        for solver in SOLVERS[:2]:
            yield f"{solver} {2 * count}, every 2, repeated", Arm(solver, 2 * count, every(2, 0))
            yield f"{solver} {2 * count}, every 2, V", Arm(solver, 2 * count, every(2, 1))
        yield f"unipc {2 * count}, every 2, V of order 2", Arm("unipc", 2 * count, every(2, 2))
        yield f"unipc {2 * count}, halves, order 1", Arm("unipc", 2 * count, halves)
        yield f"unipc {4 * count}, every 4, V", Arm("unipc", 4 * count, every(4, 1))
    for metric in ("std", "change"):
        for ratio in (0.5, 0.25):
            given = {"ratio": ratio, "metric": metric, "align": 8}
            yield (
                f"RAS {ratio} {metric}",
                Arm("stock", 28, lambda pipe, steps, g=given: fastdit.RAS(**g)),
            )
    for speed in ("2x", "3x"):
        preset = fastdit.RALU.preset(f"sd3-{speed}")
        yield f"RALU {speed}", Arm("stock", preset.run_steps, lambda pipe, steps, p=preset: p)
    for name in ("fast", "faster", "fastest"):
        preset = fastdit.ECAD.preset("tiny", name)
        yield f"ECAD {name}", Arm("stock", preset.run_steps, lambda pipe, steps, p=preset: p)
        forecast = fastdit.ECAD.preset("tiny", name, order=1)
        yield (
            f"ECAD {name}, order 1",
            Arm("stock", preset.run_steps, lambda pipe, steps, p=forecast: p),
        )
