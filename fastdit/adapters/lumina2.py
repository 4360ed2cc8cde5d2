"""Lumina 2: refiners of image and text on their own, then blocks over the joint stream of [text, image].

Restates diffusers' `Lumina2TransformerBlock.forward`. Every sub-layer is normed before and behind (RMS norms) and gated
by ``tanh(gate)``; there are scales but no shifts. In the joint stream each row begins with its own prompt, without the
padding, its image follows at once, and what prompts of unlike length leave free lies at the end, under a mask.

What is cached is the output behind its norm, which no step changes, and before the gate, which the current step sets.
The context refiner sees neither picture nor time, so it is no component: it runs once for a prompt, exactly. RALU does
not apply: the pipeline's guidance rescales rows of latents, and so not all pixels of a large token alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import BATCH, Adapter, Size, blank, picture
from fastdit.adapters.lumina import squashed
from fastdit.blocks.attention import Rotation, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.gated import feed_forward
from fastdit.blocks.residual import Residual


def noise_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor,
    temb: Tensor | None = None,
) -> Tensor:
    """One block of the noise refiner: image [B, N, D], rotary [B, N, d / 2] complex, temb [B, E] -> image."""
    image = fw.enter(hidden_states, "image")
    _block(block, fw, image, "noise_", temb, attention_mask, image_rotary_emb)
    if fw.ends:
        image.read()  # the model joins it with the text
    return image.leave()


def joint_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor,
    temb: Tensor | None = None,
) -> Tensor:
    """One main block: joint [B, S, D], mask bool [B, S] where texts are unlike long, rotary and temb -> joint."""
    joint, text = fw.enter(hidden_states, "joint"), 0
    if fw.tokens is not None:
        text = hidden_states.shape[1] - fw.tokens.active
        if attention_mask is not None:
            attention_mask = fw.tokens.take_texts(attention_mask)
    _block(block, fw, joint, "", temb, attention_mask, image_rotary_emb, text)
    return joint.leave()


def _block(
    block: nn.Module,
    fw: Forward,
    stream: Residual,
    prefix: str,
    temb: Tensor,
    mask: Tensor | None,
    rotary: Tensor,
    text: int = 0,
) -> None:
    """Attention and feed-forward of a stream, in components whose names begin with `prefix`."""
    scale, gate, scale_mlp, gate_mlp = fw.adaln(block.norm1, temb, 4, then=squashed)

    def attend() -> Tensor:
        u = stream.normed(block.norm1.norm, scale, None)
        if fw.tokens is not None:
            if prefix not in fw.scratch:
                fw.scratch[prefix] = Rotation.of(rotary)
            keys = None if mask is None else mask[:, None]
            return self_attention(fw, block.attn, u, keys, fw.scratch[prefix], text)
        return fw.segments.attention(
            block.attn,
            hidden_states=u,
            encoder_hidden_states=u,
            attention_mask=mask,
            image_rotary_emb=rotary,
        )

    def gated() -> Tensor:
        return feed_forward(fw, block.feed_forward, stream.normed(block.ffn_norm1, scale_mlp, None))

    branch = fw.component(f"{prefix}attn", lambda: fw.normed(block.norm2, attend()))
    stream.add(branch, gate)
    branch = fw.component(f"{prefix}feed_forward", lambda: fw.normed(block.ffn_norm2, gated()))
    stream.add(branch, gate_mlp)


class Lumina2(Adapter):
    """Adapter of `Lumina2Transformer2DModel`."""

    family = "lumina2"
    model_classes = ("Lumina2Transformer2DModel",)
    kinds = {"noise_refiner": "Lumina2TransformerBlock", "layers": "Lumina2TransformerBlock"}
    components = {
        "noise_refiner": ("noise_attn", "noise_feed_forward"),
        "layers": ("attn", "feed_forward"),
    }
    forwards = {"noise_refiner": noise_block, "layers": joint_block}
    layouts = {
        **dict.fromkeys(components["noise_refiner"], ("image",)),
        **dict.fromkeys(components["layers"], ("joint",)),
    }
    embeddings_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    text_tokens = 256  # at most; the padding passes the context refiner alone
    timesteps_rise = True
    shifts_latents = True
    processors = ("Lumina2AttnProcessor2_0",)
    fused_attentions = ("attn",)
    prompt_projections = ("time_caption_embed.caption_embedder", "context_refiner")
    position_embedding = "rope_embedder"
    condition_embedding = "time_caption_embed.timestep_embedder"
    output_norm = "norm_out"

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """The rotary embedding also cuts the picture into patches."""
        return [transformer.rope_embedder]

    def known_positions(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Angles of text, picture and both, and the lengths of the prompts, for which the model waits at each step."""
        given = arguments_of(transformer, args, kwargs)
        module = transformer.rope_embedder
        told = given[self.image_argument], given["encoder_attention_mask"]
        _, *angles, lengths, _ = type(module).forward(module, *told)
        return *angles, tuple(lengths)

    def embed_known(self, module: nn.Module, known: Any, patches: Tensor, mask: Tensor) -> Any:
        """Angles are those of all tokens; attention takes them at the rows."""
        *angles, lengths = known
        tokens = self.patches(patches, module.patch_size).flatten(3).flatten(1, 2)
        return tokens, *angles, list(lengths), [n + tokens.shape[1] for n in lengths]

    def embed(
        self, module: nn.Module, shape: Sequence[int], rows: Tensor, patches: Tensor, mask: Tensor
    ) -> Any:
        """The same, where each step reads the mask."""
        whole = patches.new_empty(()).expand(shape)
        _, *angles, lengths, _ = type(module).forward(module, whole, mask)
        return self.embed_known(module, (*angles, lengths), patches, mask)

    def embed_condition(
        self, transformer: Any, latents: Tensor, timesteps: Tensor, *told: Any
    ) -> Tensor:
        """The layers are given the embedded timestep."""
        embed = transformer.time_caption_embed
        return embed.timestep_embedder(embed.time_proj(timesteps).type_as(latents))

    def given_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """They run from 0, noise, to 1."""
        return 1 - timesteps / 1000

    def width(self, transformer: nn.Module) -> int:
        """The width goes by another name here."""
        return transformer.config.hidden_size

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """The example has pictures and prompts of unlike length, whose mask is read on the host."""
        mask = torch.ones(BATCH, size.text, dtype=torch.int64).tril(size.text - 2)
        return {
            "hidden_states": picture(transformer, size),
            "timestep": blank(transformer),
            "encoder_hidden_states": blank(transformer, size.text, transformer.config.cap_feat_dim),
            "encoder_attention_mask": mask,
        }


ADAPTER = Lumina2()
