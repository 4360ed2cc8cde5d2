"""Draw the pictures of the documentation that show a run from inside, with the model in the package.

python tools/pictures.py [--out docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import fastdit
from fastdit import tiny

PROMPT = (
    "a large red circle at the left and a small blue triangle at the right on a white background"
)
STEPS = 28
SHOWN = (0, 3, 4, 6, 9, 11, 12, 16, 20, 24, 27)


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


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    ras(parser.parse_args().out)


if __name__ == "__main__":
    main()
