"""What a transformer call costs the host, at real depth and tiny width: stock and patched in turns, on the CPU.

    PYTHONPATH=tests python benchmarks/bench_host.py [--out FILE] [--rounds 7] [NAME ...]

For each model: Python frames, launches, and microseconds of a call: stock, dense, a RAS step of a quarter of the
tokens, and a fully reused step. Times are those that the thread computes: medians of later calls of runs that take
turns, so that what else the machine does falls on all alike; they are a host's, since there is next to no arithmetic.
`tests/test_host.py` asserts the counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import fastdit
import host
from fastdit import RAS, Cached, Dense, Schedule
from machine import describe_machine

METHODS = {
    "dense": Dense(),
    "sparse": RAS(ratio=0.25, start=2, resets=(), align=1),
    "reused": Cached(Schedule.every(2)),
}


def later(calls: list[Any], arm: str) -> list[Any]:
    """The calls of a run that count; every second one is reused."""
    return calls[3::2] if arm == "reused" else calls[3:]


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each arm."""
    pipe = host.pipeline(name)
    seconds: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, tuple[int, int]] = {}

    def patched(arm: str) -> Any:
        fastdit.unpatch(
            pipe
        )  # with its programs, whose launches are counted only where they are recorded
        if arm != "stock":
            fastdit.patch(pipe, METHODS[arm], backend="cpu")
        return pipe

    for arm in ("stock", *METHODS):
        launched = later(host.launches(name, patched(arm)), arm)[-1]
        frames = later(host.frames(name, patched(arm)), arm)[-1]
        counts[arm] = sum(frames.values()), sum(launched.kernels.values())
    for _ in range(rounds):
        for arm in counts:
            host.draw(name, patched(arm))
            seconds[arm] += later(host.seconds(name, pipe), arm)
    fastdit.unpatch(pipe)
    stock = statistics.median(seconds["stock"])
    rows = []
    for arm, times in seconds.items():
        median = statistics.median(times)
        frames, launched = counts[arm]
        rows.append(
            {
                "model": name,
                "call": arm,
                "frames": frames,
                "launches": launched,
                "microseconds": 1e6 * median,
                "of_stock": median / stock,
            }
        )
    return rows


def main() -> None:
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(host.MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.names:
        for row in measure(name, options.rounds):
            rows.append(row)
            print(
                f"{name:12} {row['call']:8} {row['frames']:6} frames {row['launches']:5} launches "
                f"{row['microseconds']:8.0f} us {row['of_stock']:5.2f} of stock",
                flush=True,
            )
    if options.out is not None:
        result = {"machine": describe_machine(), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
