"""ECAD's search seeded with a router's sweep, against the same search with its hand-made seeds alone.

    python benchmarks/search_hybrid.py ROUTER [--searches 3] [--generations 6] [--population 16]

The model in the package with the router's scheduler; training prompts, since what is compared is the search. Both
searches have the same population, operators and random draws; the seeded one has the router's sweep in place of some
hand-made schedules. Curves are the hypervolume over the logarithm of the loss and the share of the multiply-accumulates
after each measured schedule, up to one corner for all: the uncached run's cost, the loss of the worst hand-made seed.
A spread of a few searches is shown as it is, without an interval. Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import fastdit
from fastdit import tiny
from fastdit.search import Operators, Search, Settings, Work, ecad
from fastdit.search.front import corner, growth, on_axes
from machine import describe_machine
from router_study import macs_of

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (0.15, 0.3, 0.4, 0.47, 0.55, 0.65, 0.75)  # of the components' arithmetic
PROMPTS = 1  # of each kind of scene


class HeunByCalls(FlowMatchHeunDiscreteScheduler):
    """Heun's sampler asked for calls of the model, as a search counts, where n steps make 2 n - 1."""

    def set_timesteps(self, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        """As the stock scheduler, for half as many steps as calls."""
        super().set_timesteps((num_inference_steps + 1) // 2, *args, **kwargs)


def pipeline(router: fastdit.Router) -> Any:
    """The model with the router's scheduler; its steps are calls."""
    pipe = tiny.load_pipeline()
    if "Heun" in router.conditions.scheduler:
        pipe.scheduler = HeunByCalls.from_config(pipe.scheduler.config)
    return pipe


def values(search: Search) -> np.ndarray:
    """[n, 2] of the schedules that reuse anything, in the order in which the search measured them."""
    cost = search.archive.costs[0]
    seen = list(search.archive.seen.values())[: search.generations[-1]["fresh"]]
    return on_axes(
        [c.values for c in seen if c.reused],
        (search.uncached[cost],),
        logarithmic=True,
    )


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Each search a thin line, their mean a thick one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for color, (name, some) in zip(("C0", "C1"), curves.items(), strict=True):
        for curve in some:
            axis.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.7, alpha=0.6)
        shortest = min(map(len, some))
        mean = np.mean([curve[:shortest] for curve in some], axis=0)
        axis.plot(range(1, shortest + 1), mean, color=color, linewidth=2, label=name)
    axis.set_xlabel("schedules measured")
    axis.set_ylabel("hypervolume")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Search, compare, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("router", type=Path)
    parser.add_argument("--searches", type=int, default=3)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("build/hybrid"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hybrid-cpu.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/hybrid.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    router = fastdit.Router.load(options.router)
    pipe = pipeline(router)
    kinds = [tiny.prompts(PROMPTS, "train", objects, seed=21) for objects in (1, 2)]
    prompts = tuple(prompt for pair in zip(*kinds, strict=True) for prompt in pair)
    work = Work(prompts=prompts, steps=router.steps, batch=len(prompts))
    sweep = router.sweep(TARGETS, macs_of(pipe))
    arms = {"hand-made seeds": (), "router's sweep among the seeds": tuple(sweep)}
    found: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for seed in range(options.searches):
        operators = Operators.of("step", seed)
        settings = Settings(
            options.generations, options.population, ("true-macs",), operators=operators
        )
        for name, seeds in arms.items():
            folder = options.folder / router.sha256[:8] / f"{len(seeds)}-{seed}"
            search = ecad(pipe, folder, work, settings, seeds=seeds)
            found[name].append(values(search))
            print(f"{name}, search {seed}: {len(found[name][-1])} schedules", flush=True)
    first = found["hand-made seeds"][0][: options.population - 1]
    reference = corner(first)
    curves = {
        name: [growth(some, reference).tolist() for some in searches]
        for name, searches in found.items()
    }
    result = {
        "router": router.sha256,
        "scheduler": router.conditions.scheduler,
        "calls": router.steps,
        "prompts": len(prompts),
        "population": options.population,
        "generations": options.generations,
        "sweep": TARGETS,
        "machine": describe_machine(),
        "reference": list(reference),
        "after the seeds": {n: [c[options.population - 2] for c in s] for n, s in curves.items()},
        "at the end": {name: [c[-1] for c in some] for name, some in curves.items()},
        "curves": curves,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(curves, options.picture)
    for when in ("after the seeds", "at the end"):
        for name, some in result[when].items():
            print(f"{when}, {name}: " + ", ".join(f"{volume:.3f}" for volume in some))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
