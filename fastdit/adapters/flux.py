"""FLUX.1: double-stream blocks, then single-stream blocks over [text, image], rotary positions, adaLN-zero.

Restates diffusers' `FluxTransformerBlock` and `FluxSingleTransformerBlock` (the forms of diffusers >= 0.35, which take
and return the two streams apart). Component names are ECAD's. In single blocks only `single_proj_out` reaches the
residual stream; `single_attn` and `single_proj_mlp` (cached before the GELU) are read by it alone, so they do not run
where it is reused, unless a later step wants their value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters._packed import Placed
from fastdit.adapters.base import Size, blank
from fastdit.blocks.attention import Rotation, joint_attention, readers, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.products import first_layer
from fastdit.blocks.residual import gathered, joint_normed
from fastdit.blocks.segments import unchanged
from fastdit.tokens.layout import Layout

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def double_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One `FluxTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    modulation, context = fw.adaln(block.norm1, temb, 6), fw.adaln(block.norm1_context, temb, 6)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = context

    def attend() -> tuple[Tensor, ...]:
        u_image = image.normed(block.norm1.norm, scale, shift, readers(fw, block.attn))
        u_text = text.normed(
            block.norm1_context.norm, c_scale, c_shift, readers(fw, block.attn, added=True)
        )
        if fw.tokens is not None:
            rotation = fw.rotation(lambda: Rotation(*image_rotary_emb))
            return joint_attention(fw, "full_attn", block.attn, u_image, u_text, rotation=rotation)
        return fw.segments.attention(
            block.attn,
            hidden_states=u_image,
            encoder_hidden_states=u_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    attention = fw.component("full_attn", attend)
    image.add(attention[0], gate)
    image.add(
        fw.component(
            "full_ff",
            lambda: fw.segments.feed_forward(
                block.ff,
                image.normed(block.norm2, scale_mlp, shift_mlp, first_layer(block.ff)),
            ),
        ),
        gate_mlp,
    )
    if len(attention) == 3:  # an IP-adapter's image prompt, added without a gate
        image.add(attention[2])
    text.add(attention[1], c_gate)
    text.add(
        fw.component(
            "full_ff_context",
            lambda: fw.segments.feed_forward(
                block.ff_context,
                text.normed(
                    block.norm2_context, c_scale_mlp, c_shift_mlp, first_layer(block.ff_context)
                ),
            ),
        ),
        c_gate_mlp,
    )
    return text.leave(clips=True), image.leave()


def single_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One `FluxSingleTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    text_length = encoder_hidden_states.shape[1]
    shift, scale, gate = fw.adaln(block.norm, temb, 3)
    runs_out = fw.computes("single_proj_out")
    if runs_out or fw.computes("single_attn") or fw.computes("single_proj_mlp"):
        attending = readers(fw, block.attn)
        reading = (*attending, block.proj_mlp) if attending else ()
        u = joint_normed((text, image), block.norm.norm, scale, shift, reading)

    def attend_single() -> Tensor:
        if fw.tokens is not None:
            rotation = fw.rotation(lambda: Rotation(*image_rotary_emb))
            return self_attention(
                fw, block.attn, u, rotation=rotation, text=text_length, projects=False
            )
        return fw.segments.attention(
            block.attn,
            hidden_states=u,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    activation = block.act_mlp

    def expand() -> Tensor:
        return fw.segments.linear(block.proj_mlp, u)

    def expand_and_activate() -> Tensor:
        return fw.segments.activated(block.proj_mlp, block.act_mlp, u)

    if runs_out:
        if fw.consumes("single_proj_mlp"):  # nobody keeps what it was before the activation
            expand, activation = expand_and_activate, unchanged
        mlp = gathered(fw.component("single_proj_mlp", expand))
        attention = gathered(fw.component("single_attn", attend_single))
    else:  # the output is reused; refresh what a later step will read
        if fw.computes("single_proj_mlp"):
            fw.component("single_proj_mlp", expand)
        if fw.computes("single_attn"):
            fw.component("single_attn", attend_single)
    branch = fw.component(
        "single_proj_out",
        lambda: fw.segments.project(block.proj_out, attention, activation, mlp),
    )
    for stream, part in zip((text, image), fw.parted(branch, text_length), strict=True):
        stream.add(part, gate)
    return text.leave(clips=True), image.leave(clips=True)


class Flux(Placed):
    """Adapter of `FluxTransformer2DModel`."""

    family = "flux"
    model_classes = ("FluxTransformer2DModel",)
    kinds = {DOUBLE: "FluxTransformerBlock", SINGLE: "FluxSingleTransformerBlock"}
    components = {
        DOUBLE: ("full_attn", "full_ff", "full_ff_context"),
        SINGLE: ("single_attn", "single_proj_mlp", "single_proj_out"),
    }
    consumers = {SINGLE: {"single_attn": "single_proj_out", "single_proj_mlp": "single_proj_out"}}
    forwards = {DOUBLE: double_block, SINGLE: single_block}
    embeddings_arguments = ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")
    other_arguments = ("guidance", "controlnet_blocks_repeat")
    text_tokens = 512
    uses_cfg = False
    timesteps_per_unit = 1000
    shifts_latents = True
    layouts = {
        "full_attn": ("image", "text"),
        "full_ff": ("image",),
        "full_ff_context": ("text",),
        "single_attn": ("joint",),
        "single_proj_mlp": ("joint",),
        "single_proj_out": ("joint",),
    }
    fused_attentions = ("attn",)
    prompt_projections = ("context_embedder",)
    position_embedding = "pos_embed"
    output_norm = "norm_out"
    unread = ("text",)
    condition_embedding = "time_text_embed"
    condition_arguments = ("guidance", "pooled_projections")
    processors = ("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0")
    residual_arguments = ("controlnet_block_samples", "controlnet_single_block_samples")
    changes_resolution = True

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: dict[Any, Any], ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [S, d], or [B, S, d] where each image has other tokens; made once for a stage.

        Below full resolution positions are those of a picture of half the size, in steps of a half, or of a quarter
        where coarse tokens are centred.
        """
        key = "rotation", ids.shape[0]
        if key not in memory:
            places = layout.places()
            images, count = places.shape[:2]
            if layout.name == "full":
                memory[key] = type(module).forward(module, ids)
            else:
                places = torch.cat([torch.zeros_like(places[..., :1]), places / 2], dim=-1)
                text = ids[:-count].float().expand(images, -1, -1)
                joint = torch.cat([text, places], dim=1)
                turn = type(module).forward(module, joint.flatten(0, 1))
                memory[key] = tuple(t.unflatten(0, joint.shape[:2]) for t in turn)
                if images == 1:
                    memory[key] = tuple(t[0] for t in memory[key])
        return memory[key]

    def embed_condition(
        self, transformer: Any, latents: Tensor, timesteps: Tensor, *told: Any
    ) -> Tensor:
        """Of timesteps and guidance, if the model has it, in thousandths."""
        dtype, (guidance, pooled) = latents.dtype, told
        rows = (pooled,) if guidance is None else (guidance.to(dtype) * 1000, pooled)
        return transformer.time_text_embed(timesteps.to(dtype) * 1000, *rows)

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Packed pictures and prompts; the distilled form is told the guidance."""
        config = transformer.config
        return {
            "hidden_states": blank(transformer, size.image, config.in_channels),
            "encoder_hidden_states": blank(transformer, size.text, config.joint_attention_dim),
            "pooled_projections": blank(transformer, config.pooled_projection_dim),
            "timestep": blank(transformer),
            "guidance": blank(transformer) if config.guidance_embeds else None,
            "img_ids": blank(transformer, size.image, 3)[0],
            "txt_ids": blank(transformer, size.text, 3)[0],
        }


ADAPTER = Flux()
