"""Qwen-Image: double-stream blocks with joint attention over [text, image], rotary positions, adaLN-zero.

Restates diffusers' `QwenImageTransformerBlock` (of diffusers >= 0.37, whose attention honours the prompt's mask).
Positions are made inside of the model from the pictures' shapes, and counted from a picture's middle.

Pictures to edit lie behind the picture. In the form of Edit-2511 (`zero_cond_t`) they have the modulations of the
timestep 0, so one stream has two ranges of tokens. In the form of layers (`use_layer3d_rope`) several pictures are
drawn, and only the last one is a reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit.adapters._packed import Packed
from fastdit.adapters.arguments import forward_arguments
from fastdit.adapters.base import BATCH, Call, Size, blank
from fastdit.adapters.latents import video_statistics
from fastdit.blocks.attention import Rotation, joint_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.blocks.ranges import in_ranges
from fastdit.errors import ArgumentError
from fastdit.tokens.layout import Layout


def double_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One `QwenImageTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text, image).

    In the form of two modulations temb is [2 B, D], and `modulate_index` [B, N] says which one an image token has.
    """
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    # shift, scale and gate of the attention, then of the feed-forward
    if modulate_index is None:
        img = fw.adaln(block.img_mod, temb, 6)
    else:
        both = temb.chunk(2)
        img, temb = fw.adaln(block.img_mod, both, 6), both[0]
        if fw.immediate or fw.references:
            count = hidden_states.shape[1] - fw.references
            img = in_ranges(img, count, modulate_index)
        else:  # no token has the second one
            img = img[::2]
    txt = fw.adaln(block.txt_mod, temb, 6)

    def attend() -> Any:
        u_image = image.normed(block.img_norm1, img[1], img[0])
        u_text = text.normed(block.txt_norm1, txt[1], txt[0])
        if fw.tokens is not None:
            turn = fw.rotation(lambda: Rotation.of(*image_rotary_emb[::-1]))
            given = {"rotation": turn, "mask": encoder_hidden_states_mask}
            return joint_attention(fw, "attn", block.attn, u_image, u_text, **given)
        return fw.segments.attention(
            block.attn,
            hidden_states=u_image,
            encoder_hidden_states=u_text,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    attention = fw.component("attn", attend)
    image.add(attention[0], img[2])
    image.add(_feed_forward(fw, block, "img", image, img[4], img[3]), img[5])
    text.add(attention[1], txt[2])
    text.add(_feed_forward(fw, block, "txt", text, txt[4], txt[3]), txt[5])
    return text.leave(clips=True), image.leave(clips=True)


def _feed_forward(fw: Forward, block: nn.Module, part: str, stream: Any, *affine: Tensor) -> Any:
    ff, norm = getattr(block, f"{part}_mlp"), getattr(block, f"{part}_norm2")
    return fw.component(
        f"{part}_mlp", lambda: fw.segments.feed_forward(ff, stream.normed(norm, *affine))
    )


class Shapes(NamedTuple):
    """Frames, rows and columns of what is drawn, mostly one picture, and of the references behind it."""

    drawn: Sequence[Sequence[int]]
    references: Sequence[Sequence[int]]


def _is_layered(positions: nn.Module) -> bool:
    """Whether all pictures but the last are drawn."""
    return type(positions).__name__ == "QwenEmbedLayer3DRope"


class Qwen(Packed):
    """Adapter of `QwenImageTransformer2DModel`."""

    family = "qwen"
    model_classes = ("QwenImageTransformer2DModel",)
    kinds = {"transformer_blocks": "QwenImageTransformerBlock"}
    components = {"transformer_blocks": ("attn", "img_mlp", "txt_mlp")}
    forwards = {"transformer_blocks": double_block}
    embeddings_arguments = (
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "additional_t_cond",
    )
    other_arguments = ("guidance",)
    positions_argument = "img_shapes"
    token_positions = ("img_shapes",)
    timesteps_per_unit = 1000
    text_tokens = 128  # the pipeline does not pad the prompt
    layouts = {"attn": ("image", "text"), "img_mlp": ("image",), "txt_mlp": ("text",)}
    fused_attentions = ("attn",)
    prompt_projections = ("txt_in",)
    position_embedding = "pos_embed"
    output_norm = "norm_out"
    unread = ("text",)
    condition_embedding = "time_text_embed"
    condition_arguments = ("additional_t_cond",)
    processors = ("QwenDoubleStreamAttnProcessor2_0",)
    residual_arguments = ("controlnet_block_samples",)
    changes_resolution = True

    def matches(self, transformer: Any) -> bool:
        """The blocks must be told of two modulations; an older diffusers does something else with the prompt's mask."""
        if not super().matches(transformer):
            return False
        return "modulate_index" in forward_arguments(type(transformer.transformer_blocks[0]))

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """What is drawn has a velocity, the references behind it have none; all of a batch have the first one's places.

        Raises:
            ArgumentError: They are not alike, where references have a modulation of their own.
        """
        call = super().call(transformer, args, kwargs)
        given = call.positions
        if transformer.zero_cond_t and any(shapes != given[0] for shapes in given):
            raise ArgumentError(
                f"img_shapes must be alike in a batch of a model with zero_cond_t, got {given}"
            )
        first = [given[0]] if isinstance(given[0][0], int) else given[0]
        drawn = max(1, len(first) - 1) if _is_layered(transformer.pos_embed) else 1
        shapes = Shapes(first[:drawn], first[drawn:])
        return replace(call, positions=shapes, references=sum(map(math.prod, shapes.references)))

    def moved_tokens(self, call: Call) -> int:
        """Those of what is drawn."""
        return call.tokens - call.references

    def grid(self, latents: Sequence[int], positions: Any, patch: int) -> tuple[int, int]:
        """The pipeline says the shape; frames and layers lie below each other."""
        rows = sum(frames * rows for frames, rows, _ in positions.drawn)
        return rows, positions.drawn[0][2]

    def full_grid(self, call: Call, patch: int) -> tuple[int, int]:
        """The tokens must be those of one picture."""
        shapes = [*call.positions.drawn, *call.positions.references]
        if len(shapes) > 1 or shapes[0][0] > 1:
            raise ArgumentError(f"img_shapes must be those of one picture for RALU, got {shapes}")
        return super().full_grid(call, patch)

    def some_positions(self, positions: Any, tokens: int) -> Any:
        """The model picks modulations by shapes: the tokens are all of a picture's."""
        return [[(1, 1, tokens)]] * len(positions)

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """Its VAE is one of videos."""
        mean, std = video_statistics(vae, latents)
        video = (latents.unsqueeze(2) / (1.0 / std) + mean).to(vae.dtype)
        return vae.decode(video, return_dict=False)[0][:, :, 0]

    def encode(self, image: Tensor, vae: Any) -> Tensor:
        """Its VAE is one of videos."""
        video = vae.encode(image.unsqueeze(2).to(vae.dtype), return_dict=False)[0].mode()
        mean, std = video_statistics(vae, video)
        return ((video - mean) * (1.0 / std))[:, :, 0]

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Below full resolution positions are those of a picture of half the size, in steps of a half."""
        length, sides = int(kwargs["max_txt_seq_len"]), [side // 2 for side in layout.grid]
        if layout.name == "full" and length not in memory:
            memory[length] = type(module).forward(module, *args, **kwargs)
        elif length not in memory:
            places = layout.places().cpu().unbind(-1)
            places = [p / 2 - (n - n // 2) for p, n in zip(places, sides, strict=True)]
            frame = 0 * places[0] - int(_is_layered(module))  # there it is the reference's
            axes = zip((frame, *places), module.axes_dim, strict=True)
            turns = [module.rope_params(place.flatten(), dim, module.theta) for place, dim in axes]
            image = torch.cat(turns, dim=-1).unflatten(0, places[0].shape)
            found = image.squeeze(0), module.pos_freqs[max(sides) // 2 :][:length]
            memory[length] = tuple(part.to(layout.table.device) for part in found)
        return memory[length]

    def embed_condition(
        self, transformer: Any, latents: Tensor, timesteps: Tensor, *told: Any
    ) -> Tensor:
        """The module is given latents for their dtype."""
        return transformer.time_text_embed(timesteps.to(latents.dtype), latents[:0], *told)

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """References have the modulations of the timestep 0."""
        found = super().layer_inputs(transformer, args, kwargs, batch)
        if found is None or not transformer.zero_cond_t:
            return found

        def make(timesteps: Tensor) -> tuple[Tensor, ...]:
            return *found.make(timesteps), *found.make(timesteps * 0)

        return replace(found, make=make, joins=True)

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """The example has packed pictures and masked prompts."""
        config, told = transformer.config, blank(transformer, dtype=torch.int64)
        return {
            "hidden_states": blank(transformer, size.image, config.in_channels),
            "encoder_hidden_states": blank(transformer, size.text, config.joint_attention_dim),
            "encoder_hidden_states_mask": blank(transformer, size.text, dtype=torch.bool),
            "timestep": blank(transformer),
            "img_shapes": [[(1, 1, size.image)]] * BATCH,
            "additional_t_cond": told if config.get("use_additional_t_cond") else None,
        }


ADAPTER = Qwen()
