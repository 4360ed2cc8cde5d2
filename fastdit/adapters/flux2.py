"""FLUX.2 and klein: double-stream blocks, then parallel blocks over [text, image].

Restates diffusers' `Flux2TransformerBlock` and `Flux2SingleTransformerBlock`, in the forms that have modulations in one
tensor. A single block projects queries, keys, values and its feed-forward at once, and both results by one layer again;
so that is one component. What is reused for several steps is kept as one sum for each component.

References whose keys klein keeps (`kv_cache`) are for the stock attention; methods that stand in for it refuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.adapters._packed import Placed
from fastdit.adapters.arguments import arguments_of, forward_arguments
from fastdit.adapters.base import Call, Size, blank
from fastdit.blocks.attention import Rotation, joint_attention, readers, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.gated import feed_forward
from fastdit.blocks.residual import Residual, by_rows, joint_normed
from fastdit.errors import ArgumentError
from fastdit.tokens.layout import SIDE, Layout

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def double_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One `Flux2TransformerBlock`: image [B, N, D], text [B, T, D], modulations [B, 6 D] -> (text, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    # shift, scale and gate of the attention, then of the feed-forward
    img, txt = _vectors(fw, temb_mod_img, 6), _vectors(fw, temb_mod_txt, 6)

    def attend() -> tuple[Tensor, Tensor]:
        u_image = image.normed(block.norm1, img[1], img[0], readers(fw, block.attn))
        reading = readers(fw, block.attn, added=True)
        u_text = text.normed(block.norm1_context, txt[1], txt[0], reading)
        if fw.tokens is not None:
            turn = _rotation(fw, image_rotary_emb, encoder_hidden_states.shape[1])
            return joint_attention(fw, "attn", block.attn, u_image, u_text, rotation=turn)
        kwargs = {"image_rotary_emb": image_rotary_emb} | (joint_attention_kwargs or {})
        kwargs |= {"hidden_states": u_image, "encoder_hidden_states": u_text}
        return fw.segments.attention(block.attn, **kwargs)

    def feed(ff: nn.Module, stream: Residual, *norm: Any) -> Callable[[], Tensor]:
        return lambda: feed_forward(fw, ff, stream.normed(*norm))

    fw.add_component("attn", attend, (image, img[2]), (text, txt[2]))
    fw.add_component("ff", feed(block.ff, image, block.norm2, img[4], img[3]), (image, img[5]))
    fed = feed(block.ff_context, text, block.norm2_context, txt[4], txt[3])
    fw.add_component("ff_context", fed, (text, txt[5]))
    fw.scratch["text"] = encoder_hidden_states.shape[1]
    return text.leave(clips=True), image.leave()


def single_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Tensor:
    """One `Flux2SingleTransformerBlock`: [text, image] [B, T + N, D], modulations [B, 3 D] -> the same."""
    if encoder_hidden_states is not None or split_hidden_states:
        given = "encoder_hidden_states, split_hidden_states: the flux2 adapter takes text and image joined"
        raise ArgumentError(f"{given}; accepted are None and False")
    attention, count = block.attn, fw.scratch.get("text", 0)
    text, image = fw.enter_joint(hidden_states, count)
    shift, scale, gate = _vectors(fw, temb_mod, 3)

    def attend() -> tuple[Tensor, ...]:
        layer = attention.to_qkv_mlp_proj
        reading = () if fw.tokens is None else (layer,)
        u = joint_normed((text, image), block.norm, scale, shift, reading)
        if fw.tokens is None:
            kwargs = {"image_rotary_emb": image_rotary_emb} | (joint_attention_kwargs or {})
            out = fw.segments.attention(attention, hidden_states=u, **kwargs)
        else:
            wide = attention.mlp_hidden_dim * attention.mlp_mult_factor
            made = fw.segments.linear(layer, u)
            *qkv, mlp = made.split((*[attention.inner_dim] * 3, wide), dim=-1)
            turn = _rotation(fw, image_rotary_emb, count)
            given = {"rotation": turn, "text": count, "projects": False, "qkv": qkv}
            attended = self_attention(fw, attention, u, **given)
            out = fw.segments.project(attention.to_out, attended, attention.mlp_act_fn, mlp)
        return out.split((count, out.shape[1] - count), dim=1)

    gates = by_rows(gate, (count, hidden_states.shape[1] - count))
    fw.add_component("single_attn", attend, (text, gates[0]), (image, gates[1]))
    return fw.leave_joint(text, image, clips=True)


def _vectors(fw: Forward, given: Tensor, count: int) -> Sequence[Tensor]:
    """Shift, scale and gate [B, D] of one branch after the other, all blocks' alike; [B, n, D] where keys are kept."""
    key = "modulation", id(given)
    if key not in fw.scratch:
        fw.scratch[key] = given, given.chunk(count, dim=-1)
    return fw.scratch[key][1]


def _rotation(fw: Forward, turn: tuple[Tensor, Tensor], text: int) -> Rotation:
    """That of text and image; images whose tokens are elsewhere lie behind the text one after the other."""

    def make() -> Rotation:
        images = (len(turn[0]) - text) // fw.tokens.count
        if images == 1:
            return Rotation(*turn)
        texts = (t[:text].expand(images, -1, -1) for t in turn)
        others = (t[text:].unflatten(0, (images, -1)) for t in turn)
        return Rotation(*(torch.cat(part, dim=1) for part in zip(texts, others, strict=True)))

    return fw.rotation(make)


def _statistics(vae: Any, like: Tensor) -> list[Tensor]:
    """Mean and deviation of packed latents, [1, 4 C, 1, 1] each."""
    parts = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return [part.view(1, -1, 1, 1).to(like.device, like.dtype) for part in parts]


class Flux2(Placed):
    """Adapter of `Flux2Transformer2DModel`."""

    family = "flux2"
    model_classes = ("Flux2Transformer2DModel",)
    kinds = {DOUBLE: "Flux2TransformerBlock", SINGLE: "Flux2SingleTransformerBlock"}
    components = {DOUBLE: ("attn", "ff", "ff_context"), SINGLE: ("single_attn",)}
    common_gates = True
    forwards = {DOUBLE: double_block, SINGLE: single_block}
    embeddings_arguments = ("encoder_hidden_states", "txt_ids", "img_ids")
    other_arguments = (
        "guidance",
        "kv_cache",
        "kv_cache_mode",
        "num_ref_tokens",
        "ref_fixed_timestep",
    )
    text_tokens = 512
    uses_cfg = False
    timesteps_per_unit = 1000
    layouts = {"attn": ("image", "text"), "ff": ("image",), "ff_context": ("text",)} | {
        "single_attn": ("text", "image")
    }
    fused_attentions = ("attn",)
    prompt_projections = ("context_embedder",)
    position_embedding, embeds_text = "pos_embed", True
    output_norm = "norm_out"
    unread = ("text",)
    condition_embedding = "time_guidance_embed"
    condition_arguments = ("guidance",)
    shared_modulations = (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
    processors = (
        "Flux2AttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "Flux2KVAttnProcessor",
        "Flux2KVParallelSelfAttnProcessor",
    )
    changes_resolution = True

    def matches(self, transformer: Any) -> bool:
        """The blocks must be given their modulations as one tensor, and tell how long the text is."""
        blocks = transformer.transformer_blocks if super().matches(transformer) else ()
        return len(blocks) > 0 and "temb_mod_img" in forward_arguments(type(blocks[0]))

    def call(self, transformer: nn.Module, args: Any, kwargs: Any) -> Call:
        """References whose keys are kept lie before the picture, are told to the attentions, and have no velocity."""
        found = super().call(transformer, args, kwargs)
        given = arguments_of(transformer, args, kwargs)
        mode = given.get("kv_cache_mode")
        if mode is None:
            return found
        first = given.get("num_ref_tokens", 0) if mode == "extract" else 0
        return replace(
            found,
            positions=found.positions[..., first:, :],
            signature=(*found.signature, mode, given.get("kv_cache") or object()),
            tells_attention=(*found.tells_attention, "kv_cache_mode"),
            writes=True,
        )

    def layer_inputs(self, transformer: Any, args: Any, kwargs: Any, batch: int) -> Any:
        """Where keys of references are kept, these have modulations of another timestep."""
        if arguments_of(transformer, args, kwargs).get("kv_cache_mode") == "extract":
            return None
        return super().layer_inputs(transformer, args, kwargs, batch)

    def embed(self, module: nn.Module, shape: Sequence[int], rows: Tensor, ids: Tensor) -> Any:
        """Attention takes the rotation of all tokens at the rows; nobody reads this one."""
        unread = ids.new_zeros(len(ids), sum(module.axes_dim), dtype=torch.float32)
        return unread, unread

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: dict[Any, Any], ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [n, d], one image after the other where each has other tokens; else as FLUX.1's."""
        if "rotation" not in memory:
            if layout.name != "full":
                places = layout.places() / 2
                zero = torch.zeros_like(places[..., :1])
                ids = torch.cat([zero, places, zero], dim=-1).flatten(0, 1)
            memory["rotation"] = type(module).forward(module, ids)
        return memory["rotation"]

    def embed_condition(
        self, transformer: Any, latents: Tensor, timesteps: Tensor, guidance: Tensor | None
    ) -> Tensor:
        """Of timesteps and guidance, if the model has it, in thousandths."""
        told = None if guidance is None else guidance.to(latents.dtype) * 1000
        return transformer.time_guidance_embed(timesteps.to(latents.dtype) * 1000, told)

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """Packed latents are normed."""
        mean, deviation = _statistics(vae, latents)
        packed = F.pixel_unshuffle(latents, SIDE) * deviation + mean
        return vae.decode(F.pixel_shuffle(packed, SIDE).to(vae.dtype), return_dict=False)[0]

    def encode(self, image: Tensor, vae: Any) -> Tensor:
        """Packed latents are normed."""
        latents = vae.encode(image.to(vae.dtype), return_dict=False)[0].mode()
        mean, deviation = _statistics(vae, latents)
        return F.pixel_shuffle((F.pixel_unshuffle(latents, SIDE) - mean) / deviation, SIDE)

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Packed pictures and prompts; dev is told the guidance."""
        config = transformer.config
        return {
            "hidden_states": blank(transformer, size.image, config.in_channels),
            "encoder_hidden_states": blank(transformer, size.text, config.joint_attention_dim),
            "timestep": blank(transformer),
            "guidance": blank(transformer) if config.guidance_embeds else None,
            "img_ids": blank(transformer, size.image, 4, dtype=torch.int64),
            "txt_ids": blank(transformer, size.text, 4, dtype=torch.int64),
        }


ADAPTER = Flux2()
