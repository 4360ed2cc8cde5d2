"""How far RAS's choice of tokens goes, on the model in the package: distance to a near exact solution of its equation.

    python benchmarks/ras_study.py [--images 24]

The truth of a prompt and its noise is Heun's solution in 60 steps. Arms draw it by Euler: RAS by the change of
velocities, RAS by the published metric, from both ends of its order, and plain runs with as much arithmetic as RAS.
Full captions leave little open, short ones much. Distances are of decoded pictures and of latents, relative; what an
arm is to another is said by `paired.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

import fastdit
import paired
from fastdit import tiny
from fastdit.tiny import scenes

STEPS = 28  # the pipeline's default
TRUTH_STEPS = 60  # of Heun
GUIDANCE = 2.5
SEED = 70_000  # of the first picture's noise
RESULTS = Path(__file__).with_name("results") / "ras-study.json"
RATIOS = (0.5, 0.25)


def methods(ratio: float) -> dict[str, fastdit.RAS]:
    """The metrics at one ratio; of the published one both ends."""
    return {
        f"RAS {ratio} change": fastdit.RAS(ratio=ratio, metric="change"),
        f"RAS {ratio} std": fastdit.RAS(ratio=ratio),
        f"RAS {ratio} std, the smallest dropped": fastdit.RAS(ratio=ratio, high_ratio=0.0),
    }


def captions(kind: str, count: int) -> list[str]:
    """Held-out captions of one and two objects, or short ones that name a shape alone."""
    if kind == "open":
        return [f"a {scenes.SHAPES[i % len(scenes.SHAPES)]}" for i in range(count)]
    few = count // 2
    return tiny.prompts(count - few, "test", 1, seed=7) + tiny.prompts(few, "test", 2, seed=7)


def draw(pipe: Any, texts: list[str], noise: Tensor, steps: int, method: Any = None) -> Tensor:
    """Latents [B, ...], each picture drawn from its own noise."""
    handle = fastdit.patch(pipe, method) if method is not None else None
    try:
        return pipe(
            texts,
            num_inference_steps=steps,
            latents=noise.clone(),
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
    finally:
        if handle is not None:
            handle.unpatch()


def work(pipe: Any, method: fastdit.RAS) -> float:
    """Multiplications of a run, in steps of a plain one."""
    handle = fastdit.patch(pipe, method)
    try:
        shown = handle.explain(steps=STEPS)
    finally:
        handle.unpatch()
    return STEPS * shown.macs / shown.dense_macs


def pixels(pipe: Any, latents: Tensor) -> Tensor:
    vae = pipe.vae
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(scaled, return_dict=False)[0].clamp(-1, 1)


def distances(found: Tensor, truth: Tensor) -> np.ndarray:
    """Relative, one for each picture."""
    off = (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return off.double().numpy()


def interval(values: np.ndarray) -> list[float]:
    """Mean, and the ends of its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(len(values), size=(paired.RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]


@torch.no_grad()
def study(pipe: Any, kind: str, count: int) -> dict[str, Any]:
    """Distances of all arms, and what each is to RAS by change at its ratio."""
    texts = captions(kind, count)
    size = pipe.transformer.config.sample_size
    noise = torch.stack(
        [
            torch.randn(
                pipe.transformer.config.in_channels,
                size,
                size,
                generator=torch.Generator().manual_seed(SEED + i),
            )
            for i in range(count)
        ]
    )
    own = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(own.config)
    truth = draw(pipe, texts, noise, TRUTH_STEPS)
    pipe.scheduler = own
    drawn = pixels(pipe, truth)
    off: dict[str, dict[str, np.ndarray]] = {}
    rows: dict[str, Any] = {}
    ratios: dict[str, Any] = {}

    def measure(name: str, steps: int, amount: float, method: Any = None) -> None:
        latents = draw(pipe, texts, noise, steps, method)
        off[name] = {
            "latent": distances(latents, truth),
            "pixel": distances(pixels(pipe, latents), drawn),
        }
        rows[name] = {"steps of work": amount}
        rows[name] |= {space: interval(values) for space, values in off[name].items()}
        print(kind, name, json.dumps(rows[name]), flush=True)

    measure(f"plain, {STEPS} steps", STEPS, STEPS)
    for ratio in RATIOS:
        chosen = methods(ratio)
        amounts = {name: work(pipe, method) for name, method in chosen.items()}
        for name, method in chosen.items():
            measure(name, STEPS, amounts[name], method)
        change, *others = chosen
        plain = math.ceil(max(amounts.values()))
        others.append(f"plain, {plain} steps")
        measure(others[-1], plain, plain)
        for other in others:
            found = {}
            for space in ("latent", "pixel"):
                ratio_of = paired.ratio(off[change][space], off[other][space])
                found[space] = [ratio_of[end] for end in ("value", "low", "high")]
            ratios[f"{change} / {other}"] = found
            print(kind, f"{change} / {other}", json.dumps(found), flush=True)
    return {"arms": rows, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=24)
    arguments = parser.parse_args()
    pipe = tiny.load_pipeline()
    found = {kind: study(pipe, kind, arguments.images) for kind in ("full", "open")}
    RESULTS.write_text(json.dumps({"images": arguments.images, "studies": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
