"""Transformers of the published sizes with random weights: nothing is downloaded.

The sizes are those of the models' public configurations. A tiny one has as many blocks and next to no width, so that
only what Python does of a step is left: it rehearses without a GPU, and on one it tells the host's time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
DEPTHS = ("num_layers", "num_single_layers", "n_layers")


@dataclass(frozen=True)
class RealModel:
    """How to build one model and call it for one step.

    Attributes:
        name: The model and picture size.
        cls: Class of diffusers.
        config: Its arguments.
        narrow: What a tiny one changes in them.
        batch: Rows of a step; two with classifier-free guidance.
        latent: Side of the latent.
        text: Tokens of text.
        steps: Of a run.
        inputs: (model, batch, latent, text, factory) -> arguments without the timestep.
    """

    name: str
    cls: str
    config: dict[str, Any]
    narrow: dict[str, Any]
    batch: int
    latent: int
    text: int
    steps: int
    inputs: Callable[..., Inputs] = field(repr=False)

    def depths(self) -> dict[str, int]:
        """How many blocks of each kind it has, by the argument that says so."""
        import diffusers

        given = inspect.signature(getattr(diffusers, self.cls)).parameters
        stated = {name: p.default for name, p in given.items()} | self.config
        return {name: stated[name] for name in DEPTHS if name in stated}

    def build(
        self, device: torch.device, dtype: torch.dtype, tiny: bool, **depths: int
    ) -> nn.Module:
        """Random weights, made on the device in the dtype; with `depths` in place of its own."""
        import diffusers

        config = self.config | (self.narrow if tiny else {}) | depths
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.cls)(**config)
        finally:
            torch.set_default_dtype(before)
        return model.to(dtype).eval().requires_grad_(False)

    def arguments(self, model: nn.Module, tiny: bool) -> Inputs:
        """Inputs of one step at t = 500, at the end of no particular prompt."""
        weight = next(model.parameters())

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, device=weight.device, dtype=weight.dtype)

        latent, text = (16, 8) if tiny else (self.latent, self.text)
        made = self.inputs(model, self.batch, latent, text, new)
        made.setdefault("timestep", torch.full((self.batch,), 500, device=weight.device))
        return {n: value for n, value in made.items() if value is not None} | {"return_dict": False}


def build_vae(widths: Sequence[int] = (128, 256, 512, 512)) -> nn.Module:
    """The autoencoder of SD3 and FLUX, random weights, fp32."""
    import diffusers

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(widths),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.eval().requires_grad_(False)


def _sd3(model, batch, latent, text, new) -> Inputs:
    return {
        "hidden_states": new(batch, 16, latent, latent),
        "encoder_hidden_states": new(batch, text, model.config.joint_attention_dim),
        "pooled_projections": new(batch, model.config.pooled_projection_dim),
    }


def _flux(model, batch, latent, text, new) -> Inputs:
    side = latent // 2
    image_ids = new(side * side, 3).zero_()
    grid = torch.arange(side, device=image_ids.device, dtype=image_ids.dtype)
    image_ids[:, 1] = grid.repeat_interleave(side)
    image_ids[:, 2] = grid.repeat(side)
    return {
        "hidden_states": new(batch, side * side, model.config.in_channels),
        "encoder_hidden_states": new(batch, text, model.config.joint_attention_dim),
        "pooled_projections": new(batch, model.config.pooled_projection_dim),
        "img_ids": image_ids,
        "txt_ids": new(text, 3).zero_(),
        "guidance": new(batch).fill_(3.5),
        "timestep": new(batch).fill_(0.5),
    }


def _pixart(model, batch, latent, text, new) -> Inputs:
    return {
        "hidden_states": new(batch, 4, latent, latent),
        "encoder_hidden_states": new(batch, text, model.config.caption_channels),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit(model, batch, latent, text, new) -> Inputs:
    labels = torch.zeros(batch, device=next(model.parameters()).device, dtype=torch.long)
    return {"hidden_states": new(batch, 4, latent, latent), "class_labels": labels}


def _lumina(model, batch, latent, text, new) -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    device = next(model.parameters()).device
    with torch.device(device):
        angles = get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384)
    return {
        "hidden_states": new(batch, 4, latent, latent),
        "encoder_hidden_states": new(batch, text, model.config.cross_attention_dim),
        "encoder_mask": torch.ones(batch, text, device=device, dtype=torch.long),
        "image_rotary_emb": angles,
        "timestep": new(batch).fill_(0.5),
        "cross_attention_kwargs": {},
    }


def _qwen(model, batch, latent, text, new) -> Inputs:
    side = latent // 2
    return {
        "hidden_states": new(batch, side * side, model.config.in_channels),
        "encoder_hidden_states": new(batch, text, model.config.joint_attention_dim),
        "img_shapes": [[(1, side, side)]] * batch,
        "timestep": new(batch).fill_(0.5),
    }


def _flux2(model, batch, latent, text, new) -> Inputs:
    side = latent // 2
    image_ids, text_ids = new(batch, side * side, 4).zero_(), new(batch, text, 4).zero_()
    return {
        "hidden_states": new(batch, side * side, model.config.in_channels),
        "encoder_hidden_states": new(batch, text, model.config.joint_attention_dim),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "guidance": new(batch).fill_(3.5),
        "timestep": new(batch).fill_(0.5),
    }


def _wan(model, batch, latent, text, new) -> Inputs:
    return {
        "hidden_states": new(batch, model.config.in_channels, 1, latent, latent),
        "encoder_hidden_states": new(batch, text, model.config.text_dim),
    }


def _zimage(model, batch, latent, text, new) -> Inputs:
    return {
        "x": list(new(batch, model.in_channels, 1, latent, latent).unbind()),
        "t": new(batch).fill_(0.5),
        "cap_feats": [new(text, model.config.cap_feat_dim) for _ in range(batch)],
        "timestep": None,
    }


def _lumina2(model, batch, latent, text, new) -> Inputs:
    return {
        "hidden_states": new(batch, model.config.in_channels, latent, latent),
        "encoder_hidden_states": new(batch, text, model.config.cap_feat_dim),
        "encoder_attention_mask": _mask(batch, text),
        "timestep": new(batch).fill_(0.5),
    }


def _hunyuanvideo15(model, batch, latent, text, new) -> Inputs:
    """Text without glyphs and without an image: the pipeline gives those, too, masked."""
    config = model.config
    return {
        "hidden_states": new(batch, config.in_channels, 1, latent, latent),
        "encoder_hidden_states": new(batch, text, config.text_embed_dim),
        "encoder_attention_mask": _mask(batch, text),
        "encoder_hidden_states_2": new(batch, 256, config.text_embed_2_dim),
        "encoder_attention_mask_2": _mask(batch, 256) * 0,
        "image_embeds": torch.zeros(batch, 729, config.image_embed_dim, dtype=model.dtype),
    }


def _mask(batch: int, text: int) -> Tensor:
    """All of a text counts. It lies on the host where it has values though nothing else has."""
    return torch.ones(batch, text, dtype=torch.int64)


NARROW_SD3 = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
}

MODELS = (
    RealModel(
        "FLUX.1-dev 1024",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "joint_attention_dim": 24,
            "pooled_projection_dim": 16,
        },
        1,
        128,
        512,
        28,
        _flux,
    ),
    RealModel(
        "SD3 medium 1024",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        NARROW_SD3,
        2,
        128,
        333,
        28,
        _sd3,
    ),
    RealModel(
        "SD3.5 large 1024",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        NARROW_SD3,
        2,
        128,
        333,
        28,
        _sd3,
    ),
    RealModel(
        "PixArt-Sigma 1024",
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 24,
        },
        2,
        128,
        300,
        20,
        _pixart,
    ),
    RealModel(
        "Lumina-Next 1024",
        "LuminaNextDiT2DModel",
        {"num_layers": 24, "num_kv_heads": 8},
        {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "cross_attention_dim": 24},
        2,
        128,
        256,
        30,
        _lumina,
    ),
    RealModel(
        "Qwen-Image 1024",
        "QwenImageTransformer2DModel",
        {},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "joint_attention_dim": 24,
        },
        1,
        128,
        128,
        50,
        _qwen,
    ),
    RealModel(
        "FLUX.2-dev 1024",
        "Flux2Transformer2DModel",
        {},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 2, 2),
            "joint_attention_dim": 24,
        },
        1,
        128,
        512,
        50,
        _flux2,
    ),
    RealModel(
        "Wan 2.1 14B, one frame of 1024",
        "WanTransformer3DModel",
        {},
        {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 24},
        1,
        128,
        512,
        50,
        _wan,
    ),
    RealModel(
        "Z-Image 1024",
        "ZImageTransformer2DModel",
        {},
        {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "axes_dims": (2, 2, 4), "cap_feat_dim": 24},
        2,
        128,
        128,
        50,
        _zimage,
    ),
    RealModel(
        "Lumina 2 1024",
        "Lumina2Transformer2DModel",
        {},
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "axes_dim_rope": (4, 6, 6),
            "cap_feat_dim": 24,
        },
        2,
        128,
        128,
        30,
        _lumina2,
    ),
    RealModel(
        "HunyuanVideo-1.5, one frame of 1024",
        "HunyuanVideo15Transformer3DModel",
        {},
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "rope_axes_dim": (2, 2, 4),
            "text_embed_dim": 24,
            "text_embed_2_dim": 12,
            "image_embed_dim": 12,
        },
        1,
        64,
        128,
        50,
        _hunyuanvideo15,
    ),
    RealModel(
        "DiT-XL/2 512",
        "DiTTransformer2DModel",
        {"sample_size": 64},
        {"num_attention_heads": 2, "attention_head_dim": 8},
        2,
        64,
        0,
        50,
        _dit,
    ),
)
