"""A learned router beside fixed intervals and fewer steps, on the model in the package and held-out prompts.

    python benchmarks/router_study.py ROUTER [--also NAME=ROUTER] [--images 64]

Every arm draws the same prompts from the same noise, in the router's number of steps where not said otherwise. Judged
by the paired distance, relative L2 to the picture that the unpatched model draws, and by the share of the prompts'
objects that are there (`fastdit.tiny.score`). The router's arms are cells of its sweep, taken so that a run has the
multiply-accumulates of an interval's run, and a range around. Intervals are 95 % bootstrap intervals over the prompts;
differences are paired. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
from fastdit import tiny
from fastdit.adapters import find_adapter
from fastdit.cli.distance import relative_l2
from fastdit.cost import Cost
from machine import describe_machine

INTERVALS = (2, 3)
SHARES: tuple[float, ...] = ()  # of arithmetic, beside those of the intervals
FEWER = (5, 4)  # whole steps
RESAMPLES = 4000
SEED = 50_000  # of the first picture's noise
BATCH = 8


@dataclass(frozen=True)
class Arm:
    """One way of drawing; `family` is the curve it belongs to."""

    family: str
    steps: int
    method: Callable[[], Any] | None = None


def held_out(images: int) -> list[str]:
    """Held-out prompts, half of them of two objects."""
    some = tiny.prompts(images - images // 2, "test", 1, seed=11)
    return some + tiny.prompts(images // 2, "test", 2, seed=11)


def arms_of(pipe: Any, routers: dict[str, fastdit.Router], steps: int) -> dict[str, Arm]:
    """Name -> arm."""
    arms = {"unpatched": Arm("unpatched", steps)}
    for fewer in FEWER:
        arms[f"{fewer} steps"] = Arm("fewer steps", fewer)
    shares = list(SHARES)
    for n in INTERVALS:
        schedule = fastdit.Schedule.every(n)
        arms[f"every {n}"] = Arm("fixed interval", steps, lambda s=schedule: fastdit.Cached(s))
        shares.append(reused_share(pipe, fastdit.Cached(schedule), steps))
    for name, router in routers.items():
        macs = macs_of(pipe)
        for share, schedule in zip(shares, router.sweep(shares, macs), strict=True):
            arms[f"{name} {share:.3f}"] = Arm(name, steps, lambda s=schedule: fastdit.Cached(s))
    return arms


def macs_of(pipe: Any) -> dict[str, np.ndarray]:
    """Multiply-accumulates of each component in one step, for the pictures drawn here."""
    transformer = pipe.transformer
    adapter, side = find_adapter(transformer), transformer.config.sample_size
    tokens = adapter.tokens(transformer, (1, 1, side, side))
    return Cost.of(transformer, tokens, adapter.text_tokens_of(pipe)).component_macs()


def reused_share(pipe: Any, method: Any, steps: int) -> float:
    """Share of the components' multiply-accumulates that a method spares."""
    handle = fastdit.patch(pipe, method)
    said = handle.explain(steps=steps)
    handle.unpatch()
    components = sum(float(some.sum()) for some in macs_of(pipe).values()) * steps * said.rows
    return (said.dense_macs - said.macs) / components


def draw(pipe: Any, arm: Arm, texts: list[str], first: int) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3]; picture i starts from noise SEED + first + i."""
    generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(len(texts))]
    handle = fastdit.patch(pipe, arm.method()) if arm.method else None
    try:
        found = pipe(texts, num_inference_steps=arm.steps, generator=generators, output_type="np")
    finally:
        if handle:
            handle.unpatch()
    return np.round(found.images * 255).astype(np.uint8)


def draw_all(pipe: Any, arms: dict[str, Arm], texts: list[str], folder: Path) -> dict[str, Any]:
    """Every arm's pictures, kept in `folder`; one batch of prompts after the other through all arms."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        for name, arm in arms.items():
            path = folder / f"{name} {first}.npy".replace(" ", "_")
            if not path.exists():
                np.save(path, draw(pipe, arm, some, first))
            found[name].append(np.load(path))
        print(f"{first + len(some)} of {len(texts)} prompts", flush=True)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def judge(pictures: dict[str, np.ndarray], texts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Arm -> measure -> values [RESAMPLES + 1], all prompts first; the same draws of prompts for every arm."""
    rng = np.random.default_rng(0)
    draws = np.stack(
        [np.arange(len(texts)), *rng.integers(len(texts), size=(RESAMPLES, len(texts)))]
    )
    found = {}
    for name, images in pictures.items():
        pairs = zip(images, pictures["unpatched"], strict=True)
        away = np.array([relative_l2(a, b) for a, b in pairs])
        verdicts = [
            tiny.score(image[None] / 255, [text]).objects
            for image, text in zip(images, texts, strict=True)
        ]
        right = np.array([sum(v.right for v in some) for some in verdicts])
        named = np.array([len(some) for some in verdicts])
        found[name] = {
            "distance": away[draws].mean(1),
            "score": right[draws].sum(1) / named[draws].sum(1),
        }
    return found


def interval(values: np.ndarray) -> dict[str, float]:
    """A value with its 95 % bootstrap interval."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def arithmetic(pipe: Any, arm: Arm, steps: int) -> float:
    """Multiply-accumulates of a run over those of an unpatched one of `steps` steps."""
    if arm.method is None:
        return arm.steps / steps
    handle = fastdit.patch(pipe, arm.method())
    said = handle.explain(steps=steps)
    handle.unpatch()
    return said.macs / said.dense_macs


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance and score over arithmetic, one line for each family of arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] != "unpatched"))
    for axis, measure, label in (
        (axes[0], "distance", "relative L2 to the unpatched picture"),
        (axes[1], "score", "objects drawn as the prompt says"),
    ):
        for family in families:
            some = sorted((r for r in rows if r["family"] == family), key=lambda r: r["arithmetic"])
            x = [row["arithmetic"] for row in some]
            y = [row[measure]["value"] for row in some]
            bars = [
                [row[measure]["value"] - row[measure]["low"] for row in some],
                [row[measure]["high"] - row[measure]["value"] for row in some],
            ]
            axis.errorbar(x, y, bars, marker="o", capsize=3, label=family)
        axis.set_xlabel("multiply-accumulates, share of the unpatched run's")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    stock = next(row for row in rows if row["family"] == "unpatched")["score"]["value"]
    axes[1].axhline(stock, color="0.6", linestyle=":", label="unpatched")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw, judge, write results and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("router", type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=ROUTER")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("build/router"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    routers = {"router": fastdit.Router.load(options.router)}
    for entry in options.also:
        name, _, path = entry.partition("=")
        routers[name] = fastdit.Router.load(path)
    steps = routers["router"].steps
    pipe = tiny.load_pipeline()
    arms = arms_of(pipe, routers, steps)
    texts = held_out(options.images)
    found = judge(draw_all(pipe, arms, texts, options.folder), texts)
    rows = [
        {"arm": name, "family": arm.family, "steps": arm.steps}
        | {"arithmetic": arithmetic(pipe, arm, steps)}
        | {measure: interval(values) for measure, values in found[name].items()}
        for name, arm in arms.items()
    ]
    differences = []
    for n in INTERVALS:
        share = reused_share(pipe, fastdit.Cached(fastdit.Schedule.every(n)), steps)
        for name in routers:
            arm = f"{name} {share:.3f}"
            changes = {m: interval(found[arm][m] - found[f"every {n}"][m]) for m in found[arm]}
            differences.append({"arm": arm, "beside": f"every {n}", **changes})
    result = {
        "images": options.images,
        "steps": steps,
        "routers": {name: router.sha256 for name, router in routers.items()},
        "machine": describe_machine(),
        "rows": rows,
        "differences": differences,
    }
    out = options.out or Path(__file__).parent / "results" / "router-study.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, out.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['arm']:>16}  {row['arithmetic']:.3f}  "
            + "  ".join(
                f"{m} {row[m]['value']:.4f} [{row[m]['low']:.4f}, {row[m]['high']:.4f}]"
                for m in ("distance", "score")
            )
        )
    for change in differences:
        print(change["arm"], "-", change["beside"], change["distance"], change["score"])
    print(f"written to {out}")


if __name__ == "__main__":
    main()
