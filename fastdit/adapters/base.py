"""What an adapter is: everything fastdit knows about one model family, and nothing else.

An adapter restates the forward of each of its block classes once, as calls on a
:class:`~fastdit.blocks.forward.Forward`. It finds models by class name along the MRO, so diffusers is not imported
here. Adding a family is adding a file to this folder that exposes ``ADAPTER``.

What its components cost is not written down: the model is counted on the adapter's example (see `counts.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.latents import Pictures
from fastdit.adapters.modulated import Modulated
from fastdit.adapters.once import Once, module_at
from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.observe import observed
from fastdit.spec import BlockKind, ModelSpec

#: which members a family says for what methods do: for all of them, for those that write "reuse", "rows" (a part of
#: the tokens) or "resolution", and for what is spared beside them; the others have one meaning for all families
NEEDS: Mapping[str, str] = {
    "dense": "family model_classes kinds forwards matches check_block example call compared image_argument "
    "time_argument positions_argument embeddings_arguments other_arguments residual_arguments "
    "own_attention_arguments tokens width output_elements text_tokens text_tokens_of uses_cfg timesteps_rise restates "
    "token_multiple restates_model read_prompt run_model small small_config",
    "reuse": "components consumers groups shared_gates common_gates has_component parts",
    "rows": "layouts processors embedders embed patch patches token_positions some_positions gather_latents "
    "scatter_output moved_tokens grid frames latent_image decode shifts_latents text_first as_latents as_given "
    "gather_residuals",
    "resolution": "changes_resolution check_resolution full_grid field reduce_latents expand_output "
    "embed_layout replaces_attention owns_attention as_clip encode redrawn refuse_conditions",
    "spared": "fused_attentions prompt_projections prompt_attentions weights_read_once position_embedding embeds_text "
    "condition_embedding condition_arguments shared_modulations output_norm "
    "modulated_output modulate_output output_modulators_of output_modulation unread layer_inputs embed_condition "
    "embedded embed_apart timesteps_per_unit given_timesteps",
}
#: rows of the batch of an example
BATCH = 2
#: arguments of transformers that go on to attention processors
ATTENTION_ARGUMENTS = ("joint_attention_kwargs", "cross_attention_kwargs", "attention_kwargs")


@dataclass(frozen=True)
class Call:
    """What the runtime needs of one transformer call.

    Attributes:
        hidden_states: The latents, as given.
        timestep: As given.
        embeddings: The text or class conditions, whose change invalidates caches.
        tokens: Image tokens that pass the blocks, per batch row.
        text: Text tokens of a batch row.
        signature: Shapes and dtypes a cached value depends on.
        positions: Where the image tokens are, as given, for families that pack them.
        skips_blocks: The caller leaves out blocks in this call (skip-layer guidance).
        tells_attention: Names of the arguments that it passes on to the attention processors.
        writes: It writes into what the caller keeps, which no program would do again.
        references: Of the tokens the last ones, of reference pictures, where the host knows.
    """

    hidden_states: Tensor
    timestep: Any
    embeddings: tuple[Tensor, ...]
    tokens: int
    text: int
    signature: tuple[Any, ...]
    skips_blocks: bool
    positions: Any = None
    tells_attention: tuple[str, ...] = ()
    writes: bool = False
    references: int = 0


@dataclass(frozen=True)
class Size:
    """Token counts of one batch row: `image` tokens and `text` tokens."""

    image: int
    text: int


class Adapter(Modulated, Once, Pictures):
    """Base of all adapters.

    Attributes:
        family: Short name.
        model_classes: Names of the transformer classes it serves.
        kinds: Block list attribute -> name of the block class in it, in running order.
        components: Block list attribute -> component names in running order.
        consumers: Block list attribute -> {component: the only component that reads it}.
        groups: Block list attribute -> {name: components that a schedule may set together under it}.
        shared_gates: Block list attribute -> see :class:`~fastdit.spec.BlockKind`.
        common_gates: See there, of all block lists.
        forwards: Block list attribute -> ``forward(block, fw, *args, **kwargs)``.
        image_argument, time_argument, positions_argument: Names of the transformer arguments that hold the latents,
            the timestep and where the image tokens are, if the pipelines say that.
        embeddings_arguments: Those that hold the conditions.
        other_arguments: Those that it may be given besides, which no cache depends on.
        text_tokens: Usual number of text tokens, for predictions.
        layouts: Component -> which tokens each tensor of its output holds: "image", "text" or "joint".
            A family without layouts cannot run a part of its tokens.
        text_first: Whether in joint streams the text comes before the image, or behind it.
        token_multiple: The model pads image and text each to a multiple of so many tokens.
        processors: Names of diffusers' attention processors that the family's own attention stands in for, the one
            that models come with first.
        uses_cfg: Whether runs usually double the rows for classifier-free guidance, for predictions.
        restates: Whether it restates block forwards, which the drift guard then checks.
        timesteps_per_unit: What the pipelines divide the scheduler's timesteps by.
        timesteps_rise: Whether the timestep argument rises from noise to image; elsewhere it falls.
    """

    family: str
    model_classes: Sequence[str]
    kinds: Mapping[str, str]
    components: Mapping[str, tuple[str, ...]]
    consumers: Mapping[str, Mapping[str, str]] = {}
    groups: Mapping[str, Mapping[str, tuple[str, ...]]] = {}
    shared_gates: Mapping[str, Mapping[str, int]] = {}
    common_gates = False
    forwards: Mapping[str, Callable[..., Any]]
    image_argument, time_argument = "hidden_states", "timestep"
    positions_argument = "img_ids"
    embeddings_arguments: Sequence[str] = ("encoder_hidden_states", "pooled_projections")
    other_arguments: Sequence[str] = ()
    text_tokens: int
    uses_cfg = True
    layouts: Mapping[str, Sequence[str]] = {}
    text_first = True
    token_multiple = 1
    processors: Sequence[str] = ()
    restates = True
    timesteps_rise = False
    timesteps_per_unit = 1

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
        places: dict[nn.Module, str] = {}
        for name, block_class in self.kinds.items():
            blocks = list(self.block_list(transformer, name))
            for index, block in enumerate(blocks):
                place_once(places, block, f"{name}[{index}]")
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
                kinds.append(
                    BlockKind(
                        name,
                        len(blocks),
                        self.components[name],
                        absent,
                        self.consumers.get(name, {}),
                        self.groups.get(name, {}),
                        self.shared_gates.get(name, {}),
                        self.common_gates,
                    )
                )
        if not kinds:
            raise UnsupportedModelError(
                f"{type(transformer).__name__} has no blocks in {list(self.kinds)}"
            )
        return ModelSpec(self.family, tuple(kinds))

    def check_block(self, kind: str, index: int, block: nn.Module) -> None:
        """Refuse a block variant the forward does not cover."""

    def has_component(self, kind: str, block: nn.Module, component: str) -> bool:
        """Whether this very block has the component: where it is a module of that name, it may be None."""
        return getattr(block, component, True) is not None

    def blocks(self, transformer: nn.Module) -> list[tuple[str, nn.Module]]:
        """(kind, block) of every block, in running order."""
        return [(kind, b) for kind in self.kinds for b in self.block_list(transformer, kind)]

    def block_list(self, transformer: nn.Module, kind: str) -> Sequence[nn.Module]:
        """The blocks of a kind, whose name is a path from the transformer; none where it has no such list."""
        return module_at(transformer, kind) or ()

    def wrapped(self, transformer: nn.Module) -> list[tuple[int, str, nn.Module]]:
        """(block, component, module) of all :meth:`parts`."""
        return [
            (index, name, part)
            for index, (kind, block) in enumerate(self.blocks(transformer))
            for name, part in self.parts(kind, block).items()
        ]

    # ---- one transformer call

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """Read a transformer call's arguments.

        Raises:
            ArgumentError: One is given that the adapter does not name.
        """
        given = arguments_of(transformer, args, kwargs)
        for name in given.keys() - self.known_arguments if self.restates else ():
            if given[name] is not None:
                raise ArgumentError(
                    f"{name}: the {self.family} adapter does not know what {type(transformer).__name__} does with it; "
                    f"got {type(given[name]).__name__}, accepted are {', '.join(sorted(self.known_arguments))}"
                )
        latents = given[self.image_argument]
        sizes: list[Any] = []
        if isinstance(latents, (list, tuple)):  # one image each
            sizes += [tuple(image.shape) for image in latents]
            latents = latents[0].expand(len(latents), *latents[0].shape)
        embeddings, signature, text = [], [(tuple(latents.shape), latents.dtype, latents.device)], 0
        signature += sizes
        for name in self.embeddings_arguments:
            several = isinstance(given.get(name), (list, tuple))
            for value in given[name] if several else (given.get(name),):
                if isinstance(value, Tensor):
                    embeddings.append(value)
                    signature.append((tuple(value.shape), value.dtype, value.device))
                    if value.ndim == (2 if several else 3) and not text:
                        text = value.shape[-2]
        positions = given.get(self.positions_argument)
        if positions is not None and not isinstance(positions, Tensor):
            signature.append(str(positions))
        told = []
        for kind in ATTENTION_ARGUMENTS:
            for name in given.get(kind) or ():
                if name not in self.own_attention_arguments:
                    told.append(name)
        return Call(
            latents,
            given.get(self.time_argument),
            tuple(embeddings),
            self.tokens(transformer, latents.shape),
            text,
            tuple(signature),
            bool(given.get("skip_layers")),
            positions,
            tuple(told),
        )

    def compared(self, transformer: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """What of the conditions is compared with those of the call before."""
        return call.embeddings

    @functools.cached_property
    def known_arguments(self) -> frozenset[str]:
        """The arguments that the transformer may be given; what others mean for caches nobody knows."""
        named = (self.image_argument, self.time_argument, self.positions_argument, "return_dict")
        lists = (self.embeddings_arguments, self.residual_arguments, self.other_arguments)
        return frozenset((*named, *ATTENTION_ARGUMENTS, *itertools.chain(*lists)))

    #: what calls pass on towards attention processors that is no message to them: the scale is LoRA layers'
    own_attention_arguments: frozenset[str] = frozenset({"scale"})

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """Image tokens of latents of this shape; [B, C, H, W] unless a family packs them."""
        patch = transformer.config.patch_size
        return (latent_shape[-2] // patch) * (latent_shape[-1] // patch)

    def moved_tokens(self, call: Call) -> int:
        """How many of a call's image tokens, the first ones, have a velocity that the scheduler is given."""
        return call.tokens

    def width(self, transformer: nn.Module) -> int:
        """Channels of a token in the residual stream."""
        return transformer.inner_dim

    def output_elements(self, transformer: nn.Module, tokens: int) -> int:
        """The output for so many image tokens of a row has so many elements."""
        return tokens * transformer.config.patch_size**2 * transformer.out_channels

    def text_tokens_of(self, pipeline: Any | None) -> int:
        """Text tokens the pipeline's prompts become by default."""
        return self.text_tokens

    # ---- a part of the tokens

    def check_tokens(self, transformer: nn.Module) -> None:
        """Refuse a model whose attention is not the stock one, where the adapter's own stands in for it.

        Raises:
            UnsupportedModelError: Naming the processor, or the family.
        """
        if not self.layouts:
            raise UnsupportedModelError(
                f"{type(transformer).__name__} cannot compute a part of its tokens: its adapter has no layouts"
            )
        inside = {module for _, block in self.blocks(transformer) for module in block.modules()}
        for name, module in transformer.named_modules():
            if module in inside and not self.has_stock_processor(module):
                stock = ", ".join(sorted(self.processors))
                raise UnsupportedModelError(
                    f"{name} has the attention processor {type(module.processor).__qualname__}; a method that computes "
                    f"a part of the tokens, or weighs them, stands in for diffusers' {stock}"
                )

    def has_stock_processor(self, module: nn.Module) -> bool:
        """Whether the module has no attention processor, or one of `processors`."""
        processor = type(getattr(module, "processor", None))
        ours = processor.__name__ in self.processors
        return processor is type(None) or (ours and processor.__module__.startswith("diffusers."))

    #: the blocks' attentions that `fastdit.blocks.attention` does with fewer copies than the stock processor
    fused_attentions: Sequence[str] = ()

    def has_stock_attention(self, block: nn.Module) -> bool:
        """Whether the block's `fused_attentions` are as diffusers made them, and nobody looks at them."""
        found = (getattr(block, name, None) for name in self.fused_attentions)
        return all(
            self.has_stock_processor(attention)
            and getattr(attention.processor, "_parallel_config", None) is None
            and not observed(attention)
            for attention in found
            if attention is not None
        )

    # ---- positions

    def table_embeddings_of(self, transformer: nn.Module) -> list[nn.Module]:
        """The modules that embed patches and add positions out of a table, the same at every step.

        :meth:`embed_apart` does without the sum.
        """
        return [m for m in self.embedders(transformer) if type(m).__name__ == "PatchEmbed"]

    # ---- an example

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Arguments of a call of :data:`BATCH` rows of a size, on the meta device: what is counted and compared."""
        raise NotImplementedError

    def parts(self, kind: str, block: nn.Module) -> dict[str, nn.Module]:
        """The components of a block that ask whether they run, by name; in most families the block asks."""
        return {}


def blank(transformer: nn.Module, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of an example's rows [2, ...], in the model's dtype if not said."""
    return torch.empty(BATCH, *shape, dtype=dtype or dtype_of(transformer), device="meta")


def dtype_of(transformer: nn.Module) -> torch.dtype:
    """The model's own, not that of parts which its class keeps in fp32."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    kept = (kept,) if isinstance(kept, str) else kept
    if not kept or transformer.dtype is not torch.float32:
        return transformer.dtype
    own = (
        weight
        for name, weight in transformer.named_parameters()
        if not any(k in name for k in kept)
    )
    return next((weight.dtype for weight in own if weight.is_floating_point()), torch.float32)


def picture(transformer: nn.Module, size: Size, patch: int | None = None) -> Tensor:
    """Latents [2, C, H, W] of an example, a square where the number of tokens is one."""
    config, patch = transformer.config, patch or transformer.config.patch_size
    rows = next(n for n in range(math.isqrt(size.image), 0, -1) if size.image % n == 0)
    sides = (patch * n for n in (rows, size.image // rows))
    return blank(transformer, config.in_channels, *sides)


def place_once(places: dict[nn.Module, str], module: nn.Module, place: str) -> None:
    """Note where a module is.

    Raises:
        UnsupportedModelError: It is in another place too, so that its outputs could not be told apart.
    """
    if module in places:
        raise UnsupportedModelError(
            f"{place} is the same module as {places[module]}; each place must have a module of its own"
        )
    places[module] = place
