"""Wan 2.1 and 2.2: videos by self-attention, cross-attention and feed-forward, modulated as in PixArt, in fp32.

Restates diffusers' `WanTransformerBlock.forward`. A block's modulation is its own table plus vectors shared by all
blocks: one of each for a row, or, where the timestep is each token's own (TI2V-5B), for a token. The cross-attention
has a norm with weights of its own and no gate; that of image-to-video has keys of an image, too. Rotary positions over
(frame, row, column) are made inside of the model.

Norms, modulations and gated sums are fp32 in the model, and in the ops that stand for them. Where an image is given, or
shown in a frame of its own, sizes do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters._videos import Videos, turns
from fastdit.adapters.arguments import arguments_of, place_of
from fastdit.adapters.base import Call, Size, blank
from fastdit.blocks.attention import Rotation, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.blocks.residual import Residual
from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.tokens.layout import Layout

#: text tokens of each prompt; what comes before as many is the image's, says the attention of image-to-video
TEXT = 512
#: tokens of an image, of image-to-video
IMAGE = 257
#: base of the rotary angles, which no configuration says
THETA = 10000.0


def wan_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One `WanTransformerBlock`: video [B, N, D], text [B, T, D], temb [B, 6, D] or [B, N, 6, D] -> video."""
    video = fw.enter(hidden_states, "image", wide=True)
    add_components(block, fw, video, encoder_hidden_states, temb, rotary_emb)
    return video.leave()


def add_components(
    block: nn.Module,
    fw: Forward,
    video: Residual,
    text: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor] | None,
) -> None:
    """Add self-attention, cross-attention and feed-forward of a block to its stream."""

    def modulate(shared: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (block.scale_shift_table + shared.float()).unbind(-2)

    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = fw.modulation(block, modulate, temb)

    def attend() -> Tensor:
        u = video.normed(block.norm1, scale, shift)
        if fw.tokens is None:
            return fw.segments.attention(block.attn1, u, None, None, rotary_emb)
        turn = fw.rotation(lambda: Rotation(*(part.squeeze(2).squeeze(0) for part in rotary_emb)))
        return self_attention(fw, block.attn1, u, rotation=turn)

    def attend_to_text() -> Tensor:
        u = video.normed(block.norm2, None, None)
        return fw.segments.attention(block.attn2, u, text, None, None)

    def feed_forward() -> Tensor:
        u = video.normed(block.norm3, scale_ffn, shift_ffn)
        out = fw.segments.feed_forward(block.ffn, u)
        # In fp64 this branch alone is rounded before its gate.
        return out.float() if fw.immediate and u.dtype is torch.float64 else out

    parts = (
        ("attn1", attend, gate),
        ("attn2", attend_to_text, None),
        ("ffn", feed_forward, gate_ffn),
    )
    for name, compute, gate in parts:
        if temb.ndim == 4:
            video.add(fw.component(name, compute), gate)
        else:
            video.add_component(name, compute, gate, temb[:, 2::3].float())


class Wan(Videos):
    """Adapter of `WanTransformer3DModel`."""

    family = "wan"
    model_classes = ("WanTransformer3DModel",)
    kinds = {"blocks": "WanTransformerBlock"}
    components = {"blocks": ("attn1", "attn2", "ffn")}
    shared_gates = {"blocks": {"attn1": 1, "attn2": 0, "ffn": 2}}
    forwards = {"blocks": wan_block}
    embeddings_arguments = ("encoder_hidden_states", "encoder_hidden_states_image")
    text_tokens = TEXT
    layouts = dict.fromkeys(components["blocks"], ("image",))
    processors = ("WanAttnProcessor",)
    fused_attentions = ("attn1",)
    prompt_projections = ("condition_embedder.text_embedder", "condition_embedder.image_embedder")
    prompt_attentions = {"blocks": ("attn2",)}
    position_embedding = "rope"
    condition_embedding = "condition_embedder"
    modulated_output = ("norm_out", "proj_out")
    changes_resolution = True

    # ---- a call

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """Of timesteps of tokens, that of the last one is the step's: the first frame may be given as it is."""
        found = super().call(transformer, args, kwargs)
        several = isinstance(at := found.timestep, Tensor) and at.ndim == 2
        return replace(found, timestep=at[:, -1]) if several else found

    def width(self, transformer: nn.Module) -> int:
        """The heads' channels together."""
        return transformer.config.num_attention_heads * transformer.config.attention_head_dim

    def output_elements(self, transformer: nn.Module, tokens: int) -> int:
        """As many as the projection behind the blocks gives."""
        return tokens * transformer.proj_out.out_features

    # ---- modulations

    def layer_inputs(
        self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """The vectors that all blocks share [B, 6, D], and the embedded timestep [B, D]."""
        given = arguments_of(transformer, args, kwargs)
        if given["timestep"].ndim == 2:
            return None
        embed, dtype = transformer.condition_embedder, given["encoder_hidden_states"].dtype

        def make(timesteps: Tensor) -> tuple[Tensor, Tensor]:
            angles = embed.timesteps_proj(timesteps)
            weights = next(embed.time_embedder.parameters()).dtype
            angles = angles if weights is torch.int8 else angles.to(weights)
            embedded = embed.time_embedder(angles).to(dtype)
            return embed.time_proj(embed.act_fn(embedded)).unflatten(1, (6, -1)), embedded

        return LayerInputs(make, ())

    def embedded(
        self,
        module: Any,
        made: tuple[Tensor, ...],
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Any, ...]:
        """Prompt and image are embedded beside them."""
        image = None if image is None else module.image_embedder(image)
        return made[1], made[0].flatten(1), module.text_embedder(text), image

    def weights_read_once(self, transformer: nn.Module) -> list[dict[str, Tensor | None]]:
        """The tables, too."""
        tables = [each._parameters for each in (transformer, *transformer.blocks)]
        return [*super().weights_read_once(transformer), *tables]

    def modulate_output(
        self, transformer: Any, dtype: torch.dtype, shared: Tensor, embedded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transformer's own table plus the embedded timestep."""
        shift, scale = (transformer.scale_shift_table + embedded[:, None]).to(dtype).unbind(1)
        return scale, shift

    # ---- a part of the tokens

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """The rotation is made of the latents' shape."""
        return [transformer.rope]

    def embed(self, module: nn.Module, shape: Sequence[int], rows: Tensor, latents: Tensor) -> None:
        """None: attention takes the rotation of all tokens at the rows."""

    def gather_inputs(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The active tokens come with their timesteps, where each has its own."""
        args, kwargs = super().gather_inputs(transformer, args, kwargs, rows)
        owner, key = place_of(transformer, (given := list(args)), kwargs, "timestep")
        if owner[key].ndim == 2:
            owner[key] = owner[key].gather(1, rows)
        return tuple(given), kwargs

    # ---- tokens of two sizes

    def check_resolution(self, transformer: nn.Module) -> None:
        """An image lies in channels of its own, at full size."""
        super().check_resolution(transformer)
        given, drawn = transformer.config.in_channels, transformer.config.out_channels
        if given != (drawn or given):
            raise UnsupportedModelError(
                f"{type(transformer).__name__} cannot change its resolution during a run: of its {given} channels "
                f"{given - drawn} show an image at full size"
            )

    def refuse_conditions(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """A frame that is given has another timestep, and its latents stay as they are."""
        super().refuse_conditions(transformer, args, kwargs)
        timestep = arguments_of(transformer, args, kwargs)["timestep"]
        if timestep.ndim == 2 and bool((timestep != timestep[:, -1:]).any()):
            raise ArgumentError(
                "timestep must be the same for all tokens where the resolution changes; a given frame is at full size"
            )

    def reduce_inputs(
        self,
        transformer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        ops: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Timesteps of tokens are all alike, so as many are given."""
        args, kwargs = super().reduce_inputs(transformer, args, kwargs, layout, ops)
        owner, key = place_of(transformer, (given := list(args)), kwargs, "timestep")
        if owner[key].ndim == 2:
            owner[key] = owner[key][:, : layout.tokens]
        return tuple(given), kwargs

    def turned(self, module: nn.Module, places: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, 1, d]; the model's own are in tables, for whole numbers."""
        cos, sin = turns(places.double(), (module.t_dim, module.h_dim, module.w_dim), THETA)
        return cos.unsqueeze(2).to(module.freqs_cos), sin.unsqueeze(2).to(module.freqs_cos)

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Prompts beside an image have their full length."""
        config = transformer.config
        given = {
            "hidden_states": self.example_latents(transformer, size),
            "timestep": blank(transformer),
            "encoder_hidden_states": blank(transformer, size.text, config.text_dim),
        }
        if transformer.condition_embedder.image_embedder is not None:
            places = transformer.condition_embedder.image_embedder.pos_embed
            several, tokens = (1, IMAGE) if places is None else (2, places.shape[1] // 2)
            image = blank(transformer, tokens, config.image_dim).repeat(several, 1, 1)
            given["encoder_hidden_states_image"] = image
            given["encoder_hidden_states"] = blank(transformer, TEXT, config.text_dim)
        return given


ADAPTER = Wan()
