"""Stable Diffusion 3 and 3.5: joint image/text attention blocks, adaLN-zero, optional second image attention.

Restates diffusers' `JointTransformerBlock.forward`. Token order in joint attention is [image, text], inside the stock
processor. The last block drops the text stream (`context_pre_only`); its `ff_context` is absent.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.base import Adapter, Size, blank, picture
from fastdit.blocks.attention import joint_attention, readers, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.products import first_layer


def joint_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """One `JointTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text or None, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    attention_kwargs = joint_attention_kwargs or {}
    chunks = block._chunk_size, block._chunk_dim
    last = block.context_pre_only
    modulation = fw.adaln(block.norm1, temb, 9 if block.use_dual_attention else 6)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = modulation
    if not last:
        context = fw.adaln(block.norm1_context, temb, 6)

    # Both attentions read the stream as it was before either adds to it.
    runs_attention = fw.computes("attn")
    if runs_attention:
        u_image = image.normed(block.norm1.norm, scale, shift, readers(fw, block.attn))
        if last:
            dtype = encoder_hidden_states.dtype
            c_scale, c_shift = fw.adaln(block.norm1_context, temb, 2, dtype)
        else:
            c_shift, c_scale = context[:2]
        u_text = text.normed(
            block.norm1_context.norm, c_scale, c_shift, readers(fw, block.attn, added=True)
        )
    if block.use_dual_attention and fw.computes("attn2"):
        u_second = image.normed(block.norm1.norm, second[1], second[0], readers(fw, block.attn2))

    def attend() -> tuple[Tensor, Tensor | None]:
        if fw.tokens is not None:
            return joint_attention(fw, "attn", block.attn, u_image, u_text, text_first=False)
        outputs = fw.segments.attention(
            block.attn, hidden_states=u_image, encoder_hidden_states=u_text, **attention_kwargs
        )
        return (outputs[0], None) if last else outputs  # the last block's text ends here

    attention = fw.component("attn", attend)
    image.add(attention[0], gate)
    if block.use_dual_attention:

        def attend_again() -> Tensor:
            if fw.tokens is not None:
                return self_attention(fw, block.attn2, u_second)
            return fw.segments.attention(block.attn2, hidden_states=u_second, **attention_kwargs)

        image.add(fw.component("attn2", attend_again), second[2])
    image.add(
        fw.component(
            "ff",
            lambda: fw.segments.feed_forward(
                block.ff,
                image.normed(block.norm2, scale_mlp, shift_mlp, first_layer(block.ff, chunks[0])),
                *chunks,
            ),
        ),
        gate_mlp,
    )
    if last:
        text.discard()
        return None, image.leave()

    _, _, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = context
    text.add(attention[1], c_gate)
    text.add(
        fw.component(
            "ff_context",
            lambda: fw.segments.feed_forward(
                block.ff_context,
                text.normed(
                    block.norm2_context,
                    c_scale_mlp,
                    c_shift_mlp,
                    first_layer(block.ff_context, chunks[0]),
                ),
                *chunks,
            ),
        ),
        c_gate_mlp,
    )
    return text.leave(), image.leave()


class SD3(Adapter):
    """Adapter of `SD3Transformer2DModel`."""

    family = "sd3"
    model_classes = ("SD3Transformer2DModel",)
    kinds = {"transformer_blocks": "JointTransformerBlock"}
    components = {"transformer_blocks": ("attn", "attn2", "ff", "ff_context")}
    forwards = {"transformer_blocks": joint_block}
    other_arguments = ("skip_layers",)
    text_tokens = 77 + 256
    shifts_latents = True
    layouts = {
        "attn": ("image", "text"),
        "attn2": ("image",),
        "ff": ("image",),
        "ff_context": ("text",),
    }
    fused_attentions = ("attn", "attn2")
    prompt_projections = ("context_embedder",)
    output_norm = "norm_out"
    condition_embedding = "time_text_embed"
    condition_arguments = ("pooled_projections",)
    processors = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")
    residual_arguments = ("block_controlnet_hidden_states",)
    changes_resolution = True

    def text_tokens_of(self, pipeline: Any | None) -> int:
        """CLIP's tokens and T5's, which stock pipelines pad with zeros where they have no T5."""
        if pipeline is None:
            return self.text_tokens
        if pipeline.text_encoder_3 is None:
            t5 = pipeline._get_t5_prompt_embeds("", device="cpu", dtype=torch.float32).shape[1]
        else:
            t5 = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
        return pipeline.tokenizer_max_length + t5

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Pictures and prompts."""
        config = transformer.config
        return {
            "hidden_states": picture(transformer, size),
            "encoder_hidden_states": blank(transformer, size.text, config.joint_attention_dim),
            "pooled_projections": blank(transformer, config.pooled_projection_dim),
            "timestep": blank(transformer),
        }


ADAPTER = SD3()
