"""Bytes, arithmetic and the least time of every op and of whole steps, beside what was measured.

    python benchmarks/roofline.py [--results benchmarks/results/gpu-check-....json] [--out docs/roofline.md]

Ceilings and measurements are those of the newest result of `gpu_check.py`, or of the file named; without any, ceilings
are those of an H200 in public measurements.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastdit
import gpu_results
from fastdit import Schedule
from op_cases import DTYPE, cases
from real_models import MODELS, RealModel
from shapes import ALL
from traffic import KINDS, patched, stock

H200 = {"copy_tb_s": 4.3, "matmul_tflop_s": 790.0}
STEPS = ("stock", "dense", "reused")  # the last reuses everything
Count = dict[tuple[str, str], int]  # by step: bytes by kind, launches, and multiply-accumulates

SAID = """\
# What is possible

Written by `python benchmarks/roofline.py --out docs/roofline.md`. Ceilings and measurements are those of the newest
result of `make gpu-check`, here {source}: copy {copy_tb_s:.2f} TB/s, matmul {matmul_tflop_s:.0f} TFLOP/s. bf16.

## Steps

A step has to take its arithmetic, matrix products and attention, at matmul speed, and at copy speed the bytes that no
product can take along. Bytes are counted by dispatch, of real sizes on tensors without memory: each launch that is no
product reads its inputs and writes its outputs once. There are four kinds. *Fused ops* are fastdit's: they norm whole
rows, rotate and place queries and keys, or add what was kept, so they have to read what a product wrote, and are the
**floor**. *Activations* could be a product's epilogue; fastdit's `swiglu` is one. *Copies*, such as concatenations,
could be where a product writes. *Other* is what torch does apart, such as biases that are not added within a product
and divisions by one. Launches are those of all operators that make or change memory, products and attention among
them. Patched steps are counted as their programs run; a first call of its kind, which is recorded, launches a few more.

Times are in milliseconds: *least* has the floor alone, *as it is* all bytes, both with every byte and operation at its
ceiling, one after the other. Measured steps are shares of whole runs, or calls of the transformer where these were
timed.

"""

OPS = """
## Ops

The least time of an op is its bytes at copy speed: all of them are bound by memory.

"""


def op_rows(ceilings: dict[str, float], measured: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row for each case and shape."""
    for case in cases(ALL):
        moved = case.bytes_moved()
        least = moved / (ceilings["copy_tb_s"] * 1e12)
        own = (case.op, case.name, case.shape.name)
        found = next(
            (row["us"] for row in measured if (row["op"], row["case"], row["shape"]) == own), {}
        )
        shown = ", ".join(f"{name} {us:.1f}" for name, us in found.items()) or "-"
        yield [*own, f"{moved / 1e6:.1f}", f"{1e6 * least:.1f}", shown]


def step_rows(ceilings: dict[str, float], result: gpu_results.Result) -> Iterator[list[str]]:
    """Three rows for each model: a stock step, a dense one, and one that reuses everything."""
    for real in MODELS:
        counts = of_all_blocks(real)
        for name in STEPS:
            count = {what: value for (step, what), value in counts.items() if step == name}
            floor = counts["dense" if name == "stock" else name, "fused ops"]
            operations = 2 * count["macs"]
            products = operations / (ceilings["matmul_tflop_s"] * 1e12)
            per_byte = 1 / (ceilings["copy_tb_s"] * 1e12)
            now = sum(count[kind] for kind in KINDS)
            yield [
                real.name,
                name,
                f"{operations / 1e12:.2f}",
                f"{count['launches']:,}",
                f"{now / 1e9:.2f}",
                " + ".join(f"{count[kind] / 1e9:.2f}" for kind in KINDS),
                f"{floor / 1e9:.2f}",
                f"{1e3 * (products + floor * per_byte):.2f}",
                f"{1e3 * (products + now * per_byte):.2f}",
                _measured(result, real.name, name) or "-",
            ]


def _measured(result: gpu_results.Result, model: str, step: str) -> str:
    """Milliseconds of such a step by whatever ran it."""
    arms = {"stock": ("unpatched", "compiled"), "dense": ("dense",), "reused": ("every(2)",)}[step]
    found = {}
    for other, made in gpu_results.runs(result):
        for row in made["rows"] if other == model else ():
            if not row["method"].startswith(arms) or "order" in row["method"]:
                continue
            if step != "reused":
                found[row["method"]] = 1e3 * row["seconds"] / row["steps"]
            elif row.get("call_ms"):
                calls = row["call_ms"]
                found[row["method"]] = statistics.median(calls[1::2])
    return ", ".join(f"{name} {ms:.1f}" for name, ms in found.items())


def of_all_blocks(real: RealModel) -> Count:
    """Of a model as deep as the published one, from models with few blocks: all but the first and last of a kind
    are alike, so each further one adds what the third does.
    """
    few = dict.fromkeys(real.depths(), 2)
    start = counted(real, **few)
    total = dict(start)
    for kind, depth in real.depths().items():
        longer = counted(real, **few | {kind: 3})
        for what, value in start.items():
            total[what] += (depth - 2) * (longer[what] - value)
    return total


def counted(real: RealModel, **depths: int) -> Count:
    """Of a model with so many blocks."""
    model = real.build(torch.device("meta"), DTYPE, tiny=False, **depths)
    dense, reused = patched(real, model)
    found: Count = {}
    for step, traffic in zip(STEPS, (stock(real, model), dense, reused), strict=True):
        found |= {(step, kind): traffic.bytes[kind] for kind in KINDS}
        found[step, "launches"] = traffic.launches
    all_of_it, rest = predicted(real, model)
    macs = zip(STEPS, (all_of_it, all_of_it, rest), strict=True)
    return found | {(step, "macs"): value for step, value in macs}


def predicted(real: RealModel, model: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates of a dense and of a fully reused step."""
    steps = 2  # of every(2): the second reuses everything
    size = {"height": 8 * real.latent, "width": 8 * real.latent, "text_tokens": real.text}
    run = fastdit.patch(model, fastdit.Cached(Schedule.every(steps))).explain(
        **size, batch=real.batch, cfg=False, steps=steps
    )
    plain = fastdit.patch(model).explain(**size, batch=real.batch, cfg=False, steps=steps)
    fastdit.unpatch(model)
    dense = plain.macs // steps
    return dense, run.macs - dense


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(result: gpu_results.Result) -> str:
    """docs/roofline.md by a result, or by public ceilings where it is empty."""
    ceilings = gpu_results.ceilings(result) or H200
    source = "an H200 in public measurements"
    if ceilings is not H200:
        machine = result["machine"]
        source = f"{machine['gpu']}, {machine['date']}"
    kinds = ", ".join(KINDS)
    head = ["model", "step", "TFLOP", "launches", "GB", f"of them {kinds}", "floor GB", "least"]
    head += ["as it is", "measured"]
    text = SAID.format(source=source, **ceilings) + table(head, step_rows(ceilings, result))
    head = ["op", "form", "shape", "MB", "least us", "measured us"]
    return text + OPS + table(head, op_rows(ceilings, gpu_results.rows(result, "ops")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, help="a file of gpu_check.py")
    parser.add_argument("--out", type=Path, help="write Markdown here too")
    arguments = parser.parse_args()
    if arguments.results:
        result = json.loads(arguments.results.read_text())
        if result.get("rehearsal"):
            said = "is a rehearsal without a GPU: its figures mean nothing"
            parser.error(f"{arguments.results} {said}")
    else:
        result = next(filter(gpu_results.ceilings, gpu_results.results()), {})
    text = page(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
