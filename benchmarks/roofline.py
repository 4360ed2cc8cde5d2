"""Bytes, arithmetic and the least time of every op and of whole steps, beside what was measured.

    python benchmarks/roofline.py [--results benchmarks/results/gpu-check-....json] [--out FILE]

The least time of an op is its bytes at copy speed: all of them are bound by memory. That of a step is
its arithmetic (linear layers and attention) at matmul speed plus its residual updates at copy speed,
as a step would take if nothing else cost anything. Ceilings are those measured in the results file;
without one, those of an H200 in public measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastdit
from fastdit import Schedule
from op_cases import DTYPE, cases
from real_models import MODELS, RealModel
from shapes import ALL

H200 = {"copy_tb_s": 4.3, "matmul_tflop_s": 790.0}
STEPS = 2  # of every(2): the second reuses everything


def op_rows(ceilings: dict[str, float], measured: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row for each case and shape."""
    for case in cases(ALL):
        moved = case.bytes_moved()
        least = moved / (ceilings["copy_tb_s"] * 1e12)
        found = next(
            (
                row.get("us", {})
                for row in measured
                if (row["op"], row["case"], row.get("shape"))
                == (case.op, case.name, case.shape.name)
            ),
            {},
        )
        shown = ", ".join(f"{name} {us:.1f}" for name, us in found.items()) or "-"
        yield [
            case.op,
            case.name,
            case.shape.name,
            f"{moved / 1e6:.1f}",
            f"{1e6 * least:.1f}",
            shown,
        ]


def step_rows(ceilings: dict[str, float], measured: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Two rows for each model: a dense step and one that reuses everything."""
    for real in MODELS:
        found = next((row.get("ms", {}) for row in measured if row["model"] == real.name), {})
        dense, reused = predicted(real)
        for name, (macs, moved) in (("dense", dense), ("reused", reused)):
            least = 2 * macs / (ceilings["matmul_tflop_s"] * 1e12)
            least += moved / (ceilings["copy_tb_s"] * 1e12)
            shown = ", ".join(
                f"{key} {ms:.1f}"
                for key, ms in found.items()
                if ("reused" in key) == (name == "reused")
            )
            row = [real.name, name, f"{2 * macs / 1e12:.2f}", f"{moved / 1e9:.2f}"]
            yield [*row, f"{1e3 * least:.2f}", shown or "-"]


def predicted(real: RealModel) -> tuple[tuple[int, int], tuple[int, int]]:
    """(multiply-accumulates, bytes of residual updates) of a dense and of a fully reused step."""
    model = real.build(torch.device("meta"), DTYPE, tiny=False)
    size = {"height": 8 * real.latent, "width": 8 * real.latent, "text_tokens": real.text}
    run = fastdit.patch(model, fastdit.Cached(Schedule.every(STEPS))).explain(
        **size, batch=real.batch, cfg=False, steps=STEPS
    )
    plain = fastdit.patch(model).explain(**size, batch=real.batch, cfg=False, steps=STEPS)
    fastdit.unpatch(model)
    dense = plain.macs // STEPS, plain.residual_bytes // STEPS
    return dense, (run.macs - dense[0], run.residual_bytes - dense[1])


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, help="a file of gpu_check.py")
    parser.add_argument("--out", type=Path, help="write Markdown here too")
    arguments = parser.parse_args()
    result = json.loads(arguments.results.read_text()) if arguments.results else {}
    if result.get("rehearsal"):
        parser.error(f"{arguments.results} is a rehearsal without a GPU: its figures mean nothing")
    ceilings = result.get("ceilings", H200)
    rows = {name: result.get(name, {}).get("rows", []) for name in ("ops", "steps")}
    source = result["machine"]["gpu"] if result else "an H200 in public measurements"
    text = (
        "# What is possible\n\nWritten by `python benchmarks/roofline.py --out docs/roofline.md`, which explains how "
        "the figures are made; with `--results FILE` they stand beside what `make gpu-check` measured.\n\n"
        f"Ceilings of {source}: copy {ceilings['copy_tb_s']:.2f} TB/s, "
        f"matmul {ceilings['matmul_tflop_s']:.0f} TFLOP/s. bf16.\n\n"
    )
    head = ["op", "form", "shape", "MB", "least us", "measured us"]
    text += table(head, op_rows(ceilings, rows["ops"]))
    head = ["model", "step", "TFLOP", "residual GB", "least ms", "measured ms"]
    text += "\n" + table(head, step_rows(ceilings, rows["steps"]))
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
