"""What the op benchmarks share: the copy ceiling, and one way to time and to account for bytes.

    pytest benchmarks/bench_gated_residual.py          one op by hand
    make bench                                         all of them, written to benchmarks/results

Each row of a result names the case (`case`), who ran it (`contender`) and the bytes that must move;
GB/s is these bytes over the median time, and `share_of_copy` that speed over a plain copy's.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

ROUNDS = 9
COPY_BYTES = 1 << 27  # larger than any cache


@pytest.fixture(scope="session")
def copy_speed() -> float:
    """Bytes a second, read and written, of `b.copy_(a)` with the threads of this run."""
    a = torch.ones(COPY_BYTES // 4)
    b = torch.empty_like(a)
    b.copy_(a)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(times)


@pytest.fixture
def measure(benchmark, copy_speed) -> Callable[..., None]:
    """measure(function, bytes_moved, case, contender): times it and files the row."""

    def run(function: Callable[[], object], bytes_moved: int, case: dict, contender: str) -> None:
        function()  # compiles, resolves and faults pages in, outside the timing
        if not benchmark.disabled:  # its garbage is of no other's time; to look for it takes long
            gc.collect()
        benchmark.pedantic(function, rounds=ROUNDS, iterations=_iterations(bytes_moved))
        benchmark.extra_info |= {
            "case": case,
            "contender": contender,
            "bytes": bytes_moved,
            "allocator": os.environ.get("FASTDIT_BENCH_ALLOCATOR", "default"),
            "copy_gb_s": copy_speed / 1e9,
        }
        if benchmark.stats is not None:  # None under --benchmark-disable
            speed = bytes_moved / benchmark.stats.stats.median
            benchmark.extra_info |= {"gb_s": speed / 1e9, "share_of_copy": speed / copy_speed}

    return run


def _iterations(bytes_moved: int) -> int:
    """Enough for a round to last a millisecond or so at 10 GB/s."""
    return max(1, min(100, 10_000_000 // max(bytes_moved, 1)))
