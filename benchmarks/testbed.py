"""How near a way of drawing comes to the solution of the sampler's equation, beside fewer steps of better solvers.

    python benchmarks/testbed.py [--pictures 96] [--size 64] [--folder build/testbed]

The truth is Heun's method with 60 steps, whose own error is told. Captions are full, or open: those say a shape and
leave size, place and background to the model, so that trajectories curve as those of large models do. Every arm draws
the same held-out prompts from the same noise; errors are relative L2 distances of latents to the truth, and a verdict
is the paired ratio of two arms' errors (`paired.py`). What is drawn is kept in the folder, so a run that was
interrupted goes on, and more pictures are only added.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
from arms import SOLVERS, Arm, arms, plain
from fastdit import tiny
from fastdit.tiny import scenes
from fastdit.tiny.score import find_objects
from machine import describe_machine
from paired import ratio, share

BATCH = 16
SEED = 70_000  # of the first picture's noise
TRUTH = Arm("heun", 60)
COARSER = Arm("heun", 30)
GUIDANCE = (2.5, 7.0)
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"

Errors = Mapping[str, np.ndarray]


def prompts(captions: str, count: int) -> list[str]:
    """These are held-out prompts: half of two objects, or a shape, a colour and a shape, two of either by turns."""
    if captions == "full":
        one, two = (tiny.prompts(count, "test", objects, seed=7) for objects in (1, 2))
        return [(one, two)[i % 2][i // 2] for i in range(count)]
    rng = np.random.default_rng(5)
    found = []
    for index in range(count):
        (a, b), (c, d) = (rng.choice(list(names), 2) for names in (scenes.SHAPES, scenes.COLORS))
        forms = f"a {a}", f"a {c} {a}", f"a {a} and a {b}", f"a {c} {a} and a {d} {b}"
        found.append(forms[index % 4])
    return found


class Bed:
    """The model under one condition, and what was drawn with it.

    Args:
        folder: Where latents are kept.
    """

    def __init__(self, pipe: Any, captions: str, guidance: float, size: int, folder: Path) -> None:
        self.pipe, self.captions, self.guidance, self.size = pipe, captions, guidance, size
        self.folder = folder / f"{captions}-{guidance:g}-{size}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def latents(self, name: str, arm: Arm, count: int) -> np.ndarray:
        """These are the latents [count, C, H, W] that an arm ends with; batches are kept as they come."""
        path = self.folder / (name.replace(" ", "_").replace(",", "").replace("/", "-") + ".npy")
        done = np.load(path) if path.exists() else None
        while done is None or len(done) < count:
            first = 0 if done is None else len(done)
            more = self._draw(arm, first)
            done = more if done is None else np.concatenate([done, more])
            part = path.with_suffix(".part.npy")
            np.save(part, done)
            part.replace(path)
        return done[:count]

    def _draw(self, arm: Arm, first: int) -> np.ndarray:
        texts = prompts(self.captions, first + BATCH)[first:]
        side = self.size // self.pipe.vae_scale_factor
        channels = self.pipe.transformer.config.in_channels
        noise = [
            torch.randn(channels, side, side, generator=torch.Generator().manual_seed(SEED + i))
            for i in range(first, first + BATCH)
        ]
        arguments = arm.prepare(self.pipe)
        handle = None
        if arm.method is not None:
            handle = fastdit.patch(self.pipe, arm.method(self.pipe, arm.steps))
        try:
            found = self.pipe(
                texts,
                latents=torch.stack(noise),
                height=self.size,
                width=self.size,
                guidance_scale=self.guidance,
                output_type="latent",
                **arguments,
            )
        finally:
            if handle is not None:
                handle.unpatch()
        return found.images.numpy()

    @torch.no_grad()
    def clean(self, latents: np.ndarray) -> np.ndarray:
        """This tells which pictures show objects, each of some shape."""
        config, vae = self.pipe.vae.config, self.pipe.vae
        scaled = torch.from_numpy(latents) / config.scaling_factor + (config.shift_factor or 0)
        pictures = (vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        found = (find_objects(picture)[0] for picture in pictures)
        return np.array([bool(some) and all(one.shape for one in some) for some in found])

    def arithmetic(self, arm: Arm) -> float:
        """This is the arithmetic of an arm, in evaluations of the model."""
        if arm.method is None:
            return float(arm.steps)
        arm.prepare(self.pipe)
        handle = fastdit.patch(self.pipe, arm.method(self.pipe, arm.steps))
        said = handle.explain(self.size, self.size, BATCH, arm.steps)
        handle.unpatch()
        return arm.steps * said.macs / said.dense_macs


def away(latents: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """These are relative L2 distances [n]."""
    axes = tuple(range(1, truth.ndim))
    off = np.sqrt(((latents - truth) ** 2).sum(axes))
    return np.maximum(off / np.sqrt((truth**2).sum(axes)), 1e-9)


def judge(bed: Bed, count: int) -> dict[str, Any]:
    """This draws what is missing under one condition, and compares."""
    truth = bed.latents("truth", TRUTH, count)
    # Heun's error falls by 4 where its steps are halved.
    own = away(bed.latents("truth, half the steps", COARSER, count), truth) / 3
    tried: dict[str, tuple[Arm, float]] = {}
    for name, arm in arms():
        tried[name] = arm, bed.arithmetic(arm)
    for count_of in sorted({max(1, round(spent)) for _, spent in tried.values()}):
        for solver in SOLVERS:
            name, arm = plain(solver, count_of)
            tried[name] = arm, float(count_of)
    errors, flags, rows = {}, {}, []
    for name, (arm, _) in tried.items():
        latents = bed.latents(name, arm, count)
        errors[name], flags[name] = away(latents, truth), bed.clean(latents)
        print(f"{bed.folder.name} {name}: median {np.median(errors[name]):.4f}", flush=True)
    for name, (arm, spent) in tried.items():
        row = {
            "arm": name,
            "evaluations": spent,
            "median": float(np.median(errors[name])),
            "clean": float(flags[name].mean()),
        }
        if arm.method is not None:
            beside = [f"{solver} {max(1, round(spent))}" for solver in SOLVERS]
            row["ratios"] = {b: ratio(errors[name], errors[b]) for b in beside}
            row["cleaner"] = {b: share(flags[name], flags[b]) for b in beside}
        rows.append(row)
    return {
        "captions": bed.captions,
        "guidance": bed.guidance,
        "truth": {"median": float(np.median(own)), "clean": float(bed.clean(truth).mean())},
        "rows": rows,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Median errors over evaluations: plain solvers as lines, everything else as points, a panel a condition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    studies = result["conditions"]
    figure, axes = plt.subplots(1, len(studies), figsize=(4.2 * len(studies), 4), squeeze=False)
    for axis, study in zip(axes[0], studies, strict=True):
        rows = study["rows"]
        for solver in SOLVERS:
            some = [r for r in rows if "ratios" not in r and r["arm"].startswith(solver)]
            some.sort(key=lambda row: row["evaluations"])
            axis.plot(
                [r["evaluations"] for r in some],
                [r["median"] for r in some],
                "-",
                lw=1,
                label=solver,
            )
        groups = {
            "V": "V",
            "repeated": "repeated",
            "halves": "halves",
            "RAS, std": "std",
            "RAS, change": "change",
            "ECAD": "ECAD",
            "RALU": "RALU",
        }
        for marker, (label, key) in zip("osd^*vx", groups.items(), strict=True):
            some = [r for r in rows if "ratios" in r and key in r["arm"]]
            if label != "RALU":  # other pictures, which a distance cannot judge
                axis.plot(
                    [r["evaluations"] for r in some],
                    [r["median"] for r in some],
                    marker,
                    ms=4,
                    label=label,
                )
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the model")
        axis.set_xticks([3, 5, 7, 10, 14, 20], ["3", "5", "7", "10", "14", "20"], minor=False)
        axis.minorticks_off()
        axis.set_title(f"{study['captions']} captions, guidance {study['guidance']:g}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("median distance to the solution")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Draw what is missing, judge, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--folder", type=Path, default=Path("build/testbed"))
    parser.add_argument("--out", type=Path, default=RESULTS / "testbed.json")
    parser.add_argument("--plot", type=Path, default=DOCS / "testbed.png")
    options = parser.parse_args()
    if options.pictures % BATCH:
        parser.error(f"--pictures must be a multiple of {BATCH}, got {options.pictures}")
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    found = []
    for guidance in GUIDANCE:
        for captions in ("full", "open"):
            bed = Bed(pipe, captions, guidance, options.size, options.folder)
            found.append(judge(bed, options.pictures))
    result = {
        "pictures": options.pictures,
        "size": options.size,
        "machine": describe_machine(),
        "conditions": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.plot)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
