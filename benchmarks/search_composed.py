"""What plans that a search composed are worth on held-out prompts, beside everything plain.

    fastdit search --out FOLDER --space schedule,order,ras,steps,solver --steps 28 --quality truth --guidance 2.5 \
        --height 64 --width 64 --unit step --surrogate 12 --cost true-macs ...
    python benchmarks/search_composed.py FOLDER [--pictures 96] [--of-areas 48] [--drawn build/testbed]

The model in the package at 64 pixels, guidance 2.5, full and open captions of `bed.py`'s held-out prompts. A plan is a
schedule with its orders, RAS's ratio, a number of steps and a solver. Errors are relative distances of latents to
Heun's 60 steps. What was drawn is kept, so a run that was interrupted goes on.

* The area between a set and a corner, for each captions. Its axes are the share of the arithmetic of the most steps
  searched and the decimal logarithm of the geometric mean of the errors; its corner is 1 and the worst error of evenly
  spread steps. The searched front stands beside evenly spread whole steps whose others are drawn by order 1, under both
  solvers, and beside plain steps of three. Intervals are 95 % bootstrap intervals over the prompts, the same draws for
  all sets.
* At each speed-up, of the plans of the front that take no more than that part of the time of so many plain steps of
  Euler, the one that was best on the search's own pictures is judged as the testbed's arms are (`testbed.py`): paired,
  against plain steps of equal arithmetic, the most that take no longer, and one more; and, where it computes whole
  steps alone, against AB2 on the very levels of those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import fastdit
import testbed
from arms import SOLVERS, TRUTH, Arm, plain
from bed import BATCH, Bed
from fastdit import tiny
from fastdit.patch import find_adapter
from fastdit.search.archive import Candidate
from fastdit.search.genome import Genome
from fastdit.search.knobs import OWN, Run
from fastdit.search.quality import average
from fastdit.search.result import FRONT, SUMMARY
from fastdit.search.seeds import evenly_spread_steps
from fastdit.spec import ModelSpec
from search_forecast import CAPTIONS, EVEN, GUIDANCE, PLAIN, SEARCHED, SIZE, summed_up
from testbed import away

RESULT = Path(__file__).parent / "results/search-composed-cpu.json"
PLOT = Path(__file__).resolve().parents[1] / "docs/search-composed.png"
FEWEST = 3  # evaluations of an arm
EVEN_COUNTS = 8
SPEEDUPS = (2, 3)
ARM_SOLVERS = {OWN: "stock", "recommended": "unipc"}


def rows_of(schedule: fastdit.Schedule, spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    """What a schedule computes, and by which order it draws the rest, [steps, components that there are]."""
    genome = Genome(spec, schedule.steps, (0, 1, 2))
    return genome.parts(genome.vector(schedule))


def planned(run: Run, schedule: fastdit.Schedule, spec: ModelSpec) -> Arm:
    """A plan as an arm of the testbed; its nodes are told where the model runs as a whole or not at all."""
    methods = [fastdit.Cached(schedule), *([] if run.ras is None else [run.ras])]
    bits, orders = rows_of(schedule, spec)
    drawn = ~bits.any(axis=1) & (orders == orders[:, :1]).all(axis=1) & (orders[:, 0] > 0)
    computed = bits.all(axis=1)
    whole = run.ras is None and (computed | drawn).all()
    nodes = tuple(np.flatnonzero(computed).tolist()) if whole else ()
    return Arm(ARM_SOLVERS[run.solver], run.steps, lambda pipe, steps: methods, nodes=nodes)


def front_of(folder: Path, spec: ModelSpec) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """The searched front: name of an arm -> the arm, and what the search says of it."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    found = {}
    for point in summary["front"]:
        run = Run(point["steps"], point["ratio"], point["solver"])
        schedule = fastdit.Schedule.load(folder / FRONT / f"{point['name']}.json")
        arm = planned(run, schedule, spec)
        found[f"{folder.name} {point['key'][:12]}, plan"] = (
            arm,
            {**point, **as_text(schedule, spec)},
        )
    return found


def as_text(schedule: fastdit.Schedule, spec: ModelSpec) -> dict[str, str]:
    """A letter for each step: x computes, 0 to 2 draws by that order, p computes a part or draws by several."""
    bits, orders = rows_of(schedule, spec)
    letters = [
        "x" if row.all() else "p" if row.any() or (by != by[0]).any() else str(by[0])
        for row, by in zip(bits, orders, strict=True)
    ]
    return {"text": "".join(letters)}


def sets_of(front: Mapping[str, Arm], spec: ModelSpec, steps: int) -> dict[str, dict[str, Arm]]:
    """All sets: name -> name of an arm -> the arm."""
    genome = Genome(spec, steps, (0, 1))
    vectors = evenly_spread_steps(genome, 1)
    even = {
        f"{arm} {steps}, {count} evenly, order 1": planned(
            Run(steps, 1.0, solver), genome.schedule(vectors[count - 1]), spec
        )
        for solver, arm in ARM_SOLVERS.items()
        for count in sorted(set(np.linspace(FEWEST, steps - 1, EVEN_COUNTS).round().astype(int)))
    }
    counts = [*range(FEWEST, 21), steps]
    few = dict(plain(solver, count) for solver in SOLVERS for count in counts)
    return {SEARCHED: dict(front), EVEN: even, PLAIN: few}


def errors_of(
    bed: Bed, arms: Mapping[str, Arm], truth: np.ndarray, steps: int, pictures: int
) -> dict[str, Candidate]:
    """Errors of each picture, and the share of the arithmetic."""
    found = {}
    for name, arm in arms.items():
        errors = away(bed.latents(name, arm, pictures), truth)
        values = (average("truth", errors), bed.arithmetic(arm) / steps)
        found[name] = Candidate(name, np.ones(1, dtype=bool), tuple(errors), values, 1, True)
        print(
            f"{bed.captions}, {name}: error {values[0]:.4f}, {values[1]:.0%}",
            flush=True,
        )
    return found


def picked(
    front: Mapping[str, tuple[Arm, dict[str, Any]]],
    seconds: Mapping[str, float],
    unpatched: float,
) -> dict[str, int]:
    """Arm -> speed-up: that with the least loss on the search's pictures of those that take no more of the time."""
    found = {}
    for speedup in SPEEDUPS:
        within = [name for name in front if seconds[name] <= unpatched / speedup]
        if within:
            found[min(within, key=lambda name: front[name][1]["loss"])] = speedup
    return found


def plot(areas: Mapping[str, Any], path: Path) -> None:
    """The sets of each captions on the axes of the area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(areas), 4.2), layout="constrained")
    axes = figure.subplots(1, len(areas), squeeze=False)[0]
    for axis, (captions, area) in zip(axes, areas.items(), strict=True):
        for style, (name, front) in zip(("o-", "s--", "x:"), area["fronts"].items(), strict=True):
            axis.plot([row[2] for row in front], [row[1] for row in front], style, ms=4, label=name)
        axis.set(
            title=f"{captions} captions",
            yscale="log",
            xlabel="share of the arithmetic",
            ylabel="distance to the solution, geometric mean",
        )
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw what is missing, compare, and write the result file and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the result of `fastdit search`")
    parser.add_argument("--pictures", type=int, default=96, help="of each captions")
    parser.add_argument("--of-areas", type=int, help="pictures of the areas; as many if left out")
    parser.add_argument("--drawn", type=Path, default=Path("build/testbed"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    of_areas = options.of_areas or options.pictures
    for name, count in (("--pictures", options.pictures), ("--of-areas", of_areas)):
        if count % BATCH:
            parser.error(f"{name} must be a multiple of {BATCH}, got {count}")
    summary = json.loads((options.folder / SUMMARY).read_text(encoding="utf-8"))
    settings = summary["settings"]
    steps = settings["steps"]
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    beds = [Bed(pipe, captions, GUIDANCE, SIZE, options.drawn) for captions in CAPTIONS]
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    front = front_of(options.folder, spec)
    arms = {name: arm for name, (arm, _) in front.items()}
    whole = plain("euler", steps)
    clock = testbed.timed(
        beds[0], {**arms, whole[0]: whole[1]}, options.folder / f"seconds-{SIZE}.json"
    )
    picks = picked(front, clock["seconds"], clock["seconds"][whole[0]])
    chosen = {name: arms[name] for name in picks}
    others, beside = testbed.baselines(chosen, beds[0], clock["seconds"])
    areas = {}
    for bed in beds:
        truth = bed.latents("truth", TRUTH, of_areas)
        areas[bed.captions] = summed_up(
            {
                name: errors_of(bed, group, truth, steps, of_areas)
                for name, group in sets_of(arms, spec, steps).items()
            },
            "truth",
        )
    result = {
        "machine": clock["machine"],
        "steps": steps,
        "pictures": options.pictures,
        "of_areas": of_areas,
        "timed_batch": testbed.TIMED,
        "search": {
            "pictures": len(settings["prompts"]) * settings["images_per_prompt"],
            "generations": summary["generations"],
            "population": settings["population"],
            "schedules": summary["schedules"],
            "surrogate": settings["surrogate"],
            "orders": settings["orders"],
            "knobs": settings["knobs"],
        },
        "areas": areas,
        "study": "composed",
        "unpatched": clock["seconds"][whole[0]],
        "seconds": clock["seconds"],
        "plans": {name: {"speedup": picks[name], **front[name][1]} for name in picks},
        "evaluations": {n: beds[0].arithmetic(arm) for n, arm in {**chosen, **others}.items()},
        "beside": beside,
        "solvers": SOLVERS,
        "truth_steps": TRUTH.steps,
        "conditions": [
            testbed.judge(bed, chosen, others, beside, options.pictures, TRUTH.steps)
            for bed in beds
        ],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(areas, options.plot)
    for captions, area in areas.items():
        for other, gain in area["gain"].items():
            low, high = gain["interval"]
            print(f"{captions}, over {other}: {gain['value']:+.1%} [{low:+.1%}, {high:+.1%}]")


if __name__ == "__main__":
    main()
