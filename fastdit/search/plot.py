"""The Pareto plot: the searched front between the uncached run, FORA grids, TGATE and fewer plain steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fastdit.search.baselines import DRAWN, FEWER_STEPS, UNCACHED, Baseline

FRONT, THIN = "#1f6feb", ("#9aa4af", "#57ab5a", "#d2a8ff")
STYLES = {
    UNCACHED: {"color": "#24292f", "marker": "*", "markersize": 11, "linestyle": "none"},
    "FORA": {"color": "#d4810b", "marker": "s", "markersize": 5, "linestyle": "--"},
    "TGATE": {"color": "#8250df", "marker": "^", "markersize": 6, "linestyle": "none"},
    DRAWN: {"color": "#0969da", "marker": "D", "markersize": 4, "linestyle": "none"},
    FEWER_STEPS: {"color": "#cf222e", "marker": "x", "markersize": 6, "linestyle": ":"},
}
FURTHER = {"marker": "+", "markersize": 6, "linestyle": ":"}  # of other solvers


def save_plot(
    path: str | os.PathLike[str],
    title: str,
    front: Sequence[Sequence[float]],
    baselines: Sequence[Baseline],
    uncached: float,
    labels: tuple[str, str],
    others: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> None:
    """This writes the plot as PNG: loss upward over cost to the right, as a share of the uncached run.

    Losses are drawn on a logarithmic scale; what has none, like the uncached run beside itself, stands on the floor.

    Args:
        path: Where to.
        title: One line.
        front: (loss, cost) of each point of the front.
        baselines: Points of comparison; their first two values are drawn.
        uncached: Cost of the uncached run.
        labels: Names of cost and loss.
        others: Name -> (loss, cost) of further fronts, drawn thin.
    """
    floor = min((point[0] for point in front if point[0] > 0), default=1.0) / 2

    def line(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
        """A line has shares of the cost and losses, by cost."""
        ordered = sorted((point[1] / uncached, max(point[0], floor)) for point in points)
        return [cost for cost, _ in ordered], [loss for _, loss in ordered]

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    for (name, points), color in zip((others or {}).items(), THIN, strict=False):
        axis.plot(*line(points), "o-", color=color, label=name, lw=1, ms=2.5)
    axis.plot(*line(front), "o-", color=FRONT, label="searched front", ms=4.5, lw=1.4)
    for group, points in _groups(baselines).items():
        axis.plot(*line(points), label=group, **STYLES.get(group, FURTHER))
    axis.set_xlabel(f"{labels[0]}, share of the uncached run")
    axis.set_ylabel(f"{labels[1]} (smaller is better)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlim(left=0)
    axis.set_yscale("log")
    axis.grid(color="#e8eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, format="png", dpi=150)


def _groups(baselines: Sequence[Baseline]) -> Mapping[str, list[tuple[float, ...]]]:
    found: dict[str, list[tuple[float, ...]]] = {}
    for baseline in baselines:
        found.setdefault(baseline.group, []).append(baseline.values)
    return found
