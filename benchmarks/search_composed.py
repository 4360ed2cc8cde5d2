"""What plans that a search composed are worth on held-out prompts, beside everything plain, and what ships of them.

    python benchmarks/search_composed.py FOLDER --prompts
    fastdit search --out FOLDER --prompts FOLDER/prompts.txt --space schedule,order,ras,steps,solver \
        --scheduler recommended --steps 28 --quality truth --guidance 2.5 --height 64 --width 64 --unit step \
        --even-steps --race 4 --surrogate 12 --cost true-macs --population 64 --batch 12 --image-seed 5000 ...
    python benchmarks/search_composed.py FOLDER [--pictures 96] [--of-areas 48] [--drawn build/testbed] [--ship]

The search that ships also began with 14 plans (--seed-schedule) along the front of a shorter one: 6 generations of 48,
without --scheduler and --race.

The model in the package at 64 pixels, guidance 2.5, full and open captions of `bed.py`'s held-out prompts. A plan is a
schedule with its orders, RAS's ratio, a number of steps and a solver. Errors are relative distances of latents to
Heun's 60 steps. What was drawn is kept, so a run that was interrupted goes on.

* The area (`areas.py`) of the searched front, of about as many of its plans as others have arms, and of the schedules
  in it: those plans of all steps without RAS, as ECAD evolves them. Beside them stand evenly spread whole steps whose
  others are drawn by order 1, and plain steps.
* At each speed-up, of the plans of the front that take no more than that part of the time of so many plain steps of
  Euler on the same ops, the one that was best on the search's own pictures is judged as the testbed's arms are
  (`testbed.py`): paired, against plain steps of equal arithmetic, the most that take no longer, and one more; and,
  where it computes whole steps alone, against AB2 on the very levels of those.

--ship writes `fastdit/presets/tiny`: of the front's schedules, the best on the search's own pictures with at most 1/2,
1/3 and 1/4 of the arithmetic, and the ledger's summary. These shares were fixed before any was drawn again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np

import areas
import fastdit
import testbed
from arms import dense
from bed import BATCH, Bed
from fastdit import tiny
from fastdit.evaluate.arms import TRUTH, Arm
from fastdit.patch import find_adapter
from fastdit.search.genome import Genome
from fastdit.search.knobs import OWN, Run
from fastdit.search.result import FRONT, SUMMARY
from fastdit.spec import ModelSpec
from subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/search-composed-cpu.json"
PLOT = ROOT / "docs/search-composed.png"
SHIPPED = ROOT / "fastdit/presets/tiny"
PROMPTS = 12  # that judge a plan
SEARCHED, SCHEDULES = "searched front", "its schedules"
SPEEDUPS = (2, 3)
TIMED = (1 / 5, 1 / 2)  # of the arithmetic, where plans of these speed-ups lie
PRESETS = {"fast": 1 / 2, "faster": 1 / 3, "fastest": 1 / 4}  # most of the arithmetic
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
    """The searched front: name of an arm -> the arm, and what the search says of it.

    Plans of fewer evaluations than any other arm are left out: nobody would use them.
    """
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    least = (
        0.99 * min(areas.COUNTS) / summary["settings"]["steps"] * summary["uncached"]["true-macs"]
    )
    found = {}
    for point in summary["front"]:
        if point["true-macs"] < least:
            continue
        run = Run(point["steps"], point["ratio"], point["solver"])
        schedule = fastdit.Schedule.load(folder / FRONT / f"{point['name']}.json")
        arm = planned(run, schedule, spec)
        found[f"{folder.name} {point['key'][:12]}, plan"] = (
            arm,
            {**point, "text": as_text(schedule, spec)},
        )
    return found


def as_text(schedule: fastdit.Schedule, spec: ModelSpec) -> str:
    """A letter for each step: x computes, 0 to 2 draws by that order, p computes a part or draws by several."""
    bits, orders = rows_of(schedule, spec)
    letters = [
        "x" if row.all() else "p" if row.any() or (by != by[0]).any() else str(by[0])
        for row, by in zip(bits, orders, strict=True)
    ]
    return "".join(letters)


def is_schedule(plan: Mapping[str, Any], steps: int) -> bool:
    """Whether a plan is a schedule alone, of all steps."""
    return plan["ratio"] == 1 and plan["steps"] == steps


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


def thinned(plans: Mapping[str, Mapping[str, Any]], kept: Collection[str]) -> list[str]:
    """Of the plans as many as `areas.COUNTS`, evenly along the front, and those that are kept in any case."""
    dearest = sorted(plans, key=lambda arm: plans[arm]["true-macs"])
    places = np.linspace(0, len(dearest) - 1, min(len(dearest), len(areas.COUNTS))).round()
    chosen = {dearest[int(place)] for place in places} | set(kept)
    return [arm for arm in plans if arm in chosen]


def presets_of(
    plans: Mapping[str, Mapping[str, Any]], steps: int, uncached: float
) -> dict[str, str]:
    """Preset -> the arm of the best schedule within its share of the arithmetic, by what the search says."""
    found = {}
    for name, share in PRESETS.items():
        within = [
            arm
            for arm, plan in plans.items()
            if is_schedule(plan, steps) and plan["true-macs"] <= share * uncached
        ]
        found[name] = min(within, key=lambda arm: plans[arm]["loss"])
    return found


def areas_of(
    bed: Bed, arms: Mapping[str, Arm], plans: Mapping[str, Any], steps: int, pictures: int
) -> dict[str, Any]:
    """The area of the front and of its schedules, and each arm's error and share of the arithmetic."""
    truth = bed.latents("truth", TRUTH, pictures)
    spec = find_adapter(bed.pipe.transformer).spec(bed.pipe.transformer)
    sets = {
        SEARCHED: dict(arms),
        areas.EVEN: areas.evenly_spread(spec, steps),
        areas.PLAIN: areas.plain_steps(steps),
    }
    found = {name: areas.measured(bed, group, truth, steps) for name, group in sets.items()}
    alone = {n: c for n, c in found[SEARCHED].items() if is_schedule(plans[n], steps)}
    beside = {name: found[name] for name in (areas.EVEN, areas.PLAIN)}
    return {
        SEARCHED: areas.summed_up(found),
        SCHEDULES: areas.summed_up({SCHEDULES: alone, **beside}),
        "arms": {name: list(c.values) for group in found.values() for name, c in group.items()},
    }


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The sets of each captions on the axes of the area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (captions, area) in zip(axes, found.items(), strict=True):
        fronts = area[SEARCHED]["fronts"]
        for style, (name, front) in zip(("o-", "s--", "x:"), fronts.items(), strict=True):
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


def ship(folder: Path, plans: Mapping[str, Any], presets: Mapping[str, str], target: Path) -> None:
    """Write the presets and the ledger's summary into the package."""
    for name, arm in presets.items():
        copyfile(folder / FRONT / f"{plans[arm]['name']}.json", target / f"{name}.json")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    summary.pop("measured")
    text = json.dumps(summary, indent=1, sort_keys=True) + "\n"
    (target / "ledger" / "summary.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Draw what is missing, compare, and write the result file and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the result of `fastdit search`")
    parser.add_argument("--prompts", action="store_true", help="only write those of the search")
    parser.add_argument("--pictures", type=int, default=96, help="of each captions")
    parser.add_argument("--of-areas", type=int, help="pictures of the areas; as many if left out")
    parser.add_argument("--drawn", type=Path, default=Path("build/testbed"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--ship", action="store_true", help="write fastdit/presets/tiny")
    options = parser.parse_args()
    if options.prompts:
        options.folder.mkdir(parents=True, exist_ok=True)
        texts = SUBJECTS["tiny"].training(PROMPTS)
        (options.folder / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return
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
    beds = [
        Bed(pipe, captions, areas.GUIDANCE, areas.SIZE, options.drawn)
        for captions in areas.CAPTIONS
    ]
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    front = front_of(options.folder, spec)
    arms = {name: arm for name, (arm, _) in front.items()}
    plans = {name: plan for name, (_, plan) in front.items()}
    uncached = summary["uncached"]["true-macs"]
    presets = presets_of(plans, steps, uncached)
    if options.ship:
        ship(options.folder, plans, presets, SHIPPED)
    whole = dense(steps)
    near = {n: front[n] for n in front if TIMED[0] <= plans[n]["true-macs"] / uncached <= TIMED[1]}
    clock = testbed.timed(
        beds[0],
        {**{name: arms[name] for name in near}, whole[0]: whole[1]},
        options.folder / f"seconds-{areas.SIZE}.json",
    )
    picks = picked(near, clock["seconds"], clock["seconds"][whole[0]])
    chosen = {name: arms[name] for name in picks}
    others, beside = testbed.baselines(chosen, beds[0], clock["seconds"])
    some = {name: arms[name] for name in thinned(plans, {*picks, *presets.values()})}
    found = {bed.captions: areas_of(bed, some, plans, steps, of_areas) for bed in beds}
    result = {
        "machine": clock["machine"],
        "steps": steps,
        "pictures": options.pictures,
        "of_areas": of_areas,
        "timed_batch": testbed.TIMED,
        "search": {
            "pictures": len(settings["prompts"]) * settings["images_per_prompt"],
            "given": len(settings["given"]),
            "generations": summary["generations"],
            "population": settings["population"],
            "schedules": summary["schedules"],
            "surrogate": settings["surrogate"],
            "orders": settings["orders"],
            "knobs": settings["knobs"],
        },
        "areas": {
            captions: {name: area[name] for name in (SEARCHED, SCHEDULES)}
            for captions, area in found.items()
        },
        "presets": {
            name: {
                **{key: plans[arm][key] for key in ("key", "solver", "text")},
                "errors": {captions: area["arms"][arm][0] for captions, area in found.items()},
                "share": next(iter(found.values()))["arms"][arm][1],
            }
            for name, arm in presets.items()
        },
        "study": "composed",
        "dense": clock["seconds"][whole[0]],
        "seconds": clock["seconds"],
        "plans": {name: {"speedup": picks[name], **plans[name]} for name in picks},
        "evaluations": {n: beds[0].arithmetic(arm) for n, arm in {**chosen, **others}.items()},
        "beside": beside,
        "truth_steps": TRUTH.steps,
        "conditions": [
            testbed.judge(bed, chosen, others, beside, options.pictures, TRUTH.steps)
            for bed in beds
        ],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result["areas"], options.plot)
    for captions, area in result["areas"].items():
        for name, one in area.items():
            for other, gain in one["gain"].items():
                low, high = gain["interval"]
                print(
                    f"{captions}, {name} over {other}: {gain['value']:+.1%} [{low:+.1%}, {high:+.1%}]"
                )


if __name__ == "__main__":
    main()
