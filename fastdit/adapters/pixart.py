"""PixArt-alpha and -Sigma: self-attention, cross-attention, feed-forward, modulated by adaLN-single.

Restates the `ada_norm_single` path of diffusers' `BasicTransformerBlock.forward`. The modulation of a block is its own
table plus vectors shared by all blocks. The cross-attention reads the un-normed stream and is added without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Adapter, Size, blank, picture
from fastdit.blocks.attention import self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.layer_inputs import LayerInputs, repeated
from fastdit.errors import UnsupportedModelError


def basic_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """One adaLN-single block: image [B, N, D], text [B, T, D], timestep [B, 6 D] -> image."""
    image = fw.enter(hidden_states, "image", branch_first=True)
    kwargs = dict(cross_attention_kwargs or {})

    def modulate(shared: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (block.scale_shift_table[None] + _vectors(shared)).unbind(1)

    modulation = fw.modulation(block, modulate, timestep)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    shared = _vectors(timestep)[:, 2::3]  # the gates' parts

    def attend() -> Tensor:
        u = image.normed(block.norm1, scale, shift)
        if fw.tokens is not None:
            return self_attention(fw, block.attn1, u, attention_mask)
        return fw.segments.attention(
            block.attn1, u, encoder_hidden_states=None, attention_mask=attention_mask, **kwargs
        )

    image.add_component("attn1", attend, gate, shared)
    image.add_component(
        "attn2",
        lambda: fw.segments.attention(
            block.attn2,
            image.read(),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            **kwargs,
        ),
        None,
        shared,
    )
    image.add_component(
        "ff",
        lambda: fw.segments.feed_forward(
            block.ff,
            image.normed(block.norm2, scale_mlp, shift_mlp),
            block._chunk_size,
            block._chunk_dim,
        ),
        gate_mlp,
        shared,
    )
    return image.leave()


def _vectors(timestep: Tensor) -> Tensor:
    """Shift, scale, gate of the attention, then of the feed-forward, [B, 6, D], of all blocks."""
    return timestep.reshape(timestep.shape[0], 6, -1)


class PixArt(Adapter):
    """Adapter of `PixArtTransformer2DModel`."""

    family = "pixart"
    model_classes = ("PixArtTransformer2DModel",)
    kinds = {"transformer_blocks": "BasicTransformerBlock"}
    components = {"transformer_blocks": ("attn1", "attn2", "ff")}
    shared_gates = {"transformer_blocks": {"attn1": 1, "attn2": 0, "ff": 2}}
    forwards = {"transformer_blocks": basic_block}
    embeddings_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    other_arguments = ("added_cond_kwargs", "attention_mask")
    text_tokens = 120
    layouts = dict.fromkeys(components["transformer_blocks"], ("image",))
    prompt_projections = ("caption_projection",)
    prompt_attentions = {"transformer_blocks": ("attn2",)}
    processors = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
    condition_embedding = "adaln_single"
    modulated_output = ("norm_out", "proj_out")

    def check_block(self, kind: str, index: int, block: nn.Module) -> None:
        """The block must be of the adaLN-single form with a cross-attention."""
        if (
            block.norm_type != "ada_norm_single"
            or block.attn2 is None
            or block.only_cross_attention
        ):
            raise UnsupportedModelError(
                f"{kind}[{index}] must have norm_type 'ada_norm_single', a cross-attention and a self-attention; "
                f"got norm_type {block.norm_type!r}"
            )

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs:
        """The vectors that all blocks share [B, 6 D], and the embedding [B, D] that modulates the output."""
        given = arguments_of(transformer, args, kwargs)
        told, latents = given.get("added_cond_kwargs") or {}, given["hidden_states"]

        def make(timesteps: Tensor) -> tuple[Tensor, Tensor]:
            rows = len(timesteps)
            sizes = {k: None if t is None else repeated(t, rows, batch) for k, t in told.items()}
            return transformer.adaln_single(
                timesteps, sizes, batch_size=rows, hidden_dtype=latents.dtype
            )

        return LayerInputs(make, tuple(t for t in told.values() if t is not None))

    def weights_read_once(self, transformer: nn.Module) -> list[dict[str, Tensor | None]]:
        """The tables, too."""
        tables = [each._parameters for each in (transformer, *transformer.transformer_blocks)]
        return [*super().weights_read_once(transformer), *tables]

    def modulate_output(
        self, transformer: Any, dtype: torch.dtype, shared: Tensor, embedded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transformer's own table plus the embedded timestep."""
        table = transformer.scale_shift_table
        shift, scale = (table[None] + embedded[:, None].to(table.device)).unbind(1)
        return scale, shift

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Pictures and prompts; alpha is told the pictures' sizes."""
        config = transformer.config
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            sizes = {"resolution": blank(transformer, 2), "aspect_ratio": blank(transformer, 1)}
        return {
            "hidden_states": picture(transformer, size),
            "encoder_hidden_states": blank(
                transformer, size.text, config.caption_channels or config.cross_attention_dim
            ),
            "timestep": blank(transformer),
            "added_cond_kwargs": sizes,
        }


ADAPTER = PixArt()
