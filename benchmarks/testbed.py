"""How near a way of drawing comes to the solution of the sampler's equation, beside fewer steps of better solvers.

    python benchmarks/testbed.py [caches|ras|ralu] [--model tiny|emoji] [--pictures N] [--size N] [--captions full]
        [--folder build/testbed]

The truth is Heun's method with 60 steps (20 for RALU), whose own error is told. An arm's pictures are judged by the
relative L2 distance of their latents to the truth's, by whether they are clean (objects, each of some kind), by the
share of the prompt's objects that are there, and by the Fréchet distance to the truth's pictures
(`fastdit/evaluate/frechet.py`), which alone can judge a method that draws other pictures. A verdict is paired
(`fastdit/evaluate/paired.py`), and against plain steps of three solvers (of UniPC for RALU): of equal arithmetic, the
most that take no longer, one more than that, and AB2 on the arm's own levels; of equal arithmetic alone for RAS.

What is drawn is kept in the folder, so a run that was interrupted goes on, and more pictures are only added. Seconds
are measured once for a study and kept there as well: with OMP_NUM_THREADS=1 they are the processor's. Those of plain
steps are patched with `Dense`, so all run on the same ops.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arms import STUDIES, dense
from bed import BATCH, TIMED, Bed
from fastdit.evaluate import frechet
from fastdit.evaluate.arms import SOLVERS, Arm, plain
from fastdit.evaluate.paired import ratio, share
from machine import describe_machine
from subjects import SUBJECTS

#: plain steps that are timed; those between take what a line through them says
ENDS = (4, 20)
RESAMPLES = 200  # of Fréchet distances
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"


def away(latents: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """These are relative L2 distances [n]."""
    axes = tuple(range(1, truth.ndim))
    off = np.sqrt(((latents - truth) ** 2).sum(axes))
    return np.maximum(off / np.sqrt((truth**2).sum(axes)), 1e-9)


class Judge:
    """It judges the pictures of one condition.

    Args:
        texts: The prompts.
        truth: Latents of the solution.
    """

    def __init__(self, bed: Bed, texts: list[str], truth: np.ndarray) -> None:
        self.bed, self.texts, self.truth = bed, texts, truth
        rng = np.random.default_rng(0)
        count = len(texts)
        self._draws = [np.arange(count), *rng.integers(count, size=(RESAMPLES, count))]
        self._solved = frechet.gaussian(self._features(bed.pictures(truth)))

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        return frechet.features(self.bed.pipe.vae, pictures)

    def measure(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        """These are an arm's error, "clean" and "score" [n], and its Fréchet distance [RESAMPLES + 1], of all first."""
        pictures = self.bed.pictures(latents)
        verdicts = [
            self.bed.subject.judge(picture, text)
            for picture, text in zip(pictures, self.texts, strict=True)
        ]
        rows = self._features(pictures)
        return {
            "error": away(latents, self.truth),
            "clean": np.array([clean for clean, _ in verdicts]),
            "score": np.array([there for _, there in verdicts]),
            "frechet": np.array(
                [frechet.distance(frechet.gaussian(rows[d]), self._solved) for d in self._draws]
            ),
        }


def values(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """An arm's own values."""
    return {
        "median": float(np.median(measured["error"])),
        "clean": float(measured["clean"].mean()),
        "score": float(measured["score"].mean()),
        "frechet": float(measured["frechet"][0]),
    }


def against(arm: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What an arm is beside a baseline."""
    less = arm["frechet"] - other["frechet"]
    low, high = np.quantile(less[1:], [0.025, 0.975])
    return {
        "error": ratio(arm["error"], other["error"]),
        "clean": share(arm["clean"], other["clean"]),
        "score": share(arm["score"], other["score"]),
        "frechet": {"less": float(less[0]), "low": float(low), "high": float(high)},
    }


def baselines(
    arms: Mapping[str, Arm],
    bed: Bed,
    seconds: Mapping[str, float],
    solvers: Iterable[str] = SOLVERS,
    sides: Iterable[str] = ("arithmetic", "time", "more time"),
) -> tuple[dict[str, Arm], dict[str, dict[str, list[str]]]]:
    """These are all plain arms, and of each arm those beside it: what is equal -> their names."""
    sides = tuple(sides)
    if "time" in sides:
        few, many = (seconds[plain(SOLVERS[0], steps)[0]] for steps in ENDS)
        step = (many - few) / (ENDS[1] - ENDS[0])
        rest = few - ENDS[0] * step
    found: dict[str, Arm] = {}
    beside: dict[str, dict[str, list[str]]] = {}
    for name, arm in arms.items():
        counts = {"arithmetic": max(1, round(bed.arithmetic(arm)))}
        if "time" in sides:
            counts["time"] = max(1, int((seconds[name] - rest) / step))
            counts["more time"] = counts["time"] + 1
        made = {what: [plain(s, counts[what]) for s in solvers] for what in sides}
        if arm.nodes:
            levels = bed.levels(arm)
            nodes = tuple(levels[node] for node in arm.nodes)
            own = f"ab2 on the levels of {name.rpartition(',')[0]}"
            made["nodes"] = [(own, Arm("ab2", len(nodes), sigmas=nodes))]
        beside[name] = {what: [own for own, _ in some] for what, some in made.items()}
        for some in made.values():
            found |= some
    return found, beside


def judge(
    bed: Bed,
    arms: Mapping[str, Arm],
    others: Mapping[str, Arm],
    beside: Mapping[str, Mapping[str, Iterable[str]]],
    count: int,
    steps: int,
) -> dict[str, Any]:
    """This draws what is missing under one condition, and compares with Heun's method of so many steps."""
    truth = bed.latents("truth", Arm("heun", steps), count)
    # Heun's error grows by 4 where its steps are halved.
    own = away(bed.latents("truth, half the steps", Arm("heun", steps // 2), count), truth) / 3
    bench = Judge(bed, bed.prompts(count), truth)
    measured = {}
    for name, arm in {**arms, **others}.items():
        measured[name] = bench.measure(bed.latents(name, arm, count))
        print(f"{bed.folder.name} {name}: {values(measured[name])}", flush=True)
    rows = {name: values(found) for name, found in measured.items()}
    for name, some in beside.items():
        names = {other for group in some.values() for other in group}
        rows[name]["against"] = {o: against(measured[name], measured[o]) for o in sorted(names)}
    solved = values(bench.measure(truth)) | {"median": float(np.median(own))}
    said = {"captions": bed.captions, "guidance": bed.guidance, "pictures": count}
    return {**said, "truth": solved, "rows": rows}


def timed(bed: Bed, arms: Mapping[str, Arm], path: Path) -> dict[str, Any]:
    """Seconds of a picture of all arms and of a few plain steps, kept in a file; all anew where an arm is new."""
    arms = {**arms, **dict(dense(steps) for steps in ENDS)}
    known = json.loads(path.read_text()) if path.exists() else {"seconds": {}}
    if missing := set(arms) - set(known["seconds"]):
        print(f"timing {len(arms)} arms, {len(missing)} of them new", flush=True)
        known = {"machine": describe_machine(), "seconds": bed.seconds(arms)}
        path.write_text(json.dumps(known, indent=1))
    return known


#: label of points in the plot of caches -> what their names hold
GROUPS = {
    "V": "V",
    "V, adaptive": "auto",
    "repeated": "repeated",
    "halves": "halves",
    "RAS, std": "std",
    "RAS, change": "change",
}


def grouped(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Label of points in a study's plot -> its arms: each of RALU's alone, RAS's at all ratios."""
    names = list(result["beside"])
    if result["study"] == "caches":
        return {label: [n for n in names if key in n] for label, key in GROUPS.items()}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"^RAS [\d.]+,? ", "RAS, ", name), []).append(name)
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Over evaluations, a column a condition: plain solvers as lines, everything else as points.

    RALU draws other pictures, so it is shown by its score in the place of its distance.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    conditions, spent = result["conditions"], result["evaluations"]
    own = result["study"] == "ralu"
    shown = {"frechet": "Fréchet distance\nto the solution's pictures"}
    if own:
        shown = {"score": "share of the objects\nthat are there", **shown}
    else:
        shown = {"median": "median distance\nto the solution", **shown}
    figure, axes = plt.subplots(
        2, len(conditions), figsize=(4.2 * len(conditions), 7.5), squeeze=False
    )
    for column, condition in enumerate(conditions):
        rows = condition["rows"]
        for axis, measure in zip(axes[:, column], shown, strict=True):
            for solver in result["solvers"]:
                some = [n for n in rows if "against" not in rows[n] and n.split()[0] == solver]
                some = sorted((n for n in some if " on " not in n), key=spent.__getitem__)
                axis.plot(
                    [spent[n] for n in some], [rows[n][measure] for n in some], lw=1, label=solver
                )
            for marker, (label, some) in zip(
                itertools.cycle("ospd^vP*x<>"), grouped(result).items()
            ):
                axis.plot(
                    [spent[n] for n in some],
                    [rows[n][measure] for n in some],
                    marker,
                    ms=4,
                    label=label,
                )
            axis.set(
                xscale="log", yscale="linear" if own else "log", xlabel="evaluations of the model"
            )
            some = [spent[n] for n in rows]
            few = max(some) < 2 * min(some)
            ticks = range(3, 25) if few else (3, 5, 7, 10, 14, 20)
            ticks = [n for n in ticks if min(some) <= n <= max(some)]
            axis.set_xticks(ticks, list(map(str, ticks)), minor=False)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3, which="both")
        title = f"{condition['captions']} captions, guidance {condition['guidance']:g}"
        axes[0][column].set_title(title, fontsize=10)
    for axis, label in zip(axes[:, 0], shown.values(), strict=True):
        axis.set_ylabel(label)
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.25)}
    axes[1][0].legend(fontsize=7, **({} if result["study"] == "caches" else below))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Draw what is missing, judge, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", nargs="?", choices=STUDIES, default="caches")
    parser.add_argument("--model", choices=SUBJECTS, default="tiny")
    parser.add_argument("--pictures", type=int, help="under each condition")
    parser.add_argument("--size", type=int, help="pixels")
    parser.add_argument("--captions", choices=("full", "open"), help="these alone")
    parser.add_argument("--folder", type=Path, default=Path("build/testbed"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    study, subject = STUDIES[options.study], SUBJECTS[options.model]
    size = options.size or subject.size or study.size
    conditions = [
        c._replace(pictures=options.pictures or subject.pictures or c.pictures)
        for c in study.conditions
        if options.captions in (None, c.captions)
    ]
    if options.pictures is not None and (options.pictures < 1 or options.pictures % BATCH):
        parser.error(f"--pictures must be a multiple of {BATCH}, got {options.pictures}")
    # The first model's files bear the name of the study alone.
    mark = "" if options.model == "tiny" else f"-{options.model}"
    folder = options.folder / options.model if mark else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pipe = subject.load()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    beds = [Bed(pipe, c.captions, c.guidance, size, folder, subject) for c in conditions]
    arms = dict(study.arms())
    clock = {"machine": describe_machine(), "seconds": {}}
    if "time" in study.sides:
        clock = timed(beds[0], arms, folder / f"seconds-{options.study}-{size}.json")
    others, beside = baselines(arms, beds[0], clock["seconds"], study.solvers, study.sides)
    result = {
        "study": options.study,
        "model": options.model,
        "pictures": conditions[0].pictures,
        "size": size,
        "solvers": study.solvers,
        "truth_steps": study.truth,
        "timed_batch": TIMED,
        "machine": clock["machine"],
        "seconds": clock["seconds"],
        "evaluations": {n: beds[0].arithmetic(arm) for n, arm in {**arms, **others}.items()},
        "beside": beside,
        "conditions": [
            judge(bed, arms, others, beside, condition.pictures, study.truth)
            for bed, condition in zip(beds, conditions, strict=True)
        ],
    }
    out = options.out or RESULTS / f"testbed-{options.study}{mark}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.plot or DOCS / f"testbed-{options.study}{mark}.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
