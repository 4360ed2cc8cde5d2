"""What a schedule costs: the one place where the search asks.

All are of one image. `macs` are those of linear layers, the paper's count and its objective; `true-macs` also have the
products of attention, which the larger an image the more they are. Measured latency is not here: it is a fact of a
machine, see `evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED = "macs"
COUNTED = (PUBLISHED, "true-macs")
LATENCY = "latency"
OBJECTIVES = (*COUNTED, LATENCY)


def counted(handle: Any, steps: int, arguments: Mapping[str, Any]) -> dict[str, int]:
    """One image by the schedule that `handle` runs has these counted costs, by objective."""
    size = arguments.get("height"), arguments.get("width")
    found = handle.explain(*size, steps=steps, frames=arguments.get("num_frames"))
    return {"macs": found.linear_macs, "true-macs": found.macs}
