"""Which coarse tokens RALU splits early: those with the most detail in an estimate of the clean half-size picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.tokens import edges


def energy(
    selector: str,
    latents: Tensor,
    cells: tuple[int, int],
    decode: Callable[[Tensor], Tensor],
    clipped: bool,
) -> Tensor:
    """fp32 [B, n], the detail in each token of clean latents [B, C, H, W]; see `tokens/edges.py`.

    Args:
        selector: "edges", of the decoded picture, or "gradient" or "variance", of the latents.
        cells: Rows and columns of tokens.
        decode: Is given one image after the other, so that each decides in a batch as it would alone.
        clipped: Take the decoded picture, whose range is -1 to 1, for one from 0 to 1, as published.
    """
    if selector == "edges":
        pictures = (decode(image) for image in latents.split(1))
        return torch.cat([edges.edge_energy(picture, cells, clipped) for picture in pictures])
    of_latents = {"gradient": edges.gradient_energy, "variance": edges.variance_energy}[selector]
    return of_latents(latents, cells)
