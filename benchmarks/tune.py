"""Measure tiles of the Triton kernels on the GPU at hand; write the winners into the launch table.

    python benchmarks/tune.py            # rewrites the table of triton_kernels/launch.py
    python benchmarks/tune.py --show     # prints it instead

For each op, width and bucket of rows, every candidate runs as a CUDA graph over buffers that
together exceed the L2 cache four times, candidates taking turns, and its time is the median over
the turns. A candidate enters the table where it beats the rule of launch.py by more than 2 %, which
is the noise that a benchmark against itself may show. Entries of other architectures stay. The
same times give the same file. Without a GPU nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from triton_kernels.launch import BUCKETS, RULES, TABLE, Key, Launch, arch

FILE = Path(__file__).parents[1] / "triton_kernels" / "launch.py"
BEGIN, END = "# tuned: begin\n", "# tuned: end\n"
WIDTHS = (1152, 1536, 2304, 2432, 3072)
TURNS = 15
NOISE = 1.02
BRANCHES = 2  # gated_residual's cost per branch is the same for any number


def candidates(op: str, width: int) -> list[Launch]:
    """The rule's launch first, then every sensible other one, in a fixed order."""
    found = [RULES[op](width)]
    for cols in (128, 256, 512, 1024, 2048, 4096):
        if cols >= 2 * width or (op == "norm_modulate" and width > 12 * cols):
            continue
        for rows in (1, 2, 4, 8):
            for warps in (1, 2, 4, 8, 16):
                per_thread = rows * cols // (32 * warps)
                launch = Launch(rows, cols, warps)
                if 4 <= per_thread <= 16 and launch not in found:
                    found.append(launch)
    return found


def choose(times: Mapping[Launch, float], rule: Launch) -> Launch | None:
    """The fastest launch, None where the rule's is as fast up to noise."""
    best = min(times, key=lambda launch: (times[launch], launch.rows, launch.cols, launch.warps))
    return None if times[rule] <= NOISE * times[best] else best


def render(table: Mapping[Key, Launch]) -> str:
    """The assignment between the markers, entries sorted."""
    head = "TABLE: Mapping[Key, Launch] = MappingProxyType("
    if not table:
        return head + "{})\n"
    lines = []
    for key in sorted(table):
        op, *numbers = key
        launch = table[key]
        sizes = ", ".join(map(str, numbers))
        tile = f"Launch({launch.rows}, {launch.cols}, {launch.warps}, {launch.stages})"
        lines.append(f'        ("{op}", {sizes}): {tile},\n')
    return head + "\n    {\n" + "".join(lines) + "    }\n)\n"


def rewrite(source: str, table: Mapping[Key, Launch]) -> str:
    """The text of launch.py with another table."""
    before, found, rest = source.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{FILE.name}: the markers {BEGIN.strip()!r}, {END.strip()!r} are missing")
    return before + BEGIN + render(table) + END + after


def merge(measured: Mapping[Key, Launch], architecture: int) -> dict[Key, Launch]:
    """The table with all entries of one architecture replaced."""
    return {key: v for key, v in TABLE.items() if key[3] != architecture} | dict(measured)


def measure(device: torch.device) -> dict[Key, Launch]:
    """The entries for one device."""
    measured = {}
    for op in RULES:
        for width in WIDTHS:
            for rows in BUCKETS:
                launches = candidates(op, width)
                times = _times(op, width, rows, launches, device)
                best = choose(times, launches[0])
                print(f"{op} D {width} rows {rows}: {times[launches[0]]:.2f} us by rule", end="")
                print("" if best is None else f", {times[best]:.2f} us with {best}")
                if best is not None:
                    measured[op, width, rows, arch(device)] = best
    return measured


def _times(
    op: str, width: int, rows: int, launches: list[Launch], device: torch.device
) -> dict[Launch, float]:
    """Median microseconds of one call."""
    state = rows * width * torch.bfloat16.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [_tensors(width, rows, device) for _ in range(max(2, 4 * cache // (3 * state) + 1))]
    graphs = {launch: _captured(op, sets, launch) for launch in launches}
    turns: dict[Launch, list[float]] = {launch: [] for launch in launches}
    for _ in range(TURNS):
        for launch, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            turns[launch].append(1000 * begin.elapsed_time(end) / len(sets))
    return {launch: statistics.median(times) for launch, times in turns.items()}


def _tensors(width: int, rows: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    new = {"dtype": torch.bfloat16, "device": device}
    return [torch.randn(1, rows, width, **new) for _ in range(3)], torch.randn(1, width, **new)


def _captured(op: str, sets: list, launch: Launch) -> torch.cuda.CUDAGraph:
    call = _CALLS[op]
    call(*sets[0], launch)  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors, gate in sets:
            call(tensors, gate, launch)
    return graph


def _gated_residual(tensors: list[Tensor], gate: Tensor, launch: Launch) -> None:
    from triton_kernels.gated_residual import gated_residual

    x, *branches = tensors
    gated_residual(x, branches, [gate] * BRANCHES, -1, None, None, x, launch=launch)


def _norm_modulate(tensors: list[Tensor], gate: Tensor, launch: Launch) -> None:
    from triton_kernels.norm_modulate import norm_modulate

    x, branch, out = tensors
    affine = (gate, gate, None, None, 1e-6, False)
    norm_modulate(x, *affine, branch, gate, None, None, out, launch=launch)


_CALLS: dict[str, Callable[[list[Tensor], Tensor, Launch], None]] = {
    "gated_residual": _gated_residual,
    "norm_modulate": _norm_modulate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the table, write nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured, the launch table is as it was")
    device = torch.device("cuda", torch.cuda.current_device())
    source = rewrite(FILE.read_text(), merge(measure(device), arch(device)))
    if arguments.show:
        print(source.partition(BEGIN)[2].partition(END)[0], end="")
    else:
        FILE.write_text(source)


if __name__ == "__main__":
    main()
