"""Base of families that are given a list, and give one: of a picture [C, F, H, W] a row, or of its references too."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Adapter, Call
from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.errors import ArgumentError

_SHAPE, _DTYPE, _MEMORY = map(operator.attrgetter, ("shape", "dtype", "_cdata"))


class Listed(Adapter):
    """References are conditions; what leaves out tokens, or changes their size, knows pictures of one size alone."""

    def patch(self, transformer: nn.Module) -> int:
        """Of the sides that the model knows the first is the usual one."""
        return transformer.all_patch_size[0]

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """Latents are [B, C, F, H, W], or pictures [B, C, H, W]."""
        side, (height, width) = self.patch(transformer), latent_shape[-2:]
        frames = latent_shape[2] if len(latent_shape) == 5 else 1
        return (
            max(1, frames // transformer.all_f_patch_size[0]) * (height // side) * (width // side)
        )

    def output_elements(self, transformer: nn.Module, tokens: int) -> int:
        """A token has so many channels for each latent pixel."""
        return tokens * self.patch(transformer) ** 2 * transformer.out_channels

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """The last picture of a row is the one that is drawn; the longest prompt is the text."""
        given = dict(arguments_of(transformer, args, kwargs))
        latents, (texts, *others) = given[self.image_argument], self.embeddings_arguments
        if isinstance(latents[0], list):
            rows = [pictures[:-1] for pictures in latents]
            rows += [row for name in (texts, *others) for row in given.pop(name, None) or () if row]
            given[texts] = [each for row in rows for each in row if each is not None]
            given[self.image_argument] = [pictures[-1] for pictures in latents]
        found = super().call(transformer, (), given)
        sides = given.get("patch_size"), given.get("f_patch_size")
        return replace(
            found,
            hidden_states=found.hidden_states.squeeze(2),
            text=max(map(_SHAPE, given[texts]))[0],
            signature=(*found.signature, sides),
        )

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """With references there are two, of which layers take one for each token."""
        if isinstance(arguments_of(transformer, args, kwargs)[self.image_argument][0], list):
            return None
        return super().layer_inputs(transformer, args, kwargs, batch)

    def moved_tokens(self, call: Call) -> int:
        """There must be no references."""
        self._refuse_references(call)
        return call.tokens

    def full_grid(self, call: Call, patch: int) -> tuple[int, int]:
        """There must be no references."""
        self._refuse_references(call)
        return super().full_grid(call, patch)

    def _refuse_references(self, call: Call) -> None:
        if call.positions is not None:
            raise ArgumentError(
                f"{self.image_argument} must be one picture a row, without references, where tokens are left out or "
                f"have two sizes; got {self.positions_argument}={call.positions}"
            )

    def as_latents(self, given: Any) -> Tensor:
        """Pictures of one size and one frame, [C, 1, H, W] each, as [B, C, H, W].

        A view of the memory that they are parts of, where they lie there in turn: pipelines give a batch apart.
        """
        if isinstance(given, Tensor):
            return given
        shapes = set(map(_SHAPE, given))
        if len(shapes) > 1 or len(given[0].shape) != 4 or given[0].shape[1] != 1:
            raise ArgumentError(
                f"{self.image_argument} must be pictures of one size and one frame where tokens are left out, have two "
                f"sizes, or whole steps are forecast; got {list(map(tuple, map(_SHAPE, given)))}"
            )
        first, memories = given[0], map(_MEMORY, map(Tensor.untyped_storage, given))
        forms = set(zip(map(_DTYPE, given), map(Tensor.stride, given), memories, strict=True))
        places = list(map(Tensor.storage_offset, given))
        steps = set(map(operator.sub, places[1:], places)) or {1}
        if len(forms) > 1 or len(steps) > 1 or min(steps) <= 0 or torch.is_grad_enabled():
            return torch.stack(given).squeeze(2)
        return first.as_strided((len(given), *first.shape), (*steps, *first.stride())).squeeze(2)

    def as_given(self, latents: Any) -> list[Tensor]:
        """The pictures are views."""
        return latents if isinstance(latents, list) else list(latents.unsqueeze(2).unbind())

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """None: the restated model makes positions."""
        return []
