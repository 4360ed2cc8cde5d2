"""Tokens of two sizes over one grid of cells, and how a picture of full size stands for them.

A cell is what a token covers at full resolution, mostly 2 x 2 latent pixels; a coarse token covers 2 x 2 cells. The
pipeline's latents keep their full size in all stages: each latent pixel of a coarse token is drawn 2 x 2 times as
large. So a preview of them is a picture of few pixels, and whatever is done to latents pixel by pixel, guidance or a
scheduler's step, does the same to the tokens. Reading what was written gives the same bits.

A field is latents as [B, gh, gw, 2, 2, C], a view. A token is its pixels in the order (C, 2, 2). Frames of a clip lie
below each other; each has an even number of rows of cells, so no token covers two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

#: latent pixels along a side of a token
SIDE = 2


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of one stage.

    Attributes:
        grid: Rows and columns of cells.
        table: int32 [B, n, 3], level (1 for coarse), y and x of each token's first cell, coarse tokens first;
            [1, n, 3] where all images have the same.
        coarse: How many tokens are coarse.
        centred: Whether a coarse token's place is the middle of its four cells, and not its first cell.
        coarse_keys: How many keys that of a coarse token counts for, where there are fine ones beside it.
        frames: How many frames lie below each other.
    """

    grid: tuple[int, int]
    table: Tensor
    coarse: int
    centred: bool = False
    coarse_keys: int = 1
    frames: int = 1
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def uniform(
        cls, grid: tuple[int, int], level: int, device: torch.device, frames: int = 1
    ) -> Layout:
        """All cells, or all squares of 2 x 2 cells, in raster order."""
        step = 1 << level
        y, x = (torch.arange(0, side, step, dtype=torch.int32, device=device) for side in grid)
        places = torch.cartesian_prod(y, x)
        table = torch.cat([torch.full_like(places[:, :1], level), places], dim=1)[None]
        return cls(grid, table, table.shape[1] if level else 0, frames=frames)

    @cached_property
    def name(self) -> str:
        """What stages call it: "coarse", "full" or "mixed"."""
        if self.coarse == self.tokens:
            return "coarse"
        return "mixed" if self.coarse else "full"

    @cached_property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.table.shape[1]

    def places(self) -> Tensor:
        """fp32 [B, n, 2]: y and x of each token, in cells."""
        level, *places = self.table.float().unbind(-1)
        return torch.stack(places, dim=-1) + (level / 2 if self.centred else 0 * level)[..., None]

    def places_in_clip(self) -> Tensor:
        """fp32 [B, n, 3]: frame, and y and x within it, of each token, in cells."""
        (y, x), rows = self.places().unbind(-1), self.grid[0] // self.frames
        frame = (y / rows).floor()
        return torch.stack([frame, y - rows * frame, x], dim=-1)

    @cached_property
    def weighs_keys(self) -> bool:
        """Whether some keys count more than others."""
        return self.coarse_keys != 1 and self.name == "mixed"

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """[1, n]: what is added to every query's products with these keys, the logarithm of how often each counts.

        None where each counts once.
        """
        if not self.weighs_keys:
            return None
        if dtype not in self._biases:
            bias = torch.zeros(1, self.tokens, dtype=dtype, device=self.table.device)
            bias[:, : self.coarse] = math.log(self.coarse_keys)
            self._biases[dtype] = bias
        return self._biases[dtype]

    def table_of(self, batch: int) -> Tensor:
        """The table of `batch` rows, CFG branches of the images one after the other."""
        images = self.table.shape[0]
        if images == 1:
            return self.table.expand(batch, -1, -1)
        return self.table.repeat(batch // images, 1, 1)

    def levels(self) -> Tensor:
        """uint8 [B, gh, gw]: 1 where a coarse token covers the cell."""
        level, y, x = self.table.long().unbind(-1)
        picture = level.new_zeros((level.shape[0], *self.grid), dtype=torch.uint8)
        batch = torch.arange(level.shape[0], device=level.device)[:, None]
        picture[batch, y, x] = level.to(torch.uint8)
        firsts = picture[:, ::2, ::2]  # a coarse token's first cell has even places
        return firsts.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def read(self, field: Tensor, ops: Any) -> Tensor:
        """The tokens [B, n, 4 C] of a field."""
        return ops.patchify(field, self.table_of(field.shape[0]))

    def write(self, tokens: Tensor, field: Tensor, ops: Any) -> None:
        """Draw tokens [B, n, 4 C] over the whole field."""
        ops.unpatchify(tokens, self.table_of(field.shape[0]), field)


def picture_cells(picture: Tensor, side: int) -> Tensor:
    """Latents [B, C, H, W] as a field of cells of so many latent pixels a side, [B, gh, gw, p, p, C], a view."""
    return picture.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
