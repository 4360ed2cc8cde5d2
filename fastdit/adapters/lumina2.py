"""Lumina 2: refiners of image and text on their own, then blocks over the joint stream of [text, image].

Restates diffusers' `Lumina2TransformerBlock.forward`. Every sub-layer is normed before and behind (RMS norms) and gated
by ``tanh(gate)``; there are scales but no shifts. In the joint stream each row begins with its own prompt, without the
padding, its image follows at once, and what prompts of unlike length leave free lies at the end, under a mask.

What is cached is the output behind its norm, which no step changes, and before the gate, which the current step sets.
The context refiner sees neither picture nor time, so it is no component: it runs once for a prompt, exactly. RALU does
not apply: the pipeline's guidance rescales rows of latents, and so not all pixels of a large token alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters._patches import embedded, unpatched
from fastdit.adapters.base import BATCH, Adapter, Size, blank, picture
from fastdit.adapters.lumina import squashed
from fastdit.blocks.attention import Rotation, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.gated import feed_forward
from fastdit.blocks.joint import Joint, Streams, joined, parts_of


def _block(prefix: str) -> Callable[..., Streams]:
    """The forward of the blocks of a list, in components whose names begin with `prefix`."""

    def forward(
        block: nn.Module,
        fw: Forward,
        hidden_states: Streams,
        attention_mask: Tensor | None,
        image_rotary_emb: Tensor,
        temb: Tensor | None = None,
    ) -> Streams:
        """Image or joint stream [B, S, D], mask bool [B, S], rotary [B, S, d / 2] complex, temb [B, E] -> stream."""
        stream = Joint(fw, hidden_states, text_first=True)
        scale, gate, scale_mlp, gate_mlp = fw.adaln(block.norm1, temb, 4, then=squashed)
        if fw.tokens is not None and prefix not in fw.scratch:  # the model's own order
            keys = None if attention_mask is None else fw.tokens.take_texts(attention_mask)
            fw.scratch[prefix] = Rotation.of(image_rotary_emb), keys

        def attend() -> Tensor:
            u = stream.normed(block.norm1.norm, scale)
            if fw.tokens is not None:
                rotation, keys = fw.scratch[prefix]
                keys = None if keys is None else keys[:, None]
                others = u.shape[1] - fw.tokens.active
                return self_attention(fw, block.attn, u, keys, rotation, others)
            return fw.segments.attention(
                block.attn,
                hidden_states=u,
                encoder_hidden_states=u,
                attention_mask=attention_mask,
                image_rotary_emb=image_rotary_emb,
            )

        def feed() -> Tensor:
            u = stream.normed(block.ffn_norm1, scale_mlp)
            return feed_forward(fw, block.feed_forward, u)

        branch = fw.component(f"{prefix}attn", lambda: fw.normed(block.norm2, attend()))
        stream.add(branch, gate)
        branch = fw.component(f"{prefix}feed_forward", lambda: fw.normed(block.ffn_norm2, feed()))
        stream.add(branch, gate_mlp)
        return stream.leave()

    return forward


class Lumina2(Adapter):
    """Adapter of `Lumina2Transformer2DModel`."""

    family = "lumina2"
    model_classes = ("Lumina2Transformer2DModel",)
    kinds = {"noise_refiner": "Lumina2TransformerBlock", "layers": "Lumina2TransformerBlock"}
    components = {
        "noise_refiner": ("noise_attn", "noise_feed_forward"),
        "layers": ("attn", "feed_forward"),
    }
    forwards = {"noise_refiner": _block("noise_"), "layers": _block("")}
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
    unread = ("text",)
    restates_model = True
    small_config = {
        **dict.fromkeys(("in_channels", "cap_feat_dim", "multiple_of"), 4),
        **dict.fromkeys(("num_layers", "num_refiner_layers"), 1),
        **dict.fromkeys(("num_attention_heads", "num_kv_heads"), 1),
        "hidden_size": 6,
        "axes_dim_rope": (2, 2, 2),
        "axes_lens": (9, 9, 9),
    }
    condition_embedding = "time_caption_embed.timestep_embedder"
    output_norm = "norm_out"

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """The rotary embedding also cuts the picture into patches, where the model's own forward runs."""
        return [transformer.rope_embedder]

    def embed(
        self, module: nn.Module, shape: Sequence[int], rows: Tensor, patches: Tensor, mask: Tensor
    ) -> Any:
        """Angles are those of all tokens; attention takes them at the rows."""
        whole = patches.new_empty(()).expand(shape)
        _, *angles, lengths, _ = type(module).forward(module, whole, mask)
        tokens = self.patches(patches, module.patch_size).flatten(3).flatten(1, 2)
        return tokens, *angles, lengths, [n + tokens.shape[1] for n in lengths]

    def read_prompt(
        self, transformer: nn.Module, given: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """The longest prompt; angles of prompts, picture and both; which of both are read, or None for all."""
        module = transformer.rope_embedder
        told = given["hidden_states"], given["encoder_attention_mask"]
        tokens, text, image, _, lengths, _ = type(module).forward(module, *told)
        longest, read = max(lengths), None
        if min(lengths) < longest:
            ends = torch.tensor(lengths, device=image.device)[:, None]
            places = torch.arange(longest + tokens.shape[1], device=image.device)
            read = (places < ends) | (places >= longest)
        return longest, 0, text, image, torch.cat([text[:, :longest], image], dim=1), read

    def run_model(
        self, transformer: Any, call: Any, known: tuple[Any, ...], given: Mapping[str, Any]
    ) -> Tensor:
        """The text comes first, with the padding of shorter prompts."""
        longest, _, of_text, *turns, read = known
        latents, mask = given["hidden_states"], given["encoder_attention_mask"]
        fw, side = call.forward, transformer.config.patch_size
        apart = call.unseen and fw.reuses_all
        if fw.tokens is not None:
            for prefix, angles, keys in zip(("noise_", ""), turns, (None, read), strict=True):
                if prefix not in call.memory:
                    call.memory[prefix] = Rotation.of(angles)
                fw.scratch[prefix] = call.memory[prefix], keys
        told = given["timestep"], given["encoder_hidden_states"]
        temb, text = transformer.time_caption_embed(latents, *told)
        for layer in transformer.context_refiner:
            text = layer(text, mask, of_text)
        stream = joined([embedded(transformer.x_embedder, latents, side, call.unseen)], apart)
        for layer in transformer.noise_refiner:
            stream = layer(stream, None, turns[0], temb)
        stream = joined([text[:, :longest], *parts_of(stream)], apart)
        for layer in transformer.layers:
            stream = layer(stream, read, turns[1], temb)
        image = parts_of(stream)[-1][:, -call.tokens :]
        made = transformer.norm_out(image, temb)
        return unpatched(made, latents.shape[-1] // side, side)

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
