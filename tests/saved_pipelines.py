"""Pipelines of random weights, saved to a folder with all they need to draw a prompt.

The smallest that still run whole: 2 blocks, pictures of 16 or 32 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)

from fastdit.tiny import models
from fastdit.tiny.tokenizer import build_tokenizer

TEXT = models.TextConfig(width=16, layers=1, heads=2)
VAE = models.VaeConfig(channels=(8, 8, 8), groups=4, sample_size=32)


def save_sd3(folder: Path) -> Path:
    """SD3 with two CLIP encoders and without T5; 32 x 32 pixels."""
    torch.manual_seed(0)
    size = models.TransformerConfig(sample_size=8, layers=2, heads=2, head_dim=8)
    encoders = [models.build_text_encoder(TEXT) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=_without_zeros(models.build_transformer(size, TEXT, VAE)),
        scheduler=models.build_scheduler(),
        vae=models.build_vae(VAE),
        text_encoder=encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return _save(pipeline, folder)


def save_dit(folder: Path) -> Path:
    """DiT of 1000 classes, three of their names known; 16 x 16 pixels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )
    pipeline = DiTPipeline(
        transformer=_without_zeros(transformer),
        vae=vae,
        scheduler=DDIMScheduler(),
    )
    _save(pipeline, folder)
    # Published DiT folders hold their labels here, but saving a pipeline leaves them out.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "geyser", "3": "otter, sea otter"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_unsupported(folder: Path) -> Path:
    """A pipeline without a transformer."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return _save(DDPMPipeline(unet, DDPMScheduler()), folder)


def _without_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Layers that diffusers starts at zero would hide what a schedule does."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
