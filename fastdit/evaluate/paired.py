"""Verdicts over pictures drawn in pairs: the same prompt, the same noise, two ways of drawing.

Errors have heavy tails, since a picture may flip into another; so ratios are of logarithms, with medians beside.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def ratio(errors: np.ndarray, others: np.ndarray, seed: int = 0) -> dict[str, float]:
    """This gives the geometric mean of errors / others with its 95 % bootstrap interval, and the median ratio."""
    logs = np.log(errors) - np.log(others)
    draws = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.quantile(logs[draws].mean(1), [0.025, 0.975])
    values = {"value": logs.mean(), "low": low, "high": high, "median": np.median(logs)}
    return {name: float(np.exp(value)) for name, value in values.items()}


def share(flags: np.ndarray, others: np.ndarray, seed: int = 0) -> dict[str, float]:
    """This gives a share, and how much it is above another of the same pictures with the interval of that."""
    less = flags.astype(float) - others
    draws = np.random.default_rng(seed).integers(0, len(less), (RESAMPLES, len(less)))
    low, high = np.quantile(less[draws].mean(1), [0.025, 0.975])
    return {
        "value": float(flags.mean()),
        "less": float(less.mean()),
        "low": float(low),
        "high": float(high),
    }
