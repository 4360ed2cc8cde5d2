"""A plan, or a schedule, as a picture: steps to the right, every block of each component downward, the tokens above.

Every (step, block, component) entry is shown, where the text raster has room for shares only.
"""

from __future__ import annotations

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fastdit.account.raster import ABSENT, Raster

#: of ABSENT, COMPUTED and the orders 0, 1 and 2
COLORS = ("#ffffff", "#1f6feb", "#e8eaed", "#f2c14e", "#d1495b")
NAMES = ("", "computed", "repeated", "a line", "a parabola")
STAGES = {"coarse": "#d8f3dc", "mixed": "#95d5b2", "full": "#52b788"}
SIDE = 0.11  # inches, of an entry
LEAST = 0.34  # inches, of a component, whose name must fit
HEADER = 0.7  # inches


def save_raster(raster: Raster, path: str | os.PathLike[str], name: str) -> None:
    """This writes the picture of a raster as PNG."""
    rows = raster.rows()
    heights = [max(LEAST, len(part) * SIDE) for *_, part in rows]
    header = [HEADER] * bool(raster.shares or raster.stages)
    width = max(4.0, raster.steps * 2 * SIDE)
    height = sum(heights) + sum(header) + 0.05 * len(rows) + 1.3
    figure = Figure(figsize=(width + 2.4, height), layout="constrained")
    figure.get_layout_engine().set(hspace=0.01, h_pad=0.02)
    counted = sum(part.size for *_, part in rows)
    reused = sum(int((part >= 0).sum()) for *_, part in rows) / counted
    figure.suptitle(f"{name}: {raster.steps} steps, {reused:.1%} reused", fontsize=10)
    axes = figure.subplots(
        len(header) + len(rows), 1, sharex=True, squeeze=False, height_ratios=header + heights
    )[:, 0]
    if header:
        _draw_tokens(axes[0], raster)
    seen: set[int] = set()
    for axis, (kind, component, part) in zip(axes[len(header) :], rows, strict=True):
        seen |= set(part.flatten().tolist())
        axis.imshow(
            part - ABSENT,
            cmap=ListedColormap(COLORS),
            vmin=-0.5,
            vmax=len(COLORS) - 0.5,
            aspect="auto",
            interpolation="nearest",
        )
        label = component if len(raster.components) == 1 else f"{component}\n{kind}"
        axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
        axis.set_yticks(sorted({0, len(part) - 1}))
        axis.tick_params(labelsize=6, length=2, bottom=axis is axes[-1])
    axes[-1].set_xlabel("step", fontsize=8)
    axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    figure.legend(
        handles=[
            Patch(color=COLORS[cell - ABSENT], label=NAMES[cell - ABSENT]) for cell in sorted(seen)
        ],
        loc="outside lower center",
        ncols=4,
        fontsize=7,
        frameon=False,
    )
    figure.savefig(path, format="png", dpi=150)


def _draw_tokens(axis: Axes, raster: Raster) -> None:
    """Which share of the tokens passes at each step, over the color of its stage."""
    steps = np.arange(raster.steps)
    for stage, color in STAGES.items():
        of_stage = [step for step, each in enumerate(raster.stages) if each == stage]
        if of_stage:
            axis.axvspan(of_stage[0] - 0.5, of_stage[-1] + 0.5, color=color, lw=0)
            middle = (of_stage[0] + of_stage[-1]) / 2
            axis.text(middle, 1.22, stage, fontsize=7, ha="center", va="bottom")
    axis.bar(steps, raster.shares, width=0.9, color=COLORS[1])
    for step, share in zip(steps, raster.shares, strict=True):
        axis.text(step, share + 0.03, f"{share:.0%}", fontsize=5, ha="center", va="bottom")
    axis.set_ylim(0, 1.45)
    axis.set_yticks([])
    axis.set_ylabel("tokens", fontsize=7, rotation=0, ha="right", va="center")
    axis.tick_params(bottom=False, labelbottom=False)
