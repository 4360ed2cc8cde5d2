"""Sizes of the tiny model's parts and how to build them untrained.

Every part is a stock class of diffusers or transformers. This file only fixes their
configurations; it neither trains nor loads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .captions import VOCABULARY

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection


@dataclass(frozen=True)
class VaeConfig:
    """The tiny autoencoder makes 4 x 32 x 32 latents of 128 x 128 pixels; every level but the last halves."""

    channels: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    layers_per_block: int = 1
    groups: int = 8
    sample_size: int = 128


TEACHER = VaeConfig(channels=(16, 32, 64))  # trained first; the shipped one learns from it


@dataclass(frozen=True)
class TextConfig:
    """Both text encoders have these sizes; ``max_tokens`` counts the begin and end marks."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    max_tokens: int = 24


@dataclass(frozen=True)
class TransformerConfig:
    """The denoiser has these sizes; a patch of 2 makes 256 tokens of 32 x 32 latents."""

    sample_size: int = 32
    patch_size: int = 2
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    shift: float = 3.0


def build_vae(config: VaeConfig = VaeConfig()) -> AutoencoderKL:
    """This builds an untrained autoencoder whose latent scaling is still the identity."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=config.sample_size,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_text_encoder(
    config: TextConfig = TextConfig(), words: tuple[str, ...] = VOCABULARY
) -> CLIPTextModelWithProjection:
    """This builds one untrained text encoder for a vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from .tokenizer import SPECIAL, vocabulary

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary(words)),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_tokens,
            hidden_act="gelu",
            pad_token_id=SPECIAL["<pad>"],
            bos_token_id=SPECIAL["<bos>"],
            eos_token_id=SPECIAL["<eos>"],
        )
    )


def build_transformer(
    config: TransformerConfig = TransformerConfig(),
    text: TextConfig = TextConfig(),
    vae: VaeConfig = VaeConfig(),
) -> SD3Transformer2DModel:
    """This builds the denoiser, its modulation and output layers starting at zero.

    Without ``pos_embed_max_size`` the stock patch embedding scales its positions to other
    picture sizes, so half size shows the same scene on a coarser grid rather than its middle.
    """
    import torch
    from diffusers import SD3Transformer2DModel

    width = config.heads * config.head_dim
    model = SD3Transformer2DModel(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=vae.latent_channels,
        out_channels=vae.latent_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=2 * text.width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text.width,
        pos_embed_max_size=None,
        qk_norm="rms_norm",
    )
    silent = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        silent += [block.norm1.linear, block.norm1_context.linear]
    for layer in silent:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_scheduler(
    config: TransformerConfig = TransformerConfig(),
) -> FlowMatchEulerDiscreteScheduler:
    """This builds the flow-matching scheduler with the model's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.shift)
