"""The folder that a search leaves behind.

``front/NN.json`` are the schedules of the front, 01 the best, with ``NN.png``, its raster, and ``ecad/NN.json``, the
same in the layout of the paper's files, where that has a place for the model's blocks. ``pareto.png`` shows them beside
the baselines, and ``search.json`` holds settings, versions, counts, how the hypervolume grew, and the objectives of
every schedule in the order they were measured, those stopped in a race with the loss they were given. ``ledger.jsonl``
has every measurement.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdit import __version__, files
from fastdit.account.raster import Raster
from fastdit.cli.raster import save_raster
from fastdit.errors import ScheduleError
from fastdit.schedules.schedule import Schedule
from fastdit.search.archive import Candidate
from fastdit.search.baselines import UNCACHED, Baseline
from fastdit.search.evolve import LEDGER, Search
from fastdit.search.front import non_dominated
from fastdit.search.plot import save_plot

SUMMARY, PLOT, FRONT, ECAD_LAYOUT = "search.json", "pareto.png", "front", "ecad"
PACKAGES = ("pymoo", "numpy", "torch", "diffusers")


def write_result(
    folder: Path, search: Search, baselines: Sequence[Baseline], identity: Mapping[str, Any]
) -> None:
    """This writes all but the ledger, which is there already; what an earlier search left is replaced."""
    schedules = folder / FRONT
    for path in (schedules, schedules / ECAD_LAYOUT):
        files.make_folder(path, "out")
        for old in (*path.glob("*.json"), *path.glob("*.png")):
            old.unlink()
    names = [f"{index + 1:02d}" for index in range(len(search.front))]
    for name, candidate in zip(names, search.front, strict=True):
        schedule = schedule_of(search, candidate, identity)
        schedule.save(schedules / f"{name}.json")
        save_raster(Raster.of_schedule(schedule), schedules / f"{name}.png", name)
        with suppress(ScheduleError):  # that layout has no place for every block kind
            schedule.save(schedules / ECAD_LAYOUT / f"{name}.json", layout="ecad")
    _write(folder / SUMMARY, summary(search, baselines, identity, names))
    costs = search.archive.costs
    dense = next(b for b in baselines if b.group == UNCACHED).values[1]
    save_plot(
        folder / PLOT,
        f"{search.genome.spec.family}, {search.archive.work.steps} steps of "
        f"{' and '.join(search.schedulers.values())}, "
        f"{len(search.archive.seen)} schedules measured",
        [candidate.values for candidate in search.front],
        baselines,
        dense,
        (costs[0], f"loss ({identity['quality']})"),
        {"front of the seeds": _front_of_seeds(search)},
    )


def schedule_of(search: Search, candidate: Candidate, identity: Mapping[str, Any]) -> Schedule:
    """A candidate has this effective schedule, with where it comes from and how its run is made."""
    run = search.genome.run(candidate.vector)
    steps = run.steps or search.archive.work.steps
    beside = run.arguments(steps)
    provenance = {
        "method": "ECAD (arXiv 2506.15682), searched by fastdit " + __version__,
        "objectives": objectives(search, candidate.values),
        "loss": identity["quality"],
        "family": search.genome.spec.family,
        "model": identity["model"],
        "items": search.archive.work.items,
        "scheduler": search.schedulers[str(run.solver)],
        "num_inference_steps": steps,
        **beside,
        "generations": len(search.generations) - 1,
    }
    return search.genome.schedule(search.genome.effective(candidate.vector), provenance)


def objectives(search: Search, values: Sequence[float]) -> dict[str, float]:
    """These are the objectives by name."""
    return dict(zip(("loss", *search.archive.costs), values, strict=True))


def summary(
    search: Search,
    baselines: Sequence[Baseline],
    identity: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """This sums the ledger up."""
    seen = list(search.archive.seen.values())
    return {
        "fastdit": __version__,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": dict(identity),
        "ledger": LEDGER,
        "generations": len(search.generations) - 1,
        "schedules": len(seen),
        "races_lost": sum(not candidate.complete for candidate in seen),
        "pictures": sum(len(candidate.losses) for candidate in seen),
        "progress": [
            {
                "schedules": generation["fresh"],
                "pictures": generation["pictures"],
                "hypervolume": generation["hypervolume"],
            }
            for generation in search.generations
        ],
        "uncached": search.uncached,
        "front": [
            {
                "name": name,
                "key": candidate.key,
                "reused": candidate.reused / search.genome.cells,
                **_turned(search, candidate),
                **objectives(search, candidate.values),
            }
            for name, candidate in zip(names, search.front, strict=True)
        ],
        "measured": [[*candidate.values, candidate.complete] for candidate in seen],
        "baselines": [
            {"group": b.group, "name": b.name, **objectives(search, b.values)} for b in baselines
        ],
    }


def _turned(search: Search, candidate: Candidate) -> dict[str, Any]:
    """How a candidate's run is made, where more than schedules were searched."""
    return asdict(search.genome.run(candidate.vector)) if search.genome.knobs.size else {}


def _front_of_seeds(search: Search) -> list[tuple[float, ...]]:
    keys = search.generations[0]["front"]
    values = [search.archive.seen[key].values for key in keys]
    return [values[index] for index in non_dominated(values)]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
