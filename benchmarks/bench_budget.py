"""How near a budget's speed comes to what was asked, on the model in the package, and what a request's own costs.

    python benchmarks/bench_budget.py [--out FILE] [--rounds 7] [--calibrate]

Arms take turns: the unpatched pipeline, and one patched once whose requests have budgets of their own. A loop is timed
from the first latents to the end of the last step, a call as a whole, each a median. The book in the package holds for
the machine that made it; `--calibrate` makes another first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import fastdit
import fastdit.tiny
from fastdit.cli.calibration import EMBEDDED_PROMPTS
from fastdit.cli.search import prompts_of
from fastdit.search.calibrate import calibrate
from machine import describe_machine

SPEEDS = (1.5, 2.0, 3.0, 4.0)
PROMPTS = ["a red circle", "a blue square at the left"]
STEPS = 28


class Timer:
    """Times of a pipeline's loop: it begins with the latents, and each step is told."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.began, self.ended = pipe, 0.0, 0.0
        made = pipe.prepare_latents
        pipe.prepare_latents = lambda *args, **kwargs: self._begin(made(*args, **kwargs))

    def _begin(self, latents: torch.Tensor) -> torch.Tensor:
        self.began = time.perf_counter()
        return latents

    def _step(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        self.ended = time.perf_counter()
        return given

    def draw(self) -> tuple[float, float]:
        """Seconds of the loop and of the call."""
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        self.pipe(
            PROMPTS,
            num_inference_steps=STEPS,
            generator=generator,
            callback_on_step_end=self._step,
        )
        return self.ended - self.began, time.perf_counter() - start


def measure(pipe: Any, book: fastdit.PlanBook, rounds: int) -> dict[str, Any]:
    """Rows of all speeds, and what a budget adds to a request."""
    timer = Timer(pipe)
    handle = fastdit.patch(pipe, speedup=1, book=book)
    times: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    computed = {}
    for turn in range(rounds + 1):
        for speed in (None, *SPEEDS):
            with handle.disabled() if speed is None else handle.budget(speedup=speed):
                found = timer.draw()
            if speed is not None:
                records = handle.last_run().records.values()
                computed[speed] = sum(record.tokens > 0 for record in records)
            if turn:
                times[speed].append(found)
    loop, call = (statistics.median(part) for part in zip(*times[None], strict=True))
    rows = []
    for speed in SPEEDS:
        own = [statistics.median(part) for part in zip(*times[speed], strict=True)]
        speeds = {"loop": loop / own[0], "call": call / own[1]}
        rows.append({"asked": speed, "computed": computed[speed], **speeds})
    start = time.perf_counter()
    for _ in range(100):
        with handle.budget(speedup=2):
            pass
    request = (time.perf_counter() - start) * 10
    return {"rows": rows, "loop_s": loop, "call_s": call, "request_ms": request}


def main() -> None:
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calibrate", action="store_true", help="make a plan book first")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = fastdit.tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    if options.calibrate:
        book = calibrate(pipe, prompts_of(None, True, EMBEDDED_PROMPTS), STEPS)
    else:
        book = fastdit.PlanBook.packaged(pipe.transformer)
    spent = time.perf_counter() - start
    result = {"machine": describe_machine(), "steps": STEPS, "calibrated_s": spent}
    result |= measure(pipe, book, options.rounds)
    for row in result["rows"]:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    print(f"{result['request_ms']:.3f} ms a request; the book took {spent:.0f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
