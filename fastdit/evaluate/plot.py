"""Error over speed of all groups of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdit.evaluate.contenders import COMPOSED, FEWER
from fastdit.evaluate.studio import UNPATCHED


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A comparison's JSON data as a picture: a line for each group, the nearest solver's plain steps drawn thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axis = plt.subplots(figsize=(9, 6))
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        label = row["group"]
        if label == FEWER:
            label = f"{FEWER}, {row['solver']}"
        series.setdefault(label, []).append((row["speedup"], row["error"]))
    markers = itertools.cycle("osD^vP*X<>")
    colours = itertools.cycle(plt.colormaps["tab20"].colors)
    for label, points in series.items():
        points.sort()
        plain = label.startswith(FEWER)
        style: dict[str, Any] = {"color": "0.6", "lw": 1, "ms": 3} if plain else {"lw": 1, "ms": 5}
        if label == COMPOSED:
            style = {"color": "crimson", "lw": 2.5, "ms": 7}
        elif label == UNPATCHED:
            style = {"color": "black", "lw": 0, "ms": 9}
        if not plain and "color" not in style:
            style["color"] = next(colours)
        line = ("--", ":", "-.", "-")[hash_of(label)] if plain else "-"
        axis.plot(*zip(*points, strict=True), line, marker=next(markers), label=label, **style)
    own = result["solution"]["error"]
    axis.axhline(own, color="0.8", lw=1, label="the solution's own error")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="times as fast as the unpatched loop, measured",
        ylabel="distance of latents to the many-step solution",
    )
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks([tick for tick in (0.75, 1, 1.5, 2, 3, 4, 5, 7, 10) if _within(tick, series)])
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def hash_of(label: str) -> int:
    """One of four styles for a solver's line, always the same."""
    return sum(map(ord, label)) % 4


def _within(tick: float, series: Mapping[str, list[tuple[float, float]]]) -> bool:
    speeds = [speed for points in series.values() for speed, _ in points]
    return 0.95 * min(speeds) <= tick <= 1.05 * max(speeds)
