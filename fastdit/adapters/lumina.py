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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Adapter, Call, Size, blank, picture
from fastdit.blocks.attention import Rotation, cross_attention, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.gated import feed_forward
from fastdit.blocks.layer_inputs import LayerInputs, repeated
from fastdit.blocks.residual import gathered
from fastdit.observe import observed


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
    scale, gate, scale_mlp, gate_mlp = fw.adaln(block.norm1, temb, 4, then=squashed)
    runs_out = fw.computes("to_out")
    runs_attn1, runs_attn2 = (runs_out or fw.computes(name) for name in ("attn1", "attn2"))
    if runs_attn1 or runs_attn2:
        u = image.normed(block.norm1.norm, scale, None)

    def attend() -> Tensor:
        if fw.tokens is not None:
            attn, scale, base = block.attn1, block.attn1.scale, kwargs.get("base_sequence_length")
            if base is not None:  # of all keys, however few ask
                scale *= math.sqrt(math.log(fw.tokens.count, base))
            rotation = fw.rotation(lambda: Rotation.of(image_rotary_emb[0]))
            out = self_attention(fw, attn, u, rotation=rotation, scale=scale, projects=False)
            return out.unflatten(-1, (attn.heads, -1))
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
        text = fw.normed(block.norm1_context, encoder_hidden_states)
        if fw.tokens is not None and not observed(block.attn2):
            rotation = fw.rotation(lambda: Rotation.of(image_rotary_emb[0]))
            return cross_attention(fw, block.attn2, u, text, encoder_mask.bool(), rotation)
        return fw.segments.attention(
            block.attn2,
            hidden_states=u,
            encoder_hidden_states=text,
            attention_mask=encoder_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=None,
            **kwargs,
        )

    attention = gathered(fw.component("attn1", attend)) if runs_attn1 else None
    cross = gathered(fw.component("attn2", attend_to_text)) if runs_attn2 else None
    branch = fw.component(
        "to_out",
        lambda: fw.normed(block.norm2, projected(fw, block, attention, cross)),
    )
    image.add(branch, gate)
    branch = fw.component(
        "feed_forward",
        lambda: fw.normed(
            block.ffn_norm2,
            feed_forward(fw, block.feed_forward, image.normed(block.ffn_norm1, scale_mlp, None)),
        ),
    )
    image.add(branch, gate_mlp)
    return image.leave()


def projected(fw: Forward, block: nn.Module, attention: Tensor, cross: Tensor) -> Tensor:
    """The block's output projection of the sum of two attentions [B, N, heads, d], the second gated by head."""
    layer = block.attn2.to_out[0]
    if not fw.fuses_segments or block.gate.dtype is not attention.dtype:
        return fw.segments.project_heads(layer, attention, cross, block.gate)
    gate = block.gate.tanh().repeat_interleave(attention.shape[-1])
    mixed = fw.ops.gated_residual(attention.flatten(2), [cross.flatten(2)], [gate])
    return fw.segments.linear(layer, mixed)


def squashed(
    scale: Tensor, gate: Tensor, scale_mlp: Tensor, gate_mlp: Tensor
) -> tuple[Tensor, ...]:
    """A block's modulation with its gates as they are applied."""
    return scale, gate.tanh(), scale_mlp, gate_mlp.tanh()


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
    layouts = dict.fromkeys(components["layers"], ("image",))
    processors = ("LuminaAttnProcessor2_0",)
    fused_attentions = ("attn1", "attn2")
    own_attention_arguments = frozenset({"scale", "base_sequence_length"})
    prompt_attentions = {"layers": ("attn2",)}
    condition_embedding = "time_caption_embed"
    output_norm = "norm_out"

    def compared(self, transformer: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """Of the angles those of the picture; the pipeline makes those of the largest one anew at each step."""
        *others, angles = call.embeddings
        rows, columns = (side // transformer.patch_size for side in call.hidden_states.shape[-2:])
        return *others, angles[:rows, :columns]

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

    def table_embeddings_of(self, transformer: nn.Module) -> list[nn.Module]:
        """It adds no positions, but it copies the patches."""
        return self.embedders(transformer)

    def embed_apart(
        self, module: nn.Module, kept: dict[Any, Any], latents: Tensor, freqs_cis: Tensor
    ) -> tuple[Any, None] | None:
        """A convolution reads the patches where they are; what it gives is transposed, which a residual sum takes."""
        if type(module.proj) is not nn.Linear or type(module.proj.weight) is not nn.Parameter:
            return None
        side, weight = module.patch_size, module.proj.weight
        kernel = weight.view(len(weight), -1, side, side)
        tokens = F.conv2d(latents, kernel, module.proj.bias, stride=side)
        rows, columns = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        mask = torch.ones(tokens.shape[:2], dtype=torch.int32, device=tokens.device)
        angles = freqs_cis.to(tokens.device)[:rows, :columns].flatten(0, 1).unsqueeze(0)
        return (tokens, mask, [tuple(latents.shape[2:])] * len(tokens), angles), None

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs:
        """The embedded timestep plus that of the prompt, which is embedded once for all steps."""
        given = arguments_of(transformer, args, kwargs)
        caption, mask = given["encoder_hidden_states"], given["encoder_mask"]

        def make(timesteps: Tensor) -> tuple[Tensor]:
            embed, shown = transformer.time_caption_embed, mask.float().unsqueeze(-1)
            times = embed.timestep_embedder(embed.time_proj(timesteps).to(caption.dtype))
            pooled = ((caption * shown).sum(dim=1) / shown.sum(dim=1)).to(caption)
            return (times + repeated(embed.caption_embedder(pooled), len(times), batch),)

        return LayerInputs(make, (caption, mask))

    def given_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """They run from 0, noise, to 1."""
        return 1 - timesteps / 1000

    def width(self, transformer: nn.Module) -> int:
        """The width goes by another name here."""
        return transformer.hidden_size

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Pictures, masked prompts and the angles of a picture."""
        latents = picture(transformer, size)
        rows, columns = (side // transformer.patch_size for side in latents.shape[2:])
        angles = transformer.layers[0].head_dim // 2
        return {
            "hidden_states": latents,
            "timestep": blank(transformer),
            "encoder_hidden_states": blank(
                transformer, size.text, transformer.config.cross_attention_dim
            ),
            "encoder_mask": blank(transformer, size.text, dtype=torch.bool),
            "image_rotary_emb": torch.empty(
                rows, columns, angles, dtype=torch.complex64, device="meta"
            ),
            "cross_attention_kwargs": {},
        }


ADAPTER = Lumina()
