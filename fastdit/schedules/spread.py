"""Where the computed ones among a run's steps are, when whole steps are drawn between them: ascending, from 0 on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: of `early_steps`: 1 would spread them evenly
DENSITY = 1.4


def even_steps(steps: int, count: int) -> list[int]:
    """These are `count` of `steps` steps, evenly spread."""
    return (np.arange(count) * steps // count).tolist()


def early_steps(steps: int, count: int) -> list[int]:
    """These are about `count`, the nearer to each other the earlier they are, the first two among them."""
    places = steps * (np.arange(count) / count) ** DENSITY
    return sorted({0, min(1, steps - 1), *places.astype(int).tolist()})


def changing_steps(changes: Sequence[float], count: int) -> list[int]:
    """These are about `count` between which the model's output changes by equal amounts, the first two among them.

    Args:
        changes: How far each step's output is from the one before; the first is not looked at.
    """
    travelled = np.cumsum([0.0, *changes[1:]])
    marks = np.linspace(0, travelled[-1], count, endpoint=False)
    return sorted({0, min(1, len(changes) - 1), *np.searchsorted(travelled, marks).tolist()})
