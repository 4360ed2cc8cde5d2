"""Arms side by side on the same prompts and seeds: what each costs, how near it comes, and who is nearer at equal time.

An arm's error is the relative L2 distance of its latents to those of many steps (`search/solution.py`) from the same
noise. A group of arms is one way of being faster; at a budget it is represented by its nearest arm that takes no longer
than the arm which was asked for the budget. That arm is named beforehand, the others are chosen with hindsight on these
pictures, so a verdict leans to the other side. Ratios are paired, with 95 % bootstrap intervals over the pictures.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdit.errors import FastDiTError
from fastdit.evaluate import peers
from fastdit.evaluate.arms import Arm
from fastdit.evaluate.contenders import COMPOSED, FEWER, Field, named
from fastdit.evaluate.metrics import alike, away, scales
from fastdit.evaluate.paired import RESAMPLES, ratio
from fastdit.evaluate.studio import (
    ROUNDS,
    UNPATCHED,
    Drawn,
    Spent,
    Studio,
    transformers_of,
)
from fastdit.search import solution
from fastdit.search.front import hypervolume, non_dominated, on_axes

FORMAT = "fastdit.comparison"
#: as fast as another: takes no more than this longer
SLACK = 1.05
#: a budget is met by at least this part of it
MET = 0.9
VOLUMES = 200  # resamples of a hypervolume

Watch = Callable[[str, int, int], None]
Judge = Callable[[Sequence[np.ndarray], Sequence[str]], Any]


@dataclass
class Study:
    """What was drawn and measured, to be told by :meth:`result` and shown by others.

    Attributes:
        field: The arms, and what was refused.
        studio: Where they were drawn.
        drawn: Pictures and latents by arm.
        truth: Those of many steps.
        spent: Costs by arm.
        errors: Distances to the truth by arm [n].
        solver, solved: By which the truth was found, and about how large its own error is.
    """

    field: Field
    studio: Studio
    drawn: dict[str, Drawn]
    truth: Drawn
    spent: dict[str, Spent]
    errors: dict[str, np.ndarray]
    solver: str
    solved: float

    def seconds(self, name: str) -> float:
        """Median seconds of an arm's loop for a picture; of plain steps over all solvers that make as many.

        What a solver itself takes is next to nothing, and one noisy time would decide which of them is fast enough.
        """
        plain = self.field.groups.get(FEWER, {})
        alike = [name]
        if name in plain:
            alike = [other for other, arm in plain.items() if arm.steps == plain[name].steps]
        return statistics.median(each for other in alike for each in self.spent[other].loop)

    def speedup(self, name: str) -> float:
        """Over the unpatched loop."""
        return self.seconds(UNPATCHED) / self.seconds(name)

    def arithmetic(self, name: str) -> float:
        """An arm's arithmetic as a share of the unpatched run's."""
        spent, arm, own = self.spent[name], self.field.arms[name], self.spent[UNPATCHED]
        if spent.flop_speedup is None:
            return spent.work / own.work
        return arm.steps / self.field.arms[UNPATCHED].steps / spent.flop_speedup

    def error(self, name: str) -> float:
        """The geometric mean of an arm's errors."""
        return float(np.exp(np.log(self.errors[name]).mean()))

    def cache_bytes(self, name: str) -> int | None:
        """What an arm's caches hold beside what the unpatched run holds, of a timed call; None where nobody looked."""
        spent = self.spent[name]
        if spent.flop_speedup is not None:
            return spent.held
        return max(0, spent.held - self.spent[UNPATCHED].held) if spent.held else None


def conduct(
    studio: Studio, found: Field, rounds: int = ROUNDS, watch: Watch = lambda what, done, all_: None
) -> Study:
    """Everything is drawn, then timed; an arm that is refused, or of another project and fails, is left out."""
    drawn: dict[str, Drawn] = {}

    def lose(name: str, error: Exception) -> None:
        """What another project raises is a result too."""
        refused = isinstance(error, FastDiTError) and name != UNPATCHED
        if not (refused or named(found.groups)[name] in found.peers):
            raise error
        found.drop(name, peers.said(error))
        drawn.pop(name, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch("the solution", 0, len(found.arms))
        solver = type(solution.solver(studio.pipe, solution.STEPS)).__name__
        truth = studio.drawn("solution", Arm("solution", solution.STEPS))
        coarser = studio.drawn("solution, half the steps", Arm("solution", solution.STEPS // 2))
        for done, (name, arm) in enumerate(found.arms.items()):
            watch(name, done, len(found.arms))
            try:
                drawn[name] = studio.drawn(name, arm)
            except Exception as error:
                lose(name, error)
        watch("times", len(found.arms), len(found.arms))
        spent = studio.spent(found.arms, rounds, lose)
    errors = {
        name: away(each.latents, truth.latents)
        for name, each in drawn.items()
        if _same(each, truth)
    }
    for name in set(drawn) - set(errors):
        found.drop(name, "its latents have another shape")
    # At the least a solver's error halves where its steps double.
    solved = float(np.exp(np.log(away(coarser.latents, truth.latents)).mean()))
    return Study(found, studio, drawn, truth, spent, errors, solver, solved)


def _same(drawn: Drawn, truth: Drawn) -> bool:
    return drawn.latents.shape == truth.latents.shape


def rows(
    study: Study, judge: Judge | None = None, judges: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """What each arm costs and how near it comes, as JSON data.

    Args:
        judge: Of the model in the package: how many of the objects named are there.
        judges: Those that need weights, see `judges.py`.
    """
    own = study.drawn[UNPATCHED]
    found = []
    for group, arms in study.field.groups.items():
        for name, arm in arms.items():
            spent, drawn = study.spent[name], study.drawn[name]
            speedup, share = study.speedup(name), study.arithmetic(name)
            row: dict[str, Any] = {
                "arm": name,
                "group": group,
                "solver": arm.solver,
                "steps": arm.steps,
                "loop_seconds": study.seconds(name),
                "call_seconds": statistics.median(spent.call),
                "loop_range": [min(spent.loop), max(spent.loop)],
                "speedup": speedup,
                "call_speedup": statistics.median(study.spent[UNPATCHED].call)
                / statistics.median(spent.call),
                "arithmetic": share,
                "realised": realised(speedup, share),
                "cache_bytes": study.cache_bytes(name),
                "error": study.error(name),
                "median": float(np.median(study.errors[name])),
                "over_unpatched": ratio(study.errors[name], study.errors[UNPATCHED]),
                "to_truth": means(alike(drawn.pictures, study.truth.pictures)),
                "to_unpatched": {
                    "latents": float(np.mean(away(drawn.latents, own.latents, 0.0))),
                    **means(alike(drawn.pictures, own.pictures)),
                },
            }
            if judge is not None:
                row["score"] = scored(judge, drawn.pictures, study.studio.prompts)
            for title, each in (judges or {}).items():
                row.setdefault("judges", {})[title] = each(
                    drawn.pictures, study.studio.prompts, study.truth.pictures
                )
            found.append(row)
    return found


def realised(speedup: float, share: float) -> float | None:
    """The part of the time that the arithmetic would spare which was spared; None where there is none to spare."""
    return None if share > 0.999 else (1 - 1 / speedup) / (1 - share)


def means(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The mean of each metric with its 95 % bootstrap interval; a value that is infinite is no JSON, and is None."""
    found = {}
    for name, each in values.items():
        finite = each[np.isfinite(each)]
        if not len(finite):
            found[name] = None
            continue
        draws = np.random.default_rng(0).integers(0, len(finite), (RESAMPLES, len(finite)))
        low, high = np.quantile(finite[draws].mean(1), [0.025, 0.975])
        found[name] = {"mean": float(finite.mean()), "low": float(low), "high": float(high)}
    return found


def scored(judge: Judge, pictures: np.ndarray, prompts: Sequence[str]) -> float | None:
    """The share of the named objects that are there as named; None for prompts the judge does not know."""
    try:
        return float(
            np.mean([judge(p[None], t).mean for p, t in zip(pictures, prompts, strict=True)])
        )
    except ValueError:
        return None


# ---- verdicts


def verdicts(study: Study) -> list[dict[str, Any]]:
    """Each arm that is judged beside the best of every other group that takes no longer."""
    kept = study.field.arms
    return [verdict(study, n, budget) for n, budget in study.field.judged.items() if n in kept]


def verdict(study: Study, name: str, budget: float | None) -> dict[str, Any]:
    """One arm beside every other group."""
    mine, speed = study.seconds(name), study.speedup(name)
    against = {}
    for group, arms in study.field.groups.items():
        if name in arms or group == UNPATCHED:
            continue
        fast = [each for each in arms if study.seconds(each) <= mine * SLACK]
        if not fast:
            fastest = max(map(study.speedup, arms))
            against[group] = {"verdict": "too slow", "fastest": fastest}
            continue
        rival = min(fast, key=study.error)
        compared = ratio(study.errors[name], study.errors[rival])
        against[group] = {
            "arm": rival,
            "speedup": study.speedup(rival),
            "ratio": compared,
            "verdict": word(compared),
        }
    return {
        "budget": budget,
        "arm": name,
        "speedup": speed,
        "met": budget is None or speed >= MET * budget,
        "against": against,
    }


def word(compared: Mapping[str, float]) -> str:
    """Nearer or farther where the interval of the ratio leaves no doubt."""
    return "nearer" if compared["high"] < 1 else "farther" if compared["low"] > 1 else "alike"


def volumes(study: Study) -> dict[str, dict[str, Any]]:
    """How much each group's front covers: over the loop's time and the decimal logarithm of the error.

    The corner is the unpatched time and the largest error of plain steps; an interval is over the pictures.
    """
    groups = {g: [*arms] for g, arms in study.field.groups.items() if g != UNPATCHED}
    plain = groups.get(FEWER) or [UNPATCHED]
    corner = float(np.log10(max(map(study.error, plain)))), 1.0
    count = len(study.errors[UNPATCHED])
    rng = np.random.default_rng(0)
    draws = [np.arange(count), *rng.integers(count, size=(VOLUMES, count))]

    def volume(arms: Sequence[str], draw: np.ndarray) -> float:
        points = [(np.exp(np.log(study.errors[n][draw]).mean()), study.seconds(n)) for n in arms]
        return hypervolume(on_axes(np.array(points), (study.seconds(UNPATCHED),), True), corner)

    found = {g: np.array([volume(arms, draw) for draw in draws]) for g, arms in groups.items()}
    result = {}
    for group, each in found.items():
        front = non_dominated(np.array([[study.error(n), study.seconds(n)] for n in groups[group]]))
        result[group] = {"value": float(each[0]), "front": [groups[group][i] for i in front]}
        if COMPOSED in found and group != COMPOSED:
            low, high = np.quantile((found[COMPOSED] - each)[1:], [0.025, 0.975])
            gain = {
                "value": float(found[COMPOSED][0] - each[0]),
                "low": float(low),
                "high": float(high),
            }
            result[group]["composed_over_it"] = gain
    return result


def sentences(study: Study, told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the composed plans do not win, and why, in words."""
    found = []
    for each in told:
        if not each["met"]:
            found.append(
                f"{each['arm']}: {each['budget']:g}x was asked for, {each['speedup']:.2f}x was reached."
            )
        for group, one in each["against"].items():
            if one["verdict"] in ("nearer", "too slow"):
                continue
            compared = one["ratio"]
            how = "is nearer" if one["verdict"] == "farther" else "is as near by the interval"
            found.append(
                f"Beside {each['arm']}, {one['arm']} ({group}) {how}: error {compared['value']:.2f} "
                f"[{compared['low']:.2f}, {compared['high']:.2f}] of its, at {one['speedup']:.2f}x beside "
                f"{each['speedup']:.2f}x."
            )
    return found


# ---- all of it


def result(
    study: Study, judge: Judge | None = None, judges: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The study as JSON data."""
    told = verdicts(study)
    return {
        "format": FORMAT,
        "version": 1,
        "pictures": len(study.studio.prompts),
        "prompts": list(study.studio.prompts),
        "solution": {"steps": solution.STEPS, "solver": study.solver, "error": study.solved},
        "ms_ssim_scales": scales(study.truth.pictures.shape[-3:-1]),
        "provenance": provenance(study.studio),
        "rows": rows(study, judge, judges),
        "verdicts": told,
        "where_not": sentences(study, told),
        "hypervolume": volumes(study),
        "refused": dict(sorted(study.field.refused.items())),
    }


def provenance(studio: Studio) -> dict[str, Any]:
    """What the figures hold for."""
    transformer = studio.pipe.transformer
    weight = next(transformer.parameters())
    on_gpu = weight.device.type == "cuda"
    machine = torch.cuda.get_device_name(weight.device) if on_gpu else _processor()
    return {
        **identity(studio.pipe),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "made": time.strftime("%Y-%m-%d"),
        "versions": {
            each: _version(each) for each in ("fastdit", "torch", "diffusers", "cache-dit")
        },
        "seed": studio.seed,
        "batch": studio.batch,
        "arguments": studio.arguments,
    }


def identity(pipe: Any) -> dict[str, Any]:
    """Model and sampler, each with a hash."""
    from fastdit.search.evaluator import fingerprint, sampler_of

    return {
        "pipeline": type(pipe).__name__,
        "model": ", ".join(f"{type(m).__name__} {fingerprint(m)}" for m in transformers_of(pipe)),
        "scheduler": sampler_of(pipe.scheduler),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
