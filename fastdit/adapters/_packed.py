"""Base of families whose pipelines pack latents: [B, N, 4 C], a token for 2 x 2 latent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.base import Adapter, Call
from fastdit.adapters.latents import batch_index
from fastdit.errors import ArgumentError
from fastdit.tokens.layout import SIDE, Layout


class Packed(Adapter):
    """The tokens of a call are what it is given; only pictures and predictions have a height and a width."""

    def patch(self, transformer: nn.Module) -> int:
        """The pipeline packs 2 x 2 latent pixels."""
        return SIDE

    def tokens(self, transformer: nn.Module, latent_shape: Any) -> int:
        """A call has the tokens it is given; a [B, C, H, W] shape (for predictions) those it would be packed to."""
        if len(latent_shape) == 3:
            return latent_shape[1]
        return (latent_shape[-2] // SIDE) * (latent_shape[-1] // SIDE)

    def latent_image(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens [B, N, 4 C] are unpacked."""
        tiles = self.field(latents, grid)
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def patches(self, velocity: Tensor, patch: int) -> Tensor:
        """Tokens [B, N, 4 C] are given as [B, N, 1, 2, 2, C]: the grid does not matter to who chooses tokens."""
        return self.field(velocity, (velocity.shape[1], 1))

    def field(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        """Tokens [B, gh gw, 4 C] are given as a view [B, gh, gw, 2, 2, C]."""
        grid = latents.unflatten(1, cells).unflatten(3, (-1, SIDE, SIDE))
        return grid.permute(0, 1, 2, 4, 5, 3)

    def gather_latents(self, latents: Tensor, index: tuple[Tensor, Tensor], patch: int) -> Tensor:
        """The tokens at `index`, [B, K, 4 C]."""
        return latents[index]

    def scatter_output(self, sample: Tensor, rows: Tensor, full: Tensor, patch: int) -> Tensor:
        """The result is `full` [B, N, 4 C] with `rows` replaced by `sample`."""
        return full.index_put((batch_index(rows), rows), sample)

    def reduce_latents(self, latents: Tensor, layout: Layout, ops: Any) -> Tensor:
        """The layout's tokens, [B, n, 4 C]."""
        return layout.read(self.field(latents, layout.grid), ops)

    def expand_output(self, sample: Tensor, layout: Layout, latents: Tensor, ops: Any) -> Tensor:
        """Tokens [B, n, 4 C] are drawn at full size, [B, N, 4 C]."""
        full = sample.new_empty(sample.shape[0], latents.shape[1], sample.shape[2])
        layout.write(sample, self.field(full, layout.grid), ops)
        return full

    def embed(
        self, module: nn.Module, shape: Sequence[int], rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """No rotation: attention takes that of all tokens at the rows."""

    replaces_attention = True


class Placed(Packed):
    """The tokens' positions are given as `img_ids`: a picture's number, row, column, and perhaps more."""

    token_positions = ("img_ids",)

    def moved_tokens(self, call: Call) -> int:
        """Those of the picture, without the reference images that edits put behind it; waits for the device."""
        return call.tokens if call.positions is None else len(_of_picture(call.positions))

    def grid(self, latents: Sequence[int], positions: Tensor | None, patch: int) -> tuple[int, int]:
        """Read off the positions, so it waits for the device; other than a grid of them is one row."""
        tokens, rows = latents[1], 1
        if positions is not None:
            own = _of_picture(positions)
            tokens, rows = len(own), int(own[:, 1].max()) + 1
        return (rows, tokens // rows) if tokens % rows == 0 else (1, tokens)

    def full_grid(self, call: Call, patch: int) -> tuple[int, int]:
        """Read off the positions, which must be those of one picture; waits for the device."""
        height, width = super().full_grid(call, patch)
        count, ids = call.tokens, _of_batch(call.positions).float()
        expected = torch.zeros_like(ids[: height * width])
        expected[:, :3] = Layout.uniform((height, width), 0, ids.device).table[0]
        if count != ids.shape[0] or not torch.equal(ids, expected):
            raise ArgumentError(
                "img_ids must be the rows and columns of one picture for RALU; "
                f"got {count} tokens that are not (reference images, or positions of your own)"
            )
        return height, width


def _of_batch(positions: Tensor) -> Tensor:
    """Positions [N, axes]; transformers that are given them for each row of the batch read the first row's."""
    return positions[0] if positions.ndim == 3 else positions


def _of_picture(positions: Tensor) -> Tensor:
    """The positions of the picture itself, which come first: the first number of a reference image's is another."""
    positions = _of_batch(positions)
    return positions[: int((positions[:, 0] == positions[0, 0]).cumprod(0).sum())]
