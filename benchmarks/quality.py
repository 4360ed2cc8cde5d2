"""What a method costs in quality on the model in the package, beside fewer plain steps in the same time.

    python benchmarks/quality.py STUDY --time           # seconds of each arm, on a quiet machine
    python benchmarks/quality.py STUDY [--images 256]   # draws what is missing, judges, writes results

Every arm draws the same held-out prompts from the same noise. It is judged by the Fréchet distance to freshly drawn
scenes (`frechet.py`), by the distance to the picture that the unpatched model draws from the same noise, and by the
share of the prompts' objects that are there (`fastdit.tiny.score`). Intervals are 95 % bootstrap intervals over the
prompts; the same draws of prompts serve all arms, so differences between arms have intervals of their own.
Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
import frechet
from arms import random_tokens
from fastdit import tiny
from fastdit.cli.distance import relative_l2
from fastdit.tiny import scenes
from machine import describe_machine

STEPS = 28  # the pipeline's default
REFERENCES = 2048
RESAMPLES = 1000
SEED = 70_000  # of the first picture's noise
ROUNDS = 5  # of timing
PICTURES = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Arm:
    """One way of drawing.

    Attributes:
        steps: Steps of the pipeline.
        method: Makes what is patched in; None for the unpatched model.
        batch: Pictures drawn together.
        around: A context manager that draws run in.
    """

    steps: int = STEPS
    method: Callable[[], Any] | None = None
    batch: int = 16
    around: Callable[[], Any] = contextlib.nullcontext


def ras_arms() -> dict[str, Arm]:
    """RAS at three ratios; the tokens of the other end; the published arithmetic; random tokens as a control."""
    arms = {}
    for ratio in (0.75, 0.5, 0.25):
        arms[f"RAS {ratio}"] = Arm(method=lambda r=ratio: fastdit.RAS(ratio=r))
    for ratio in (0.5, 0.25):
        arms[f"RAS {ratio}, high_ratio 0"] = Arm(
            method=lambda r=ratio: fastdit.RAS(ratio=r, high_ratio=0.0)
        )
        arms[f"RAS {ratio}, parity"] = Arm(
            method=lambda r=ratio: fastdit.RAS(ratio=r, mode="parity"), batch=1
        )
        arms[f"RAS {ratio}, random tokens"] = Arm(
            method=lambda r=ratio: fastdit.RAS(ratio=r), around=random_tokens
        )
    return arms


#: study -> (its arms, those that fewer plain steps are set beside)
STUDIES: dict[str, tuple[Callable[[], dict[str, Arm]], tuple[str, ...]]] = {
    "ras": (ras_arms, ("RAS 0.75", "RAS 0.5", "RAS 0.25")),
}


def held_out(images: int) -> list[str]:
    """Held-out prompts, half of them of two objects."""
    some = tiny.prompts(images - images // 2, "test", 1, seed=7)
    return some + tiny.prompts(images // 2, "test", 2, seed=7)


def draw(pipe: Any, arm: Arm, texts: list[str], first: int) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] of prompts; picture i starts from noise SEED + first + i."""
    generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(len(texts))]
    handle = fastdit.patch(pipe, arm.method()) if arm.method else None
    try:
        with arm.around():
            found = pipe(
                texts, num_inference_steps=arm.steps, generator=generators, output_type="np"
            )
    finally:
        if handle:
            handle.unpatch()
    return np.round(found.images * 255).astype(np.uint8)


def draw_all(pipe: Any, name: str, arm: Arm, texts: list[str], folder: Path) -> np.ndarray:
    """All pictures of an arm, kept in `folder` batch by batch."""
    path = folder / f"{name}.npy".replace(" ", "_").replace(",", "")
    done = np.load(path) if path.exists() else np.zeros((0, 128, 128, 3), np.uint8)
    started = time.perf_counter()
    while len(done) < len(texts):
        first = len(done)
        # A batch always has the same prompts, also after an interruption.
        batch = texts[first : first + arm.batch]
        done = np.concatenate([done, draw(pipe, arm, batch, first)])
        if len(done) == len(texts) or len(done) % 16 == 0:
            part = path.with_suffix(".part.npy")
            np.save(part, done)
            part.replace(path)
            spent = time.perf_counter() - started
            print(f"{name}: {len(done)} of {len(texts)} pictures, {spent:.0f} s", flush=True)
    return done[: len(texts)]


def measure(pipe: Any, arms: dict[str, Arm]) -> dict[str, float]:
    """Seconds of a picture for each arm: medians of rounds in which the arms take turns.

    With a single thread the processor's time is taken, which is wall time where nothing else runs.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    texts = held_out(16)
    for arm in arms.values():  # warm up
        draw(pipe, arm, texts[: arm.batch], 0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            start = clock()
            draw(pipe, arm, texts[: arm.batch], 0)
            seconds[name].append((clock() - start) / arm.batch)
    return {name: statistics.median(values) for name, values in seconds.items()}


def arithmetic(pipe: Any, arm: Arm) -> float:
    """Multiply-accumulates of a run as a share of the unpatched run of `STEPS` steps."""
    if arm.method is None:
        return arm.steps / STEPS
    handle = fastdit.patch(pipe, arm.method())
    said = handle.explain(steps=arm.steps, batch=1)
    dense = said.dense_macs / arm.steps * STEPS
    handle.unpatch()
    return said.macs / dense


def plain_arms(pipe: Any, arms: dict[str, Arm], names: tuple[str, ...], seconds: dict[str, float]):
    """(arms of fewer plain steps, accelerated arm -> plain arms in the same time and of the same arithmetic)."""
    plain, beside = {}, {}
    for name in names:
        by_time = round(STEPS * seconds[name] / seconds["unpatched"])
        by_macs = round(STEPS * arithmetic(pipe, arms[name]))
        beside[name] = {}
        for what, steps in (("time", by_time), ("arithmetic", by_macs)):
            steps = min(max(steps, 1), STEPS)
            label = "unpatched" if steps == STEPS else f"{steps} steps"
            plain.setdefault(label, Arm(steps))
            beside[name][what] = label
    plain.pop("unpatched", None)
    return plain, beside


def real_scenes() -> np.ndarray:
    """Freshly drawn scenes of the held-out kind, half of them with two objects."""
    rng = np.random.default_rng(99)
    found = []
    for index in range(REFERENCES):
        scene = scenes.sample_scene(rng, 1 + index % 2, "test")
        found.append(scenes.render(scene, 128, rng))
    return (np.stack(found) * 255).round().astype(np.uint8)


def judge(
    vae: Any, pictures: dict[str, np.ndarray], texts: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Arm -> measure -> [RESAMPLES + 1] values, that of all prompts first and then those of the bootstrap's draws."""
    rng = np.random.default_rng(0)
    draws = [np.arange(len(texts)), *rng.integers(len(texts), size=(RESAMPLES, len(texts)))]
    truth = frechet.gaussian(frechet.features(vae, real_scenes()))
    found = {}
    for name, images in pictures.items():
        rows = frechet.features(vae, images)
        away = np.array(
            [relative_l2(a, b) for a, b in zip(images, pictures["unpatched"], strict=True)]
        )
        verdicts = [
            tiny.score(image[None] / 255, text).objects
            for image, text in zip(images, texts, strict=True)
        ]
        right = np.array([sum(v.right for v in some) for some in verdicts])
        named = np.array([len(some) for some in verdicts])
        found[name] = {
            "frechet": np.array(
                [frechet.distance(frechet.gaussian(rows[d]), truth) for d in draws]
            ),
            "distance": np.array([away[d].mean() for d in draws]),
            "score": np.array([right[d].sum() / named[d].sum() for d in draws]),
        }
        print(
            f"{name}: " + ", ".join(f"{k} {v[0]:.4g}" for k, v in found[name].items()), flush=True
        )
    return found


def interval(values: np.ndarray) -> dict[str, float]:
    """A value with its 95 % bootstrap interval."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How much each measure changes, over arithmetic: plain steps as a line, everything else as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    plain = sorted(
        (row for row in rows if row["arm"] == "unpatched" or row["arm"].endswith(" steps")),
        key=lambda row: row["arithmetic"],
    )
    titles = {
        "frechet": "Fréchet distance to drawn scenes, change (less is better)",
        "distance": "distance to the unpatched picture",
        "score": "prompt score, change (more is better)",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        series = [("fewer steps", plain, "o-")]
        series += [(row["arm"], [row], "D") for row in rows if row not in plain]
        for label, some, style in series:
            changes = [row["less_unpatched"][name] for row in some]
            values = np.array([[change[k] for k in ("value", "low", "high")] for change in changes])
            off = np.abs(values[:, 1:].T - values[:, 0])
            axis.errorbar(
                [row["arithmetic"] for row in some],
                values[:, 0],
                yerr=off,
                fmt=style,
                ms=5,
                lw=1,
                capsize=2,
                label=label,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of the arithmetic")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Time, or draw and judge, one study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--time", action="store_true", help="measure the seconds only")
    parser.add_argument("--draw", metavar="ARM", help="draw this arm only")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    make, compared = STUDIES[options.study]
    arms = {"unpatched": Arm(), **make()}
    pipe = tiny.load_pipeline()
    options.folder.mkdir(parents=True, exist_ok=True)
    timing = options.folder / f"{options.study}-seconds.json"
    if options.time:
        timing.write_text(
            json.dumps({"machine": describe_machine(), "seconds": measure(pipe, arms)}, indent=1)
        )
        print(timing.read_text())
        return
    timed = json.loads(timing.read_text())
    plain, beside = plain_arms(pipe, arms, compared, timed["seconds"])
    arms |= plain
    texts = held_out(options.images)
    if options.draw:
        draw_all(pipe, options.draw, arms[options.draw], texts, options.folder)
        return
    pictures = {
        name: draw_all(pipe, name, arm, texts, options.folder) for name, arm in arms.items()
    }
    found = judge(pipe.vae, pictures, texts)
    rows = [
        {
            "arm": name,
            "steps": arm.steps,
            "seconds": timed["seconds"].get(name),
            "arithmetic": arithmetic(pipe, arm),
            **{measure: interval(values) for measure, values in found[name].items()},
            "less_unpatched": {
                measure: interval(values - found["unpatched"][measure])
                for measure, values in found[name].items()
            },
        }
        for name, arm in arms.items()
    ]
    differences = [
        {"arm": name, "beside": other, "same": what}
        | {m: interval(found[name][m] - found[other][m]) for m in found[name]}
        for name, others in beside.items()
        for what, other in others.items()
    ]
    result = {
        "study": options.study,
        "images": options.images,
        "steps": STEPS,
        "machine": timed["machine"],
        "rows": rows,
        "differences": differences,
    }
    out = options.out or Path(__file__).parent / "results" / f"quality-{options.study}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, options.plot or PICTURES / f"quality-{options.study}.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
