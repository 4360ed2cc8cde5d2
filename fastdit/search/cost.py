"""What a schedule costs: the one place where the search asks.

`true-macs` are multiply-accumulates of linear layers and attention products for one image. Measured latency is not
here: it is a fact of a machine, see `evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTED = ("true-macs",)
LATENCY = "latency"
OBJECTIVES = (*COUNTED, LATENCY)


def counted(handle: Any, steps: int, arguments: Mapping[str, Any]) -> dict[str, int]:
    """The counted costs of one image by the schedule that `handle` runs, by objective."""
    found = handle.explain(arguments.get("height"), arguments.get("width"), steps=steps)
    return {"true-macs": found.macs}
