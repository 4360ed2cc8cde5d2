"""Measure tiles of the Triton kernels on the GPU at hand; write the winners into the launch table.

    python benchmarks/tune.py            # rewrites the table of triton_kernels/launch.py
    python benchmarks/tune.py --show     # prints it instead

For each op, width and bucket of rows, every candidate runs as a CUDA graph over buffers that
together exceed the L2 cache four times, candidates taking turns, and its time is the median over
the turns. A candidate enters the table where it beats the rule of launch.py by more than 2 %, which
is the noise that a benchmark against itself may show. A tile of sparse_attention enters where it
beats torch's attention, and each of its backends, by as much: an entry is what makes that kernel run.
Those are the attentions of the models (attention.py), or with --attention B H G Q S d one more. Entries
of other architectures stay. The
same times give the same file. Without a GPU nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention import MODELS, SHARES, torch_contenders
from timing import race
from triton_kernels.launch import BUCKETS, RULES, TABLE, Key, Launch, arch, attention_key

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
    return {key: v for key, v in TABLE.items() if key[-1] != architecture} | dict(measured)


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


ATTENTION_TILES = tuple(
    Launch(rows, cols, warps, stages)
    for rows, warps in ((16, 4), (64, 4), (128, 8))
    for cols in (32, 64, 128)
    for stages in (2, 3, 4)
)


def measure_attention(sizes: Sequence[tuple[int, ...]], device: torch.device) -> dict[Key, Launch]:
    """The entries of sparse_attention for one device; sizes are (B, H, G, Q, S, d)."""
    from triton_kernels.sparse_attention import sparse_attention

    measured = {}
    for batch, heads, kv_heads, queries, keys, dim in sizes:
        new = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(batch, queries, heads, dim, **new)
        k, v = (torch.randn(batch, keys, kv_heads, dim, **new) for _ in range(2))
        out = torch.empty_like(q)

        def tiled(launch: Launch, q=q, k=k, v=v, out=out, dim=dim) -> None:
            sparse_attention(q, k, v, dim**-0.5, out, launch=launch)

        calls = torch_contenders(q, k, v)
        rivals = set(calls)
        calls |= {launch: lambda launch=launch: tiled(launch) for launch in ATTENTION_TILES}
        contenders = {name: lambda i, call=call: call() for name, call in calls.items()}
        times = race(contenders, 1, device, TURNS).seconds
        best = outruns(times, rivals)
        shown = {str(name): round(1e6 * seconds, 1) for name, seconds in times.items()}
        print(f"sparse_attention {(batch, heads, kv_heads, queries, keys, dim)}: {shown}")
        if best is not None:
            measured[attention_key(q.shape, k.shape, arch(device))] = best
    return measured


def outruns(times: Mapping[str | Launch, float], rivals: set[str]) -> Launch | None:
    """The fastest tile, where it beats every rival that ran by more than noise."""
    tiles = [name for name in times if name not in rivals]
    best = min(tiles, key=lambda t: (times[t], t.rows, t.cols, t.warps, t.stages), default=None)
    rival = min((times[name] for name in rivals if name in times), default=0.0)
    return best if best is not None and NOISE * times[best] < rival else None


def model_sizes() -> list[tuple[int, ...]]:
    """Those of the models at all shares."""
    return [
        (form.batch, form.heads, form.kv_heads, form.queries(share), form.keys, form.dim)
        for form in MODELS
        for share in SHARES
    ]


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
    parser.add_argument(
        "--attention", type=int, nargs=6, action="append", default=[],
        metavar=("B", "H", "G", "Q", "S", "d"), help="one more size of sparse_attention",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured, the launch table is as it was")
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = [*model_sizes(), *map(tuple, arguments.attention)]
    measured = measure(device) | measure_attention(sizes, device)
    source = rewrite(FILE.read_text(), merge(measured, arch(device)))
    if arguments.show:
        print(source.partition(BEGIN)[2].partition(END)[0], end="")
    else:
        FILE.write_text(source)


if __name__ == "__main__":
    main()
