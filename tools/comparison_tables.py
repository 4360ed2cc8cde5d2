"""What docs/evaluate.md shows of a comparison."""

from __future__ import annotations

import re
from typing import Any

MODELS = {
    "tiny": ("The model in the package", ""),
    "emoji": ("The second model", " --model emoji"),
}


def solution(result: dict[str, Any]) -> list[str]:
    """How far ways of many steps end from a finer solution."""
    tiny, emoji = (result["models"][name] for name in MODELS)
    return [
        (
            f"Relative distance of the latents to {result['fine']} even steps of AB2, the geometric mean over "
            f"{result['pictures']} held-out pictures of each model in the package (`benchmarks/bench_solution.py`)."
        ),
        "",
        "| | first | second |",
        "|---|---|---|",
        *(f"| {name} | {tiny[name]:.4f} | {emoji[name]:.4f} |" for name in tiny),
    ]


def verdicts(result: dict[str, Any], model: str) -> list[str]:
    """The verdicts of `fastdit compare` on one of `MODELS`."""
    name, option = MODELS[model]
    judged, told = result["verdicts"], result["provenance"]
    heads = [f"{v['budget']:g}x, reached {v['speedup']:.2f}x" for v in judged]
    lines = [
        (
            f"{name}, 28 steps, {result['pictures']} pictures, {told['machine']}, {told['threads']} threads, all in "
            f"one run (`fastdit compare{option} --pictures 12 --rounds 2`): the error of the plan of each budget over "
            "that of the nearest arm of a group that takes no longer, with its 95 % interval. Below 1 the plan is "
            "nearer to the solution; bold where the interval says so. The last column is the hypervolume of the "
            "budgets' front less that of the group's."
        ),
        "",
        f"| beside | {' | '.join(heads)} | front |",
        f"|---{'|---' * (len(heads) + 1)}|",
    ]
    for group in judged[0]["against"]:
        cells = [_verdict(verdict["against"][group]) for verdict in judged]
        more = result["hypervolume"][group]["composed_over_it"]
        cells.append(f"{more['value']:+.2f} [{more['low']:+.2f}, {more['high']:+.2f}]")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    refused = dict.fromkeys(re.sub(r" [\d.]+$", "", name) for name in result["refused"])
    lines += ["", f"Did not run on it: {', '.join(refused)}.", "", *result["where_not"]]
    return [f"* {line}" if line in result["where_not"] else line for line in lines]


def _verdict(found: dict[str, Any]) -> str:
    if found.get("arm") is None:
        return "too slow"
    ratio = found["ratio"]
    shown = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}], {found['arm']}"
    return f"**{shown}**" if found["verdict"] == "nearer" else shown
