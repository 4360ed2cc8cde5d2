"""The solution of a sampler's equation: what many steps from the same noise come to.

A flow is followed by AB2 at evenly spaced noise levels. A pipeline's own are shifted to where few steps need them and
so are far apart near the picture: with a shift of 3 the last of 100 steps of UniPC begins at .03, and ends .01 of the
latents' length from the solution, more than half as far as 28 steps of Euler do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdit.errors import ArgumentError
from fastdit.schedules.solvers import converted, follows_flow, noise_of, recommend

#: many more than any run that is measured
STEPS = 100


def check_solvable(pipeline: Any) -> None:
    """This refuses a pipeline whose runs have no solution, or that gives no latents.

    Raises:
        ArgumentError: Its sampler draws noise at each step, or its runs end with pictures.
    """
    if noise := noise_of(pipeline.scheduler):
        raise ArgumentError(
            f"quality 'truth' needs a sampler that draws no noise at each step, this one does ({noise})"
        )
    if "latents" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ArgumentError(
            f"quality 'truth' compares latents, which {type(pipeline).__name__} does not give"
        )


@contextmanager
def solving(pipeline: Any, steps: int | None = None) -> Iterator[int]:
    """Inside, runs of so many steps come to the solution; afterwards the pipeline has its own scheduler again."""
    own, steps = pipeline.scheduler, steps or STEPS
    pipeline.scheduler = solver(pipeline, steps)
    try:
        yield steps
    finally:
        pipeline.scheduler = own


def solver(pipeline: Any, steps: int) -> Any:
    """The scheduler of the solution: for a model that predicts noise the recommended one."""
    if not follows_flow(pipeline.scheduler):
        return recommend(pipeline, steps).scheduler
    from fastdit.evaluate.ab2 import AB2Scheduler

    even = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    return converted(pipeline.scheduler, AB2Scheduler, **even)
