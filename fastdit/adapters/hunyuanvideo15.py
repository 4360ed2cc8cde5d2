"""HunyuanVideo-1.5: double-stream blocks with joint attention over [video, text], adaLN-zero, rotary positions.

Restates diffusers' `HunyuanVideo15TransformerBlock.forward`, and the model's own. Only the video has positions. The
text is that of a language model, which a refiner sees together with the timestep, glyphs of a second encoder, and a
first frame's image. The model's own forward gathers the tokens that count of each prompt, at each call, and leaves all
others behind them, masked; the one here leaves them out, but for what the longest prompt of a batch is longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters._videos import Videos, turns
from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import BATCH, Call, Size, blank
from fastdit.blocks.attention import Rotation, joint_attention, readers
from fastdit.blocks.forward import Forward
from fastdit.blocks.products import first_layer


def joint_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """One block: video [B, N, D], text [B, T, D], temb [B, D], mask [B, T] or None for all -> (video, text)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    # shift, scale and gate of the attention, then of the feed-forward
    img, txt = (fw.adaln(norm, temb, 6) for norm in (block.norm1, block.norm1_context))

    def attend() -> tuple[Tensor, Tensor]:
        attention, norms = block.attn, (block.norm1.norm, block.norm1_context.norm)
        u_image = image.normed(norms[0], img[1], img[0], readers(fw, attention))
        u_text = text.normed(norms[1], txt[1], txt[0], readers(fw, attention, added=True))
        if fw.tokens is not None:
            turn = fw.rotation(lambda: Rotation(*freqs_cis))
            mask = None if attention_mask is None else attention_mask.bool()
            given = {"text_first": False, "rotation": turn, "mask": mask}
            return joint_attention(fw, "attn", attention, u_image, u_text, **given)
        mask = attention_mask
        if mask is None:  # the processor asks for one
            mask = torch.ones(u_text.shape[:2], dtype=torch.bool, device=u_text.device)
        return fw.segments.attention(
            attention,
            hidden_states=u_image,
            encoder_hidden_states=u_text,
            attention_mask=mask,
            image_rotary_emb=freqs_cis,
        )

    def feed_forward(name: str, stream: Any, norm: nn.Module, shift: Tensor, scale: Tensor) -> Any:
        ff = getattr(block, name)

        def compute() -> Tensor:
            return fw.segments.feed_forward(ff, stream.normed(norm, scale, shift, first_layer(ff)))

        return fw.component(name, compute)

    attention = fw.component("attn", attend)
    image.add(attention[0], img[2])
    image.add(feed_forward("ff", image, block.norm2, *img[3:5]), img[5])
    text.add(attention[1], txt[2])
    text.add(feed_forward("ff_context", text, block.norm2_context, *txt[3:5]), txt[5])
    return image.leave(), text.leave()


class HunyuanVideo15(Videos):
    """Adapter of `HunyuanVideo15Transformer3DModel`."""

    family = "hunyuanvideo15"
    model_classes = ("HunyuanVideo15Transformer3DModel",)
    kinds = {"transformer_blocks": "HunyuanVideo15TransformerBlock"}
    components = {"transformer_blocks": ("attn", "ff", "ff_context")}
    forwards = {"transformer_blocks": joint_block}
    embeddings_arguments = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
    )
    other_arguments = ("timestep_r",)
    text_tokens = 128
    layouts = {"attn": ("image", "text"), "ff": ("image",), "ff_context": ("text",)}
    fused_attentions = ("attn",)
    prompt_projections = ("context_embedder_2", "image_embedder")
    position_embedding = "rope"
    output_norm = "norm_out"
    unread = ("text",)
    condition_embedding = "time_embed"
    processors = ("HunyuanVideo15AttnProcessor2_0",)
    changes_resolution = True
    restates_model = True
    small_config = {
        **dict.fromkeys(("in_channels", "out_channels", "text_embed_dim"), 4),
        **dict.fromkeys(("text_embed_2_dim", "image_embed_dim"), 4),
        **dict.fromkeys(("num_attention_heads", "num_layers", "num_refiner_layers"), 1),
        "attention_head_dim": 6,
        "rope_axes_dim": (2, 2, 2),
        "mlp_ratio": 1.0,
    }

    def read_prompt(
        self, transformer: nn.Module, given: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """How many tokens count, and how many of them beside the text; which do of text and of glyphs; a mask of the
        text's; whether an image's do; a mask of all. Masks are None where all of these count.
        """
        told = [given.get(name) for name in self.embeddings_arguments]
        if any(tensor is None for tensor in told):
            return None
        masks, image = [mask.bool() for mask in told[1::2]], told[4]
        lengths = [bound for mask in masks for bound in mask.sum(dim=1).aminmax()]
        least, most, fewest, longest, shown = torch.stack([*lengths, image.any().long()]).tolist()
        rows, kept = [], []
        for mask, end in zip(masks, (max(most, 1), longest), strict=True):
            rows.append(mask.long().argsort(dim=1, descending=True, stable=True)[:, :end])
            kept.append(mask.gather(1, rows[-1]))
        text, glyphs = kept
        frame = text.new_ones(len(text), shown * image.shape[1])
        whole = None if least == text.shape[1] else text
        mask = torch.cat([frame, glyphs, text], dim=1)
        even = whole is None and fewest == longest
        count, beside = mask.shape[1], mask.shape[1] - text.shape[1]
        return count, beside, *rows, whole, bool(shown), None if even else mask

    def run_model(
        self, transformer: Any, call: Any, known: tuple[Any, ...], given: Mapping[str, Any]
    ) -> Tensor:
        """Glyphs and image are embedded once for a prompt; the text's refiner sees the timestep, too."""
        _, _, rows, glyphs, whole, shown, mask = known
        latents, timestep = given["hidden_states"], given["timestep"]
        kinds = transformer.cond_type_embed.weight

        parts = []
        if shown:
            parts.append(transformer.image_embedder(given["image_embeds"]) + kinds[2])
        if glyphs.shape[1]:
            some = given["encoder_hidden_states_2"].take_along_dim(glyphs[..., None], dim=1)
            parts.append(transformer.context_embedder_2(some) + kinds[1])
        text = given["encoder_hidden_states"].take_along_dim(rows[..., None], dim=1)
        parts.append(transformer.context_embedder(text, timestep, whole) + kinds[0])
        text = torch.cat(parts, dim=1)

        turn = transformer.rope(latents)
        temb = transformer.time_embed(timestep, timestep_r=given.get("timestep_r"))
        video = transformer.x_embedder(latents)
        for block in transformer.transformer_blocks:
            video, text = block(video, text, temb, mask, turn)
        video = transformer.proj_out(transformer.norm_out(video, temb))
        patch = self.patch(transformer)
        sides = [n // p for n, p in zip(latents.shape[2:], patch, strict=True)]
        video = video.unflatten(2, (-1, *patch)).unflatten(1, sides).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """All three texts count."""
        found = super().call(transformer, args, kwargs)
        return replace(found, text=sum(t.shape[1] for t in found.embeddings if t.ndim == 3))

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """Only the rotary embedding has positions."""
        return [transformer.rope]

    def embed(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """No rotation: attention takes that of all tokens at the rows."""

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> Any:
        """Nothing is foreseen of a second timestep, which a model of mean flows embeds, too."""
        if arguments_of(transformer, args, kwargs).get("timestep_r") is not None:
            return None
        return super().layer_inputs(transformer, args, kwargs, batch)

    def output_elements(self, transformer: nn.Module, tokens: int) -> int:
        """As many as the projection behind the blocks gives."""
        return tokens * transformer.proj_out.out_features

    def width(self, transformer: nn.Module) -> int:
        """Of all heads."""
        config = transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def patch(self, transformer: nn.Module) -> tuple[int, int, int]:
        """The configuration has the frames by a name of their own."""
        config = transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    def decode_video(self, latents: Tensor, vae: Any) -> Tensor:
        """Its VAE has one scale."""
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def encode(self, image: Tensor, vae: Any) -> Tensor:
        """Its VAE has one scale."""
        latents = vae.encode(image.to(vae.dtype), return_dict=False)[0].mode()
        return latents * vae.config.scaling_factor

    def turned(self, module: nn.Module, places: Tensor) -> tuple[Tensor, Tensor]:
        """[n, d], or [B, n, d] where each video has other tokens."""
        cos, sin = turns(places.float(), module.rope_dim, module.theta)
        return cos.squeeze(0), sin.squeeze(0)

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """A prompt without glyphs and image; what the forward reads on the host has values."""
        config, dtype = transformer.config, transformer.dtype
        return {
            "hidden_states": self.example_latents(transformer, size),
            "timestep": blank(transformer),
            "encoder_hidden_states": blank(transformer, size.text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(BATCH, size.text),
            "encoder_hidden_states_2": blank(transformer, 0, config.text_embed_2_dim),
            "encoder_attention_mask_2": torch.ones(BATCH, 0),
            "image_embeds": torch.zeros(BATCH, 0, config.image_embed_dim, dtype=dtype),
        }

    def small(self, model_class: Any, size: Size) -> tuple[nn.Module, dict[str, Any]]:
        """Prompts of unlike length, with glyphs and an image."""
        model, given = super().small(model_class, size)
        mask = torch.ones(BATCH, size.text).tril(size.text - 2)
        masks = {"encoder_attention_mask": mask, "encoder_attention_mask_2": mask.flip(0)}
        glyphs, image = blank(model, size.text, 4), blank(model, 2, 4)
        return model, given | masks | {"encoder_hidden_states_2": glyphs, "image_embeds": image}


ADAPTER = HunyuanVideo15()
