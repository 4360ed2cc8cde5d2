"""The frames of a clip, which lie below each other where a picture stands for it, and rows of tokens of each."""

from __future__ import annotations

import torch
from torch import Tensor


def of_frames(picture: Tensor, frames: int) -> Tensor:
    """[B, C, F h, w] as [B F, C, h, w]."""
    return picture.unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)


def rows_of_clip(rows: Tensor, frames: int, tokens: int) -> Tensor:
    """Rows [B F, k] of each frame's own tokens as rows [B, F k] of a clip's, which has `tokens` in all."""
    if frames == 1:
        return rows
    first = torch.arange(0, tokens, tokens // frames, dtype=rows.dtype, device=rows.device)
    return (rows.unflatten(0, (-1, frames)) + first[:, None]).flatten(1)
