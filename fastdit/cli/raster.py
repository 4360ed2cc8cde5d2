"""A static schedule as a picture: a panel per component, steps to the right, blocks downward.

Every (step, block, component) entry is shown, where the text raster of `fastdit schedule show` has
room for shares only. Takes a bound schedule; knows no model.
"""

from __future__ import annotations

import os

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdit.schedules.schedule import Schedule

COLORS = ListedColormap(["#e8eaed", "#1f6feb"])  # reused, computed
SIDE = 0.09  # inches, of an entry's square
SMALLEST = 1.1  # inches, of a panel's side


def save_raster(schedule: Schedule, path: str | os.PathLike[str], name: str) -> None:
    """This writes the picture of a schedule as PNG, with one row of panels per block kind."""
    layers = list(schedule.layers.items())
    heights = [max(SMALLEST, layer.bits.shape[1] * SIDE) for _, layer in layers]
    panels = max(len(layer.components) for _, layer in layers)
    width = max(SMALLEST, schedule.steps * SIDE)
    figure = Figure(
        figsize=(max(4.5, panels * (width + 0.4) + 0.4), sum(heights) + 0.6 * len(layers) + 0.6),
        layout="constrained",
    )
    title = f"{name}: {schedule.steps} steps, {schedule.reuse_share:.1%} reused"
    figure.suptitle(f"{title}\n(blue computes, grey is reused)", fontsize=10)
    axes = figure.subplots(
        len(layers), panels, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row, (kind, layer) in zip(axes, layers, strict=True):
        row[0].set_ylabel(kind, fontsize=9)
        for index, axis in enumerate(row):
            if index >= len(layer.components):
                axis.set_axis_off()
                continue
            entries = layer.bits[:, :, index].T.astype(np.uint8)  # [blocks, steps]
            axis.imshow(
                entries, cmap=COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axis.set_title(layer.components[index], fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.tick_params(labelsize=7, length=2)
    figure.savefig(path, format="png", dpi=150)
