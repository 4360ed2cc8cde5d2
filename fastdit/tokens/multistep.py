"""What a multistep solver, diffusers' UniPC, remembers of the steps before; an Euler step remembers nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def replace(scheduler: Any, made: Callable[[Tensor], Tensor]) -> None:
    """It remembers `made` of each tensor in its place."""
    if not hasattr(scheduler, "model_outputs"):
        return
    outputs = scheduler.model_outputs
    scheduler.model_outputs = [x if x is None else made(x) for x in outputs]
    if scheduler.last_sample is not None:
        scheduler.last_sample = made(scheduler.last_sample)


def forget(scheduler: Any) -> None:
    """It goes on as from a first step: with order 1, and nothing to correct."""
    if not hasattr(scheduler, "model_outputs"):
        return
    scheduler.model_outputs = [None] * len(scheduler.model_outputs)
    scheduler.timestep_list = [None] * len(scheduler.timestep_list)
    scheduler.lower_order_nums, scheduler.last_sample = 0, None
