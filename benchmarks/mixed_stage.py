"""What a coarse token's place and weight do to pictures at the end of RALU's mixed stage, on the model in the package.

    python benchmarks/mixed_stage.py

The clean estimate with which that stage ends is decoded and judged as whole pictures are: the share of clean pictures,
objects of some shape alone, and the share of the prompts' objects that are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
from arms import STUDIES
from bed import BATCH, SEED
from fastdit import tiny
from fastdit.evaluate.arms import Arm
from fastdit.evaluate.paired import share
from fastdit.tiny.score import find_objects
from machine import describe_machine
from subjects import SUBJECTS

PICTURES, SIZE, GUIDANCE = 64, 128, 2.5
ARMS = ("RALU 3x, parity", "RALU 3x, corners, keys alike", "RALU 3x, keys alike", "RALU 3x")
RESULT = Path(__file__).parent / "results" / "mixed-stage.json"


def ends(pipe: Any, arm: Arm, texts: list[str]) -> dict[str, np.ndarray]:
    """These are an arm's pictures [n, h, w, 3] in [0, 1], at the end of the mixed stage and of the run."""
    side, channels = SIZE // pipe.vae_scale_factor, pipe.transformer.config.in_channels
    found: dict[str, list[np.ndarray]] = {"stage": [], "run": []}
    for first in range(0, len(texts), BATCH):
        seeds = range(SEED + first, SEED + first + BATCH)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        with arm.around():
            handle = fastdit.patch(pipe, arm.method(pipe, arm.steps))
            drawn = pipe(
                texts[first : first + BATCH],
                num_inference_steps=arm.steps,
                latents=torch.stack(
                    [torch.randn(channels, side, side, generator=g) for g in noise]
                ),
                height=SIZE,
                width=SIZE,
                guidance_scale=GUIDANCE,
                output_type="np",
            )
            found["stage"].append(handle.stage_pictures()[1] / 255)
            handle.unpatch()
        found["run"].append(drawn.images)
    return {end: np.concatenate(pictures) for end, pictures in found.items()}


def judged(pictures: np.ndarray, texts: list[str]) -> dict[str, np.ndarray]:
    """These are "clean" and "score" of each picture."""
    objects = [find_objects(picture)[0] for picture in pictures]
    scores = [
        np.mean([one.right for one in tiny.score(picture[None], text).objects])
        for picture, text in zip(pictures, texts, strict=True)
    ]
    clean = [bool(some) and all(one.shape for one in some) for some in objects]
    return {"clean": np.array(clean), "score": np.array(scores)}


def main() -> None:
    """Draw all and write the result."""
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    texts = SUBJECTS["tiny"].prompts("full", PICTURES)
    arms = dict(STUDIES["ralu"].arms())
    found = {
        name: {end: judged(drawn, texts) for end, drawn in ends(pipe, arms[name], texts).items()}
        for name in ARMS
    }
    rows = {
        name: {
            end: {what: share(values, found[ARMS[0]][end][what]) for what, values in some.items()}
            for end, some in ends_of.items()
        }
        for name, ends_of in found.items()
    }
    result = {"pictures": PICTURES, "size": SIZE, "guidance": GUIDANCE}
    result |= {"machine": describe_machine(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
