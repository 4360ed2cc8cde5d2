"""Pipelines of every family with text encoders, all of random weights: what a folder of a published model holds.

The tokenizer has the words of the testbed's captions; every other is unknown to it. An autoencoder has the factor that
the family's pipeline takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    Lumina2Pipeline,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)

import tiny_models
from fastdit.tiny import models
from fastdit.tiny.tokenizer import build_tokenizer
from tiny_models import LATENT

WIDTH = 20  # of what the tiny transformers read
#: a chat as the pipelines' text encoders are told it
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "assistant"
)
DECODER = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}


def tokenizer() -> Any:
    """One for all, which cuts nothing."""
    found = build_tokenizer(max_tokens=2048)
    found.chat_template = CHAT
    return found


def t5(kind: str = "T5") -> Any:
    """An encoder of T5 or of UMT5."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def decoder(kind: str, **more: Any) -> Any:
    """A decoder whose hidden states are the prompt."""
    config = getattr(transformers, f"{kind}Config")(**{**DECODER, "head_dim": 10, **more})
    return getattr(transformers, f"{kind}Model")(config)


def qwen_vl() -> Any:
    """Qwen-Image's, without its eyes."""
    rope = {"type": "mrope", "mrope_section": [1, 2, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_scaling": rope}, vision_config=vision
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def vae8() -> Any:
    """An autoencoder of eight pixels a latent's."""
    model = AutoencoderKL(
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1,
        sample_size=64,
    )
    return tiny_models.randomise(model, 1)


def wan_vae() -> Any:
    """Wan's autoencoder, of eight pixels and four frames."""
    model = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * LATENT,
        latents_std=[1.5] * LATENT,
    )
    return tiny_models.randomise(model, 1)


def pixart() -> Any:
    """PixArt for 256 pixels, of noise, by DPM++."""
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=LATENT,
        out_channels=2 * LATENT,
        caption_channels=WIDTH,
        cross_attention_dim=24,
        interpolation_scale=1,
    )
    return PixArtAlphaPipeline(
        transformer=tiny_models.randomise(transformer),
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae8(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def flux() -> Any:
    """FLUX.1-dev, whose shift goes by the size."""
    text = models.build_text_encoder(models.TextConfig(width=12, layers=1, heads=2))
    return FluxPipeline(
        transformer=tiny_models.transformer("flux-dev"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_models.vae(),
        text_encoder=transformers.CLIPTextModel(text.config),
        tokenizer=build_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def qwen() -> Any:
    """Qwen-Image, whose shift goes by the size and ends at a set level."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9
    )
    return QwenImagePipeline(
        transformer=tiny_models.transformer("qwen"),
        scheduler=scheduler,
        vae=tiny_models.video_vae(),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer(),
    )


def wan() -> Any:
    """Wan 2.1, by UniPC of a flow as it is published."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        transformer=tiny_models.transformer("wan"),
        scheduler=scheduler,
        vae=wan_vae(),
        text_encoder=t5("UMT5"),
        tokenizer=tokenizer(),
    )


def lumina() -> Any:
    """Lumina-Next."""
    return LuminaPipeline(
        transformer=tiny_models.transformer("lumina"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae8(),
        text_encoder=decoder("Gemma"),
        tokenizer=tokenizer(),
    )


def lumina2() -> Any:
    """Lumina 2."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENT,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=tiny_models.randomise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae8(),
        text_encoder=decoder("Gemma2"),
        tokenizer=tokenizer(),
    )


def zimage() -> Any:
    """Z-Image."""
    return diffusers.ZImagePipeline(
        transformer=tiny_models.transformer("zimage"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae8(),
        text_encoder=decoder("Qwen3"),
        tokenizer=tokenizer(),
    )


def dit() -> Any:
    """DiT of classes, of noise, by DDIM."""
    pipe = tiny_models.pipeline("dit", scheduler=DDIMScheduler(clip_sample=False))
    pipe.register_modules(vae=vae8())
    return DiTPipeline(pipe.transformer, pipe.vae, pipe.scheduler)


FAMILIES: dict[str, Callable[[], Any]] = {
    "pixart": pixart,
    "flux": flux,
    "wan": wan,
    "lumina": lumina,
    "lumina2": lumina2,
    "dit": dit,
}
if tiny_models.HAS_QWEN:
    FAMILIES["qwen"] = qwen
if tiny_models.HAS_ZIMAGE:
    FAMILIES["zimage"] = zimage


def build(name: str) -> Any:
    """A pipeline of random weights, the same each time."""
    torch.manual_seed(0)
    found = FAMILIES[name]()
    for part in found.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    found.set_progress_bar_config(disable=True)
    return found
