"""Lumina-Next: self- and cross-attention of the same input, summed and projected once, then a SwiGLU feed-forward.

Restates diffusers' `LuminaNextDiTBlock.forward`. Every sub-layer is normed before and behind (RMS norms) and gated by
``tanh(gate)``; there are scales but no shifts. The two attentions return rows by head, unprojected; their sum
``attn1 + tanh(head gate) attn2`` goes through the one projection of the block, `attn2.to_out`. So only `to_out` and
`feed_forward` reach the residual stream; `attn1` and `attn2` are read by `to_out` alone and do not run where it is
reused, unless a later step wants their value.

What is cached: of `attn1` and `attn2` the rows by head, before the head gates, which are weights and the same in every
step; of `to_out` and `feed_forward` the output behind its norm, which no step changes either, and before the gate,
which the current step sets. So a reused component costs one gated residual, no norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.base import (
    Adapter,
    Size,
    attention_macs,
    chunk_gates,
    linear_macs,
)
from fastdit.blocks.attention import Part, Rotation, attend
from fastdit.blocks.forward import Forward, gathered


def lumina_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor,
    temb: Tensor,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """One `LuminaNextDiTBlock`: image [B, N, D], text [B, T, C], rotary [1, N, d / 2] complex, temb [B, E] -> image."""
    image = fw.enter(hidden_states, "image")
    kwargs = cross_attention_kwargs or {}
    modulation = fw.segments.linear(block.norm1.linear, block.norm1.silu(temb))
    scale, gate, scale_mlp, gate_mlp = chunk_gates(modulation, 4)
    runs_out = fw.computes("to_out")
    runs_attn1, runs_attn2 = (runs_out or fw.computes(name) for name in ("attn1", "attn2"))
    if runs_attn1 or runs_attn2:
        u = image.normed(block.norm1.norm, scale, None)

    def attend() -> Tensor:
        if fw.tokens is not None:
            return _attend(fw, block.attn1, u, image_rotary_emb, kwargs.get("base_sequence_length"))
        return fw.segments.attention(
            block.attn1,
            hidden_states=u,
            encoder_hidden_states=u,
            attention_mask=attention_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=image_rotary_emb,
            **kwargs,
        )

    def attend_to_text() -> Tensor:
        return fw.segments.attention(
            block.attn2,
            hidden_states=u,
            encoder_hidden_states=fw.normed(block.norm1_context, encoder_hidden_states),
            attention_mask=encoder_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=None,
            **kwargs,
        )

    attention = gathered(fw.component("attn1", attend)) if runs_attn1 else None
    cross = gathered(fw.component("attn2", attend_to_text)) if runs_attn2 else None
    branch = fw.component(
        "to_out",
        lambda: fw.normed(
            block.norm2,
            fw.segments.project_heads(block.attn2.to_out[0], attention, cross, block.gate),
        ),
    )
    image.add(branch, gate.unsqueeze(1).tanh())
    branch = fw.component(
        "feed_forward",
        lambda: fw.normed(
            block.ffn_norm2,
            fw.segments.feed_forward(
                block.feed_forward, image.normed(block.ffn_norm1, scale_mlp, None)
            ),
        ),
    )
    image.add(branch, gate_mlp.unsqueeze(1).tanh())
    return image.leave()


def _attend(
    fw: Forward, attn: nn.Module, u: Tensor, rotary: Tensor, base_length: int | None
) -> Tensor:
    """Self-attention of the active tokens, rows by head; its scale is that of all keys, however few ask."""
    tokens = fw.tokens
    if tokens.rows is None:  # a call of a part of the tokens is given the angles of that part
        angles = rotary[0]
        twice = (t.float().repeat_interleave(2, dim=-1) for t in (angles.real, angles.imag))
        tokens.memory.rotation = Rotation(*twice)
    scale = attn.scale
    if base_length is not None:
        scale *= math.sqrt(math.log(tokens.count, base_length))
    part = Part(attn.to_q(u), attn.to_k(u), attn.to_v(u), attn.norm_q, attn.norm_k, 0, tokens.rows)
    out = attend(
        tokens,
        (fw.index, "attn1"),
        (part,),
        tokens.count,
        attn.heads,
        tokens.memory.rotation,
        scale=scale,
    )
    return out.unflatten(-1, (attn.heads, -1))


class Lumina(Adapter):
    """Adapter of `LuminaNextDiT2DModel`."""

    family = "lumina"
    model_classes = ("LuminaNextDiT2DModel",)
    kinds = {"layers": "LuminaNextDiTBlock"}
    components = {"layers": ("attn1", "attn2", "to_out", "feed_forward")}
    consumers = {"layers": {"attn1": "to_out", "attn2": "to_out"}}
    groups = {"layers": {"attn": ("attn1", "attn2", "to_out"), "ff": ("feed_forward",)}}
    forwards = {"layers": lumina_block}
    # The angles too: below the pipeline's `scaling_watershed` they are others, of which no key was made.
    embeddings_arguments = ("encoder_hidden_states", "encoder_mask", "image_rotary_emb")
    text_tokens = 256  # at most; the pipeline pads a prompt to the next multiple of 8 only
    timesteps_rise = True
    layouts = {
        "attn1": ("image",),
        "attn2": ("image",),
        "to_out": ("image",),
        "feed_forward": ("image",),
    }
    processors = frozenset({"LuminaAttnProcessor2_0"})
    own_attention_arguments = frozenset({"scale", "base_sequence_length"})

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """The patch embedding also hands out the rotary angles."""
        return [transformer.patch_embedder]

    def embed(
        self,
        module: nn.Module,
        shape: Sequence[int],
        rows: Tensor,
        patches: Tensor,
        freqs_cis: Tensor,
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
        """As `LuminaPatchEmbed.forward`: patches, mask, size, and the active tokens' angles [B, K, d/2]."""
        side = module.patch_size
        batch, _, height, width = patches.shape
        tokens = patches.unflatten(-1, (-1, side)).permute(0, 3, 1, 2, 4).flatten(2)  # (c, ph, pw)
        mask = torch.ones(rows.shape, dtype=torch.int32, device=patches.device)
        grid = freqs_cis[: shape[-2] // side, : shape[-1] // side].flatten(0, 1)
        angles = grid.to(patches.device)[rows]
        return module.proj(tokens), mask, [(height, width)] * batch, angles

    def width(self, transformer: nn.Module) -> int:
        """The width goes by another name here."""
        return transformer.hidden_size

    def macs(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Linear layers, and QK^T and AV with the keys and values of each group repeated for its heads."""
        if component == "attn1":
            attn = block.attn1
            return size.image * (attention_macs(attn) + 2 * size.image * attn.inner_dim)
        if component == "attn2":
            attn = block.attn2
            image = linear_macs(attn.to_q) + 2 * size.text * attn.inner_dim
            return image * size.image + linear_macs(attn.to_k, attn.to_v) * size.text
        module = block.attn2.to_out if component == "to_out" else block.feed_forward
        return linear_macs(module) * size.image

    def overhead_macs(self, transformer: nn.Module, size: Size) -> int:
        """Embedders, modulations of every block, the output modulation and projection."""
        norms = (block.norm1 for block in transformer.layers)
        out = transformer.norm_out
        per_image = linear_macs(transformer.time_caption_embed, out.linear_1, *norms)
        return per_image + linear_macs(transformer.patch_embedder, out.linear_2) * size.image

    def slot_elements(
        self, transformer: nn.Module, kind: str, block: nn.Module, component: str, size: Size
    ) -> int:
        """Every component caches image rows; those of the attentions are split by head."""
        return size.image * transformer.hidden_size

    def probe(
        self, transformer: nn.Module, kind: str, block: nn.Module, random: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """8 image tokens at random rotary angles and 5 text tokens, the last one masked."""
        hidden = random(2, 8, transformer.hidden_size)
        angles = random(1, 8, block.head_dim // 2).float()
        text = torch.ones(2, 5, dtype=torch.bool, device=hidden.device)
        text[:, -1] = False
        return {
            "hidden_states": hidden,
            "attention_mask": torch.ones(2, 8, dtype=torch.int32, device=hidden.device),
            "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
            "encoder_hidden_states": random(2, 5, block.attn2.cross_attention_dim),
            "encoder_mask": text,
            "temb": random(2, min(transformer.hidden_size, 1024)),
            "cross_attention_kwargs": {},
        }


ADAPTER = Lumina()
