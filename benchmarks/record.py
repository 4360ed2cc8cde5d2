"""Measures the ops and writes benchmarks/results/<op>-<machine>-<date>.json; prints one table an op.

    python benchmarks/record.py [op ...]

Everything is measured twice: with the C library's default allocator, where a fresh tensor over
32 MiB is mapped, faulted in and unmapped at each call, which makes any allocating expression look
slow; and with thresholds that keep memory in the process (`kept`). Speed-ups are read from `kept`.
Shapes follow FASTDIT_BENCH_SHAPES (see shapes.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastdit import ops
from machine import describe_machine

HERE = Path(__file__).resolve().parent
KEPT = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
# The default allocator is there to be seen once, not for the whole grid.
RUNS = (
    ("kept", KEPT, ""),
    ("default", {}, "pixart-1024 and not inductor and (-1- or -8- or plain or branch)"),
)


def measure(op: str) -> list[dict]:
    """All rows of one op: case, contender, allocator, seconds, GB/s, share of the copy speed."""
    rows = []
    for allocator, settings, chosen in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "pytest", "-q", str(HERE / f"bench_{op}.py")]
            command += ["-k", chosen, "--benchmark-json", str(report), "--benchmark-quiet"]
            environment = {**os.environ, **settings, "FASTDIT_BENCH_ALLOCATOR": allocator}
            done = subprocess.run(command, cwd=folder, env=environment)
            if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
                continue  # an op without the shapes chosen here
            done.check_returncode()
            found = json.loads(report.read_text())["benchmarks"]
        rows += [_row(entry) for entry in found]
    return rows


def _row(entry: dict) -> dict:
    stats = {k: entry["stats"][k] for k in ("median", "min", "iqr", "rounds")}
    return {**entry["extra_info"], "seconds": stats}


def speed_up(rows: list[dict], row: dict, over: str) -> float | None:
    """How much faster `row` is than the contender `over` of the same case and allocator."""
    for other in rows:
        same = all(other[k] == row[k] for k in ("case", "allocator"))
        if same and other["contender"] == over:
            return other["seconds"]["median"] / row["seconds"]["median"]
    return None


def show(op: str, rows: list[dict]) -> None:
    print(f"\n{op}: median ms, GB/s, share of copy, times faster than eager")
    for row in rows:
        case = ", ".join(str(v) for k, v in row["case"].items() if k != "size")
        ratio = speed_up(rows, row, "eager")
        print(
            f"  {case:42} {row['allocator']:8} {row['contender']:19}"
            f" {row['seconds']['median'] * 1e3:9.3f} {row['gb_s']:7.1f}"
            f" {row['share_of_copy']:6.0%}" + (f" {ratio:6.2f}x" if ratio else "")
        )


def main(named: list[str]) -> None:
    machine = describe_machine()
    kind = f"cpu-{machine['cores']}core" if machine["gpu"] is None else machine["gpu"]
    kind = re.sub(r"[^a-z0-9]+", "-", str(kind).lower()).strip("-")
    for op in named or ops.FILES:
        rows = measure(op)
        path = HERE / "results" / f"{op}-{kind}-{machine['date']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"op": op, "machine": machine, "rows": rows}, indent=1) + "\n")
        show(op, rows)
        print(f"written to {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
