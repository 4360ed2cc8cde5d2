"""Base of families of videos: latents are [B, C, F, H, W], and a patch of some frames, rows and columns is a token.

The tokens of a frame lie row by row, frame after frame. Where a picture stands for a video, its frames lie below each
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Adapter, Size, blank
from fastdit.adapters.latents import batch_index, video_statistics
from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.tokens.layout import Layout


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
        video, last = self.decode_video(latents, vae), max(1, latents.shape[2] - 1)
        return video[:, :, :: max(1, (video.shape[2] - 1) // last)].flatten(2, 3)

    def decode_video(self, latents: Tensor, vae: Any) -> Tensor:
        """The video [B, 3, T, H, W], -1 to 1, of latents [B, C, F, h, w]."""
        mean, std = video_statistics(vae, latents)
        return vae.decode((latents / (1.0 / std) + mean).to(vae.dtype), return_dict=False)[0]

    def encode(self, image: Tensor, vae: Any) -> Tensor:
        """The latents of a video, the inverse of :meth:`decode_video`."""
        latents = vae.encode(image.to(vae.dtype), return_dict=False)[0].mode()
        mean, std = video_statistics(vae, latents)
        return (latents - mean) * (1.0 / std)

    # ---- tokens of two sizes: large ones are so in rows and columns, and all frames are kept

    def check_resolution(self, transformer: nn.Module) -> None:
        """Patches are of one frame each, and of one latent pixel or 2 x 2."""
        patch = self.patch(transformer)
        if not self.changes_resolution or patch not in ((1, 1, 1), (1, 2, 2)):
            raise UnsupportedModelError(
                f"{type(transformer).__name__} cannot change its resolution during a run: its patches are of "
                f"{' x '.join(map(str, patch))}, frames first; accepted are 1 x 1 x 1 and 1 x 2 x 2"
            )

    def field(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        """The pipeline's latents [B, C, F, H, W] as [B, gf gh, gw, p, p, C], a view."""
        return self.patches(latents, (1, *[latents.shape[-1] // cells[1]] * 2))

    def as_clip(self, picture: Tensor, frames: int) -> Tensor:
        """[B, C, F H, W] as [B, C, F, H, W]."""
        return picture.unflatten(2, (frames, -1))

    def redrawn(self, latents: Tensor, vae: Any) -> Tensor:
        """The frames, each enlarged, are encoded as one video; those of the latents lie below each other."""
        video = self.decode_video(latents, vae).float()
        frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="bicubic")
        video = frames.clamp(-1, 1).unflatten(0, (len(video), -1)).transpose(1, 2)
        return self.encode(video, vae).flatten(2, 3)

    def reduce_latents(self, latents: Tensor, layout: Layout, ops: Any) -> Tensor:
        """A half-size video of coarse tokens, or the patches of mixed ones side by side in one frame."""
        found = super().reduce_latents(latents, layout, ops)
        return found if layout.name == "coarse" else found.unsqueeze(2)

    def expand_output(self, sample: Tensor, layout: Layout, latents: Tensor, ops: Any) -> Tensor:
        """The inverse, at full size."""
        sample = sample if layout.name == "coarse" else sample.squeeze(2)
        return super().expand_output(sample, layout, latents, ops)

    replaces_attention = True

    def refuse_conditions(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Behind the channels of what is drawn may be those of an image at full size; without one they are 0."""
        latents = arguments_of(transformer, args, kwargs)[self.image_argument]
        shown = latents[:, transformer.config.out_channels or latents.shape[1] :]
        if shown.shape[1] and bool(shown.any()):
            raise ArgumentError(
                f"{self.image_argument} must show no image where the resolution changes; {shown.shape[1]} of its "
                f"{latents.shape[1]} channels do, at full size"
            )

    #: cos and sin [B, n, d] of places [B, n, 3] of tokens, frame, row and column, as the family's own positions are
    turned: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: dict[Any, Any], latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The model's own where tokens are alike; mixed ones have the places of frames of half the size, in steps of
        a half, or of a quarter."""
        if "rotation" not in memory:
            if layout.name == "mixed":
                frame, y, x = layout.places_in_clip().unbind(-1)
                places = torch.stack([frame, y / 2, x / 2], dim=-1)
                memory["rotation"] = self.turned(module, places)
            else:
                memory["rotation"] = type(module).forward(module, latents)
        return memory["rotation"]

    def example_latents(self, transformer: nn.Module, size: Size) -> Tensor:
        """Latents of an example, of one frame: a square where the number of tokens is one."""
        rows = next(n for n in range(math.isqrt(size.image), 0, -1) if size.image % n == 0)
        cells = zip((1, rows, size.image // rows), self.patch(transformer), strict=True)
        return blank(transformer, transformer.config.in_channels, *(n * p for n, p in cells))


def turns(places: Tensor, dims: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, n, d], each value twice, of places [B, n, 3], whose axes have so many channels.

    They are computed in the dtype of the places, as the models' own are.
    """
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    made = [
        get_1d_rotary_pos_embed(dim, place.flatten(), theta, use_real=True, freqs_dtype=place.dtype)
        for place, dim in zip(places.unbind(-1), dims, strict=True)
    ]
    cos, sin = (torch.cat(axes, dim=1) for axes in zip(*made, strict=True))
    return cos.unflatten(0, places.shape[:2]), sin.unflatten(0, places.shape[:2])
