"""A coarse picture of latents becomes one of twice its size, at an earlier time of the trajectory.

In the cosine transform (orthonormal, of type II) of a picture the coefficients of low frequency are, but for a factor
of 2, those of the same picture at half the size. So the state of a coarse picture tells that half of a fine one's, and
its noise, twice as strong against the signal, makes it the state of an earlier time. The coefficients it does not tell
are noise alone: at that time, the signal that they had would hardly be seen.

With a correlation c below 1/4 that time is earlier still, and the low half gets noise as well: for each coefficient it
has the variance 1 - 4c of what the others get, which is what four copies of a pixel ask for (see
`ops/resolution_transition.py`), with the cosine transform in place of means of four pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.errors import ArgumentError


def enlarged(
    small: Tensor,
    noise: Tensor | None = None,
    *,
    scale: float = 1.0,
    deviation: float = 0.0,
    correlation: float = 0.25,
) -> Tensor:
    """[..., 2 h, 2 w]: scale * small at twice its size + deviation * z.

    Args:
        small: [..., h, w], fp32 or fp64.
        noise: [..., 2 h, 2 w], standard normal, from which z is made; None for no noise.
        scale: What the picture is multiplied by.
        deviation: What the noise is multiplied by.
        correlation: c, from 0 to 1/4: the noise in the low half has the variance 1 - 4c.
    """
    height, width = small.shape[-2:]
    if noise is None:
        waves = small.new_zeros(*small.shape[:-2], 2 * height, 2 * width)
    else:
        waves = deviation * transformed(noise.to(small.dtype))
    low = waves[..., :height, :width]
    low.mul_(math.sqrt(1 - 4 * correlation)).add_(transformed(small), alpha=2 * scale)
    down, across = (_waves(2 * side, small) for side in (height, width))
    return down.T @ waves @ across


def transformed(picture: Tensor) -> Tensor:
    """The orthonormal cosine transform, of type II, of a picture [..., h, w]."""
    down, across = (_waves(side, picture) for side in picture.shape[-2:])
    return down @ picture @ across.T


def new_power(latents: Tensor) -> float:
    """The mean square of the coefficients of clean latents [..., h, w] that a picture of half their size lacks."""
    if latents.ndim < 2 or any(side % 2 or not side for side in latents.shape[-2:]):
        raise ArgumentError(
            f"latents must be pictures [..., h, w] of even sides, got shape {list(latents.shape)}"
        )
    power = transformed(latents.double()).square()
    height, width = (side // 2 for side in latents.shape[-2:])
    new = torch.ones_like(power, dtype=torch.bool)
    new[..., :height, :width] = False
    return float(power[new].mean())


def _waves(size: int, like: Tensor) -> Tensor:
    """The transform as a matrix [size, size], a frequency a row; made in fp64."""
    places = torch.arange(size, dtype=torch.float64, device=like.device)
    waves = torch.cos(math.pi / size * places[:, None] * (places + 0.5))
    waves *= math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.to(like.dtype)
