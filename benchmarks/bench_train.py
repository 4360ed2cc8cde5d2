"""What an iteration of router training costs: arithmetic, seconds and memory, in units of one forward of the model.

    python benchmarks/bench_train.py [--out FILE] [--steps 10] [--batch 2]

The model in the package, guidance on. An iteration is the teacher, the student and a backward pass that reaches no
weight; the first step of an epoch, one forward, is left out of it, and so is the estimate of lambda, which has a row of
its own. Arithmetic is counted by torch's formulas, with attention as products that it has formulas for. Each contender
runs in a process of its own: memory is how far its peak lies above what it held with the model loaded (resident set, so
with the allocator's slack). The code of the method's authors takes about 6 forwards an iteration: its teacher has a
graph, and gradients reach the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastdit import tiny
from fastdit.train import HarmoniCa, proxy
from fastdit.train.blending import STOCK
from machine import describe_machine

#: contender -> arguments of the training; None draws, as the unit of all others
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "drawing": None,
    "training": {"lambda_form": None},
    "training, checkpointed": {"lambda_form": None, "checkpointing": True},
    "estimate of lambda, released": {"lambda_form": "released"},
    "estimate of lambda, published": {"lambda_form": "published"},
}
TIMED = 3  # runs of which the median is taken


class Flops(TorchDispatchMode):
    """Floating point operations by torch's own formulas, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def work(contender: str, steps: int, batch: int) -> tuple[Any, int]:
    """What a contender does once, and how many forwards or iterations of T that is to be divided by."""
    given = CONTENDERS[contender]
    texts = tiny.prompts(batch, "train", 2)
    pipe = tiny.load_pipeline()
    made = HarmoniCa(pipe, steps=steps, prompts=texts, batch=batch, **(given or {}))

    def draw() -> None:
        with made.trainee:
            proxy.Sampling(made.trainee, [STOCK] * steps).run(made.draw()())

    def estimate() -> None:
        rows = [torch.sigmoid(row.detach()) for row in made.logits]
        with made.trainee:
            proxy.estimate(made.settings.lambda_form, made.trainee, rows, made.draw())

    if given is None:
        return draw, steps
    if given["lambda_form"] is None:
        return made.train_epoch, steps - 1
    return estimate, 1


def measure(contender: str, steps: int, batch: int) -> dict[str, float]:
    """Peak bytes, seconds and operations of one contender; the peak is that of the process, so it comes first."""
    run, count = work(contender, steps, batch)
    before = _resident()
    run()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    with sdpa_kernel(SDPBackend.MATH), Flops() as counter:
        run()
    return {
        "peak_bytes": peak,
        "seconds": statistics.median(seconds),
        "operations": counter.total,
        "count": count,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def apart(contender: str, options: argparse.Namespace) -> Any:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--only", contender]
    command += ["--steps", str(options.steps), "--batch", str(options.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all contenders, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(measure(options.only, options.steps, options.batch)))
        return
    found = {name: apart(name, options) for name in CONTENDERS}
    one = {key: found["drawing"][key] / options.steps for key in ("operations", "seconds")}
    rows = []
    for name, row in found.items():
        # An epoch begins with a forward that trains nothing.
        first = 1 if name.startswith("training") else 0
        rows.append(
            {"contender": name, "peak_bytes": row["peak_bytes"]}
            | {key: (row[key] / one[key] - first) / row["count"] for key in one}
        )
        print(
            f"{name:32} {rows[-1]['operations']:8.3f} forwards' arithmetic, "
            f"{rows[-1]['seconds']:8.2f} of their time, {rows[-1]['peak_bytes'] / 2**20:6.0f} MiB"
        )
    result = {
        "steps": options.steps,
        "batch": options.batch,
        "forward_seconds": one["seconds"],
        "machine": describe_machine(),
        "rows": rows,
    }
    out = options.out or Path(__file__).parent / "results" / "train-cpu.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
