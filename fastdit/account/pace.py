"""Whether a GPU waits for Python: what a step takes the host, and what it takes the device.

The rule by which ``graphs="auto"`` chooses stands here alone: a run is replayed where the host takes longer than the
device at one of its steps. The host makes launches, so many for each component that computes and for the rest of a
call; the device multiplies, and moves residuals. All figures are of programs and of large sizes, and rounded: where
host and device are about as fast, it does not matter which is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdit.schedules.actions import COMPUTE
from fastdit.schedules.plan import RunPlan

#: launches of a component that computes, and of a call beside them: SD3 609 for 71, FLUX 878 for 171, PixArt 589 for 84
LAUNCHES, LAUNCHES_BESIDE = 8, 25
#: seconds of the host for one
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Pace:
    """What a device reaches: multiply-accumulates of 16 bits and bytes, a second.

    Attributes:
        macs: In products of large matrices.
        bytes: Of its memory.
    """

    macs: float
    bytes: float


#: first number of the compute capability -> about two thirds of what is on the data sheet
PACES = {8: Pace(100e12, 1.2e12), 9: Pace(300e12, 2.4e12), 10: Pace(750e12, 5e12)}


def pace_of(device: torch.device) -> Pace | None:
    """The pace of a GPU; None of what is none. Unknown ones are like the newest that is known and older."""
    if device.type != "cuda":
        return None
    major, _ = torch.cuda.get_device_capability(device)
    return PACES[max((known for known in PACES if known <= major), default=min(PACES))]


def steps_that_wait(
    stages: Iterable[tuple[Any, RunPlan, Sequence[int]]], components: int, pace: Pace
) -> int:
    """At so many steps a run's calls take the host longer than the device.

    Args:
        stages: (:class:`~fastdit.account.cost.Cost`, plan, active tokens of each step), one after the other.
        components: Of all blocks.
    """
    return sum(
        _host(plan.part(step, step + 1), components) > _device(count, plan, tokens, step, pace)
        for count, plan, tokens in stages
        for step in range(plan.steps)
        if not plan.forecast_order(step)
    )


def _host(plan: RunPlan, components: int) -> float:
    """Seconds of a step for the host."""
    if plan.actions:
        flags = (flags for block in plan.actions[0] for flags in block.values())
        components = sum(each & COMPUTE for each in flags)
    return LAUNCH_SECONDS * (LAUNCHES * components + LAUNCHES_BESIDE)


def _device(count: Any, plan: RunPlan, tokens: Sequence[int], step: int, pace: Pace) -> float:
    """Seconds of a step for the device; residuals of the active tokens alone."""
    part, some = plan.part(step, step + 1), tokens[step : step + 1]
    share = some[0] / count.size.image if some else 1.0
    wide = (
        max(1.0, count.itemsize / 2) ** 3
    )  # an eighth of the products in fp32, which has no cores of its own
    return (
        wide * count.macs(part, some) / pace.macs + share * count.residual_bytes(part) / pace.bytes
    )
