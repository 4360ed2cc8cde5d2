"""The solution of a sampler's equation: what many steps from the same noise come to.

A flow is followed by AB2 at evenly spaced noise levels. A pipeline's own are shifted to where few steps need them and
so are far apart near the picture (docs/evaluate.md says how far off that is).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdit.errors import ArgumentError
from fastdit.schedules.solvers import converted, follows_flow, noise_of, recommend
from fastdit.search.ab2 import AB2Scheduler

#: many more than any run that is measured
STEPS = 100
EVEN = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


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
    """The scheduler of the solution; where no flow is followed from noise to a picture the recommended one."""
    own = pipeline.scheduler
    if not follows_flow(own) or own.config.get("invert_sigmas"):
        return recommend(pipeline, steps).scheduler
    return converted(own, AB2Scheduler, **EVEN)
