"""DiT: class-conditional blocks of self-attention and feed-forward, adaLN-zero with an embedder of its own per block.

Restates the `ada_norm_zero` path of diffusers' `BasicTransformerBlock.forward`. The model's forward reads
`transformer_blocks[0].norm1` for its output modulation, so blocks keep all their attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Adapter, Size, blank, picture
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
    """One adaLN-zero block: image [B, N, D], timestep [B], class_labels [B] -> image."""
    image = fw.enter(hidden_states, "image", branch_first=True)
    norm = block.norm1

    def modulate(timesteps: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        emb = norm.emb(timesteps, labels, hidden_dtype=hidden_states.dtype)
        return fw.segments.linear(norm.linear, norm.silu(emb)).chunk(6, dim=1)

    modulation = fw.modulation(norm, modulate, timestep, class_labels)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
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
    processors = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
    text_tokens = 0
    modulated_output = ("norm_out", "proj_out_2")

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
        labels = arguments_of(transformer, args, kwargs).get("class_labels")
        if labels is None:
            return None
        return LayerInputs(
            lambda timesteps: (timesteps, repeated(labels, len(timesteps), batch)), (labels,)
        )

    def modulate_output(
        self, transformer: Any, dtype: torch.dtype, timesteps: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By a layer of its own, of the first block's embedding."""
        emb = transformer.transformer_blocks[0].norm1.emb(timesteps, labels, hidden_dtype=dtype)
        shift, scale = transformer.proj_out_1(F.silu(emb)).chunk(2, dim=1)
        return scale, shift

    def output_modulators_of(self, transformer: Any) -> list[nn.Module]:
        """That layer and that embedding."""
        return [transformer.proj_out_1, transformer.transformer_blocks[0].norm1.emb]

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Pictures of a class each."""
        return {
            "hidden_states": picture(transformer, size),
            "timestep": blank(transformer, dtype=torch.int64),
            "class_labels": blank(transformer, dtype=torch.int64),
        }


ADAPTER = DiT()
