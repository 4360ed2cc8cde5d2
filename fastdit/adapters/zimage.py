"""Z-Image: refiners of image and text on their own, then blocks over the joint stream of [image, text].

Restates diffusers' `ZImageTransformerBlock.forward` and, but for pictures with references, the model's (diffusers
>= 0.37). Image and text are padded to multiples of 32 tokens with a learned one each, which is read as the others are;
only what prompts of unlike length leave free behind that is masked.

What is cached is the output behind its norm, as in Lumina 2, and the context refiner runs once for a prompt. Where
tokens are left out, all padding is active. RALU's coarse tokens have the places of a picture of half the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters._listed import Listed
from fastdit.adapters._patches import embedded, unpatched
from fastdit.adapters._sequence import MULTIPLE, angles, behind, refined
from fastdit.adapters.arguments import forward_arguments
from fastdit.adapters.base import Size, blank, picture
from fastdit.adapters.lumina import squashed
from fastdit.blocks import gated
from fastdit.blocks.attention import Rotation, self_attention
from fastdit.blocks.forward import Forward
from fastdit.blocks.joint import Joint, Streams, joined, parts_of


def _block(prefix: str) -> Callable[..., Streams]:
    """The forward of the blocks of a list, in components whose names begin with `prefix`."""

    def forward(
        block: nn.Module,
        fw: Forward,
        x: Streams,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Streams:
        """Image and padding, or the joint stream, [B, N, D], rotary [B, N, d / 2] complex, temb [B, E] -> [B, N, D].

        The mask [B, N] tells padding behind shorter texts. With references each token has the modulation of the time,
        or that of clean pictures, as `noise_mask` [B, N] says.
        """
        stream = Joint(fw, x, text_first=False)
        if noise_mask is None:
            vectors = fw.adaln(block.adaLN_modulation, adaln_input, 4, then=squashed)
        else:
            both = (block.adaLN_modulation(c).chunk(4, dim=1) for c in (adaln_noisy, adaln_clean))
            pairs = zip(*(squashed(*parts) for parts in both), strict=True)
            noisy = noise_mask[..., None] == 1
            vectors = tuple(torch.where(noisy, a[:, None], b[:, None]) for a, b in pairs)
        scale, gate, scale_mlp, gate_mlp = vectors

        def attend() -> Tensor:
            u = stream.normed(block.attention_norm1, scale)
            if fw.tokens is not None:
                if prefix not in fw.scratch:
                    fw.scratch[prefix] = Rotation.of(freqs_cis)
                keys = None if attn_mask is None else attn_mask[:, None]
                others = u.shape[1] - fw.tokens.active
                return self_attention(fw, block.attention, u, keys, fw.scratch[prefix], others)
            given = {"attention_mask": attn_mask, "freqs_cis": freqs_cis}
            return fw.segments.attention(block.attention, u, **given)

        def feed_forward() -> Tensor:
            u = stream.normed(block.ffn_norm1, scale_mlp)
            return gated.feed_forward(fw, block.feed_forward, u)

        norms, names = (block.attention_norm2, block.ffn_norm2), ("attention", "feed_forward")
        branch = fw.component(prefix + names[0], lambda: fw.normed(norms[0], attend()))
        stream.add(branch, gate)
        branch = fw.component(prefix + names[1], lambda: fw.normed(norms[1], feed_forward()))
        stream.add(branch, gate_mlp)
        return stream.leave()

    return forward


class ZImage(Listed):
    """Adapter of `ZImageTransformer2DModel`."""

    family = "zimage"
    model_classes = ("ZImageTransformer2DModel",)
    kinds = dict.fromkeys(("noise_refiner", "layers"), "ZImageTransformerBlock")
    components = {
        "noise_refiner": ("noise_attention", "noise_feed_forward"),
        "layers": ("attention", "feed_forward"),
    }
    forwards = {"noise_refiner": _block("noise_"), "layers": _block("")}
    layouts = dict.fromkeys(sum(components.values(), ()), ("joint",))
    text_first = False
    token_multiple = MULTIPLE
    restates_model = True
    small_config = {
        **dict.fromkeys(("in_channels", "cap_feat_dim"), 4),
        **dict.fromkeys(("n_layers", "n_refiner_layers", "n_heads", "n_kv_heads"), 1),
        "dim": 6,
        "axes_dims": (2, 2, 2),
        "axes_lens": (99, 9, 9),
    }
    unread = ("text",)
    image_argument, time_argument, positions_argument = "x", "t", "image_noise_mask"
    embeddings_arguments = ("cap_feats", "siglip_feats")
    other_arguments = ("patch_size", "f_patch_size")
    residual_arguments = ("controlnet_block_samples",)
    text_tokens = 512  # at most
    timesteps_rise = True
    shifts_latents = True
    processors = ("ZSingleStreamAttnProcessor",)
    fused_attentions = ("attention",)
    prompt_projections = ("cap_embedder", "context_refiner", "siglip_embedder", "siglip_refiner")
    condition_embedding = "t_embedder"
    changes_resolution = True

    def matches(self, transformer: Any) -> bool:
        """The blocks must be of the form that knows references."""
        blocks = list(transformer.layers) if super().matches(transformer) else ()
        return bool(blocks) and "noise_mask" in forward_arguments(type(blocks[0]))

    def gather_residuals(self, residuals: Any, index: tuple[Tensor, Tensor], count: int) -> Any:
        """They are of the joint stream, by the number of the layer."""
        found = residuals.items()
        return {n: torch.cat([joint[index], joint[:, count:]], dim=1) for n, joint in found}

    def read_prompt(
        self, transformer: nn.Module, given: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """How long the prompts are with their padding; there must be one picture a row, all of one size and frame."""
        shapes = {getattr(picture, "shape", None) for picture in given["x"]}
        usual = given.get("patch_size", 2) == self.patch(transformer)
        if not usual or len(shapes) > 1 or None in shapes or math.prod(shapes.pop()[1:-2]) > 1:
            return None
        lengths = tuple(len(prompt) + behind(len(prompt)) for prompt in given["cap_feats"])
        return max(lengths), 0, lengths

    def run_model(
        self, transformer: Any, call: Any, known: tuple[Any, ...], given: Mapping[str, Any]
    ) -> Tensor:
        """What depends on shapes alone is kept in the branch's memory, or in the stage's."""
        latents, fw, lengths, side = given["x"], call.forward, known[2], given.get("patch_size", 2)
        residuals = given.get("controlnet_block_samples") or {}
        key, padding = f"{side}-{given.get('f_patch_size', 1)}", behind(call.count)
        apart = call.unseen and fw.reuses_all
        temb = transformer.t_embedder(given["t"] * transformer.t_scale).type_as(latents)
        turns, read = angles(transformer, call, side, lengths)
        parts = [embedded(transformer.all_x_embedder[key], latents, side, call.unseen)]
        if padding:
            parts.append(transformer.x_pad_token.expand(len(latents), padding, -1))
        stream, end = joined(parts, apart), call.count + padding
        for layer in transformer.noise_refiner:
            stream = layer(stream, None, None if turns is None else turns[:, :end], temb)
        mask = None if read is None else read[:, end:]
        image, *others = parts_of(stream)
        others.append(refined(transformer, given["cap_feats"], lengths, mask))
        stream = joined([image, joined(others, False)], apart)
        for number, layer in enumerate(transformer.layers):
            stream = layer(stream, read, turns, temb)
            if number in residuals:
                parts = parts_of(stream)
                more = residuals[number].split([part.shape[1] for part in parts], dim=1)
                stream = joined(list(map(torch.add, parts, more)), apart)
        last, image = transformer.all_final_layer[key], fw.enter(parts_of(stream)[0], "output")
        (scale,) = fw.adaln(last.adaLN_modulation, temb, 1)
        made = last.linear(image.normed(last.norm_final, scale, None))
        return unpatched(made[:, : call.tokens], latents.shape[-1] // side, side)

    def embed_condition(
        self, transformer: Any, latents: Sequence[Tensor], timesteps: Tensor, *told: Any
    ) -> Tensor:
        """The model scales the time, which its latents' dtype does not round."""
        return transformer.t_embedder(timesteps * transformer.t_scale).type_as(latents[0])

    def given_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """They run from 0, noise, to 1."""
        return (1000 - timesteps) / 1000

    def output_modulation(self, transformer: Any) -> int:
        """There is a scale."""
        return transformer.dim

    def width(self, transformer: nn.Module) -> int:
        """The width goes by another name here."""
        return transformer.dim

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """The example has pictures, and prompts of one length."""
        text = blank(transformer, size.text, transformer.config.cap_feat_dim)
        pictures = self.as_given(picture(transformer, size, self.patch(transformer)))
        return {"x": pictures, "t": blank(transformer), "cap_feats": list(text.unbind())}

    def small(self, model_class: Any, size: Size) -> tuple[nn.Module, dict[str, Any]]:
        """Prompts are padded to unlike lengths."""
        model, given = super().small(model_class, size)
        own = given["cap_feats"][0]
        return model, given | {"cap_feats": [own, own.new_empty(MULTIPLE + 1, own.shape[1])]}


ADAPTER = ZImage()
