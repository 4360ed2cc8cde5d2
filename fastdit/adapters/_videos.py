"""Base of families of videos: latents are [B, C, F, H, W], and a patch of some frames, rows and columns is a token.

The tokens of a frame lie row by row, frame after frame. Where a picture stands for a video, its frames lie below each
other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastdit.adapters.base import Adapter, Size, blank
from fastdit.adapters.latents import batch_index, video_statistics
from fastdit.errors import UnsupportedModelError


class Videos(Adapter):
    """Latents have five axes, and the autoencoder, one of videos, has a mean and a deviation for each channel."""

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """The latents are [B, C, F, H, W]; a picture's shape, for predictions, stands for one frame."""
        *frames, rows, columns = latent_shape[2:]
        sides = (*(frames or [1]), rows, columns)
        return math.prod(n // p for n, p in zip(sides, self.patch(transformer), strict=True))

    def patch(self, transformer: nn.Module) -> tuple[int, int, int]:  # type: ignore[override]
        """Frames, rows and columns of a patch."""
        return tuple(transformer.config.patch_size)

    def check_tokens(self, transformer: nn.Module) -> None:
        """Patches are of one frame each, else they have no view of six axes."""
        super().check_tokens(transformer)
        frames = self.patch(transformer)[0]
        if frames != 1:
            raise UnsupportedModelError(
                f"{type(transformer).__name__} has patches of {frames} frames; a method that computes a part of the "
                "tokens takes those of one"
            )

    def grid(self, latents: Sequence[int], positions: Any, patch: Any) -> tuple[int, int]:
        """The frames lie below each other."""
        frames, rows, columns = (n // p for n, p in zip(latents[2:], patch, strict=True))
        return frames * rows, columns

    def frames(self, latents: Sequence[int], positions: Any, patch: Any) -> int:
        """Those of the latents, in patches; a picture's shape, for predictions, is that of one."""
        return latents[2] // patch[0] if len(latents) == 5 else 1

    def _cells(self, video: Tensor, patch: Any) -> Tensor:
        """[B, C, F, H, W] as [B, gf, gh, gw, pf, ph, pw, C], a view."""
        for axis, side in zip((-3, -2, -1), patch, strict=True):
            video = video.unflatten(axis, (-1, side))  # negative, as the axes before it grow
        return video.permute(0, 2, 4, 6, 3, 5, 7, 1)

    def patches(self, velocity: Tensor, patch: Any) -> Tensor:
        """[B, C, F, H, W] as [B, gf gh, gw, pf ph, pw, C], a view where a patch is of one frame."""
        return self._cells(velocity, patch).flatten(4, 5).flatten(1, 2)

    def gather_latents(self, latents: Tensor, index: tuple[Tensor, Tensor], patch: Any) -> Tensor:
        """The patches at `index` side by side, [B, C, pf, ph, K pw]."""
        active = self._cells(latents, patch).flatten(1, 3)[index]
        return active.permute(0, 5, 2, 3, 1, 4).flatten(4)

    def scatter_output(self, sample: Tensor, rows: Tensor, full: Tensor, patch: Any) -> Tensor:
        """`full` [B, C, F, H, W] with the patches at `rows` replaced by those of `sample` [B, C, pf, ph, K pw]."""
        merged = full.clone()
        cells = self._cells(merged, patch)
        new = sample.unflatten(-1, (-1, patch[2])).permute(0, 4, 2, 3, 5, 1)
        _, _, down, across, *_ = cells.shape
        frames, in_frame = rows // (down * across), rows % (down * across)
        cells[batch_index(rows), frames, in_frame // across, in_frame % across] = new
        return merged

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """The frames lie below each other, one of the video for each of the latents."""
        mean, std = video_statistics(vae, latents)
        video = vae.decode((latents / (1.0 / std) + mean).to(vae.dtype), return_dict=False)[0]
        last = max(1, latents.shape[2] - 1)
        return video[:, :, :: max(1, (video.shape[2] - 1) // last)].flatten(2, 3)

    def example_latents(self, transformer: nn.Module, size: Size) -> Tensor:
        """Latents of an example, of one frame: a square where the number of tokens is one."""
        rows = next(n for n in range(math.isqrt(size.image), 0, -1) if size.image % n == 0)
        cells = zip((1, rows, size.image // rows), self.patch(transformer), strict=True)
        return blank(transformer, transformer.config.in_channels, *(n * p for n, p in cells))
