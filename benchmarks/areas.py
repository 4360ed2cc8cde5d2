"""What a set of ways of drawing is worth at all costs at once, beside evenly spread whole steps and plain ones.

It is the area between a set and a corner (hypervolume). Its axes are the share of the arithmetic of the most steps and
the decimal logarithm of the geometric mean of the errors; its corner is 1 and the worst error of evenly spread steps.
Intervals are 95 % bootstrap intervals over the prompts, the same draws for all sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import fastdit
from bed import Bed
from fastdit.evaluate.arms import SOLVERS, Arm, plain
from fastdit.search.archive import Candidate
from fastdit.search.front import hypervolume, non_dominated, on_axes
from fastdit.search.genome import Genome
from fastdit.search.quality import average
from fastdit.search.seeds import evenly_spread_steps
from fastdit.spec import ModelSpec
from testbed import away

EVEN, PLAIN = "evenly spread steps with V", "plain steps"
CAPTIONS = ("full", "open")
GUIDANCE, SIZE = 2.5, 64
#: evaluations of an arm beside others; nearly all, since fewer would cover less, however near each is
COUNTS = (*range(3, 15), 16, 18, 20, 24)
#: Euler is the nearer one at few evaluations alone, evenly spread or plain
MOST_EVEN_EULER, MOST_PLAIN_EULER, MOST_PLAIN = 14, 8, 20
RESAMPLES = 2000
JUDGE = "truth"  # whose mean of errors is taken


def scheduled(solver: str, steps: int, schedule: fastdit.Schedule) -> Arm:
    """A schedule under a solver."""
    return Arm(solver, steps, lambda pipe, steps: fastdit.Cached(schedule))


def evenly_spread(spec: ModelSpec, steps: int) -> dict[str, Arm]:
    """Numbers of whole steps under UniPC, evenly spread, whose others are drawn by order 1; few of Euler too."""
    genome = Genome(spec, steps, (0, 1))
    vectors = evenly_spread_steps(genome, 1)
    return {
        f"{solver} {steps}, {count} evenly, order 1": scheduled(
            solver, steps, genome.schedule(vectors[count - 1])
        )
        for solver, most in (("stock", MOST_EVEN_EULER), ("unipc", steps - 1))
        for count in COUNTS
        if count <= min(most, steps - 1)
    }


def plain_steps(steps: int) -> dict[str, Arm]:
    """Plain steps of three solvers."""
    few, many = (
        [n for n in COUNTS if n <= most] for most in (MOST_PLAIN_EULER, min(MOST_PLAIN, steps - 1))
    )
    counts = {solver: few if solver == "euler" else [*many, steps] for solver in SOLVERS}
    return dict(plain(solver, count) for solver, some in counts.items() for count in some)


def measured(
    bed: Bed, arms: Mapping[str, Arm], truth: np.ndarray, steps: int
) -> dict[str, Candidate]:
    """Errors of as many pictures as the truth has, and the share of the arithmetic of so many plain steps."""
    found = {}
    for name, arm in arms.items():
        errors = away(bed.latents(name, arm, len(truth)), truth)
        values = (average(JUDGE, errors), bed.arithmetic(arm) / steps)
        found[name] = Candidate(name, np.ones(1, dtype=bool), tuple(errors), values, 1, True)
        print(f"{bed.captions}, {name}: error {values[0]:.4f}, {values[1]:.0%}", flush=True)
    return found


def summed_up(sets: Mapping[str, Mapping[str, Candidate]]) -> dict[str, Any]:
    """The corner, and how much the first set covers, and over each other one; one of them is `EVEN`.

    Returns:
        "corner", the error; "hypervolume" of each set; "gain" over each other set, a share with its interval; "fronts",
        of each set what no other member dominates: [arm, error, share of the arithmetic], the cheapest first.
    """
    fronts = {}
    for name, group in sets.items():
        every = list(group.values())
        fronts[name] = [every[index] for index in non_dominated([c.values for c in every])]
    worst = max(candidate.values[0] for candidate in sets[EVEN].values())
    ((height, _),) = on_axes(np.array([[worst, 1.0]]), (1.0,), True)
    volumes = {name: _volumes(front, (float(height), 1.0)) for name, front in fronts.items()}
    first, *others = volumes.values()
    return {
        "corner": worst,
        "hypervolume": {name: drawn[0] for name, drawn in volumes.items()},
        "gain": {
            name: {
                "value": first[0] / drawn[0] - 1,
                "interval": np.quantile(np.divide(first, drawn)[1:] - 1, (0.025, 0.975)).tolist(),
            }
            for name, drawn in zip([*volumes][1:], others, strict=True)
        },
        "fronts": {
            name: [[c.key, *c.values] for c in sorted(group, key=lambda c: c.values[1])]
            for name, group in fronts.items()
        },
    }


def _volumes(front: Sequence[Candidate], reference: tuple[float, float]) -> list[float]:
    """Hypervolumes over all pictures, then over each draw of them."""
    losses, shares = np.array([c.losses for c in front]), [c.values[1] for c in front]
    items = losses.shape[1]
    draws = np.random.default_rng(0).integers(items, size=(RESAMPLES, items))
    return [
        hypervolume(
            on_axes(
                np.column_stack([[average(JUDGE, row) for row in losses[:, chosen]], shares]),
                (1.0,),
                True,
            ),
            reference,
        )
        for chosen in (np.arange(items), *draws)
    ]
