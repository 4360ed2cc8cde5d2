"""Checks of what only values tell, where nothing waits for them: on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.errors import ArgumentError


def check_range(rows: Tensor | None, tokens: int) -> None:
    """Row numbers are those of a store of so many rows."""
    if rows is None or rows.device.type != "cpu" or rows.numel() == 0:
        return
    low, high = rows.min().item(), rows.max().item()
    if low < 0 or high >= tokens:
        wrong = low if low < 0 else high
        raise ArgumentError(f"rows: found {wrong}, but the store has rows 0 to {tokens - 1}")


def check_places(table: Tensor, field: Tensor) -> None:
    """The tokens of a table lie within a field [B, gh, gw, ph, pw, C]."""
    if table.device.type != "cpu":
        return
    level, y, x = table.to(torch.int64).unbind(-1)
    height, width = field.shape[1:3]
    side = 1 << level.clamp(0, 62)
    inside = (level >= 0) & (level < 31) & (y >= 0) & (x >= 0)
    outside = ~(inside & (y + side <= height) & (x + side <= width))
    if outside.any():
        found = table[outside][0].tolist()
        raise ArgumentError(
            f"table: found the token {found} (level, y, x); accepted are those within the grid of "
            f"{height} x {width} cells"
        )
