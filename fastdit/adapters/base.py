"""What an adapter is: everything fastdit knows about one model family, and nothing else.

An adapter restates the forward of each of its block classes once, as calls on a :class:`~fastdit.forward.Forward`. It
finds models by class name along the MRO, so diffusers is not imported here. Adding a family is adding a file to this
folder that exposes ``ADAPTER``.

The counts behind `explain` live here too, since only the family knows them: multiply-accumulates and slot sizes per
component, per row of the batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.errors import UnsupportedModelError
from fastdit.spec import BlockKind, ModelSpec


@dataclass(frozen=True)
class Call:
    """What the session needs of one transformer call.

    Attributes:
        hidden_states: The latents, as given.
        timestep: As given.
        embeddings: The text or class conditions, whose change invalidates caches.
        tokens: Image tokens that pass the blocks, per batch row.
        signature: Shapes and dtypes a cached value depends on.
        skips_blocks: The caller leaves out blocks in this call (skip-layer guidance).
    """

    hidden_states: Tensor
    timestep: Any
    embeddings: tuple[Tensor, ...]
    tokens: int
    signature: tuple[Any, ...]
    skips_blocks: bool


@dataclass(frozen=True)
class Size:
    """Token counts of one batch row: `image` tokens and `text` tokens."""

    image: int
    text: int


class Adapter:
    """Base of all adapters.

    Attributes:
        family: Short name.
        model_classes: Names of the transformer classes it serves.
        kinds: Block list attribute -> name of the block class in it, in running order.
        components: Block list attribute -> component names in running order.
        consumers: Block list attribute -> {component: the only component that reads it}.
        forwards: Block list attribute -> ``forward(block, fw, *args, **kwargs)``.
        embeddings_arguments: The transformer arguments that hold the conditions.
        text_tokens: Usual number of text tokens, for predictions.
        uses_cfg: Whether runs usually double the rows for classifier-free guidance, for predictions.
        timesteps_rise: Whether the timestep argument rises from noise to image; elsewhere it falls.
    """

    family: str
    model_classes: Sequence[str]
    kinds: Mapping[str, str]
    components: Mapping[str, tuple[str, ...]]
    consumers: Mapping[str, Mapping[str, str]] = {}
    forwards: Mapping[str, Callable[..., Any]]
    embeddings_arguments: Sequence[str] = ("encoder_hidden_states", "pooled_projections")
    text_tokens: int
    uses_cfg = True
    timesteps_rise = False

    # ---- recognising a model

    def matches(self, transformer: Any) -> bool:
        """Whether the transformer is of this family."""
        return any(cls.__name__ in self.model_classes for cls in type(transformer).__mro__)

    def spec(self, transformer: nn.Module) -> ModelSpec:
        """The transformer's block kinds.

        Raises:
            UnsupportedModelError: A block is of another class than expected, or lacks what its forward needs.
        """
        kinds = []
        for name, block_class in self.kinds.items():
            blocks = list(getattr(transformer, name, ()))
            for index, block in enumerate(blocks):
                if not any(cls.__name__ == block_class for cls in type(block).__mro__):
                    raise UnsupportedModelError(
                        f"{name}[{index}] must be a {block_class}, got {type(block).__name__}"
                    )
                self.check_block(name, index, block)
            absent = frozenset(
                (index, component)
                for index, block in enumerate(blocks)
                for component in self.components[name]
                if not self.has_component(name, block, component)
            )
            if blocks:
                consumers = self.consumers.get(name, {})
                kinds.append(BlockKind(name, len(blocks), self.components[name], absent, consumers))
        if not kinds:
            raise UnsupportedModelError(
                f"{type(transformer).__name__} has no blocks in {list(self.kinds)}"
            )
        return ModelSpec(self.family, tuple(kinds))

    def check_block(self, kind: str, index: int, block: nn.Module) -> None:
        """Refuse a block variant the forward does not cover."""

    def has_component(self, kind: str, block: nn.Module, component: str) -> bool:
        """Whether this very block has the component."""
        return True

    def blocks(self, transformer: nn.Module) -> list[tuple[str, nn.Module]]:
        """(kind, block) of every block, in running order."""
        return [(kind, block) for kind in self.kinds for block in getattr(transformer, kind, ())]

    # ---- one transformer call

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """Read a transformer call's arguments."""
        names = forward_arguments(type(transformer))

        def argument(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            position = names.index(name) if name in names else len(args)
            return args[position] if position < len(args) else None

        latents = argument("hidden_states")
        conditions = (argument(name) for name in self.embeddings_arguments if name in names)
        embeddings = tuple(value for value in conditions if value is not None)
        tokens = self.tokens(transformer, latents.shape)
        tensors = (latents, *embeddings)
        signature = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
        return Call(
            latents,
            argument("timestep"),
            embeddings,
            tokens,
            signature,
            bool(argument("skip_layers")),
        )

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """Image tokens of latents of this shape; [B, C, H, W] unless a family packs them."""
        patch = transformer.config.patch_size
        return (latent_shape[-2] // patch) * (latent_shape[-1] // patch)

    def width(self, transformer: nn.Module) -> int:
        """Channels of a token in the residual stream."""
        return transformer.inner_dim

    def text_tokens_of(self, pipeline: Any | None) -> int:
        """Text tokens the pipeline's prompts become by default."""
        return self.text_tokens

    # ---- counts, per batch row

    def macs(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Multiply-accumulates of a component, attention products included."""
        raise NotImplementedError

    def overhead_macs(self, transformer: nn.Module, size: Size) -> int:
        """Multiply-accumulates of a call outside all components: embeddings, modulation, output."""
        raise NotImplementedError

    def slot_elements(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Elements of the component's cached output."""
        raise NotImplementedError

    # ---- drift guard

    def probe(
        self, transformer: nn.Module, kind: str, block: nn.Module, random: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """Keyword arguments for one block on a few random tokens; ``random(*shape)`` draws in the model's dtype."""
        raise NotImplementedError


def linear_macs(*modules: nn.Module | None) -> int:
    """Multiply-accumulates per row of all Linear layers (and 1x1-equivalent patch convolutions) in the modules."""
    total = 0
    for module in modules:
        for layer in module.modules() if module is not None else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                total += layer.weight.numel()
    return total


def attention_macs(attention: nn.Module) -> int:
    """:func:`linear_macs` of an attention over one sequence; `fuse_qkv_projections` leaves the layers in place."""
    return linear_macs(attention.to_q, attention.to_k, attention.to_v, attention.to_out)


@functools.cache
def forward_arguments(cls: type) -> tuple[str, ...]:
    """Names of the arguments of ``cls.forward``, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def chunk_gates(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, count D] -> `count` views [B, D]."""
    return torch.chunk(modulation, count, dim=1)
