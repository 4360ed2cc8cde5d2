"""What a searched front is worth on prompts that the search never saw, and what ships of it.

    fastdit search --out FOLDER --generations 24 --population 24 --images-per-prompt 2 --race 2 --unit step \
        --surrogate 20 --cost true-macs
    python benchmarks/search_front.py FOLDER --held-out 79 790000 [--prompts 16] [--workers 2] [--ship]

Four sets of schedules of the embedded model stand beside each other: the front that the search found; its first
population; as many random mutants of that as the search measured schedules, made by the search's own mutation without
its selection and crossover, and found in the same races by the same judge (`FOLDER/random`); and, as what anybody would
do by hand, every number of whole steps, evenly spread. All non-dominated ones are drawn again from held-out prompts and
other noise, in `FOLDER/heldout`. Killed, it goes on where it was.

What is compared, fixed before the search was run: the area between a set and the corner of its plot, `docs/search.png`.
Its axes are the true MACs as a share of the uncached run's, from 0 to 1, and the decimal logarithm of the loss; its
corner is the uncached run's cost and the loss of the worst seed on the held-out pictures. The logarithm, because the
losses span two decades: with the loss itself, nearly all of the area is the box of the worst seed, and the schedules
that anybody would use, closer to the uncached picture than a tenth of that, are hardly in it. Intervals are 95 %
bootstrap intervals over the held-out pictures, the same draws for all sets. Two further areas are reported, labelled,
with the loss itself for the logarithm: up to the same corner, and up to the loss of every(5), the coarsest grid of the
paper's tables.

More than one search was compared on the default held-out pictures (`benchmarks/results/search-earlier-cpu.json`), and
one on those of the seeds 78 and 780000; what they showed led to the next. --held-out takes the seeds of other prompts
and other noise. Those above were chosen before the search was made whose front ships, and looked at once.

How the area grew with the schedules measured, on the search's own pictures, is written down too; --beside names the
folder of the same search made without --surrogate, finished or not.

--ship writes `fastdit/presets/tiny`: of the searched front, by the search's own losses, the best schedules with at most
1/3, 1/4 and 1/6 of the uncached multiply-accumulates, and the ledger's summary. These shares were chosen with an
earlier front in view; for this one they were fixed beforehand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np

from fastdit import tiny
from fastdit.search import Knobs, Operators, Settings, Work, moves
from fastdit.search.archive import Archive, Candidate
from fastdit.search.baselines import UNCACHED, Baseline, measure_baselines
from fastdit.search.evolve import LEDGER, Search, evolve
from fastdit.search.front import corner, growth, hypervolume, non_dominated, on_axes
from fastdit.search.genome import Genome
from fastdit.search.ledger import Ledger
from fastdit.search.plot import save_plot
from fastdit.search.quality import average
from fastdit.search.result import SUMMARY, schedule_of
from fastdit.search.seeds import evenly_spread_steps
from fastdit.search.workers import Processes, Workers
from machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
AREA = "logarithmic loss"  # the comparison; the others are further readings
PRESETS = {"fast": 1 / 3, "faster": 1 / 4, "fastest": 1 / 6}  # most of the uncached cost
TIMES = (1, 2, 4, 8)  # how often a random mutant is mutated
BATCH = 24
RESAMPLES = 2000
HELD_OUT = (2, 90_000)  # seeds of prompts and of the first picture's noise


def settings_of(folder: Path) -> tuple[Work, Settings]:
    """How the search of a folder was made, from its ledger's first line."""
    with (folder / LEDGER).open(encoding="utf-8") as lines:
        identity = json.loads(next(lines))["identity"]
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    work = {name: identity[name] for name in Work.__dataclass_fields__ if name in identity}
    work["prompts"] = tuple(work["prompts"])
    work["knobs"] = Knobs(**work.get("knobs", {}))
    settings = Settings(
        summary["generations"],
        identity["population"],
        tuple(identity["costs"]),
        identity["race"],
        Operators(**identity["operators"]),
        even_steps=bool(identity["given"]),
        surrogate=identity["surrogate"],
    )
    return Work(**work), settings


def first_population(search: Search) -> list[Candidate]:
    """The seeds that were measured, the uncached run left out."""
    count = search.generations[0]["fresh"]
    return [c for c in list(search.archive.seen.values())[:count] if c.reused]


def random_mutants(
    folder: Path, search: Search, identity: Mapping[str, Any], count: int
) -> Archive:
    """As many schedules as the search measured: its seeds, and random mutants of random seeds."""
    work, settings = settings_of(folder)
    (folder / "random").mkdir(exist_ok=True)
    if not (folder / "random" / LEDGER).exists():  # what is measured is measured
        copyfile(folder / LEDGER, folder / "random" / LEDGER)
    with (
        closing(Processes(tiny.load_pipeline, work, count)) as workers,
        closing(Ledger(folder / "random" / LEDGER, identity)) as ledger,
    ):
        return mutants_of(search, ledger, workers, work, settings)


def mutants_of(
    search: Search, ledger: Ledger, workers: Workers, work: Work, settings: Settings
) -> Archive:
    """The same by given workers, with all that was measured."""
    archive = Archive(search.genome, work, settings.costs, settings.race, ledger, workers)
    wanted = search.generations[-1]["fresh"]
    count = search.generations[0]["fresh"]
    seeds = [c.vector for c in list(search.archive.seen.values())[:count]]
    archive.evaluate(np.stack(seeds))
    rng, mutate = np.random.default_rng(1), mutation(search.genome, settings.operators)
    while len(archive.seen) < wanted:
        parents = rng.integers(len(seeds), size=min(BATCH, wanted - len(archive.seen)))
        children = np.stack([seeds[parent] for parent in parents])
        for child, times in zip(children, rng.choice(TIMES, len(children)), strict=True):
            for _ in range(times):
                mutate(child, rng)
        archive.evaluate(children)
        print(f"random mutants: {len(archive.seen)} of {wanted}", flush=True)
    return archive


def mutation(
    genome: Genome, operators: Operators
) -> Callable[[np.ndarray, np.random.Generator], None]:
    """What changes a vector, bool [genome size], in place, as the search's mutation changes one that it changes."""
    shape, parts = (genome.steps, len(genome.components)), moves.parts_of(genome.components)

    def by_steps(vector: np.ndarray, rng: np.random.Generator) -> None:
        moves.move(vector.reshape(shape), parts, rng)

    def by_bits(vector: np.ndarray, rng: np.random.Generator) -> None:
        vector ^= rng.random(vector.size) < operators.mutation_bits / vector.size

    return by_steps if operators.unit == "step" else by_bits


def area_after(
    schedules: Sequence[Candidate], seeds: int, uncached: Sequence[float]
) -> list[tuple[int, float]]:
    """(schedules measured, area of their front) after the `seeds`, every batch and all; the search's own corner."""
    outside = (np.inf,) * (1 + len(uncached))  # the uncached run's place
    values = on_axes([c.values if c.reused else outside for c in schedules], uncached, True)
    first = values[:seeds]
    areas = growth(values, corner(first[np.isfinite(first[:, 0])]))
    counts = [*range(seeds, len(areas), BATCH), len(areas)]
    return [(count, float(areas[count - 1])) for count in counts]


def area_by_generation(ledger: Path) -> list[tuple[int, float]]:
    """The same of a search, as its ledger has it."""
    with ledger.open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines if line.startswith('{"generation"')]
    return [(entry["fresh"], entry["hypervolume"]) for entry in entries]


def compare(
    sets: dict[str, Sequence[Candidate]],
    uncached: Sequence[float],
    reference: Sequence[float],
    logarithmic: bool = True,
    resamples: int = RESAMPLES,
    quality: str = "paired",
) -> dict[str, Any]:
    """Hypervolumes of the sets, and how far the first exceeds each other one, over draws of the items.

    Args:
        sets: Name -> what was measured.
        uncached: The uncached run's costs.
        reference: The corner, on the axes of `on_axes`.
        logarithmic: Whether the axis of the loss is.
        resamples: Draws of the bootstrap.
        quality: Whose mean of losses is taken.
    """
    losses = {name: np.array([c.losses for c in group]) for name, group in sets.items()}
    costs = {name: np.array([c.values[1:] for c in group]) for name, group in sets.items()}
    items = next(iter(losses.values())).shape[1]

    def volume(name: str, chosen: np.ndarray) -> float:
        mean = [average(quality, row) for row in losses[name][:, chosen]]
        values = np.column_stack([mean, costs[name]])
        return hypervolume(on_axes(values, uncached, logarithmic), reference)

    rng = np.random.default_rng(0)
    draws = [rng.integers(items, size=items) for _ in range(resamples)]
    volumes = {name: volume(name, np.arange(items)) for name in sets}
    drawn = {name: np.array([volume(name, draw) for draw in draws]) for name in sets}
    first, *others = sets
    return {
        "hypervolume": volumes,
        "gain": {
            other: {
                "value": volumes[first] / volumes[other] - 1,
                "interval": np.quantile(drawn[first] / drawn[other] - 1, (0.025, 0.975)).tolist(),
            }
            for other in others
        },
    }


def held_out_prompts(count: int, seed: int = HELD_OUT[0]) -> tuple[str, ...]:
    """Scenes that neither training nor search saw, one and two objects in turn."""
    kinds = [tiny.prompts(count // 2, split="test", objects=k, seed=seed) for k in (1, 2)]
    return tuple(prompt for pair in zip(*kinds, strict=True) for prompt in pair)


def pick(front: Sequence[Candidate], uncached: float) -> dict[str, Candidate]:
    """Preset -> the best schedule of the front within its share of the uncached cost."""
    found = {}
    for name, share in PRESETS.items():
        within = [c for c in front if c.values[1] <= share * uncached]
        if within:
            found[name] = min(within, key=lambda candidate: candidate.values[0])
    return found


def non_dominated_of(group: Sequence[Candidate]) -> list[Candidate]:
    complete = [candidate for candidate in group if candidate.complete]
    return [complete[index] for index in non_dominated(np.array([c.values for c in complete]))]


def study(
    folder: Path,
    prompts: int,
    count: int,
    control: bool = True,
    beside: Path | None = None,
    held_out: tuple[int, int] = HELD_OUT,
) -> dict[str, Any]:
    """Everything, resumed from the ledgers of `folder`; without the `control`, no random mutants."""
    work, settings = settings_of(folder)
    factory = tiny.load_pipeline
    with closing(Processes(factory, work, count)) as workers:
        search, ledger = evolve(folder, work, settings, (), workers)
        ledger.close()
    seeds = first_population(search)
    groups = {"searched front": list(search.front), "seeds": non_dominated_of(seeds)}
    dense = tuple(search.uncached[name] for name in settings.costs)
    presets = pick(search.front, dense[0])
    areas_after = {"searched front": area_by_generation(folder / LEDGER)}
    if beside is not None:
        areas_after["without the surrogate"] = area_by_generation(beside / LEDGER)

    unseen = replace(work, prompts=held_out_prompts(prompts, held_out[0]), seed=held_out[1])
    unseen_folder = folder / ("heldout" if held_out == HELD_OUT else f"heldout-{held_out[0]}")
    unseen_folder.mkdir(exist_ok=True)
    identity = {**unseen.described(), "model": ledger.identity["model"]}
    with (
        closing(Processes(factory, unseen, count)) as workers,
        closing(Ledger(unseen_folder / LEDGER, identity)) as held,
    ):
        archive = Archive(search.genome, unseen, settings.costs, 0, held, workers)

        def progress(done: int, total: int) -> None:
            print(f"held out: {done} of {total}", flush=True)

        def draw(group: Sequence[Candidate]) -> list[Candidate]:
            return archive.evaluate(np.stack([c.vector for c in group]), progress)

        for group in groups.values():
            draw(group)
        worst = draw(seeds)
        spread = archive.evaluate(np.stack(evenly_spread_steps(search.genome)), progress)
        baselines = measure_baselines(archive, progress)
        if control:
            mutants = random_mutants(folder, search, ledger.identity, count)
            areas_after["random mutants"] = area_after(
                list(mutants.seen.values()), search.generations[0]["fresh"], dense
            )
            groups["random mutants"] = mutants.front()
            draw(groups["random mutants"])
    sets = {name: [archive.seen[c.key] for c in group] for name, group in groups.items()}
    sets["evenly spread steps"] = non_dominated_of(spread)
    worst_seed = np.array([c.values for c in worst])
    every_5 = max(b.values[0] for b in baselines if b.name == "every 5")
    ones = [1.0] * len(dense)
    areas = {
        AREA: compare(sets, dense, corner(on_axes(worst_seed, dense, True))),
        "linear loss": compare(sets, dense, corner(on_axes(worst_seed, dense, False)), False),
        "linear loss below every(5)": compare(sets, dense, (every_5, *ones), False),
    }
    return {
        "search": search,
        "identity": ledger.identity,
        "presets": presets,
        "sets": sets,
        "baselines": baselines,
        "held_out": {name: archive.seen[c.key] for name, c in presets.items()},
        "found": {
            "machine": describe_machine(),
            "pictures": unseen.items,
            "held_out": list(held_out),
            "search_pictures": work.items,
            "population": settings.population,
            "schedules": search.generations[-1]["fresh"],
            "generations": len(search.generations) - 1,
            "surrogate": settings.surrogate,
            "area after schedules": areas_after,
            "corner": {"worst seed": float(worst_seed[:, 0].max()), "every(5)": every_5},
            "areas": areas,
        },
    }


def as_rows(found: dict[str, Any]) -> dict[str, Any]:
    """The result file: hypervolumes, presets and baselines on the held-out pictures."""
    dense = uncached_cost(found["baselines"])
    return {
        **found["found"],
        "presets": {
            name: {"loss": c.values[0], "cost": c.values[1] / dense, "key": c.key}
            for name, c in found["held_out"].items()
        },
        "baselines": [
            {
                "group": b.group,
                "name": b.name,
                "loss": b.values[0],
                "cost": b.values[1] / dense,
            }
            for b in found["baselines"]
        ],
        "fronts": {
            name: [[c.values[0], c.values[1] / dense] for c in group]
            for name, group in found["sets"].items()
        },
    }


def uncached_cost(baselines: Sequence[Baseline]) -> float:
    return next(b.values[1] for b in baselines if b.group == UNCACHED)


def ship(found: dict[str, Any], folder: Path, target: Path) -> None:
    """Write the presets and the ledger's summary into the package."""
    target.mkdir(parents=True, exist_ok=True)
    for name, candidate in found["presets"].items():
        schedule_of(found["search"], candidate, found["identity"]).save(target / f"{name}.json")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    summary.pop("measured")
    text = json.dumps(summary, indent=1, sort_keys=True) + "\n"
    (target / "ledger").mkdir(exist_ok=True)
    (target / "ledger" / "summary.json").write_text(text, encoding="utf-8")


def save_picture(found: dict[str, Any], path: Path) -> None:
    """The sets on the held-out pictures, beside what nobody searched for."""
    sets = {name: [c.values for c in group] for name, group in found["sets"].items()}
    save_plot(
        path,
        f"the model in the package, {found['search'].genome.steps} steps, "
        f"{found['found']['pictures']} held-out pictures",
        sets.pop("searched front"),
        found["baselines"],
        uncached_cost(found["baselines"]),
        ("true MACs", "relative L2 to the uncached picture"),
        sets,
    )


def main() -> None:
    """Compare, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the result of `fastdit search`")
    parser.add_argument("--beside", type=Path, help="the same search without the surrogate")
    parser.add_argument("--prompts", type=int, default=16, help="held out; an even number")
    parser.add_argument(
        "--held-out",
        type=int,
        nargs=2,
        default=HELD_OUT,
        metavar=("PROMPTS", "NOISE"),
        help="seeds",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--without-control",
        action="store_true",
        help="leave the random mutants out, half of the work",
    )
    parser.add_argument("--out", type=Path, help="a file instead of those of the repository")
    parser.add_argument("--ship", action="store_true", help="write fastdit/presets/tiny")
    arguments = parser.parse_args()
    found = study(
        arguments.folder,
        arguments.prompts,
        arguments.workers,
        not arguments.without_control,
        arguments.beside,
        tuple(arguments.held_out),
    )
    out = arguments.out or ROOT / "benchmarks/results/search-cpu.json"
    out.write_text(json.dumps(as_rows(found), indent=1) + "\n", encoding="utf-8")
    if arguments.out is None:
        save_picture(found, ROOT / "docs/search.png")
    for area, compared in found["found"]["areas"].items():
        for other, gain in compared["gain"].items():
            low, high = gain["interval"]
            print(f"{area}: over {other} {gain['value']:+.1%} [{low:+.1%}, {high:+.1%}]")
    if arguments.ship:
        ship(found, arguments.folder, ROOT / "fastdit/presets/tiny")


if __name__ == "__main__":
    main()
