"""How a family's latents become image tokens, all of them, a part of them, or of two sizes.

Here they are pictures [B, C, H, W] that the model patches by itself; `_packed.py` has those that pipelines pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of, place_of
from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.tokens.layout import SIDE, Layout, picture_cells

if TYPE_CHECKING:
    from fastdit.adapters.base import Call


class Pictures:
    """Base of all adapters: latents are pictures, and a patch of them is a token.

    Attributes:
        shifts_latents: Whether the pipelines add the VAE's shift before they decode.
    """

    shifts_latents = False

    def as_latents(self, given: Any) -> Tensor:
        """What the transformer is given, or gives, as the scheduler has latents; some take and give lists."""
        return given

    def as_given(self, latents: Tensor) -> Any:
        """The inverse of :meth:`as_latents`."""
        return latents

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """Modules whose forward adds positions to the tokens, and so must know the rows."""
        return [transformer.pos_embed]

    def embed(self, module: nn.Module, shape: Sequence[int], rows: Tensor, patches: Tensor) -> Any:
        """The embedded active tokens [B, K, D], positions added, of patches [B, C, p, K p] laid side by side.

        `shape` is that of the whole latents.
        """
        return _embedded(
            module,
            patches,
            lambda: _positions(module, shape[-2], shape[-1], patches.device)[0][rows],
        )

    def embed_apart(
        self, module: nn.Module, kept: dict[Any, Any], patches: Tensor, *more: Any
    ) -> tuple[Any, Tensor | None] | None:
        """What the module gives of embedded tokens, [B, N, D] of any strides, and what is yet to be added to these.

        `kept` holds that, the positions [B, N, D]. None where only the module's own forward will do.
        """
        table = getattr(module, "pos_embed", None)
        if more or table is None or module.layer_norm or not module.flatten:
            return None
        tokens = module.proj(patches).flatten(2).transpose(1, 2)
        if table.dtype is not tokens.dtype:
            return None
        if module not in kept:
            found = _positions(module, *patches.shape[-2:], patches.device)
            kept[module] = found.to(table.dtype)
        return tokens, kept[module].expand(len(tokens), -1, -1)

    def patch(self, transformer: nn.Module) -> int:
        """Side of a patch in latent pixels."""
        return transformer.config.patch_size

    def grid(self, latents: Sequence[int], positions: Tensor | None, patch: int) -> tuple[int, int]:
        """Rows and columns of image tokens, for pictures of them; `latents` is the shape the transformer was given."""
        return latents[-2] // patch, latents[-1] // patch

    def frames(self, latents: Sequence[int], positions: Any, patch: Any) -> int:
        """How many frames of a video lie below each other in the :meth:`grid`."""
        return 1

    def latent_image(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pipeline's latents as [B, C, H, W]; `grid` has the rows and columns of tokens."""
        return latents

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """The picture [B, 3, H, W], -1 to 1, of latents [B, C, h, w]."""
        shift = (vae.config.shift_factor or 0.0) if self.shifts_latents else 0.0
        latents = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        return vae.decode(latents, return_dict=False)[0]

    def encode(self, image: Tensor, vae: Any) -> Tensor:
        """The latents [B, C, h, w] of a picture [B, 3, H, W], -1 to 1: the inverse of :meth:`decode`."""
        shift = (vae.config.shift_factor or 0.0) if self.shifts_latents else 0.0
        latents = vae.encode(image.to(vae.dtype), return_dict=False)[0].mode()
        return (latents - shift) * vae.config.scaling_factor

    def patches(self, velocity: Tensor, patch: int) -> Tensor:
        """[B, C, H, W] as [B, gh, gw, p, p, C], a view."""
        return picture_cells(velocity, patch)

    #: arguments with per-token residuals of a ControlNet, lists of [B, N, D]
    residual_arguments: Sequence[str] = ()
    #: arguments with a position for each image token; where tokens are left out, as many are given, which nobody reads
    token_positions: Sequence[str] = ()

    def some_positions(self, positions: Any, tokens: int) -> Any:
        """Positions for so many tokens, of an argument that has [..., N, axes]."""
        return positions[..., :tokens, :]

    def gather_inputs(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the active tokens [B, K] only: their latents and a ControlNet's residuals."""
        args, kwargs = list(args), dict(kwargs)
        owner, key = place_of(transformer, args, kwargs, self.image_argument)
        latents, index = self.as_latents(owner[key]), (batch_index(rows), rows)
        owner[key] = self.as_given(self.gather_latents(latents, index, self.patch(transformer)))
        for name in self.token_positions:
            owner, key = place_of(transformer, args, kwargs, name)
            owner[key] = self.some_positions(owner[key], rows.shape[1])
        for name in self.residual_arguments:
            owner, key = place_of(transformer, args, kwargs, name)
            if owner is not None and owner[key] is not None:
                count = self.tokens(transformer, latents.shape)
                owner[key] = self.gather_residuals(owner[key], index, count)
        return tuple(args), kwargs

    def gather_residuals(self, residuals: Any, index: tuple[Tensor, Tensor], count: int) -> Any:
        """A ControlNet's residuals, of those that have `count` tokens the ones at `index`."""
        return [r[index] if r.ndim == 3 and r.shape[1] == count else r for r in residuals]

    def gather_latents(self, latents: Tensor, index: tuple[Tensor, Tensor], patch: int) -> Tensor:
        """The patches at `index`, (image, token) numbers of shape [B, K], laid side by side, [B, C, p, K p]."""
        tokens = self.patches(latents, patch).flatten(3).flatten(1, 2)  # [B, N, p p C]
        active = tokens[index].unflatten(-1, (patch, patch, -1))
        return active.permute(0, 4, 2, 1, 3).flatten(3)  # [B, C, p, K, p] -> [B, C, p, K p]

    def scatter_output(self, sample: Tensor, rows: Tensor, full: Tensor, patch: int) -> Tensor:
        """`full` [B, C, H, W] with the patches at `rows` replaced by those of `sample` [B, C, p, K p]."""
        merged = full.clone()
        grid = self.patches(merged, patch)
        new = sample.unflatten(-1, (-1, patch)).permute(0, 3, 2, 4, 1)  # [B, K, p, p, C]
        down, across = rows // grid.shape[2], rows % grid.shape[2]
        grid[batch_index(rows), down, across] = new
        return merged

    # ---- tokens of two sizes

    def as_clip(self, picture: Tensor, frames: int) -> Tensor:
        """Latents [B, C, F H, W], frames below each other, as the VAE has them."""
        return picture

    def redrawn(self, latents: Tensor, vae: Any) -> Tensor:
        """Clean latents at twice the size, as the VAE encodes their picture when it is enlarged; as :meth:`decode`."""
        image = self.decode(latents, vae).float()
        image = F.interpolate(image, scale_factor=2, mode="bicubic").clamp(-1, 1)
        return self.encode(image, vae)

    #: whether :meth:`reduce_inputs` and the others of this section are for this family
    changes_resolution = False

    def check_resolution(self, transformer: nn.Module) -> None:
        """Refuse a model that cannot run on tokens of two sizes.

        Raises:
            UnsupportedModelError: Naming the model.
        """
        if not self.changes_resolution or self.patch(transformer) != SIDE:
            raise UnsupportedModelError(
                f"{type(transformer).__name__} cannot change its resolution during a run; that takes an adapter that "
                f"says how, and patches of {SIDE} x {SIDE}"
            )

    def full_grid(self, call: Call, patch: int) -> tuple[int, int]:
        """Rows and columns of tokens at full resolution."""
        return self.grid(call.hidden_states.shape, call.positions, patch)

    def field(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        """The pipeline's latents as [B, gh, gw, p, p, C], a view."""
        return self.patches(latents, SIDE)

    def reduce_inputs(
        self,
        transformer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        ops: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the tokens of a layout; `embed_layout` says where they are."""
        args, kwargs = list(args), dict(kwargs)
        owner, key = place_of(transformer, args, kwargs, self.image_argument)
        owner[key] = self.as_given(self.reduce_latents(self.as_latents(owner[key]), layout, ops))
        for name in self.token_positions:
            owner, key = place_of(transformer, args, kwargs, name)
            owner[key] = self.some_positions(owner[key], layout.tokens)
        return tuple(args), kwargs

    def reduce_latents(self, latents: Tensor, layout: Layout, ops: Any) -> Tensor:
        """A half-size picture of coarse tokens, or the patches of mixed ones side by side, [B, C, p, n p]."""
        if layout.name == "coarse":
            return latents[..., ::2, ::2].contiguous()
        field = self.field(latents, layout.grid)
        patches = layout.read(field, ops).unflatten(2, (-1, *field.shape[3:5]))  # [B, n, C, p, p]
        return patches.permute(0, 2, 3, 1, 4).flatten(3)

    def expand_output(self, sample: Tensor, layout: Layout, latents: Tensor, ops: Any) -> Tensor:
        """The output of such a call at full size, shaped like `latents`."""
        if layout.name == "coarse":
            return sample.repeat_interleave(2, -1).repeat_interleave(2, -2)
        full = sample.new_empty(sample.shape[:2] + latents.shape[2:])
        field = self.field(full, layout.grid)
        patches = sample.unflatten(-1, (-1, field.shape[4])).permute(0, 3, 1, 2, 4)
        layout.write(patches.flatten(2), field, ops)  # [B, n, C, p, p]
        return full

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: dict[Any, Any], patches: Tensor
    ) -> Tensor:
        """The embedded tokens of a layout, positions added; `memory` lives as long as the layout.

        Where tokens are mixed, the coarse keep their places in a half-size picture, or lie in the middle of what they
        cover, and each split one's four have places half a step apart.
        """
        if layout.name != "mixed":
            return type(module).forward(module, patches)

        def positions() -> Tensor:
            if "positions" not in memory:
                level, y, x = layout.table.long().unbind(-1)
                cell = y * layout.grid[1] + x
                found = _half_step_positions(module, layout.grid, patches.device)[cell]
                if layout.centred:
                    middles = _half_step_positions(module, layout.grid, patches.device, 0.25)[cell]
                    found = torch.where(level[..., None] > 0, middles, found)
                memory["positions"] = found
            return memory["positions"].repeat(
                patches.shape[0] // memory["positions"].shape[0], 1, 1
            )

        return _embedded(module, patches, positions)

    #: whether tokens of two sizes may need the family's own attention though all keys count alike
    replaces_attention = False

    def owns_attention(self, layout: Layout, batch: int) -> bool:
        """Whether the stock attention cannot run a layout: in that all keys count alike, and, where the family replaces
        it, all images have one rotation.
        """
        return layout.weighs_keys or (self.replaces_attention and layout.table.shape[0] > 1)

    def refuse_conditions(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse what a run is given of pictures at full resolution, at its first call; that may wait for a device."""

    def refuse_residuals(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse a ControlNet's residuals, which are for the tokens at full resolution."""
        given = arguments_of(transformer, args, kwargs)
        for name in self.residual_arguments:
            if given.get(name) is not None:
                raise ArgumentError(
                    f"{name}: a ControlNet's residuals are for the full resolution; RALU accepts none"
                )


def batch_index(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device)[:, None]


def video_statistics(vae: Any, like: Tensor) -> list[Tensor]:
    """The mean and the deviation of the latents of a VAE of videos, [1, C, 1, 1, 1] each."""
    return [
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    ]


def _embedded(module: nn.Module, patches: Tensor, positions: Callable[[], Tensor]) -> Tensor:
    """The tokens [B, K, D] of patches, as diffusers' `PatchEmbed` makes them, with positions [B or 1, K, D] added."""
    tokens = module.proj(patches).flatten(2).transpose(1, 2)
    if module.layer_norm:
        tokens = module.norm(tokens)
    return tokens if module.pos_embed is None else (tokens + positions()).to(tokens.dtype)


def _positions(module: nn.Module, height: int, width: int, device: torch.device) -> Tensor:
    """The position table [1, N, D] of a `PatchEmbed` for latents of this size, as its forward picks it."""
    if module.pos_embed_max_size:
        return module.cropped_pos_embed(height, width)
    down, across = height // module.patch_size, width // module.patch_size
    if (module.height, module.width) == (down, across):
        return module.pos_embed
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    table = get_2d_sincos_pos_embed(
        embed_dim=module.pos_embed.shape[-1],
        grid_size=(down, across),
        base_size=module.base_size,
        interpolation_scale=module.interpolation_scale,
        device=device,
        output_type="pt",
    )
    return table.float().unsqueeze(0)


def _half_step_positions(
    module: nn.Module, cells: tuple[int, int], device: torch.device, off: float = 0.0
) -> Tensor:
    """Positions [gh gw, D] of a `PatchEmbed`, row by row, at the half steps of a picture of half as many patches.

    `off` is added to all of them, in steps.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

    size = module.pos_embed_max_size
    places = []
    for side in cells:
        steps = torch.arange(side, device=device, dtype=torch.float32) / 2 + off
        if size:  # the picture lies in the middle of a table
            steps = (size - side // 2) // 2 + steps
        places.append(steps / ((size or side // 2) / module.base_size) / module.interpolation_scale)
    down, across = places
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"))
    table = get_2d_sincos_pos_embed_from_grid(module.pos_embed.shape[-1], grid, output_type="pt")
    return table.float().to(module.pos_embed.dtype)
