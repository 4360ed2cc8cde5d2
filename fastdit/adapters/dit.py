"""DiT: class-conditional blocks of self-attention and feed-forward, adaLN-zero with an embedder of its own per block.

Restates the `ada_norm_zero` path of diffusers' `BasicTransformerBlock.forward`. The model's forward reads
`transformer_blocks[0].norm1` for its output modulation, so blocks keep all their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.base import (
    Adapter,
    Size,
    argument_of,
    attention_macs,
    chunk_gates,
    linear_macs,
)
from fastdit.blocks.forward import Forward
from fastdit.blocks.modulation import LayerInputs, repeated
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
    """One adaLN-zero block: image [B, N, D], timestep [B], class_labels [B] -> image."""
    image = fw.enter(hidden_states, "image", branch_first=True)
    norm = block.norm1

    def modulate(timesteps: Tensor, labels: Tensor) -> Tensor:
        emb = norm.emb(timesteps, labels, hidden_dtype=hidden_states.dtype)
        return fw.segments.linear(norm.linear, norm.silu(emb))

    modulation = fw.modulation(norm, modulate, timestep, class_labels)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunk_gates(modulation, 6)
    image.add(
        fw.component(
            "attn1",
            lambda: fw.segments.attention(
                block.attn1,
                image.normed(block.norm1.norm, scale, shift),
                encoder_hidden_states=None,
                attention_mask=attention_mask,
                **(cross_attention_kwargs or {}),
            ),
        ),
        gate,
    )
    image.add(
        fw.component(
            "ff",
            lambda: fw.segments.feed_forward(
                block.ff,
                image.normed(block.norm3, scale_mlp, shift_mlp),
                block._chunk_size,
                block._chunk_dim,
            ),
        ),
        gate_mlp,
    )
    return image.leave()


class DiT(Adapter):
    """Adapter of `DiTTransformer2DModel`."""

    family = "dit"
    model_classes = ("DiTTransformer2DModel",)
    kinds = {"transformer_blocks": "BasicTransformerBlock"}
    components = {"transformer_blocks": ("attn1", "ff")}
    forwards = {"transformer_blocks": basic_block}
    embeddings_arguments = ("class_labels",)
    processors = frozenset({"AttnProcessor2_0", "FusedAttnProcessor2_0"})
    text_tokens = 0

    def check_block(self, kind: str, index: int, block: nn.Module) -> None:
        """The block must be of the adaLN-zero form without cross-attention."""
        if (
            block.norm_type != "ada_norm_zero"
            or block.attn2 is not None
            or block.only_cross_attention
        ):
            raise UnsupportedModelError(
                f"{kind}[{index}] must have norm_type 'ada_norm_zero' and no cross-attention; "
                f"got norm_type {block.norm_type!r}"
            )

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """Timestep and class, which each layer embeds for itself."""
        labels = argument_of(transformer, args, kwargs, "class_labels")
        if labels is None:
            return None
        return LayerInputs(
            lambda timesteps: (timesteps, repeated(labels, len(timesteps), batch)), (labels,)
        )

    def modulation_width(self, transformer: nn.Module) -> int:
        """Of all blocks."""
        return sum(block.norm1.linear.out_features for block in transformer.transformer_blocks)

    def macs(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Linear layers, and QK^T and AV."""
        if component == "attn1":
            attn = block.attn1
            return size.image * (attention_macs(attn) + 2 * size.image * attn.inner_dim)
        return linear_macs(block.ff) * size.image

    def overhead_macs(self, transformer: nn.Module, size: Size) -> int:
        """Embedders and modulations of every block, the output modulation (block 0's embedder again) and projection."""
        first = transformer.transformer_blocks[0].norm1
        per_image = sum(linear_macs(block.norm1) for block in transformer.transformer_blocks)
        per_image += linear_macs(first.emb, transformer.proj_out_1)
        return per_image + linear_macs(transformer.pos_embed, transformer.proj_out_2) * size.image

    def slot_elements(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Every component caches image rows."""
        return size.image * transformer.inner_dim

    def probe(
        self, transformer: nn.Module, kind: str, block: nn.Module, random: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """8 image tokens at two timesteps and classes."""
        device = block.norm1.linear.weight.device
        return {
            "hidden_states": random(2, 8, transformer.inner_dim),
            "timestep": torch.tensor([7, 500], device=device),
            "class_labels": torch.tensor([0, 1], device=device),
        }


ADAPTER = DiT()
