"""How near a budget's speed comes to what was asked, on the model in the package, and what a request's own costs.

    python benchmarks/bench_budget.py [--out FILE] [--rounds 7] [--pictures 24] [--calibrate]

Arms take turns: the unpatched pipeline, and one patched once whose requests have budgets of their own. A loop is timed
from the first latents to the end of the last step, a call as a whole, each a median. The book in the package holds for
the machine that made it; `--calibrate` makes another first.

A guard that never fires is timed beside the same plan without one, in turns. And on prompts that the book was not made
on, each of its plans stands beside evenly spread steps, as many, drawn as lines: the paired ratio of the distances to
the solution with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
import fastdit.tiny
from fastdit.cli.calibration import EMBEDDED_PROMPTS, presets
from fastdit.cli.search import prompts_of
from fastdit.schedules.book import Plan
from fastdit.schedules.spread import even_steps
from fastdit.search import solution
from fastdit.search.calibrate import calibrate
from fastdit.search.trial import interval
from machine import describe_machine

SPEEDS = (1.5, 2.0, 3.0, 4.0)
GUARDED = 2.0
BATCH = 4
HELD_OUT = {"split": "test", "seed": 5}
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
    handle.unpatch()
    handle = fastdit.patch(pipe, speedup=1, book=book)
    start = time.perf_counter()
    for _ in range(100):
        with handle.budget(speedup=2):
            pass
    request = (time.perf_counter() - start) * 10
    handle.unpatch()
    guard = guarded(pipe, timer, book, rounds)
    return {"rows": rows, "loop_s": loop, "call_s": call, "request_ms": request, "guard": guard}


def guarded(pipe: Any, timer: Timer, book: fastdit.PlanBook, rounds: int) -> dict[str, float]:
    """The loop's time with a guard that never fires over that of the same plan without one: each turn's ratio."""
    calm = tuple(
        replace(plan, bounds=(1e9,) * max(0, len(plan.computed) - 2)) if plan.whole else plan
        for plan in book.plans
    )
    whole = tuple(plan for plan in calm if plan.whole)
    ratios = []
    for _ in range(rounds):
        loops = {}
        for guard in (False, True):
            given = {"book": replace(book, plans=whole), "guard": guard}
            handle = fastdit.patch(pipe, speedup=GUARDED, **given)
            timer.draw()
            loops[guard] = min(timer.draw()[0] for _ in range(3))
            handle.unpatch()
        ratios.append(loops[True] / loops[False])
    found = statistics.median(ratios)
    return {"speedup": GUARDED, "ratio": found, "lowest": min(ratios), "highest": max(ratios)}


def held_out(pipe: Any, book: fastdit.PlanBook, pictures: int) -> list[dict[str, Any]]:
    """Each plan of whole steps over as many evenly spread ones, and both over the unpatched run."""
    scenes = [fastdit.tiny.prompts(pictures // 2, objects=n, **HELD_OUT) for n in (1, 2)]
    prompts = [prompt for pair in zip(*scenes, strict=True) for prompt in pair]

    def draw(steps: int) -> np.ndarray:
        found = []
        for first in range(0, len(prompts), BATCH):
            some = prompts[first : first + BATCH]
            seeds = range(1000 + first, 1000 + first + len(some))
            given = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
            given |= {"num_inference_steps": steps, "output_type": "latent"}
            found.append(pipe(some, **given).images)
        return torch.cat(found).double().flatten(1).numpy()

    with solution.solving(pipe) as steps:
        truth = draw(steps)

    def error(plan: Plan | None) -> np.ndarray:
        if plan is None:
            return np.log(np.linalg.norm(draw(STEPS) - truth, axis=1))
        twice = replace(plan, seconds=book.unpatched_seconds * STEPS / 2)
        with handle.budget(speedup=2, book=replace(book, plans=(book.plans[0], twice))):
            return np.log(np.linalg.norm(draw(STEPS) - truth, axis=1))

    unpatched = error(None)
    handle = fastdit.patch(pipe, speedup=1, book=book)
    rows = []
    for plan in book.plans[1:]:
        own, count = error(plan), len(plan.computed)
        if not plan.whole:  # as fast or faster
            same = [
                p for p in book.plans if p.whole and book.seconds_of(p) <= book.seconds_of(plan)
            ]
            count = max((len(p.computed) for p in same), default=count)
        even = error(Plan(tuple(even_steps(STEPS, count)), 1, 1.0, 1.0, 1.0))
        row = {"speedup": book.speedup_of(plan), "whole": plan.whole, "even_steps": count}
        row |= {"over_even": interval(own - even), "over_unpatched": interval(own - unpatched)}
        rows.append(row | {"even_over_unpatched": interval(even - unpatched)})
        print(count, plan.whole, "held out:", np.round(rows[-1]["over_even"], 3), flush=True)
    handle.unpatch()
    return rows


def main() -> None:
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=24, help="held out")
    parser.add_argument("--calibrate", action="store_true", help="make a plan book first")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = fastdit.tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    if options.calibrate:
        prompts = prompts_of(None, True, EMBEDDED_PROMPTS)
        book = calibrate(pipe, prompts, STEPS, plans=presets("tiny", STEPS))
    else:
        book = fastdit.PlanBook.packaged(pipe.transformer)
    spent = time.perf_counter() - start
    result = {"machine": describe_machine(), "steps": STEPS, "rounds": options.rounds}
    result["calibrated_s"] = spent if options.calibrate else None
    result |= measure(pipe, book, options.rounds)
    result["pictures"], result["held_out"] = (
        options.pictures,
        held_out(pipe, book, options.pictures),
    )
    for row in result["rows"]:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    print("guard: ", result["guard"])
    print(f"{result['request_ms']:.3f} ms a request; the book took {spent:.0f} s to make or read")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
