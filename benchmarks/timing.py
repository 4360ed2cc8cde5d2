"""Time several ways to do one thing against each other, on a GPU by graph replay or on the CPU.

A contender is a function of an index: it works on that one of several sets of buffers which together
exceed the L2 cache four times, so that none finds its inputs there. On a GPU a contender is a CUDA
graph of one call for each set; contenders take turns, and a time is the median over the turns. The
first contender runs a second time under the name `again`: its ratio to itself says how much a
ratio is worth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Contender = Callable[[int], object]
AGAIN = "again"
CALLS = 20  # in a graph, at least


@dataclass(frozen=True)
class Race:
    """Seconds of one call, by contender; what could not run, by contender, with its reason."""

    seconds: Mapping[str, float]
    failed: Mapping[str, str]
    self_check: float | None  # the first contender over itself

    def asdict(self) -> dict[str, object]:
        return {
            "us": {name: 1e6 * value for name, value in self.seconds.items()},
            "failed": dict(self.failed),
            "self_check": self.self_check,
        }


def sets_needed(bytes_per_set: int, device: torch.device, most: int = 64) -> int:
    """How many sets of buffers exceed the L2 cache four times."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, -(-4 * cache // max(1, bytes_per_set))))


def race(
    contenders: Mapping[str, Contender], sets: int, device: torch.device, turns: int = 31
) -> Race:
    """Time the contenders in turns."""
    runs: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    names = [*contenders, AGAIN]
    first = next(iter(contenders))
    for name in names:
        try:
            runs[name] = _prepared(contenders[first if name == AGAIN else name], sets, device)
        except Exception as error:  # a rival that does not run is a result too
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    calls = max(CALLS, sets) if device.type == "cuda" else sets
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns + 1):
        for name, run in runs.items():
            times[name].append(_seconds(run, device) / calls)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    again = medians.pop(AGAIN, None)
    check = None if again is None or first not in medians else again / medians[first]
    return Race(medians, failed, check)


def _prepared(contender: Contender, sets: int, device: torch.device) -> Callable[[], None]:
    """All calls of one turn; everything is compiled and warm."""
    for i in range(sets):
        contender(i)
    if device.type != "cuda":
        return lambda: [contender(i) for i in range(sets)] and None
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(max(CALLS, sets)):
            contender(call % sets)
    return graph.replay


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
