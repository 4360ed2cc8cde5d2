"""How long transformer calls take: of the host, until the device is done, and of the device alone.

On a GPU an event before a call and one after it say how long the stream took, the waiting for launches included. With
the stream held before each call until the host has launched all of it, they say how long the device itself takes.
Without a GPU the host's clock stands in for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: of a GPU's clock in a second, at most: held longer than asked for is held well
CYCLES = 2.0e9


def launch_seconds(device: torch.device, rounds: int = 7, launches: int = 400) -> float:
    """What one launch of torch costs the host; so few at once that it does not wait for the device."""
    x = torch.zeros(8, device=device)
    x.add_(1)
    found = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(launches):
            x.add_(1)
        found.append((time.perf_counter() - start) / launches)
    _wait(device)
    return statistics.median(found)


def python_seconds(rounds: int = 7, count: int = 200_000) -> float:
    """What one empty call costs the interpreter in a loop: the pace of everything that is launched from Python."""

    def nothing(value: int) -> int:
        return value

    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for value in range(count):
            nothing(value)
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found)


class CallClock:
    """Every call of one transformer, in order, while :meth:`running`.

    Attributes:
        host_ms: From a call until it returns.
    """

    def __init__(self, transformer: nn.Module, device: torch.device) -> None:
        self._cls = type(transformer)
        self._transformer = transformer
        self._device = device
        self._ends: list[tuple[Any, Any]] = []
        self.host_ms: list[float] = []

    @contextmanager
    def running(self, hold_ms: Sequence[float] = ()) -> Iterator[CallClock]:
        """Calls are timed; with `hold_ms` the stream is held for so long before each, in turn.

        The class's `__call__` is wrapped: hooks on the transformer would be somebody's for fastdit.
        """
        given, own = self._cls.__call__, self._cls.__dict__.get("__call__")
        self._ends, self.host_ms = [], []

        def timed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not self._transformer:
                return given(module, *args, **kwargs)
            index = len(self._ends)
            if index < len(hold_ms):
                self._hold(hold_ms[index])
            begin = self._mark()
            start = time.perf_counter()
            found = given(module, *args, **kwargs)
            self.host_ms.append(1e3 * (time.perf_counter() - start))
            self._ends.append((begin, self._mark()))
            return found

        self._cls.__call__ = timed
        try:
            yield self
        finally:
            del self._cls.__call__
            if own is not None:
                self._cls.__call__ = own

    def call_ms(self) -> list[float]:
        """From the beginning of each call to its end, as the device saw it."""
        _wait(self._device)
        if self._device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in self._ends]
        return [1e3 * (end - begin) for begin, end in self._ends]

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _hold(self, milliseconds: float) -> None:
        if self._device.type == "cuda":
            torch.cuda._sleep(int(milliseconds * 1e-3 * CYCLES))


def idle_share(call_ms: Sequence[float], device_ms: Sequence[float]) -> float:
    """What share of the time of transformer calls the device had nothing to do."""
    return 1 - sum(device_ms) / sum(call_ms)


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Until the device is done; and what was made."""
    _wait(device)
    start = time.perf_counter()
    found = work()
    _wait(device)
    return time.perf_counter() - start, found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
