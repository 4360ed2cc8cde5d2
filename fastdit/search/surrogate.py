"""A surrogate: predicts what schedules are worth from those measured so far, so that children are bred on predictions.

Not of the paper, which measures every child. What a schedule costs is linear in its bits, with other factors for each
value of a knob; a loss whose ratios matter is proportional to how much it reuses, times something that follows where
that is and how stale. Kernel ridge regressions learn both from the measurements (the mean of a Gaussian process),
NSGA-II breeds some generations on what they predict, and of these children those are measured that together would
enlarge the front's hypervolume most. A prediction only ever decides what is measured next.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

import numpy as np

from fastdit.schedules.forecast import MAX_ORDER
from fastdit.search.front import hypervolume, non_dominated
from fastdit.search.genome import Genome
from fastdit.search.nsga2 import Nsga2, Operators
from fastdit.search.seeds import uncached

LENGTH = 1.0  # of the kernel over staleness, in median distances between the schedules measured
MAGNITUDE = 0.3  # what its logarithm counts in such a distance, beside where it is
APART = 0.5  # what a knob counts there that is turned
RIDGE = 1e-2  # how much of a prediction's variance is the measurement's noise
BREADTH = 4  # members bred on predictions, for each that is measured
DIGITS = 6  # of a prediction: far above what differs with a machine's order of sums


class Surrogate:
    """This predicts objectives, the loss first, from those of measured schedules.

    Args:
        bits: What was measured, bool [n, steps, components].
        values: Its objectives, [n, objectives].
        proportional: Whether the loss is given as its decimal logarithm, and vanishes with what is reused.
        orders: By which all of it is drawn, shaped like `bits`, where that differs.
        knobs: A column for each value of a knob beside its first, [n, columns], where more than schedules differ.
    """

    def __init__(
        self,
        bits: np.ndarray,
        values: np.ndarray,
        proportional: bool = True,
        orders: np.ndarray | None = None,
        knobs: np.ndarray | None = None,
    ) -> None:
        where, trend = _where(bits, orders, knobs), _trend(bits, orders, knobs)
        self._slope = np.eye(trend.shape[1])[1]  # as much loss as is reused
        free = [i for i in range(trend.shape[1]) if i != 1 or not proportional]
        rest = values[:, 0] - trend @ self._slope * proportional
        self._slope[free] = np.linalg.lstsq(trend[:, free], rest, rcond=None)[0]
        self._loss = _Ridge(_exponential(where), where, values[:, 0] - trend @ self._slope)
        spent, turned = _computed(bits, orders), 0 if knobs is None else knobs.shape[1]
        self._costs = [
            _Ridge(_bilinear(turned), self._spent(spent, knobs), c) for c in values.T[1:]
        ]

    def __call__(
        self,
        bits: np.ndarray,
        orders: np.ndarray | None = None,
        knobs: np.ndarray | None = None,
    ) -> np.ndarray:
        """bool [m, steps, components], with orders and knobs where they differ, has [m, objectives]."""
        computed = self._spent(_computed(bits, orders), knobs)
        loss = _trend(bits, orders, knobs) @ self._slope + self._loss(_where(bits, orders, knobs))
        columns = [loss, *(costs(computed) for costs in self._costs)]
        return np.column_stack(columns).round(DIGITS)

    @staticmethod
    def _spent(computed: np.ndarray, knobs: np.ndarray | None) -> np.ndarray:
        return computed if knobs is None else np.concatenate([computed, knobs], axis=1)


def propose(
    genome: Genome,
    children: np.ndarray,
    measured: np.ndarray,
    seen: Container[str],
    values: np.ndarray,
    reference: tuple[float, ...],
    operators: Operators,
    generations: int,
    logarithmic: bool = True,
    vanishes: bool = True,
) -> np.ndarray:
    """These are measured in place of `children`, bool [n, genome size]: as many, and none that was measured.

    Args:
        genome: The model's bit vectors.
        children: What NSGA-II would measure; they fill up what is short of promising ones.
        measured: bool [m, genome size], without the uncached run.
        seen: Keys of all that was measured.
        values: [m, objectives] of `measured`, on the axes of the hypervolume.
        reference: The hypervolume's corner.
        operators: NSGA-II's; the seed should differ between calls.
        generations: To be bred on predictions.
        logarithmic: Whether the first of `values` is a logarithm.
        vanishes: Whether a schedule that reuses nothing has no loss.
    """
    known, *drawn = _parts_of(genome, measured)
    surrogate = Surrogate(known, values, logarithmic and vanishes, *drawn)
    front = non_dominated(values)
    # The uncached run is worth nothing by itself, but what reuses a little descends from it.
    algorithm = Nsga2(
        np.concatenate([uncached(genome)[None], measured[front], children]),
        BREADTH * len(children),
        values.shape[1],
        replace(operators, min_difference=0),
        genome.components,
        len(genome.orders),
        genome.knobs,
    )
    for _ in range(generations + 1):
        vectors = algorithm.ask()
        if not len(vectors):
            break
        bits, *drawn = _parts_of(genome, vectors)
        algorithm.tell(surrogate(bits, *drawn), (~bits).sum(axis=(1, 2)))
    fresh: dict[str, np.ndarray] = {}
    for vector in algorithm.survivors():
        key = genome.key(vector)
        if key not in seen and genome.reused(vector) >= operators.min_difference:
            fresh.setdefault(key, vector)
    if not fresh:
        return children
    bred = np.stack(list(fresh.values()))
    chosen = _enlarging(
        surrogate(*_parts_of(genome, bred)), values[front], reference, len(children)
    )
    return np.concatenate([bred[chosen], children[: len(children) - len(chosen)]])


def _enlarging(
    points: np.ndarray, front: np.ndarray, reference: tuple[float, ...], count: int
) -> list[int]:
    """At most `count` of the `points` enlarge the front's hypervolume most, one after the other."""
    left, chosen = list(range(len(points))), []
    while left and len(chosen) < count:
        volumes = [hypervolume(np.vstack([front, points[index]]), reference) for index in left]
        if max(volumes) <= hypervolume(front, reference):
            break
        chosen.append(left.pop(int(np.argmax(volumes))))
        front = np.vstack([front, points[chosen[-1]]])
    return chosen


class _Ridge:
    """This is kernel ridge regression about the mean of the targets [n]."""

    def __init__(
        self,
        kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
        inputs: np.ndarray,
        targets: np.ndarray,
    ) -> None:
        self._kernel, self._inputs, self._mean = kernel, inputs, targets.mean()
        matrix = kernel(inputs, inputs) + RIDGE * np.eye(len(inputs))
        self._weights = np.linalg.solve(matrix, targets - self._mean)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return self._mean + self._kernel(inputs, self._inputs) @ self._weights


def _parts_of(
    genome: Genome, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Vectors become bits [n, steps, components], step 0 computing, and orders and knobs where several are searched."""
    bits, orders = genome.parts(vectors)
    bits = bits.copy()
    bits[:, 0] = True
    drawn = np.where(bits, 0, orders) if len(genome.orders) > 1 else None
    tails = vectors[:, genome.table :]
    return bits, drawn, genome.knobs.columns(tails) if genome.knobs.size else None


def _computed(bits: np.ndarray, orders: np.ndarray | None) -> np.ndarray:
    """A cost follows what computes, and which steps the model does not run at."""
    computed = bits.reshape(len(bits), -1) - 0.5
    if orders is None:
        return computed
    whole = (orders == orders[:, :, :1]).all(axis=2) & (orders[:, :, 0] > 0)
    return np.concatenate([computed, whole], axis=1)


def _staleness(bits: np.ndarray) -> np.ndarray:
    """Staleness is log(1 + steps since a component was computed), [n, steps x components]."""
    ages = np.zeros(bits.shape)
    for step in range(1, bits.shape[1]):
        ages[:, step] = np.where(bits[:, step], 0, ages[:, step - 1] + 1)
    return np.log1p(ages).reshape(len(bits), -1)


def _where(
    bits: np.ndarray, orders: np.ndarray | None, knobs: np.ndarray | None = None
) -> np.ndarray:
    """Staleness has a direction and a size: few stale entries are as far from few others as many from many.

    What is repeated lies in other directions than what is drawn, by each order; and each knob in one of its own.
    """
    stale = _staleness(bits)
    if orders is not None:
        drawn = orders.reshape(len(bits), -1)
        stale = np.concatenate([stale * (drawn == each) for each in range(MAX_ORDER + 1)], axis=1)
    size = np.linalg.norm(stale, axis=1, keepdims=True) + 1e-9
    columns = [stale / size, MAGNITUDE * np.log(size)]
    return np.concatenate(columns if knobs is None else [*columns, APART * knobs], axis=1)


def _trend(
    bits: np.ndarray, orders: np.ndarray | None, knobs: np.ndarray | None = None
) -> np.ndarray:
    """A loss follows this at large: how much is reused, and how stale that is, as decimal logarithms.

    And, where orders differ, which share of it is not repeated; and where knobs are: [n, 3 or more].
    """
    reused, stale = (~bits).sum(axis=(1, 2)) + 1.0, _staleness(bits).sum(axis=1) + 1.0
    columns = [np.ones(len(bits)), np.log10(reused), np.log10(stale / reused)]
    if orders is not None:
        columns.append((orders > 0).sum(axis=(1, 2)) / reused)
    return np.column_stack(columns if knobs is None else [*columns, knobs])


def _bilinear(turned: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The kernel is linear in what computes, and so it is for each of the last `turned` columns, which are of knobs."""

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        end = one.shape[1] - turned
        return (one[:, :end] @ other[:, :end].T) * (1 + one[:, end:] @ other[:, end:].T)

    return kernel


def _exponential(inputs: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The kernel is exp(-distance / length), the length set by the distances between the inputs."""
    distances = _distances(inputs, inputs)
    apart = distances[distances > 1e-6]
    length = LENGTH * (np.median(apart) if apart.size else 1.0)

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.exp(-_distances(one, other) / length)

    return kernel


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squares, 0))
