"""How far a picture is from another: PSNR and relative L2, in float64 over images in [0, 1].

Both say how much changed, not whether it got worse: a picture may be as good and another one.
"""

from __future__ import annotations

import math

import numpy as np


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """This is the peak signal to noise in dB: -10 log10 of the mean squared difference, inf if equal."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def relative_l2(image: np.ndarray, reference: np.ndarray) -> float:
    """This is |image - reference| / |reference| in the Euclidean norm."""
    truth = reference.astype(np.float64)
    error = float(np.linalg.norm(image.astype(np.float64) - truth))
    if error == 0:
        return 0.0
    norm = float(np.linalg.norm(truth))
    return error / norm if norm else math.inf
