"""What a front of forecasts is worth on held-out prompts, beside whole steps that anybody would draw as lines.

    fastdit search --out FOLDER --scheduler recommended --orders 0,1 --quality truth --guidance 2.5 \
        --height 64 --width 64 --unit step --even-steps --surrogate 8 --cost true-macs ...
    python benchmarks/search_forecast.py FOLDER [--pictures 32] [--drawn build/search-forecast]

The model in the package at 64 pixels, guidance 2.5, full and open captions of `bed.py`'s held-out prompts, the sampler
that `fastdit.recommend` gives. Errors are relative distances of latents to Heun's 60 steps. The searched front stands
beside evenly spread whole steps whose others are drawn by order 1 (`Cached(..., order=1)`; every count of them), and
plain steps of UniPC and AB2.

What is compared: the area between a set and a corner. Its axes are the share of the unpatched run's arithmetic
and the decimal logarithm of the mean error; its corner is 1 and the worst error of evenly spread steps. Intervals are
95 % bootstrap intervals over the held-out prompts, the same draws for all sets. What was drawn is kept, so a run that
was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import fastdit
from arms import TRUTH, Arm, plain
from bed import BATCH, Bed
from fastdit import tiny
from fastdit.patch import find_adapter
from fastdit.search.archive import Candidate
from fastdit.search.front import non_dominated, on_axes
from fastdit.search.genome import Genome
from fastdit.search.result import FRONT, SUMMARY
from fastdit.search.seeds import evenly_spread_steps
from machine import describe_machine
from search_front import compare
from testbed import away

RESULT = Path(__file__).parent / "results/search-forecast-cpu.json"
SEARCHED, EVEN, PLAIN = "searched front", "evenly spread steps with V", "plain steps"
CAPTIONS = ("full", "open")
GUIDANCE, SIZE = 2.5, 64
FEWEST = 2  # evaluations of an arm


def scheduled(steps: int, schedule: fastdit.Schedule) -> Arm:
    """A schedule under the recommended sampler."""
    return Arm("unipc", steps, lambda pipe, count: fastdit.Cached(schedule))


def arms_of(folder: Path, genome: Genome, steps: int) -> dict[str, dict[str, Arm]]:
    """All sets: name -> name of an arm -> the arm."""
    front = {
        f"{folder.name} {schedule.sha256[:12]}": scheduled(steps, schedule)
        for schedule in map(fastdit.Schedule.load, sorted((folder / FRONT).glob("*.json")))
    }
    even = {
        f"even {count} of {steps}, order 1": scheduled(steps, genome.schedule(vector))
        for count, vector in enumerate(evenly_spread_steps(genome, 1), 1)
        if count >= FEWEST
    }
    few = dict(
        plain(solver, count) for solver in ("unipc", "ab2") for count in range(FEWEST, steps + 1)
    )
    return {SEARCHED: front, EVEN: even, PLAIN: few}


def measured(
    beds: list[Bed], arms: Mapping[str, Arm], steps: int, pictures: int
) -> dict[str, Candidate]:
    """Errors of each picture under all captions, and the share of the arithmetic."""
    truths = [bed.latents("truth", TRUTH, pictures) for bed in beds]
    found = {}
    for name, arm in arms.items():
        drawn = [bed.latents(name, arm, pictures) for bed in beds]
        errors = np.concatenate([away(*pair) for pair in zip(drawn, truths, strict=True)])
        values = (float(errors.mean()), beds[0].arithmetic(arm) / steps)
        found[name] = Candidate(name, np.ones(1, dtype=bool), tuple(errors), values, 1, True)
        print(f"{name}: error {values[0]:.4f}, {values[1]:.0%}", flush=True)
    return found


def summed_up(
    sets: Mapping[str, Mapping[str, Candidate]], quality: str = "paired"
) -> dict[str, Any]:
    """The corner, and the comparison of what no member of the same set dominates; by the mean of that quality."""
    fronts = {}
    for name, group in sets.items():
        every = list(group.values())
        fronts[name] = [every[index] for index in non_dominated([c.values for c in every])]
    worst = max(candidate.values[0] for candidate in sets[EVEN].values())
    ((height, _),) = on_axes(np.array([[worst, 1.0]]), (1.0,), True)
    return {
        "corner": worst,
        **compare(fronts, (1.0,), (float(height), 1.0), quality=quality),
        "fronts": {
            name: [[c.key, *c.values] for c in sorted(group, key=lambda c: c.values[1])]
            for name, group in fronts.items()
        },
    }


def main() -> None:
    """Draw what is missing, compare, and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the result of `fastdit search`")
    parser.add_argument("--pictures", type=int, default=32, help="of each captions")
    parser.add_argument("--drawn", type=Path, default=Path("build/search-forecast"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.pictures % BATCH:
        parser.error(f"--pictures must be a multiple of {BATCH}, got {options.pictures}")
    summary = json.loads((options.folder / SUMMARY).read_text(encoding="utf-8"))
    steps = summary["settings"]["steps"]
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    beds = [Bed(pipe, captions, GUIDANCE, SIZE, options.drawn) for captions in CAPTIONS]
    sets = {
        name: measured(beds, arms, steps, options.pictures)
        for name, arms in arms_of(options.folder, Genome(spec, steps, (0, 1)), steps).items()
    }
    settings = summary["settings"]
    result = {
        "machine": describe_machine(),
        "steps": steps,
        "pictures": options.pictures * len(CAPTIONS),
        "search_pictures": len(settings["prompts"]) * settings["images_per_prompt"],
        "generations": summary["generations"],
        "population": settings["population"],
        "schedules": summary["schedules"],
        "surrogate": settings["surrogate"],
        **summed_up(sets),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for other, gain in result["gain"].items():
        low, high = gain["interval"]
        print(f"over {other}: {gain['value']:+.1%} [{low:+.1%}, {high:+.1%}]")


if __name__ == "__main__":
    main()
