"""Latency is measured: the same work patched and stock, in turns, on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastdit.checks import whole
from fastdit.errors import ArgumentError


@dataclass(frozen=True)
class Measurement:
    """This is the wall clock of a piece of work; `print` it.

    Attributes:
        seconds, stock_seconds: Medians, patched and stock.
        speedup: Median over the turns of stock over patched.
        range: The least and the most of it.
    """

    seconds: float
    stock_seconds: float
    speedup: float
    range: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.range
        return (
            f"{self.seconds:.4g} s patched, {self.stock_seconds:.4g} s stock: "
            f"{self.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        )


def measure(
    run: Callable[[], Any],
    disabled: Callable[[], AbstractContextManager[None]],
    device: torch.device,
    repeats: int,
) -> Measurement:
    """This times `run` as it is and inside `disabled`, `repeats` times in turns after a warm-up of each.

    Raises:
        ArgumentError: `run` cannot be called, or `repeats` is not a positive int.
    """
    if not callable(run):
        raise ArgumentError(
            f"run must be a function to call, such as lambda: pipe(...), got {type(run).__name__}"
        )
    whole("repeats", repeats)
    patched, stock = [], []
    for _ in range(repeats + 1):
        for seconds, context in ((stock, disabled), (patched, nullcontext)):
            with context():
                seconds.append(_seconds(run, device))
    ratios = [a / b for a, b in zip(stock[1:], patched[1:], strict=True)]
    return Measurement(
        statistics.median(patched[1:]),
        statistics.median(stock[1:]),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
