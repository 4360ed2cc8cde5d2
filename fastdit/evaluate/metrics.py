"""How like two pictures are, in floating point over [0, 1], and how far latents are from others.

SSIM is Wang et al.'s (2004): a Gaussian window of 11 by 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, the mean over
places where the window fits and over channels. MS-SSIM (Wang et al. 2003) has five scales; a picture too small for
five has as many as fit, their exponents scaled to a sum of 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit.cli.distance import psnr, relative_l2
from fastdit.errors import ArgumentError

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """The structural similarity of two pictures [h, w, 3] in [0, 1]; 1 if they are equal."""
    return float(_similarity(*_channels(image, reference))[0].mean())


def ms_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """The same over several scales, see :func:`scales`; parts below 0 count as 0."""
    count = scales(image.shape[:2])
    exponents = np.array(EXPONENTS[:count]) / sum(EXPONENTS[:count])
    pair = _channels(image, reference)
    found = 1.0
    for scale, exponent in enumerate(exponents):
        both, contrast = _similarity(*pair)
        part = (both if scale == count - 1 else contrast).mean()
        found *= max(0.0, float(part)) ** exponent
        pair = tuple(F.avg_pool2d(each, 2) for each in pair)
    return found


def scales(sides: tuple[int, ...]) -> int:
    """The scales of MS-SSIM at which the window fits into a picture, at most five.

    Raises:
        ArgumentError: It fits at none.
    """
    count = sum(min(sides) // 2**scale >= WINDOW for scale in range(len(EXPONENTS)))
    if count == 0:
        raise ArgumentError(f"pictures must have sides of at least {WINDOW} pixels, got {sides}")
    return count


def _channels(image: np.ndarray, reference: np.ndarray) -> tuple[Tensor, ...]:
    """Two pictures as float64 [channels, 1, h, w].

    Raises:
        ArgumentError: Their shapes differ, or one holds integers, whose differences may wrap.
    """
    if image.shape != reference.shape:
        raise ArgumentError(f"pictures must be of one shape, got {image.shape}, {reference.shape}")
    for each in (image, reference):
        if not np.issubdtype(each.dtype, np.floating):
            raise ArgumentError(f"pictures must be floats in [0, 1], got {each.dtype}")
    return tuple(
        torch.from_numpy(np.ascontiguousarray(each, dtype=np.float64)).permute(2, 0, 1)[:, None]
        for each in (image, reference)
    )


def _similarity(image: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its factor of contrast and structure, at each place."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-((offsets / SIGMA) ** 2) / 2)
    weights /= weights.sum()

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean, other = blurred(image), blurred(reference)
    variances = blurred(image**2) - mean**2, blurred(reference**2) - other**2
    shared = blurred(image * reference) - mean * other
    contrast = (2 * shared + C2) / (sum(variances) + C2)
    return contrast * (2 * mean * other + C1) / (mean**2 + other**2 + C1), contrast


Metric = Callable[[np.ndarray, np.ndarray], float]

#: of pictures; larger is more alike
METRICS: dict[str, Metric] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def alike(pictures: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of each pair of pictures [n, h, w, 3], or of videos [n, frames, h, w, 3] the mean over frames."""

    def judged(metric: Metric, one: np.ndarray, other: np.ndarray) -> float:
        frames = (one[None], other[None]) if one.ndim == 3 else (one, other)
        return float(np.mean([metric(*pair) for pair in zip(*frames, strict=True)]))

    return {
        name: np.array([judged(metric, *pair) for pair in zip(pictures, references, strict=True)])
        for name, metric in METRICS.items()
    }


def away(latents: np.ndarray, truth: np.ndarray, least: float = 1e-9) -> np.ndarray:
    """Relative L2 distances of latents to others [n], at least `least`, so that they have logarithms."""
    return np.array([max(least, relative_l2(*pair)) for pair in zip(latents, truth, strict=True)])
