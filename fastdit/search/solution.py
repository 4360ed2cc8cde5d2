"""The solution of a sampler's equation: what many steps from the same noise come to."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdit.errors import ArgumentError
from fastdit.schedules.solvers import noise_of, recommend

STEPS = 240


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
    pipeline.scheduler = recommend(pipeline, steps).scheduler
    try:
        yield steps
    finally:
        pipeline.scheduler = own
