"""Families without an adapter: attention and feed-forward modules wrapped as they are.

A block's own forward runs, with its norms, modulations and gated residuals; only the modules in COMPONENTS are spared
where a schedule reuses them. What is cached is the module's output, so the semantics are those of an adapter; what is
lost are the fused residuals, the skipped norms, partial token sets and the closed-form costs, of which only the linear
layers are counted, over the image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastdit.adapters.base import Adapter, forward_arguments, place_once
from fastdit.forward import Forward
from fastdit.spec import ModelSpec

#: attributes of a block that are components, by diffusers' habits
COMPONENTS = ("attn", "attn1", "attn2", "ff", "ff_context", "ffn", "feed_forward", "mlp")


def block_lists(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Attribute -> component names, of the module lists whose elements have components."""
    found = {}
    for name, blocks in transformer.named_children():
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            names = tuple(
                child
                for child, module in blocks[0].named_children()
                if child in COMPONENTS and module is not None
            )
            if names:
                found[name] = names
    return found


def patch_sides(transformer: nn.Module) -> tuple[int, int, int]:
    """Frames, rows and columns of a patch, which a model's config has as one number, as several, or not at all."""
    side = getattr(transformer.config, "patch_size", None) or 1
    frames = getattr(transformer.config, "patch_size_t", None) or 1
    sides = (side, side) if isinstance(side, int) else side
    return (frames, *sides)[-3:]


def stock_block(block: nn.Module, fw: Forward, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward; its components ask the session."""
    return type(block).forward(block, *args, **kwargs)


class Generic(Adapter):
    """The adapter of one transformer class that has none."""

    family = "generic"
    text_tokens = 0
    restates = False
    embeddings_arguments = (
        "encoder_hidden_states",
        "encoder_hidden_states_t5",
        "pooled_projections",
        "class_labels",
        "encoder_attention_mask",
    )

    def __init__(self, transformer: nn.Module) -> None:
        cls = type(transformer)
        lists = block_lists(transformer)
        self.model_classes = (cls.__name__,)
        self.kinds = {name: type(getattr(transformer, name)[0]).__name__ for name in lists}
        self.components = lists
        self.forwards: Mapping[str, Callable[..., Any]] = dict.fromkeys(lists, stock_block)

    def spec(self, transformer: nn.Module) -> ModelSpec:
        """A component that several blocks share could not tell which of them calls it."""
        found = super().spec(transformer)
        places: dict[nn.Module, str] = {}
        for index, component, module in self.wrapped(transformer):
            place_once(places, module, f"{component} of block {index}")
        return found

    def has_component(self, kind: str, block: nn.Module, component: str) -> bool:
        """Blocks of one list may differ."""
        return getattr(block, component, None) is not None

    def parts(self, kind: str, block: nn.Module) -> dict[str, nn.Module]:
        """Every component."""
        names = (n for n in self.components[kind] if self.has_component(kind, block, n))
        return {name: getattr(block, name) for name in names}

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """None: all tokens run."""
        return []

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """Of images [B, C, H, W] and videos, [B, C, F, H, W] or [B, F, C, H, W]; packed latents are tokens."""
        _, *sizes = latent_shape
        if len(sizes) == 2:
            return sizes[0]
        channels = getattr(transformer.config, "in_channels", None)
        del sizes[len(sizes) == 4 and sizes[0] != channels == sizes[1]]
        sides = reversed(patch_sides(transformer))
        return math.prod(size // side for size, side in zip(reversed(sizes), sides, strict=False))

    def patch(self, transformer: nn.Module) -> int:
        """Side of a patch, across."""
        return patch_sides(transformer)[2]

    def width(self, transformer: nn.Module) -> int:
        """The outputs of a block's last linear layer."""
        return getattr(transformer, "inner_dim", 0)


def generic_adapter(transformer: nn.Module) -> Generic | None:
    """An adapter of a transformer by wrapping, or None where nothing can be wrapped."""
    callable_so = "hidden_states" in forward_arguments(type(transformer))
    return Generic(transformer) if callable_so and block_lists(transformer) else None
