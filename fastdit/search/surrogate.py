"""A surrogate: predicts what schedules are worth from those measured so far, so that children are bred on predictions.

Not of the paper, which measures every child. What a schedule costs is linear in its bits; a loss whose ratios matter is
proportional to how much it reuses, times something that follows where that is and how stale. Kernel ridge regressions
learn both from the measurements (the mean of a Gaussian process), NSGA-II breeds some generations on what they predict,
and of these children those are measured that together would enlarge the front's hypervolume most. A prediction only
ever decides what is measured next.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace

import numpy as np

from fastdit.search.front import hypervolume, non_dominated
from fastdit.search.genome import Genome
from fastdit.search.nsga2 import Nsga2, Operators
from fastdit.search.seeds import uncached

LENGTH = 1.0  # of the kernel over staleness, in median distances between the schedules measured
MAGNITUDE = 0.3  # what its logarithm counts in such a distance, beside where it is
RIDGE = 1e-2  # how much of a prediction's variance is the measurement's noise
BREADTH = 4  # members bred on predictions, for each that is measured
DIGITS = 6  # of a prediction: far above what differs with a machine's order of sums


class Surrogate:
    """This predicts objectives, the loss first, from those of measured schedules.

    Args:
        bits: What was measured, bool [n, steps, components].
        values: Its objectives, [n, objectives].
        logarithmic: Whether the loss is given as its decimal logarithm.
    """

    def __init__(self, bits: np.ndarray, values: np.ndarray, logarithmic: bool = True) -> None:
        where, trend = _where(bits), _trend(bits)
        self._slope = np.array([0.0, 1.0, 0.0])  # as much loss as is reused
        free = [0, 2] if logarithmic else [0, 1, 2]
        rest = values[:, 0] - trend @ self._slope * logarithmic
        self._slope[free] = np.linalg.lstsq(trend[:, free], rest, rcond=None)[0]
        self._loss = _Ridge(_exponential(where), where, values[:, 0] - trend @ self._slope)
        self._costs = [_Ridge(_linear, _computed(bits), column) for column in values.T[1:]]

    def __call__(self, bits: np.ndarray) -> np.ndarray:
        """bool [m, steps, components] has [m, objectives]."""
        computed = _computed(bits)
        loss = _trend(bits) @ self._slope + self._loss(_where(bits))
        columns = [loss, *(costs(computed) for costs in self._costs)]
        return np.column_stack(columns).round(DIGITS)


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
    """
    surrogate = Surrogate(_bits_of(genome, measured), values, logarithmic)
    front = non_dominated(values)
    # The uncached run is worth nothing by itself, but what reuses a little descends from it.
    algorithm = Nsga2(
        np.concatenate([uncached(genome)[None], measured[front], children]),
        BREADTH * len(children),
        values.shape[1],
        replace(operators, min_difference=0),
        genome.components,
    )
    for _ in range(generations + 1):
        vectors = algorithm.ask()
        if not len(vectors):
            break
        bits = _bits_of(genome, vectors)
        algorithm.tell(surrogate(bits), (~bits).sum(axis=(1, 2)))
    fresh: dict[str, np.ndarray] = {}
    for vector in algorithm.survivors():
        key = genome.key(vector)
        if key not in seen and genome.reused(vector) >= operators.min_difference:
            fresh.setdefault(key, vector)
    if not fresh:
        return children
    bred = np.stack(list(fresh.values()))
    chosen = _enlarging(surrogate(_bits_of(genome, bred)), values[front], reference, len(children))
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


def _bits_of(genome: Genome, vectors: np.ndarray) -> np.ndarray:
    """Vectors become [n, steps, components]; step 0 computes."""
    bits = vectors.reshape(len(vectors), genome.steps, len(genome.components)).copy()
    bits[:, 0] = True
    return bits


def _computed(bits: np.ndarray) -> np.ndarray:
    return bits.reshape(len(bits), -1) - 0.5


def _staleness(bits: np.ndarray) -> np.ndarray:
    """Staleness is log(1 + steps since a component was computed), [n, steps x components]."""
    ages = np.zeros(bits.shape)
    for step in range(1, bits.shape[1]):
        ages[:, step] = np.where(bits[:, step], 0, ages[:, step - 1] + 1)
    return np.log1p(ages).reshape(len(bits), -1)


def _where(bits: np.ndarray) -> np.ndarray:
    """Staleness has a direction and a size: few stale entries are as far from few others as many from many."""
    stale = _staleness(bits)
    size = np.linalg.norm(stale, axis=1, keepdims=True) + 1e-9
    return np.concatenate([stale / size, MAGNITUDE * np.log(size)], axis=1)


def _trend(bits: np.ndarray) -> np.ndarray:
    """A loss follows this at large, [n, 3]: how much is reused, and how stale that is, as decimal logarithms."""
    reused, stale = (~bits).sum(axis=(1, 2)) + 1.0, _staleness(bits).sum(axis=1) + 1.0
    return np.column_stack([np.ones(len(bits)), np.log10(reused), np.log10(stale / reused)])


def _linear(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one @ other.T


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
