"""The sampler of a pipeline by its name on the command line."""

from __future__ import annotations

from typing import Any

from fastdit.errors import ArgumentError

RECOMMENDED = "recommended"


def swap_scheduler(pipeline: Any, name: str, steps: int | None = None) -> None:
    """A pipeline gets another scheduler of diffusers, with what the old one's settings say to it.

    Args:
        pipeline: Any of diffusers.
        name: A class of diffusers; or, where `steps` says of how many its runs are, "recommended" for the one that
            :func:`fastdit.recommend` gives.

    Raises:
        ArgumentError: diffusers has no such class.
        UnsupportedModelError: The class cannot follow the flow that the model gives velocities of, or needs one.
    """
    import diffusers

    from fastdit.schedules.solvers import converted, recommend

    if name == RECOMMENDED and steps is not None:
        pipeline.scheduler = recommend(pipeline, steps).scheduler
        return
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not hasattr(scheduler_class, "from_config"):
        also = "" if steps is None else f", or {RECOMMENDED}"
        raise ArgumentError(
            f"--scheduler must be a scheduler class of diffusers, such as DDIMScheduler{also}, got {name!r}"
        )
    pipeline.scheduler = converted(pipeline.scheduler, scheduler_class)
