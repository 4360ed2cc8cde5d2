"""A guard watches forecasts of whole steps: whenever the model computes, it asks how far the forecast would have been.

A picture of which any branch of guidance was further off than the plan ever was when it was measured is computed at
every later step of its run, in all branches: one that is computed beside one that is drawn would have their difference
scaled. Such pictures pass in a batch of their own; the others are drawn as planned. The answer is copied to the host
while the next step runs, and is looked at only once it is there: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of

#: arguments with a value for each row of the batch, beside those that a family names; some that may have one for all
BY_ROW = ("guidance", "encoder_attention_mask", "encoder_hidden_states_mask")
POSITIONS = ("img_ids", "txt_ids")


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
        self._told: Tensor | None = None
        self.copied: Any = None
        self._known: tuple[int, ...] = ()
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
            there = torch.empty(self.rows.shape, dtype=torch.bool, pin_memory=True)
            self._told = there.copy_(self.rows, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self._told = self.rows

    def fired(self, step: int) -> tuple[int, ...]:
        """The pictures that are computed from now on, as far as the host knew when it first asked at this step."""
        if step != self._step:
            if self._told is not None and (self.copied is None or self.copied.query()):
                self._known = tuple(self._told.nonzero().flatten().tolist())
                self._told = None
            self._step = step
        return self._known

    def rows_of(self, pictures: Sequence[int], count: int) -> list[int]:
        """The rows of these pictures in a call of `count`; all, where these are no whole number of the pictures."""
        every = len(self.rows)
        return [row for row in range(count) if count % every or row % every in pictures]


class Guarded:
    """A step that is drawn, but for some rows.

    Args:
        drawn: Of all rows, [B, ...].
        rows: Those that are computed.
    """

    def __init__(self, drawn: Tensor, rows: Sequence[int]) -> None:
        self._drawn = drawn
        self._rows = torch.tensor(rows).to(drawn.device, non_blocking=True)

    def call_of(
        self, adapter: Any, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments of a call of these rows alone; None where all pass."""
        if len(self._rows) == len(self._drawn):
            return None
        return rows_of_call(adapter, transformer, args, kwargs, self._rows)

    def mixed(self, computed: Tensor) -> Tensor:
        """What the model gives for these rows, or for all of them, and what was drawn for the others."""
        if len(computed) == len(self._drawn):
            computed = computed.index_select(0, self._rows)
        return self._drawn.index_copy(0, self._rows, computed)


def rows_of_call(
    adapter: Any, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rows: Any
) -> dict[str, Any] | None:
    """The arguments of a transformer's call for some rows of its batch, int [K]; None where it is not known how.

    Known are those that every family has: latents, timestep, conditions and their masks, guidance, and positions.
    """
    given = {n: v for n, v in arguments_of(transformer, args, kwargs).items() if v is not None}
    batch, time = given[adapter.image_argument], adapter.time_argument
    if not (adapter.restates and isinstance(batch, Tensor)):
        return None
    by_row = {adapter.image_argument, time, *adapter.embeddings_arguments, *BY_ROW}
    found: dict[str, Any] = {}
    for name, value in given.items():
        tensor = isinstance(value, Tensor)
        of_all = name == "return_dict" or (not tensor and value == {})
        of_all = of_all or (tensor and name in POSITIONS and value.ndim == 2)
        if of_all or (tensor and name == time and value.numel() == 1):
            found[name] = value
        elif tensor and name in by_row and value.ndim and len(value) == len(batch):
            found[name] = value.index_select(0, rows)
        else:
            return None
    return found


def deviations(drawn: Tensor, computed: Tensor) -> Tensor:
    """How far each row is off, relatively, [B] in fp32."""
    drawn, computed = (each.float().flatten(1) for each in (drawn, computed))
    return (drawn - computed).norm(dim=1) / computed.norm(dim=1)
