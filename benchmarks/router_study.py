"""A learned router beside fixed intervals and fewer steps, on the model in the package and held-out prompts.

    python benchmarks/router_study.py ROUTER [--components ROUTER] [--pairs ROUTER] [--prompts 96] [--side 32]

A router that was trained for forecasts is judged by another measure, see `solver_study.py`. The rule of the others,
fixed before the first run:

* Held-out prompts, half of them of two objects, of a split that neither model nor router saw; noise seeds from SEED on,
  where training draws its own at random from 2^62. Every arm draws the same prompts from the same noise, with the
  scheduler, guidance and size that the router was trained for.
* Judged by the paired distance, relative L2 to the picture that the unpatched model draws in the same number of steps,
  and by the share of the prompts' objects that are there (`fastdit.tiny.score`).
* The router meets each fixed interval at equal multiply-accumulates of the whole run, to 1 %, checked: its entries with
  the least logits are reused, as many as that takes. It wins where the 95 % bootstrap interval of the mean paired
  difference in distance lies below 0. Each interval is reported, and the score, also where it loses.
* Main arms, over all prompts: intervals, the router beside them, fewer steps, and, for Heun's sampler, the rule that a
  reader would write by hand: the first call and the correctors, as many as every second call. Side arms, over the first
  `--side` prompts, draw the curves: other shares of the router; one with a logit for each component, where the first
  has one for each step; one trained as Learning-to-Cache is (lambda = 1, adjacent pairs), up to the half that it can
  reuse.

Intervals are percentiles over resampled prompts, the same draws for all arms. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
import solver_study
from fastdit import tiny
from fastdit.account.cost import Cost
from fastdit.adapters import find_adapter
from fastdit.cli.distance import relative_l2
from fastdit.cli.sampler import swap_scheduler
from machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
INTERVALS = (2, 3, 4)
SHARES = (0.2, 0.35)  # of the components' arithmetic, beside those of the intervals
FEWER = (1 / 2, 2 / 5)  # of the steps
TOLERANCE = 0.01
RESAMPLES = 4000
SEED = 50_000  # of the first picture's noise
BATCH = 8


@dataclass(frozen=True)
class Arm:
    """One way of drawing; `family` is the curve it belongs to, `main` whether all prompts are drawn."""

    family: str
    steps: int
    method: Callable[[], Any] | None = None
    main: bool = True


def held_out(count: int) -> list[str]:
    """Held-out prompts, of one object and of two in turn."""
    kinds = [tiny.prompts(count // 2, "test", objects, seed=11) for objects in (1, 2)]
    return [prompt for pair in zip(*kinds, strict=True) for prompt in pair]


def arms_of(
    pipe: Any,
    router: fastdit.Router,
    components: fastdit.Router | None,
    pairs: fastdit.Router | None,
    steps: int,
) -> dict[str, Arm]:
    """Name -> arm."""

    def cached(schedule: Any) -> Callable[[], Any]:
        return lambda: fastdit.Cached(schedule)

    macs = macs_of(pipe)
    every = {n: fastdit.Schedule.every(n) for n in INTERVALS}
    shares = {n: reused_share(pipe, cached(every[n]), steps) for n in INTERVALS}
    arms = {"unpatched": Arm("unpatched", steps)}
    for share in FEWER:
        arms[f"{round(share * steps)} steps"] = Arm("fewer steps", round(share * steps))
    for n in INTERVALS:
        arms[f"every {n}"] = Arm("fixed interval", steps, cached(every[n]))
        (schedule,) = router.sweep([shares[n]], macs)
        arms[f"router as every {n}"] = Arm("router", steps, cached(schedule))
    if "Heun" in type(pipe.scheduler).__name__:
        schedule = correctors(router)
        arms["correctors"] = Arm("correctors by hand", steps, cached(schedule))
    sides = [("router", "router", router, SHARES)]
    if components:
        sides.append(("components", "a logit a component", components, (*SHARES, *shares.values())))
    if pairs:
        sides.append(("pairs", "Learning-to-Cache's training", pairs, (*SHARES, shares[2])))
    for name, family, some, wanted in sides:
        for share, schedule in zip(wanted, some.sweep(wanted, macs), strict=True):
            arms[f"{name} {share:.0%}"] = Arm(family, steps, cached(schedule), False)
    return arms


def correctors(router: fastdit.Router) -> fastdit.Schedule:
    """Heun evaluates twice at a sigma, to correct and to predict anew: the second time is reused."""
    rows = np.arange(router.steps)
    computes = (rows % 2 == 1) | (rows == 0)
    bits = {
        kind: np.broadcast_to(computes[:, None, None], logits.shape)
        for kind, logits in router.logits.items()
    }
    return fastdit.Schedule.from_bits(bits, router.components)


def macs_of(pipe: Any) -> dict[str, np.ndarray]:
    """Multiply-accumulates of each component in one step, for the pictures drawn here."""
    transformer = pipe.transformer
    adapter, side = find_adapter(transformer), transformer.config.sample_size
    tokens = adapter.tokens(transformer, (1, 1, side, side))
    return Cost.of(transformer, tokens, adapter.text_tokens_of(pipe)).component_macs()


def explained(pipe: Any, method: Callable[[], Any], steps: int) -> Any:
    """What the library predicts of a run."""
    handle = fastdit.patch(pipe, method())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resampled schedules say so each time
        said = handle.explain(steps=len(calls_of(pipe, steps)))
    handle.unpatch()
    return said


def reused_share(pipe: Any, method: Callable[[], Any], steps: int) -> float:
    """Share of the components' multiply-accumulates that a method spares."""
    said = explained(pipe, method, steps)
    one = sum(float(some.sum()) for some in macs_of(pipe).values())
    rows = len(calls_of(pipe, steps))
    return (said.dense_macs - said.macs) / (one * rows * said.transformer_batch)


def calls_of(pipe: Any, steps: int) -> torch.Tensor:
    """The timesteps of a run, one for each call of the model."""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.timesteps


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


def draw_all(
    pipe: Any, arms: dict[str, Arm], texts: list[str], side: int, folder: Path
) -> dict[str, Any]:
    """Every arm's pictures, kept in `folder`; one batch of prompts after the other through all arms."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        for name, arm in arms.items():
            if not arm.main and first >= side:
                continue
            path = folder / f"{name} {first}.npy".replace(" ", "_")
            if not path.exists():
                np.save(path, draw(pipe, arm, some, first))
            found[name].append(np.load(path))
        print(f"{first + len(some)} of {len(texts)} prompts", flush=True)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def judge(pictures: dict[str, np.ndarray], texts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Arm -> measure -> values [RESAMPLES + 1], all its prompts first; arms of as many prompts share the draws."""
    found = {}
    for name, images in pictures.items():
        count = len(images)
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        draws = np.vstack([np.arange(count), drawn])
        pairs = zip(images, pictures["unpatched"], strict=False)
        away = np.array([relative_l2(a, b) for a, b in pairs])
        verdicts = [
            tiny.score(image[None] / 255, [text]).objects
            for image, text in zip(images, texts, strict=False)
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
        return len(calls_of(pipe, arm.steps)) / len(calls_of(pipe, steps))
    said = explained(pipe, arm.method, steps)
    return said.macs / said.dense_macs


def compare(
    found: dict[str, dict[str, np.ndarray]], spent: dict[str, float]
) -> list[dict[str, Any]]:
    """The router less what it was made to cost as much as; refuses a pair that does not."""
    beside = [(f"router as every {n}", f"every {n}") for n in INTERVALS]
    beside.append(("router as every 2", "correctors"))
    rows = []
    for arm, other in beside:
        if other not in found:
            continue
        if abs(spent[arm] / spent[other] - 1) > TOLERANCE:
            raise RuntimeError(f"{arm} spends {spent[arm]:.4f}, {other} {spent[other]:.4f}")
        changes = {m: interval(found[arm][m] - found[other][m]) for m in found[arm]}
        rows.append({"arm": arm, "beside": other, **changes})
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance and score over arithmetic, one line for each family of arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
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
            axis.errorbar(x, y, bars, marker="o", markersize=4, capsize=2, label=family)
        axis.set_xlabel("multiply-accumulates, share of the unpatched run's")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    stock = next(row for row in rows if row["family"] == "unpatched")["score"]["value"]
    axes[1].axhline(stock, color="0.6", linestyle=":", label="unpatched")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw, judge, write results and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("router", type=Path)
    parser.add_argument("--components", type=Path, metavar="ROUTER", help="no --whole-steps")
    parser.add_argument("--pairs", type=Path, metavar="ROUTER", help="trained with --pairs")
    parser.add_argument("--prompts", type=int, default=96, help="of the main arms")
    parser.add_argument("--side", type=int, default=32, help="prompts of the side arms")
    parser.add_argument("--folder", type=Path, default=Path("build/router"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    router = fastdit.Router.load(options.router)
    components = fastdit.Router.load(options.components) if options.components else None
    pairs = fastdit.Router.load(options.pairs) if options.pairs else None
    steps = router.provenance["training"]["steps"]
    pipe = tiny.load_pipeline()
    if router.order:
        solver_study.study(router, components, pipe, options)
        return
    if router.conditions.scheduler != type(pipe.scheduler).__name__:
        swap_scheduler(pipe, router.conditions.scheduler)
    arms = arms_of(pipe, router, components, pairs, steps)
    spent = {name: arithmetic(pipe, arm, steps) for name, arm in arms.items()}
    texts = held_out(options.prompts)
    folder = options.folder / router.sha256[:8]
    found = judge(draw_all(pipe, arms, texts, options.side, folder), texts)
    rows = [
        {"arm": name, "family": arm.family, "steps": arm.steps, "arithmetic": spent[name]}
        | {"prompts": options.prompts if arm.main else min(options.side, options.prompts)}
        | {measure: interval(values) for measure, values in found[name].items()}
        for name, arm in arms.items()
    ]
    differences = compare(found, spent)
    result = {
        "prompts": options.prompts,
        "steps": steps,
        "calls": router.steps,
        "scheduler": router.conditions.scheduler,
        "router": router.sha256,
        "components": components and components.sha256,
        "pairs": pairs and pairs.sha256,
        "epochs": router.provenance["epochs"],
        "machine": describe_machine(),
        "rows": rows,
        "differences": differences,
    }
    name = "heun" if "Heun" in router.conditions.scheduler else "euler"
    out = options.out or ROOT / "benchmarks" / "results" / f"router-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    picture = out if options.out else ROOT / "docs" / out.name
    plot(rows, picture.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['arm']:>22}  {row['arithmetic']:.3f}  "
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
