"""The first population: the hand-made families of the ECAD paper (spec 6.4), for any model and number of steps.

* uncached; infeasible, and kept as the paper keeps it.
* FORA grids: all components every n steps.
* attention only every n steps, feed-forward always.
* evenly spaced: at some steps, some blocks reuse one role of component.
* TGATE without the averaging of its cross-attention, for models that have a cross-attention of their own.

Where forecasts are searched, not of the paper: whole steps drawn by each order, evenly spread and dense early, and each
half of the depth in turn. Where more than a schedule is searched, all of that for each number of steps and each solver,
and beside it what needs no schedule: plain runs of each, and RAS alone.

A population smaller than the families takes from each in turn; a larger one is filled by crossing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from fastdit.errors import ArgumentError
from fastdit.schedules.book import PlanBook
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.spread import early_steps, even_steps
from fastdit.search.genome import Genome

if TYPE_CHECKING:
    from fastdit.search.knobs import Run

PERIODS = (2, 3, 4, 5, 7, 10, 20)
ATTENTION_PERIODS = (2, 4, 5, 7, 10, 20)
SPACED = {"attention": 20, "feed_forward": 18, "cross": 7}  # how many of each
TGATE_STEPS = (10, 12, 14, 16, 18, 20)
TGATE_PERIODS = (1, 3, 5, 7, 9, 11)
TGATE_COUNT = 13
TGATE_WARMUP = 2
FORECAST_SHARES = (0.5, 0.7, 0.35, 0.6, 0.85)  # of the steps that compute
PAPER_STEPS = 20
POPULATIONS = {"pixart": 72}
POPULATION = 24
CROSS = {"pixart": ("attn2",), "lumina": ("attn2",)}


def default_population(family: str) -> int:
    """The paper's population is 72 for PixArt, 24 for FLUX, and for what it did not search."""
    return POPULATIONS.get(family, POPULATION)


def first_population(
    genome: Genome, population: int, given: Sequence[Schedule] = (), seed: int = 0
) -> np.ndarray:
    """The seeds are bool [population, genome size]: the uncached run, those `given`, then the families in turn.

    Raises:
        ArgumentError: More are given than the population holds.
        ScheduleError: One that is given does not fit the model or the steps.
    """
    if len(given) >= population:
        raise ArgumentError(
            f"population must exceed the number of schedules given, got {population} for {len(given)}"
        )
    found: dict[bytes, np.ndarray] = {}
    mine = [uncached(genome), *(genome.vector(schedule) for schedule in given)]
    for vector in (*mine, *_in_turn(genome)):
        if len(found) < population:
            found.setdefault(genome.to_bytes(vector), vector)
    _fill(found, genome, population, np.random.default_rng(seed))
    return np.stack(list(found.values()))


def seeds_of(book: PlanBook, genome: Genome) -> list[Schedule]:
    """The schedules of a book's plans that a search of this genome can hold."""
    found = []
    for plan in book.plans[1:] if book.steps == genome.steps else ():
        schedule = plan.schedule or Schedule.of_steps(
            genome.spec, book.steps, plan.computed, plan.order
        )
        orders = {int(order) for layer in schedule.layers.values() for order in layer.orders.flat}
        if orders <= set(genome.orders):
            found.append(schedule)
    return found


def uncached(genome: Genome) -> np.ndarray:
    """All components compute at all steps."""
    return genome.join(np.ones((genome.steps, len(genome.components)), dtype=bool))


def fora(genome: Genome, period: int) -> np.ndarray:
    """All components compute every `period` steps."""
    return _build(genome, lambda step, block, role: step % period == 0)


def attention_only(genome: Genome, period: int) -> np.ndarray:
    """Attention computes every `period` steps, feed-forward always."""
    return _build(genome, lambda step, block, role: role == "feed_forward" or step % period == 0)


def evenly_spaced(genome: Genome, role: str, blocks: int, steps: int) -> np.ndarray:
    """`blocks` blocks reuse their components of a role at `steps` steps, both evenly spread."""
    total = genome.spec.block_count
    at = {math.ceil(x - 1) for x in np.linspace(0, genome.steps + 1, steps + 2)[1:-1]}
    spread = {round(i * (total - 1) / max(1, blocks - 1)) for i in range(blocks)}
    return _build(
        genome, lambda step, block, own: own != role or step not in at or block not in spread
    )


def evenly_spread_steps(genome: Genome, order: int = 0) -> list[np.ndarray]:
    """Vectors compute whole steps, evenly spread: 1, 2, ... of them, up to all but one; `order` draws the others.

    Not of the paper, which has the grids among them: they fill the costs between every second step and all of them.
    """
    counts = range(1, genome.steps)
    return [whole_steps(genome, even_steps(genome.steps, count), order) for count in counts]


def dense_early_steps(genome: Genome, count: int, order: int) -> np.ndarray:
    """About so many whole steps compute, the nearer to each other the earlier they are."""
    return whole_steps(genome, early_steps(genome.steps, count), order)


def whole_steps(genome: Genome, computed: Sequence[int] | np.ndarray, order: int) -> np.ndarray:
    """These steps compute; the others are drawn by `order`."""
    rows = np.zeros((genome.steps, len(genome.components)), dtype=bool)
    rows[list(computed)] = True
    return genome.join(rows, order)


def halves(genome: Genome, order: int, first: int = 2) -> np.ndarray:
    """From step `first`, each half of the depth computes at every other step and is drawn by `order` at the next."""
    half = genome.spec.block_count // 2
    return _build(
        genome, lambda step, block, role: step < first or (step % 2 == 0) == (block < half), order
    )


def tgate(genome: Genome, gate: int, period: int) -> np.ndarray:
    """Self-attention computes every `period` steps until step `gate`, from there cross-attention never."""

    def computes(step: int, block: int, role: str) -> bool:
        if step >= gate:
            return role != "cross"
        return role != "attention" or step < TGATE_WARMUP or step % period == 0

    return _build(genome, computes)


def has_cross_attention(genome: Genome) -> bool:
    """This tells whether the model has a cross-attention of its own."""
    return "cross" in _roles(genome)


def _in_turn(genome: Genome) -> Iterator[np.ndarray]:
    """The FORA grids come first, then a member of every other family, again and again; of knobs each run in turn."""
    if genome.knobs.size:
        runs = list(genome.knobs.runs())
        plain = [run for run in runs if run.ras is None and not run.coarse]
        for run in sorted(runs, key=lambda run: run not in plain):
            yield genome.embed(uncached(genome.alone(run)), run)
        for group in zip_longest(*(_of_run(genome, run) for run in plain)):
            yield from (vector for vector in group if vector is not None)
        return
    yield from (fora(genome, n) for n in _periods(genome, PERIODS))
    roles = set(_roles(genome))
    families = [_forecasts(genome, order) for order in genome.orders if order]
    families += [[attention_only(genome, n) for n in _periods(genome, ATTENTION_PERIODS)]]
    families += [_spaced(genome, role, n) for role, n in SPACED.items() if role in roles]
    if "cross" in roles:
        families.append(_tgates(genome))
    for group in zip_longest(*families):
        yield from (vector for vector in group if vector is not None)


def _of_run(genome: Genome, run: Run) -> Iterator[np.ndarray]:
    """The families of one run, forecasts before others."""
    alone = genome.alone(run)
    drawn = zip_longest(*(_forecasts(alone, order) for order in alone.orders if order))
    for vector in (*(v for group in drawn for v in group if v is not None), *_in_turn(alone)):
        yield genome.embed(vector, run)


def _forecasts(genome: Genome, order: int) -> list[np.ndarray]:
    """These are drawn by one order, the most useful first."""
    counts = [max(2, round(share * genome.steps)) for share in FORECAST_SHARES]
    even = evenly_spread_steps(genome, order)
    found = [halves(genome, order)]
    for count in counts:
        found += [even[min(count, len(even)) - 1], dense_early_steps(genome, count, order)]
    return [*found, halves(genome, order, first=genome.steps // 2)]


def _periods(genome: Genome, periods: Sequence[int]) -> list[int]:
    """These fit the steps; the longest, all steps, always does."""
    return sorted({*(n for n in periods if n < genome.steps), genome.steps})


def _spaced(genome: Genome, role: str, count: int) -> list[np.ndarray]:
    """These are `count` of the evenly spaced schedules, from the least reuse to the most."""
    total = genome.spec.block_count
    grid = [
        (blocks, steps)
        for blocks in range(min(3, total), total + 1, 2)
        for steps in range(min(3, genome.steps - 1), genome.steps, 2)
    ]
    grid.sort(key=lambda pair: (pair[0] * pair[1], pair))
    chosen = np.unique(np.linspace(0, len(grid) - 1, count).round().astype(int))
    return [evenly_spaced(genome, role, *grid[index]) for index in chosen]


def _tgates(genome: Genome) -> list[np.ndarray]:
    pairs = [
        (math.ceil(gate * genome.steps / PAPER_STEPS), period)
        for gate in TGATE_STEPS
        for period in TGATE_PERIODS
    ]
    chosen = np.linspace(0, len(pairs) - 1, TGATE_COUNT).round().astype(int)
    return [tgate(genome, *pairs[index]) for index in chosen]


def _fill(
    found: dict[bytes, np.ndarray], genome: Genome, population: int, rng: np.random.Generator
) -> None:
    """This crosses the seeds at four points until there are enough; after many failures it flips fair coins."""
    sources = list(found.values())
    for attempt in range(100 * population):
        if len(found) >= population:
            return
        one, other = rng.choice(len(sources), 2, replace=len(sources) < 2)
        cuts = np.sort(rng.permutation(genome.size - 1)[:4] + 1)
        swapped = np.searchsorted(cuts, np.arange(genome.size), side="right") % 2 == 1
        vector = np.where(swapped, sources[other], sources[one])
        if attempt > 10 * population:
            vector = rng.random(genome.size) < 0.5
        found.setdefault(genome.to_bytes(vector), vector)
    raise ArgumentError(
        f"population {population} is more than the {2 ** min(genome.size, 60)} schedules there are"
    )


def _roles(genome: Genome) -> list[str]:
    """ "attention", "cross" or "feed_forward" of each component of a step."""
    cross = CROSS.get(genome.spec.family, ())
    return [
        "cross"
        if name in cross
        else "attention"
        if "attn" in name or name == "to_out"
        else "feed_forward"
        for _, _, name in genome.components
    ]


def _build(genome: Genome, computes: Callable[[int, int, str], bool], order: int = 0) -> np.ndarray:
    """A rule over (step, block over all kinds, role) has this vector."""
    first, offsets = 0, {}
    for kind in genome.spec.kinds:
        offsets[kind.name] = first
        first += kind.count
    roles = _roles(genome)
    blocks = [
        (offsets[kind] + block, role)
        for (kind, block, _), role in zip(genome.components, roles, strict=True)
    ]
    rows = [[computes(step, block, role) for block, role in blocks] for step in range(genome.steps)]
    return genome.join(np.array(rows), order)
