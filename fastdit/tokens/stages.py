"""The sigmas of a run in stages, each at its own resolution: grids, the way from one to the next, and matching.

Times as in RALU (arXiv 2507.08422): t = 1 - sigma, 0 is noise and 1 is data. A stage begins at s, ends at e, and spaces
its steps evenly but for a shift h. Copying a token four times leaves its copies with the same noise; what makes the
noise white again takes the state back to a noisier time, so the next stage begins before the last one ended.

Nothing here knows a tensor: plain floats and fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: where the published solutions were found from, and within which bounds
START_SHIFT, START_Z = 3.0, 2.0
SHIFT_BOUNDS, Z_BOUNDS = (0.5, 10.0), (2.0, 100.0)
POINTS = 1000


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        layout: "coarse", "mixed" or "full".
        first: Its first step, counted over the run.
        sigmas: One more than it has steps.
        scale, deviation: The state that enters it is scale * x + deviation * z; (1, 0) in the first.
    """

    layout: str
    first: int
    sigmas: tuple[float, ...]
    scale: float = 1.0
    deviation: float = 0.0

    @property
    def steps(self) -> int:
        """Transformer steps."""
        return len(self.sigmas) - 1


def sigma_grid(start: float, end: float, shift: float, steps: int) -> list[float]:
    """The sigmas of a stage, from 1 - start to 1 - end: `steps` + 1 values."""
    ends = (1 - time for time in (start, end))
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in ends)  # without the shift
    even = [first + (last - first) * step / steps for step in range(steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def transition(end: float, noise: float) -> tuple[float, float, float]:
    """From time `end` to the next stage: (its start s, scale a, deviation b), state -> a state + b z.

    The noise z has covariance I - c among four copies, c being `noise`; a end = s, a (1 - end) = b sqrt(c), b = 1 - s
    (equations 4 to 7).
    """
    delta = (1 - end) / math.sqrt(noise)
    return end / (delta + end), 1 / (delta + end), delta / (delta + end)


def latest_end(power: float, share: float, noise: float) -> float:
    """The time at whose transition a signal of this power in what is new has `share` of the power of the noise there.

    With s / (1 - s) = sqrt(share / power) for the start s of the next stage; see :func:`transition`.
    """
    if not power:
        return 1.0
    ratio = math.sqrt(share / power / noise)  # e / (1 - e)
    return ratio / (1 + ratio)


def starts(ends: Sequence[float], noise: float) -> tuple[float, ...]:
    """Start times of all stages."""
    return (0.0, *(transition(end, noise)[0] for end in ends[:-1]))


def mismatch(
    shifts: Sequence[float],
    z: float,
    steps: Sequence[int],
    ends: Sequence[float],
    base_shift: float,
) -> float:
    """How far the sigmas of a run in stages are from those a model is used to (equation 9).

    The Jensen-Shannon distance (natural logarithm, the root of the divergence) between the density of times over all
    stages and that of a run of shift `base_shift` that goes back as often.
    """
    times = np.linspace(0.0, 1.0, POINTS)
    begins = starts(ends, 1 / z**2)
    backs = [(s, e, e - s) for s, e in zip(begins[1:], ends[:-1], strict=True)]
    wanted = _density(times, base_shift, 0.0, 1.0) + sum(
        weight * _density(times, base_shift, s, e) for s, e, weight in backs
    )
    found = sum(
        count * _density(times, shift, s, e)
        for count, shift, s, e in zip(steps, shifts, begins, ends, strict=True)
    )
    return _jensen_shannon(wanted, found)


def solve(
    steps: Sequence[int], ends: Sequence[float], base_shift: float
) -> tuple[tuple[float, ...], float]:
    """((h1, h2, h3), Z) with the least :func:`mismatch`, as found from the published starting point.

    For two or more stages. The objective has several minima; another start finds another.
    """
    from scipy.optimize import minimize

    found = minimize(
        lambda x: mismatch(x[:-1], x[-1], steps, ends, base_shift),
        [START_SHIFT] * len(steps) + [START_Z],
        bounds=[SHIFT_BOUNDS] * len(steps) + [Z_BOUNDS],
    )
    *shifts, z = map(float, found.x)
    return tuple(shifts), z


def _density(times: np.ndarray, shift: float, start: float, end: float) -> np.ndarray:
    """Density of evenly spaced times under a shift, between start and end."""

    def share(time: float) -> float:
        return shift * time / (1 + (shift - 1) * time)

    inside = (times >= start) & (times <= end)
    return inside * shift / (1 + (shift - 1) * times) ** 2 / (share(end) - share(start))


def _jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (np.clip(x, 1e-10, None) for x in (p, q))
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2
    return math.sqrt(max(0.0, float((p * np.log(p / mean) + q * np.log(q / mean)).sum() / 2)))
