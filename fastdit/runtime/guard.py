"""A guard watches forecasts of whole steps: whenever the model computes, it asks how far the forecast would have been.

A row of the batch that was further off than the plan ever was when it was measured is computed at every later step of
its run; the others are drawn as planned. The answer is copied to the host while the next step runs, and is looked at
only once it is there: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Guard:
    """The guard of one guidance branch.

    Args:
        bounds: Step -> the most that a forecast may be off there, relatively; of the steps that compute.

    Attributes:
        rows: Which rows of the batch are computed from now on, bool [B]; None before the first was looked at.
    """

    def __init__(self, bounds: Mapping[int, float]) -> None:
        self._bounds = bounds
        self.rows: Tensor | None = None
        self._any: Tensor | None = None
        self._copied: Any = None
        self._fired = False

    def watch(self, step: int, drawn: Tensor, computed: Tensor) -> None:
        """Compare what would have been drawn at a step with what the model gives there, [B, ...] each."""
        bound = self._bounds.get(step)
        if bound is None:
            return
        far = ~(deviations(drawn, computed) <= bound)  # what is no number is far
        self.rows = far if self.rows is None else self.rows | far
        if self.rows.device.type == "cuda":
            self._any = self.rows.any().to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._any = self.rows.any()

    def fired(self) -> bool:
        """Whether any row is computed from now on, as far as the host knows."""
        there = self._any is not None and (self._copied is None or self._copied.query())
        self._fired = self._fired or (there and bool(self._any))
        return self._fired

    def mixed(self, computed: Tensor, drawn: Tensor) -> Tensor:
        """What the model gives for the rows that are computed, and what was drawn for the others."""
        return torch.where(self.rows.view(-1, *[1] * (computed.ndim - 1)), computed, drawn)


def deviations(drawn: Tensor, computed: Tensor) -> Tensor:
    """How far each row is off, relatively, [B] in fp32."""
    drawn, computed = (each.float().flatten(1) for each in (drawn, computed))
    return (drawn - computed).norm(dim=1) / computed.norm(dim=1)
