"""Variation of a schedule by whole steps: what `Operators(unit="step")` does instead of the paper's.

The paper's operators cut and flip single bits, so a child mixes fresh and stale components within a step. The schedules
that it published hardly do: of FLUX 98 % of the block-steps are all or nothing, and half of PixArt's steps recompute
nothing (spec 7). Here the step is what is cut, added, dropped and moved, and only some moves take a part of one.

Orders of forecasts change by the step too: one of a single order spares the model's other layers and is extrapolated
as a solver would, a mixed one is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PART_SHARE, SHIFT_SHARE = 0.2, 0.4  # of the moves; the others add or drop a step
ORDER_SHARE = 0.25  # of the moves, before those, where there are orders to choose from
ANOTHER = 0.5  # probability that a move is followed by a further one


def parts_of(components: Sequence[tuple[str, int, str]]) -> np.ndarray:
    """A move of a part may take these masks, bool [n, components]: each block and each component of a kind.

    Args:
        components: (kind, block, component) of each bit of a step.
    """
    blocks = [each[:2] for each in components]
    names = [(kind, name) for kind, _, name in components]
    return np.array(
        [
            [own == group for own in owners]
            for owners in (blocks, names)
            for group in dict.fromkeys(owners)
        ]
    )


def move(bits: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> None:
    """This changes a schedule, bool [steps, components] with True computing, in place; step 0 stays as it is.

    One move, and with probability `ANOTHER` one more, again and again. A move adds or drops a step, as probably the one
    as the other whatever there are more of; or has two neighbouring steps trade places; or adds or drops a part of a
    step. Where columns of orders follow (:class:`~fastdit.search.genome.Genome`), another one draws a step.
    """
    rows, width = bits, parts.shape[1]
    bits, orders = rows[:, :width], rows[:, width:].reshape(len(rows), -1, width)
    while True:
        if orders.size and rng.random() < ORDER_SHARE:
            _redraw(bits, orders, parts, rng)
            if rng.random() >= ANOTHER:
                return
            continue
        draw = rng.random()
        if draw < PART_SHARE:
            columns = parts[rng.integers(len(parts))]
            _toggle(bits, columns, rng)
        elif draw < PART_SHARE + SHIFT_SHARE:
            _shift(rows, rng)
        else:
            _toggle(bits, np.ones(bits.shape[1], dtype=bool), rng)
        if rng.random() >= ANOTHER:
            return


def _toggle(bits: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> None:
    """At a random step the columns that mostly reuse compute, or the reverse."""
    if len(bits) < 2:
        return
    computes = bits[1:, columns].mean(axis=1) >= 0.5
    wanted = bool(rng.random() < 0.5)
    steps = np.flatnonzero(computes != wanted)
    if not len(steps):
        wanted, steps = not wanted, np.arange(len(computes))
    bits[1 + rng.choice(steps), columns] = wanted


def _redraw(
    bits: np.ndarray, orders: np.ndarray, parts: np.ndarray, rng: np.random.Generator
) -> None:
    """At a random step that reuses, another order draws all of it or, seldom, a part; orders are [steps, planes, n]."""
    steps = 1 + np.flatnonzero(~bits[1:].all(axis=1))
    if not len(steps):
        return
    step, columns = rng.choice(steps), np.ones(bits.shape[1], dtype=bool)
    if rng.random() < PART_SHARE:
        columns = parts[rng.integers(len(parts))]
    planes = orders.shape[1]
    usual = round(float(orders[step][:, columns].sum(axis=0).mean()))
    place = rng.choice([other for other in range(planes + 1) if other != usual])
    orders[step][:, columns] = np.arange(planes)[:, None] < place


def _shift(bits: np.ndarray, rng: np.random.Generator) -> None:
    """Two neighbouring steps that differ trade places."""
    steps = 1 + np.flatnonzero((bits[1:-1] != bits[2:]).any(axis=1))
    if len(steps):
        step = rng.choice(steps)
        bits[[step, step + 1]] = bits[[step + 1, step]]


def cross(
    one: np.ndarray, other: np.ndarray, cuts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two schedules, bool [steps, components], exchange what lies between every second pair of cuts.

    Args:
        one, other: Parents; left as they are.
        cuts: How many, all between steps; as many as there are places, if there are fewer.
        rng: Where the cuts come from.
    """
    places = len(one) - 1
    at = np.sort(rng.permutation(places)[: min(cuts, places)] + 1)
    swapped = (np.searchsorted(at, np.arange(len(one)), side="right") % 2 == 1)[:, None]
    return np.where(swapped, other, one), np.where(swapped, one, other)
