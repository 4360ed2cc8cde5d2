"""A guard watches forecasts of whole steps: whenever the model computes, it asks how far the forecast would have been.

A picture of which any branch of guidance was further off than the plan ever was when it was measured is computed at
every later step of its run, in all branches: one that is computed beside one that is drawn would have their difference
scaled. The others are drawn as planned. The answer is copied to the host while the next step runs, and is looked at
only once it is there: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Guard:
    """The guard of a run.

    Args:
        bounds: Step -> the most that a forecast may be off there, relatively; of the steps that compute.

    Attributes:
        pictures: How many there are, B: row r of a call's batch is of picture r modulo B. None before a step is done.
        rows: Which of them are computed from now on, bool [B]; None before the first was looked at.
        copied: The event after which the host knows of them; None where it always does.
    """

    def __init__(self, bounds: Mapping[int, float]) -> None:
        self._bounds = bounds
        self.pictures: int | None = None
        self.rows: Tensor | None = None
        self._any: Tensor | None = None
        self.copied: Any = None
        self._fired = False
        self._step = -1

    def watch(self, step: int, drawn: Tensor, computed: Tensor) -> None:
        """Compare what would have been drawn at a step with what the model gives there in a call, [rows, ...] each."""
        bound = self._bounds.get(step)
        if bound is None:
            return
        far = ~(deviations(drawn, computed) <= bound)  # what is no number is far
        count = self.pictures or len(far)
        far = far.view(-1, count).any(0) if len(far) % count == 0 else far.any().expand(count)
        self.rows = far if self.rows is None else self.rows | far
        if self.rows.device.type == "cuda":
            self._any = self.rows.any().to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self._any = self.rows.any()

    def fired(self, step: int) -> bool:
        """Whether any picture is computed from now on, as far as the host knew when it first asked at this step."""
        if step != self._step:
            there = self._any is not None and (self.copied is None or self.copied.query())
            self._fired = self._fired or (there and bool(self._any))
            self._step = step
        return self._fired

    def mixed(self, computed: Tensor, drawn: Tensor) -> Tensor:
        """What the model gives for the pictures that are computed, and what was drawn for the others."""
        rows, count = self.rows, len(computed)
        rows = rows.any().expand(count) if count % len(rows) else rows.repeat(count // len(rows))
        return torch.where(rows.view(-1, *[1] * (computed.ndim - 1)), computed, drawn)


def deviations(drawn: Tensor, computed: Tensor) -> Tensor:
    """How far each row is off, relatively, [B] in fp32."""
    drawn, computed = (each.float().flatten(1) for each in (drawn, computed))
    return (drawn - computed).norm(dim=1) / computed.norm(dim=1)
