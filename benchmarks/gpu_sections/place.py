"""Where a section runs: its device, the time it has, and the rows that it has made so far."""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_sections.clocks import launch_seconds
from gpu_sections.order import BAD_FORK, Answer, Order
from machine import describe_machine


class Place:
    """What a section's function is given.

    Attributes:
        order: What to do.
        device, dtype: Of everything that is measured.
        rehearsal: No GPU; figures mean nothing.
        turns: Of a race of contenders.
        launch_us: Microseconds of this host for one launch.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.rehearsal = order.rehearsal
        self.device = torch.device("cpu" if self.rehearsal else "cuda")
        self.dtype = torch.float32 if self.rehearsal else torch.bfloat16
        self.turns = 2 if self.rehearsal else 15
        self.deadline = time.monotonic() + order.seconds
        self.answer = Answer(machine=describe_machine())
        self.launch_us = 1e6 * launch_seconds(self.device)
        self.gpu = self.answer.machine["gpu"] or "none: a rehearsal"
        self._keep()

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def promise(self, names: Sequence[str]) -> None:
        """The rows that are to be made: whatever is not made by the end is missed by name."""
        self.answer.promised += names
        self._keep()

    def add(self, name: str, **figures: Any) -> dict[str, Any]:
        """A row was measured, or measured anew; it says where."""
        row = {"name": name, "gpu": self.gpu, "launch_us": self.launch_us} | figures
        rows = self.answer.rows
        places = [index for index, other in enumerate(rows) if other["name"] == name]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        self._keep()
        return row

    def skip(self, name: str, why: str) -> None:
        """A row is not made, with a reason."""
        print(f"  {name}: skipped, {why}", flush=True)
        self.add(name, skipped=why)

    def lack(self, name: str, what: str) -> None:
        """A row is of something that is not installed here."""
        print(f"  {name}: {what}", flush=True)
        self.add(name, absent=what)

    def fail(self, name: str) -> None:
        """A row could not be made: the exception that is handled now is why."""
        said = traceback.format_exc()
        print(f"  {name}: {said.strip().splitlines()[-1]}", flush=True)
        self.add(name, error=said[-1500:])

    def tell(self, **facts: Any) -> None:
        """What is no row."""
        self.answer.facts |= facts
        self._keep()

    def stands_in(self, what: str) -> None:
        """A rehearsal cannot do something, and says what it does in place of it."""
        said = self.answer.facts.setdefault("stand-ins", [])
        if what not in said:
            said.append(what)
            print(f"  stands in: {what}", flush=True)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.rehearsal:
            torch.cuda.synchronize()

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """A row by `measure`, unless the time is up; others are worth having if it fails."""
        if self.left() < 0:
            self.skip(name, "the time is up")
            return
        try:
            self.add(name, **measure())
        except Exception:
            self.fail(name)

    def _keep(self) -> None:
        self.answer.write(self.order.file)


def work(order: Order) -> None:
    """The process of one section."""
    os.setpgid(0, 0)  # with all that it starts it can be ended at once
    if not order.rehearsal and torch.cuda._is_in_bad_fork():
        os._exit(BAD_FORK)
    place = Place(order)
    module, _, function = order.function.partition(":")
    try:
        getattr(importlib.import_module(module), function)(place)
        place.answer.state = "done"
    except Exception:
        place.answer.state, place.answer.why = "failed", traceback.format_exc()[-3000:]
        print(place.answer.why, flush=True)
    place.answer.write(order.file)
