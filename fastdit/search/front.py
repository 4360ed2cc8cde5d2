"""What dominates what, and how much of the objective space a set of points covers. All objectives are minimised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TINY = 1e-9  # losses below count as this one, where a logarithm is taken


def non_dominated(values: np.ndarray) -> np.ndarray:
    """These rows of [n, objectives] no other row dominates, by the first objective.

    Of equal rows the first one stays.
    """
    values = np.asarray(values, dtype=np.float64)
    kept = []
    for index, row in enumerate(values):
        no_worse, better = (values <= row).all(axis=1), (values < row).any(axis=1)
        equal_before = (values[:index] == row).all(axis=1).any()
        if not (no_worse & better).any() and not equal_before:
            kept.append(index)
    order = sorted(kept, key=lambda index: tuple(values[index]))
    return np.array(order, dtype=int)


def on_axes(values: np.ndarray, uncached: Sequence[float], logarithmic: bool) -> np.ndarray:
    """A plot shows [n, objectives] so: the loss, or its decimal logarithm, and shares of the `uncached` costs."""
    values = np.array(values, dtype=np.float64).reshape(-1, 1 + len(uncached))
    if logarithmic:
        values[:, 0] = np.log10(np.maximum(values[:, 0], TINY))
    values[:, 1:] /= np.asarray(uncached, dtype=np.float64)
    return values


def corner(seeds: np.ndarray) -> tuple[float, ...]:
    """The hypervolume of a search ends here, on the axes: the loss of its worst seed, the uncached run's costs."""
    return (float(np.max(seeds[:, 0])), *[1.0] * (seeds.shape[1] - 1))


def hypervolume(values: np.ndarray, reference: Sequence[float]) -> float:
    """This is the volume between the rows of [n, objectives] and the `reference` point, which bounds it from above."""
    from fastdit.search.nsga2 import require_pymoo

    require_pymoo()
    from pymoo.indicators.hv import HV

    values = np.asarray(values, dtype=np.float64)
    inside = values[(values < np.asarray(reference)).all(axis=1)]
    return (
        float(HV(ref_point=np.asarray(reference, dtype=np.float64))(inside)) if len(inside) else 0.0
    )


def growth(values: np.ndarray, reference: Sequence[float]) -> np.ndarray:
    """The first 1, 2, ... n rows of [n, objectives] have this hypervolume: a search had it after each evaluation."""
    found, front = [], np.empty((0, len(reference)))
    for row in np.asarray(values, dtype=np.float64):
        if not (front <= row).all(axis=1).any():
            front = np.vstack([front[~(row <= front).all(axis=1)], row])
            volume = hypervolume(front, reference)
        found.append(volume)
    return np.array(found)
