"""What a front has to beat, measured like the front: the uncached run, FORA grids, TGATE, and fewer plain steps.

Where forecasts are searched, also the grids whose other steps are drawn by each order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastdit.search import seeds
from fastdit.search.archive import Archive, Progress, silent

FORA = (2, 3, 4, 5, 7, 10)
TGATE = tuple((gate, period) for gate in (10, 15) for period in (1, 3, 5))
STEP_SHARES = (0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
FORECAST = (2, 3, 4)
UNCACHED, FEWER_STEPS, DRAWN = "uncached", "fewer steps", "forecasts"


@dataclass(frozen=True)
class Baseline:
    """This is one point of comparison.

    Attributes:
        group: The curve it belongs to.
        name: Its own.
        values: The objectives: mean loss, then the costs.
    """

    group: str
    name: str
    values: tuple[float, ...]


def measure_baselines(archive: Archive, progress: Progress = silent) -> list[Baseline]:
    """All baselines that exist for the model are measured; TGATE needs a cross-attention of its own."""
    genome, steps = archive.genome, archive.genome.steps
    named = {
        ("FORA", f"every {n}"): seeds.fora(genome, n) for n in FORA if n < steps or n == FORA[0]
    }
    for order in filter(None, genome.orders):
        drawn = {n: seeds.whole_steps(genome, range(0, steps, n), order) for n in FORECAST}
        named |= {
            (DRAWN, f"every {n}, order {order}"): each for n, each in drawn.items() if n < steps
        }
    if seeds.has_cross_attention(genome):
        for gate, period in TGATE:
            step = math.ceil(gate * steps / seeds.PAPER_STEPS)
            named["TGATE", f"m={step} k={period}"] = seeds.tgate(genome, step, period)
    vectors = np.stack(list(named.values()))
    measured = archive.evaluate(vectors, progress, racing=False)
    found = [
        Baseline(group, name, candidate.values)
        for (group, name), candidate in zip(named, measured, strict=True)
    ]
    asked = archive.work.steps
    counts = sorted({max(1, round(share * asked)) for share in STEP_SHARES}, reverse=True)
    points = archive.fewer_steps([asked, *counts], progress)
    found.append(Baseline(UNCACHED, f"{asked} steps", points[0]))
    found += [
        Baseline(FEWER_STEPS, f"{count} steps", values)
        for count, values in zip(counts, points[1:], strict=True)
    ]
    for solver in archive.work.knobs.solvers[1:]:
        points = archive.fewer_steps([asked, *counts], progress, solver)
        found += [
            Baseline(f"{FEWER_STEPS}, {solver}", f"{count} steps", values)
            for count, values in zip([asked, *counts], points, strict=True)
        ]
    return found
