"""Patches of pictures whose channels come last, as a linear layer embeds them, and another gives them back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def embedded(layer: nn.Linear, latents: Tensor, side: int, unseen: bool) -> Tensor:
    """The layer's tokens [B, N, D] of latents [B, C, H, W]; where it is `unseen`, by a convolution in its place.

    That reads the patches where they are, and its kernel is the layer's weight, whose channels lie last.
    """
    if unseen and type(layer) is nn.Linear:
        kernel = layer.weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        return F.conv2d(latents, kernel, layer.bias, stride=side).flatten(2).transpose(1, 2)
    tiles = latents.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))  # [B, C, h, p, w, p]
    return layer(tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))


def unpatched(tokens: Tensor, columns: int, side: int) -> Tensor:
    """Latents [B, C, H, W] of tokens [B, N, p p C] in rows of so many columns."""
    tiles = tokens.unflatten(2, (side, side, -1)).unflatten(1, (-1, columns))  # [B, h, w, p, p, C]
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
