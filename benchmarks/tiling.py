"""Tokens of two sizes as a sampler has them: a coarse grid of which 0.3 was split in four.

Widths are those of packed latents of 16 channels in patches of 2 x 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shapes import Shape

CHANNELS, PATCH = 16, 2
WIDTH = CHANNELS * PATCH * PATCH
NUMBERS = {"scale": 0.218, "deviation": 0.902, "correlation": 0.0177}


@dataclass(frozen=True)
class Tiling:
    """Of a square of about N cells, the same for all B images.

    Attributes:
        side: Cells in a row, an even number.
        table: int32 [B, n, 3]; coarse tokens first.
        coarse: How many those are.
        owner: int64 [B, side side], the token over each cell.
    """

    side: int
    table: Tensor
    coarse: int
    owner: Tensor

    @property
    def rows(self) -> Tensor:
        """int32 [B, K], the coarse tokens."""
        index = torch.arange(self.coarse, dtype=torch.int32, device=self.table.device)
        return index.expand(len(self.table), -1)


def tiling(shape: Shape, device: torch.device | str = "cpu") -> Tiling:
    """The tokens of a shape after the first transition."""
    half = max(1, math.isqrt(shape.tokens) // 2)
    squares = [(y, x) for y in range(half) for x in range(half)]
    order = torch.randperm(len(squares), generator=torch.Generator().manual_seed(0)).tolist()
    coarse = len(squares) - int(0.3 * len(squares))
    places = [(1, 2 * squares[i][0], 2 * squares[i][1]) for i in sorted(order[:coarse])]
    for i in sorted(order[coarse:]):
        y, x = 2 * squares[i][0], 2 * squares[i][1]
        places += [(0, y + r, x + q) for r in (0, 1) for q in (0, 1)]
    owner = torch.zeros(2 * half, 2 * half, dtype=torch.int64)
    for i, (level, y, x) in enumerate(places):
        owner[y : y + 2**level, x : x + 2**level] = i
    table = torch.tensor(places, dtype=torch.int32, device=device)
    batch = (shape.batch, -1)
    return Tiling(
        2 * half,
        table.expand(*batch, -1).contiguous(),
        coarse,
        owner.flatten().to(device).expand(batch).contiguous(),
    )


def field_of(latents: Tensor) -> Tensor:
    """[B, C, H, W] as [B, gh, gw, ph, pw, C]."""
    return latents.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1)


def read(latents: Tensor, t: Tiling) -> Tensor:
    """patchify in torch: pack the latents, and those of half the size, then gather from both."""
    found = []
    for part, size in ((t.table[:, : t.coarse], 2), (t.table[:, t.coarse :], 1)):
        packed = F.pixel_unshuffle(latents[..., ::size, ::size], PATCH).flatten(2).transpose(1, 2)
        cells = part[..., 1].long() // size * (t.side // size) + part[..., 2] // size
        found.append(packed.gather(1, cells[..., None].expand(-1, -1, packed.shape[2])))
    return torch.cat(found, 1)


def draw(tokens: Tensor, t: Tiling) -> Tensor:
    """unpatchify in torch, with the token over each cell known: gather and unpack at both sizes, then choose."""
    packed = tokens.gather(1, t.owner[..., None].expand(-1, -1, tokens.shape[2]))
    picture = packed.transpose(1, 2).unflatten(2, (t.side, t.side))
    fine = F.pixel_shuffle(picture, PATCH)
    coarse = F.interpolate(F.pixel_shuffle(picture[..., ::2, ::2], PATCH), scale_factor=2)
    is_coarse = (t.owner < t.coarse).view(-1, 1, t.side, t.side)
    return torch.where(
        is_coarse.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3), coarse, fine
    )


def finish(x: Tensor, noise: Tensor, t: Tiling) -> tuple[Tensor, Tensor]:
    """The transition to the whole grid in torch: copies, noise, and a sort into raster order."""
    pull = math.sqrt(1 - 4 * NUMBERS["correlation"]) - 1
    unsplit = math.sqrt(1 - NUMBERS["correlation"])
    coarse = t.table[:, : t.coarse, 1:]
    offsets = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=x.device)
    places = torch.cat(
        [(coarse.unsqueeze(2) + offsets).flatten(1, 2), t.table[:, t.coarse :, 1:]], 1
    )
    order = (places[..., 0] * t.side + places[..., 1]).argsort(dim=1).unsqueeze(-1)
    siblings = noise[:, : 4 * t.coarse].unflatten(1, (-1, 4))
    siblings = siblings + pull * siblings.mean(2, keepdim=True)
    z = torch.cat([siblings.flatten(1, 2), unsplit * noise[:, 4 * t.coarse :]], dim=1)
    copies = torch.cat([x[:, : t.coarse].repeat_interleave(4, dim=1), x[:, t.coarse :]], dim=1)
    y = (NUMBERS["scale"] * copies.float() + NUMBERS["deviation"] * z).to(x.dtype)
    return y.gather(1, order.expand_as(y)), places.gather(1, order.expand_as(places))
