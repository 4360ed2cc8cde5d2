"""What reuse does to pictures under a sampler that draws noise at each step, on the model in the package.

    python benchmarks/noisy_sampler.py

The share of the objects that held-out prompts name which is drawn right (`fastdit.tiny.score`), half of the prompts of
two objects, at 64 x 64 pixels, with and without `stochastic_sampling`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import fastdit
from fastdit import tiny
from fastdit.methods.ras import PUBLISHED_RESETS
from machine import describe_machine

PROMPTS, BATCH, STEPS, SIZE = 48, 12, 28, 64
RESULT = Path(__file__).parent / "results" / "noisy-sampler.json"
ARMS = {
    "uncached": None,
    "every(2)": fastdit.Cached(fastdit.Schedule.every(2)),
    "every(4)": fastdit.Cached(fastdit.Schedule.every(4)),
    "RAS 0.5": fastdit.RAS(ratio=0.5, align=8, resets=PUBLISHED_RESETS[28]),
    "RAS 0.25": fastdit.RAS(ratio=0.25, align=4, resets=PUBLISHED_RESETS[28]),
    "RAS 0.5 by std": fastdit.RAS(ratio=0.5, metric="std", align=8),
}


def right(method: object, noisy: bool) -> float:
    """This is the share of objects that are right."""
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=noisy)
    if method is not None:
        fastdit.patch(pipe, method)
    one, two = (tiny.prompts(PROMPTS // 2, "test", objects, seed=7) for objects in (1, 2))
    texts, found = one + two, []
    for first in range(0, PROMPTS, BATCH):
        torch.manual_seed(0)  # of the noise that steps draw
        drawn = pipe(
            texts[first : first + BATCH],
            num_inference_steps=STEPS,
            height=SIZE,
            width=SIZE,
            generator=[torch.Generator().manual_seed(first + i) for i in range(BATCH)],
            output_type="np",
        )
        found.append(drawn.images)
    return tiny.score(np.concatenate(found), texts).mean


def main() -> None:
    """Draw all arms and write the result."""
    warnings.simplefilter("ignore")  # what is measured here is what is warned of
    shares = {
        name: {
            "with noise": right(method, noisy=True),
            "without": right(method, noisy=False),
        }
        for name, method in ARMS.items()
    }
    result = {"prompts": PROMPTS, "steps": STEPS, "size": SIZE, "machine": describe_machine()}
    RESULT.write_text(json.dumps({**result, "shares": shares}, indent=1) + "\n")
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
