"""Draw the pictures of the documentation that show a run from inside, with the model in the package.

python tools/pictures.py [ras] [ralu] [--out docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import fastdit
from fastdit import tiny
from fastdit.methods.ralu import LAYOUTS

PROMPT = (
    "a large red circle at the left and a small blue triangle at the right on a white background"
)
STEPS = 28
SHOWN = (0, 3, 4, 5, 6, 7, 8, 11, 15, 19, 27)


def ras(folder: Path) -> None:
    """Which tokens RAS computes, laid over the image as it forms."""
    pipe = tiny.load_pipeline()
    ratios = (0.5, 0.25)
    figure, axes = plt.subplots(len(ratios), len(SHOWN) + 1, figsize=(15, 3.1))
    for row, ratio in zip(axes, ratios, strict=True):
        handle = fastdit.patch(pipe, fastdit.RAS(ratio=ratio))
        with handle.watch() as frames:
            image = pipe(PROMPT, generator=torch.Generator().manual_seed(3)).images[0]
        drawn = handle.report().token_map(frames.pictures())
        handle.unpatch()
        for axis, step in zip(row, SHOWN, strict=False):
            axis.imshow(drawn[step])
            axis.set_title(f"step {step}", fontsize=9)
        row[-1].imshow(image)
        row[-1].set_title("result", fontsize=9)
        row[0].set_ylabel(f"RAS {ratio}", fontsize=10)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout(pad=0.4)
    figure.savefig(folder / "ras.png", dpi=90)


def ralu(folder: Path) -> None:
    """The ends of RALU's stages, and the same noise drawn by the unpatched model."""
    pipe = tiny.load_pipeline()

    def draw(steps: int) -> Any:
        generator = torch.Generator().manual_seed(3)
        return pipe(PROMPT, num_inference_steps=steps, generator=generator).images[0]

    presets = ("sd3-2x", "sd3-3x", "late")
    unpatched = draw(STEPS)
    figure, axes = plt.subplots(len(presets), 5, figsize=(12, 7.9))
    for row, preset in zip(axes, presets, strict=True):
        method = fastdit.RALU.preset(preset)
        handle = fastdit.patch(pipe, method)
        result = draw(method.run_steps)
        report = handle.report()
        drawn = report.resolution_map(handle.stage_pictures()[:, 0].repeat(2, 1).repeat(2, 2))
        handle.unpatch()
        shown = [*drawn, result, unpatched]
        titles = [f"{s.layout}: {s.steps} steps of {s.tokens} tokens" for s in report.stages]
        titles += [f"result, {method.run_steps} steps", f"unpatched, {STEPS} steps"]
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        if len(drawn) < len(LAYOUTS):
            row[1].set_title("no mixed stage", fontsize=9)
            row[1].axis("off")
            row = np.delete(row, 1)
        for axis, picture, title in zip(row, shown, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(f"RALU {preset}", fontsize=10)
    figure.tight_layout(pad=0.4, h_pad=1.2)
    figure.savefig(folder / "ralu.png", dpi=90)


#: name -> what draws it
PICTURES = {"ras": ras, "ralu": ralu}


def main() -> None:
    """Draw all, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    for name in options.names or PICTURES:
        PICTURES[name](options.out)


if __name__ == "__main__":
    main()
