"""Tiny transformers and pipelines of every family, built offline, with random weights everywhere.

diffusers initialises gates and output projections to zero, under which most mistakes give the right
answer; so every parameter is drawn anew, at a scale that keeps activations near one. Pipelines have
no text encoders: prompts are embeddings.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from diffusers.utils import logging
from torch import Tensor, nn

from fastdit.adapters import find_adapter
from fastdit.adapters.base import Adapter
from fastdit.spec import ModelSpec

logging.set_verbosity_error()

TEXT = 5
#: its attention has the form that the adapter knows since diffusers 0.37
HAS_QWEN = "modulate_index" in inspect.signature(QwenImageTransformerBlock.forward).parameters
#: its blocks are given modulations as the adapter knows since there is a pipeline of klein
HAS_FLUX2 = hasattr(diffusers, "Flux2KleinPipeline")
#: its blocks know references since diffusers 0.37
HAS_ZIMAGE = "noise_mask" in inspect.signature(ZImageTransformerBlock.forward).parameters
LATENT = 4
HEIGHT, WIDTH = 8, 16


def sd3(dual: tuple[int, ...] = (), qk_norm: str | None = None, layers: int = 3) -> nn.Module:
    """SD3; with `dual` and `qk_norm` it is SD3.5-medium's form."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
        pos_embed_max_size=16,
    )


def flux(guidance: bool = False, layers: int = 2, single_layers: int = 2) -> nn.Module:
    """FLUX.1; with `guidance` it is the distilled dev form."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )


def pixart(sigma: bool = False, layers: int = 3) -> nn.Module:
    """PixArt; alpha conditions on the image size too, Sigma does not."""
    return PixArtTransformer2DModel(
        sample_size=16 if sigma else 128,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=LATENT,
        out_channels=2 * LATENT,
        caption_channels=20,
        cross_attention_dim=24,
        interpolation_scale=1,
        use_additional_conditions=not sigma,
    )


def dit(layers: int = 3) -> nn.Module:
    """DiT, class-conditional; square images only."""
    return DiTTransformer2DModel(
        sample_size=8,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=LATENT,
        out_channels=2 * LATENT,
        num_embeds_ada_norm=1000,
    )


def lumina(layers: int = 3) -> nn.Module:
    """Lumina-Next, two query heads to each key head as in the published model's grouped attention."""
    return LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT,
        hidden_size=32,
        num_layers=layers,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=20,
    )


def lumina2(layers: int = 3) -> nn.Module:
    """Lumina 2, two query heads to each key head."""
    return Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT,
        hidden_size=32,
        num_layers=layers,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(30, 32, 32),
        cap_feat_dim=20,
    )


def qwen(layers: int = 3) -> nn.Module:
    """Qwen-Image."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT,
        out_channels=LATENT,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )


def wan(layers: int = 3, **more: Any) -> nn.Module:
    """Wan 2.1 and each transformer of 2.2."""
    given = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENT,
        "out_channels": LATENT,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": layers,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**given | more)


def flux2(klein: bool = False, layers: int = 2, single_layers: int = 3) -> nn.Module:
    """FLUX.2; klein is not told the guidance."""
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )


def zimage(layers: int = 3) -> nn.Module:
    """Z-Image."""
    return ZImageTransformer2DModel(
        in_channels=LATENT,
        dim=32,
        n_layers=layers,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )


def hunyuanvideo15(layers: int = 3, **more: Any) -> nn.Module:
    """HunyuanVideo-1.5; the channels are the latents', a condition's and a mask."""
    given = {
        "in_channels": 2 * LATENT + 1,
        "out_channels": LATENT,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "text_embed_dim": 20,
        "text_embed_2_dim": 12,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 16,
    }
    model = HunyuanVideo15Transformer3DModel(**given | more)
    # It is 2048 wide whatever the configuration says.
    width = model.proj_out.in_features
    model.context_embedder_2 = type(model.context_embedder_2)(12, 16, width)
    return model


@dataclass(frozen=True)
class Family:
    """One form of a transformer: how to build it and how to call it."""

    build: Callable[[], nn.Module]
    square: bool = False
    cfg_in_one_call: bool = True
    #: prompts of one run may have unlike lengths, which the model takes from the host
    reads_masks: bool = False
    #: parts of it are fp32 whatever the model's dtype; tests in fp64 lift that, see `conftest.py`
    casts: bool = False


FAMILIES: dict[str, Family] = {
    "sd3": Family(sd3),
    "sd3.5": Family(functools.partial(sd3, dual=(0, 1), qk_norm="rms_norm")),
    "flux": Family(flux, cfg_in_one_call=False),
    "flux-dev": Family(functools.partial(flux, guidance=True), cfg_in_one_call=False),
    "pixart-alpha": Family(pixart),
    "pixart-sigma": Family(functools.partial(pixart, sigma=True)),
    "dit": Family(dit, square=True),
    "lumina": Family(lumina),
    "lumina2": Family(lumina2, cfg_in_one_call=False, reads_masks=True),
    "wan": Family(wan, cfg_in_one_call=False, casts=True),
} | ({"qwen": Family(qwen, cfg_in_one_call=False, reads_masks=True)} if HAS_QWEN else {})
if HAS_FLUX2:
    FAMILIES["flux2"] = Family(flux2)  # which has one call, and no guidance of another prompt
    FAMILIES["flux2-klein"] = Family(functools.partial(flux2, klein=True), cfg_in_one_call=False)
FAMILIES |= {"zimage": Family(zimage)} if HAS_ZIMAGE else {}
FAMILIES["hunyuanvideo15"] = Family(
    hunyuanvideo15, cfg_in_one_call=False, reads_masks=True, casts=True
)

#: families of videos
VIDEOS = ("wan", "hunyuanvideo15")

#: families that this diffusers lacks
TOO_NEW = ([] if HAS_QWEN else ["qwen"]) + ([] if HAS_FLUX2 else ["flux2"])
TOO_NEW += [] if HAS_ZIMAGE else ["zimage"]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: matrices at 1/sqrt(fan in), norm weights around one, biases and tables small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "scale_shift_table" in name:
                value = 0.7 * value
            elif parameter.ndim > 1:
                value = value / parameter[0].numel() ** 0.5
            elif "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * value
            else:
                value = 0.2 * value
            parameter.copy_(value)
    return module.eval()


def transformer(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random transformer of a form in FAMILIES."""
    return randomise(FAMILIES[name].build(), seed).to(dtype)


@functools.cache
def adapter_of(name: str) -> Adapter:
    """The adapter of a form in FAMILIES."""
    with torch.device("meta"):
        return find_adapter(FAMILIES[name].build())


def forms(can: str = "family") -> list[str]:
    """The forms in FAMILIES whose adapters have the member that says what they can do: "layouts" for a part of the
    tokens, "changes_resolution", "fused_attentions" and the like. Each is a pipeline in PIPELINES too."""
    return [name for name in FAMILIES if getattr(adapter_of(name), can)]


def one_each(names: list[str], which: int = 0) -> list[str]:
    """Of each family the first of these forms, or with -1 the last: where all of them would take long."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(adapter_of(name).family, []).append(name)
    return [several[which] for several in families.values()]


def spec_of(pipe: Any) -> ModelSpec:
    """The kinds of blocks of a pipeline's transformer."""
    return find_adapter(pipe.transformer).spec(pipe.transformer)


def call(
    name: str,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    height: int = HEIGHT,
    width: int = WIDTH,
    step: int = 0,
    text: int = TEXT,
    timestep: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one transformer call: same condition at each `step`, other latents and timestep."""
    condition = torch.Generator().manual_seed(7)
    noise = torch.Generator().manual_seed(100 + step)
    if FAMILIES[name].square:
        height = width = 8

    def randn(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    t = 900.0 - 150 * step if timestep is None else timestep
    if name.startswith("dit"):
        return {
            "hidden_states": randn(noise, batch, LATENT, height, width),
            "timestep": torch.full((batch,), int(t)),
            "class_labels": torch.arange(batch) + 3,
            "return_dict": False,
        }
    arguments: dict[str, Any] = {
        "hidden_states": randn(noise, batch, LATENT, height, width),
        "encoder_hidden_states": randn(condition, batch, text, 20),
        "timestep": torch.full((batch,), t, dtype=dtype),
        "return_dict": False,
    }
    if name.startswith("pixart"):
        mask = torch.ones(batch, text)
        mask[:, -1] = 0
        arguments["encoder_attention_mask"] = mask
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if name == "pixart-alpha":
            arguments["added_cond_kwargs"] = {
                "resolution": torch.tensor([[height, width]] * batch, dtype=dtype),
                "aspect_ratio": torch.tensor([[height / width]] * batch, dtype=dtype),
            }
        return arguments
    if name == "lumina":
        mask = torch.ones(batch, text, dtype=torch.int64)
        mask[:, -1] = 0
        # its time runs from 0, noise, to 1; its positions are cropped from a grid of any size
        return arguments | {
            "timestep": 1 - arguments["timestep"] / 1000,
            "encoder_mask": mask,
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
            "cross_attention_kwargs": {"base_sequence_length": 16},
        }
    if name == "lumina2":
        mask = torch.ones(batch, text, dtype=torch.int64)
        mask[1::2, -1] = 0
        time = 1 - arguments["timestep"] / 1000
        return arguments | {"timestep": time, "encoder_attention_mask": mask}
    if name == "wan":  # the halves of the picture are its frames
        return arguments | {"hidden_states": frames_of(arguments["hidden_states"])}
    if name == "qwen":
        mask = torch.ones(batch, text, dtype=torch.bool)
        mask[::2, -1] = False
        return arguments | {
            "hidden_states": randn(noise, batch, height * width // 4, 4 * LATENT),
            "encoder_hidden_states_mask": mask,
            "timestep": arguments["timestep"] / 1000,
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }
    if name.startswith("flux2"):
        sides = (1, 1, 1, text), (1, height // 2, width // 2, 1)
        ids = (torch.cartesian_prod(*map(torch.arange, axes)).repeat(batch, 1, 1) for axes in sides)
        return arguments | {
            "hidden_states": randn(noise, batch, height * width // 4, 4 * LATENT),
            "timestep": arguments["timestep"] / 1000,
            **({"guidance": torch.full((batch,), 3.5)} if name == "flux2" else {}),
            **dict(zip(("txt_ids", "img_ids"), ids, strict=True)),
        }
    if name == "zimage":  # prompts of unlike length, which the model pads to one
        prompts = arguments["encoder_hidden_states"]
        return {
            "x": list(arguments["hidden_states"].unsqueeze(2).unbind()),
            "t": 1 - arguments["timestep"] / 1000,
            "cap_feats": [own[: text - row % 2] for row, own in enumerate(prompts)],
            "return_dict": False,
        }
    if name == "hunyuanvideo15":  # of two frames; every other prompt has no glyphs
        masks = torch.ones(batch, text), torch.ones(batch, 3)
        masks[0][::2, -1] = masks[1][1::2] = 0
        return arguments | {
            "hidden_states": randn(noise, batch, 2 * LATENT + 1, 2, height // 2, width),
            "encoder_attention_mask": masks[0],
            "encoder_hidden_states_2": randn(condition, batch, 3, 12),
            "encoder_attention_mask_2": masks[1],
            "image_embeds": randn(condition, batch, 2, 12),
        }
    arguments["pooled_projections"] = randn(condition, batch, 12)
    if name.startswith("flux"):
        tokens = height * width // 4
        arguments["hidden_states"] = randn(noise, batch, tokens, 4 * LATENT)
        arguments["timestep"] = arguments["timestep"] / 1000
        ids = torch.stack(
            torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij"), -1
        )
        arguments["img_ids"] = torch.cat([torch.zeros(tokens, 1), ids.reshape(tokens, 2)], 1).to(
            dtype
        )
        arguments["txt_ids"] = torch.zeros(text, 3, dtype=dtype)
        arguments["guidance"] = (
            torch.full((batch,), 3.5, dtype=dtype) if name == "flux-dev" else None
        )
    return arguments


@contextmanager
def fp64_throughout() -> Iterator[None]:
    """Inside it `Tensor.float` leaves fp64 as it is."""

    def wide(self: Tensor) -> Tensor:
        return self if self.dtype is torch.float64 else self.to(torch.float32)

    Tensor.float = wide
    try:
        yield
    finally:
        del Tensor.float


def frames_of(picture: Tensor) -> Tensor:
    """A picture [B, C, 2 H, W] as a video [B, C, 2, H, W], of as many tokens in the same order."""
    return picture.unflatten(2, (2, -1))


def latents_given(name: str, given: dict[str, Any]) -> Tensor:
    """The latents in the arguments of a call, as a pipeline's scheduler has them."""
    adapter = adapter_of(name)
    return adapter.as_latents(given[adapter.image_argument])


def sample(output: Any) -> Tensor:
    """The velocities [B, ...] that come first in a transformer's output; some models give a list of them."""
    return torch.stack(output[0]) if isinstance(output[0], list) else output[0]


# ---- pipelines


def vae() -> nn.Module:
    """An autoencoder that keeps the size: one latent pixel per pixel."""
    model = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        sample_size=16,
    )
    return randomise(model, 1)


def video_vae() -> nn.Module:
    """Qwen's autoencoder, of videos of one frame; it keeps the size too."""
    model = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.1] * LATENT,
        latents_std=[1.5] * LATENT,
    )
    return randomise(model, 1)


def wan_vae() -> nn.Module:
    """Wan's autoencoder, of a latent frame and pixel for each of the video's."""
    model = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.1] * LATENT,
        latents_std=[1.5] * LATENT,
        scale_factor_temporal=1,  # its pipeline draws in multiples of 16 pixels, taken to be eight a latent's
    )
    return randomise(model, 1)


def normed_vae() -> nn.Module:
    """FLUX.2's autoencoder, which norms packed latents; it keeps the size too."""
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=16,
    )
    draw = torch.Generator().manual_seed(2)
    model.bn.running_mean.copy_(0.1 * torch.randn(4 * LATENT, generator=draw))
    model.bn.running_var.copy_(1 + torch.rand(4 * LATENT, generator=draw))
    return randomise(model, 1)


def hunyuanvideo15_vae() -> nn.Module:
    """HunyuanVideo-1.5's autoencoder, which keeps the size too."""
    model = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT,
        block_out_channels=(8,),
        layers_per_block=1,
        spatial_compression_ratio=1,
        temporal_compression_ratio=1,
    )
    model.use_slicing = True  # it decodes no batch at once
    return randomise(model, 1)


class Videos(HunyuanVideo15Pipeline):
    """The stock pipeline with the arguments of the others: it draws two frames, each of half a picture's height."""

    vision_num_semantic_tokens = property(lambda self: 2, lambda self, value: None)

    def __call__(
        self,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        num_frames: int = 2,
        **more: Any,
    ) -> Any:
        enabled = guidance_scale != 1
        self.guider = ClassifierFreeGuidance(guidance_scale, enabled=enabled)
        if latents is not None:  # a call's have a condition and a mask behind them
            latents = latents[:, :LATENT]
            latents = latents.unflatten(2, (num_frames, -1)) if latents.ndim == 4 else latents
        video = super().__call__(
            height=height // num_frames,
            width=width,
            num_frames=num_frames,
            num_videos_per_prompt=num_images_per_prompt,
            latents=latents,
            **more,
        )
        return SimpleNamespace(images=video.frames)


#: of families with other latents than pictures
_VAES = {
    "qwen": video_vae,
    "wan": wan_vae,
    "flux2": normed_vae,
    "hunyuanvideo15": hunyuanvideo15_vae,
}
_NO_TEXT = {
    "wan": ("text_encoder", "tokenizer"),
    "flux2": ("text_encoder", "tokenizer"),
    "hunyuanvideo15": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "qwen": ("text_encoder", "tokenizer"),
    "flux": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "sd3": (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ),
    "pixart": ("text_encoder", "tokenizer"),
    "dit": (),
    "lumina": ("text_encoder", "tokenizer"),
    "lumina2": ("text_encoder", "tokenizer"),
    "zimage": ("text_encoder", "tokenizer"),
}


@dataclass(frozen=True)
class Pipe:
    """A pipeline class with the transformer form and the scheduler it usually has."""

    family: str
    pipeline: type
    scheduler: Callable[[], Any]
    image_to_image: bool = False


PIPELINES: dict[str, Pipe] = {
    "sd3": Pipe("sd3", StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler),
    "sd3.5": Pipe("sd3.5", StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler),
    "sd3-img2img": Pipe(
        "sd3", StableDiffusion3Img2ImgPipeline, FlowMatchEulerDiscreteScheduler, True
    ),
    "flux": Pipe("flux", FluxPipeline, FlowMatchEulerDiscreteScheduler),
    "flux-dev": Pipe("flux-dev", FluxPipeline, FlowMatchEulerDiscreteScheduler),
    "flux-img2img": Pipe("flux-dev", FluxImg2ImgPipeline, FlowMatchEulerDiscreteScheduler, True),
    "pixart-alpha": Pipe("pixart-alpha", PixArtAlphaPipeline, DPMSolverMultistepScheduler),
    "pixart-sigma": Pipe("pixart-sigma", PixArtSigmaPipeline, DPMSolverMultistepScheduler),
    "dit": Pipe("dit", DiTPipeline, DDIMScheduler),
    "lumina": Pipe("lumina", LuminaPipeline, FlowMatchEulerDiscreteScheduler),
    "lumina2": Pipe("lumina2", Lumina2Pipeline, FlowMatchEulerDiscreteScheduler),
    "wan": Pipe("wan", WanPipeline, FlowMatchEulerDiscreteScheduler),
} | ({"qwen": Pipe("qwen", QwenImagePipeline, FlowMatchEulerDiscreteScheduler)} if HAS_QWEN else {})
if HAS_ZIMAGE:
    PIPELINES |= {
        "zimage": Pipe("zimage", ZImagePipeline, FlowMatchEulerDiscreteScheduler),
        "zimage-img2img": Pipe(
            "zimage", ZImageImg2ImgPipeline, FlowMatchEulerDiscreteScheduler, True
        ),
    }

if HAS_FLUX2:
    PIPELINES["flux2"] = Pipe("flux2", diffusers.Flux2Pipeline, FlowMatchEulerDiscreteScheduler)
    PIPELINES["flux2-klein"] = Pipe(
        "flux2-klein", diffusers.Flux2KleinPipeline, FlowMatchEulerDiscreteScheduler
    )
PIPELINES["hunyuanvideo15"] = Pipe("hunyuanvideo15", Videos, FlowMatchEulerDiscreteScheduler)

IMAGE_TO_IMAGE = [name for name, entry in PIPELINES.items() if entry.image_to_image]


def pipeline(
    name: str, dtype: torch.dtype = torch.float32, scheduler: Any = None, seed: int = 0
) -> Any:
    """A random pipeline of PIPELINES."""
    entry = PIPELINES[name]
    kind = entry.family.partition("-")[0].partition(".")[0]
    parts: dict[str, Any] = dict.fromkeys(_NO_TEXT[kind])
    if name == "hunyuanvideo15":
        parts["guider"] = ClassifierFreeGuidance()
    pipe = entry.pipeline(
        vae=_VAES.get(kind, vae)().to(dtype),
        transformer=transformer(entry.family, dtype, seed),
        scheduler=scheduler or entry.scheduler(),
        **parts,
    )
    if name.startswith("lumina"):
        pipe.vae_scale_factor = 1  # the others read it from their autoencoder
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    name: str,
    batch: int = 1,
    steps: int = 4,
    seed: int = 0,
    cfg: bool = True,
    dtype: torch.dtype = torch.float32,
    height: int = HEIGHT,
    width: int = WIDTH,
    prompt_per_image: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a pipeline call; latents come back.

    FLUX and PixArt get one prompt for several images unless `prompt_per_image`: FLUX does not repeat it.
    """
    entry = PIPELINES[name]
    condition = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=condition, dtype=torch.float64).to(dtype)

    result: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "guidance_scale": 4.0 if cfg else 1.0,
    }
    if name == "dit":
        # DiTPipeline has no latent output and no size; see `generate`.
        return result | {"class_labels": [3] * batch, "output_type": "np"} | more
    # StableDiffusion3Pipeline repeats given prompt embeddings for several images, but not the
    # pooled ones; LuminaPipeline and those of videos repeat none.
    repeats = prompt_per_image or name.startswith(("sd3", "lumina", "wan", "hunyuan"))
    prompts, images = (batch, 1) if repeats else (1, batch)
    result |= {
        "prompt_embeds": randn(prompts, TEXT, 20),
        "num_images_per_prompt": images,
        "height": height,
        "width": width,
    }
    if name.startswith("pixart"):
        result |= {
            "prompt": None,
            "negative_prompt": None,
            "negative_prompt_embeds": randn(prompts, TEXT, 20),
            "prompt_attention_mask": torch.ones(prompts, TEXT),
            "negative_prompt_attention_mask": torch.ones(prompts, TEXT),
            "use_resolution_binning": False,
        }
    elif name.startswith("lumina"):
        # Lumina 2's pipeline counts the tokens of a mask
        dtype_of_masks = torch.int64 if name == "lumina2" else torch.float32
        masks = torch.ones(2, prompts, TEXT, dtype=dtype_of_masks)
        if name == "lumina2":  # its guidance by default rescales by rows of the whole picture
            masks[0, ::2, -1] = masks[1, 1::2, -2:] = 0
            result["cfg_normalization"] = False
        result |= {
            "negative_prompt_embeds": randn(prompts, TEXT, 20),
            "prompt_attention_mask": masks[0],
            "negative_prompt_attention_mask": masks[1],
        }
    elif name == "wan":
        if cfg:
            result["negative_prompt_embeds"] = randn(prompts, TEXT, 20)
        # The pipeline counts one frame, and those that its autoencoder adds, of which there is none, as two.
        result |= {"height": 8 * (height // 2), "width": 8 * width, "num_frames": 1}
        result["num_videos_per_prompt"] = result.pop("num_images_per_prompt")
    elif name.startswith("zimage"):  # lists, of prompts of unlike length
        result["prompt_embeds"] = [randn(TEXT - row % 2, 20) for row in range(prompts)]
        result["guidance_scale"] = 4.0 if cfg else 0.0
        if cfg:
            result["negative_prompt_embeds"] = [randn(TEXT - 2, 20) for _ in range(prompts)]
    elif name == "qwen":
        result |= {"prompt_embeds_mask": torch.ones(prompts, TEXT), "true_cfg_scale": 1.0}
        result["prompt_embeds_mask"][:, -1] = 0
        del result["guidance_scale"]
        if cfg:  # of a prompt of another length
            result |= {
                "negative_prompt_embeds": randn(prompts, TEXT + 2, 20),
                "negative_prompt_embeds_mask": torch.ones(prompts, TEXT + 2),
                "true_cfg_scale": 4.0,
            }
    elif name.startswith("flux2"):
        if name == "flux2-klein" and cfg:
            result["negative_prompt_embeds"] = randn(prompts, TEXT, 20)
    elif name == "hunyuanvideo15":  # the negative prompt is of another length, and half have glyphs
        for kind, longer in (("", 0), ("negative_", 2)) if cfg else (("", 0),):
            masks = torch.ones(prompts, TEXT + longer), torch.zeros(prompts, 3)
            masks[0][1::2, -1] = 0
            masks[1][1::2] = bool(longer)
            result |= {
                f"{kind}prompt_embeds": randn(prompts, TEXT + longer, 20),
                f"{kind}prompt_embeds_mask": masks[0],
                f"{kind}prompt_embeds_2": randn(prompts, 3, 12),
                f"{kind}prompt_embeds_mask_2": masks[1],
            }
    else:
        result["pooled_prompt_embeds"] = randn(prompts, 12)
    flux1 = name.startswith("flux") and not name.startswith("flux2")
    if name.startswith("sd3") or (flux1 and cfg):
        result["negative_prompt_embeds"] = randn(prompts, TEXT, 20)
        result["negative_pooled_prompt_embeds"] = randn(prompts, 12)
    if flux1:
        result |= {"guidance_scale": 3.5, "true_cfg_scale": 4.0 if cfg else 1.0}
    if entry.image_to_image:
        result |= {"image": randn(1, 3, height, width).sigmoid(), "strength": 0.6}
    return result | more


def asked(name: str, height: int = HEIGHT, width: int = WIDTH) -> dict[str, int]:
    """What `explain` is asked about a run of `arguments` of this size."""
    if name == "wan":
        return {"height": 8 * (height // 2), "width": 8 * width, "frames": 2}
    if name == "hunyuanvideo15":
        return {"height": height // 2, "width": width, "frames": 2}
    return {"height": height, "width": width}


def of_one_text(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call without what stands beside the prompt: HunyuanVideo-1.5's glyphs and image."""
    beside = ("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds")
    return {key: value[:, :0] if key in beside else value for key, value in given.items()}


def generate(pipe: Any, name: str, **kwargs: Any) -> Tensor:
    """The latents that a run ends with."""
    if "dtype" not in kwargs:
        kwargs["dtype"] = pipe.transformer.dtype
    return latents_of(pipe, arguments(name, **kwargs))


def latents_of(pipe: Any, given: dict[str, Any]) -> Tensor:
    """The latents that ``pipe(**given)`` ends with; DiTPipeline shows them to its autoencoder only."""
    if not isinstance(pipe, DiTPipeline):
        found = pipe(**given)
        return found.images if hasattr(found, "images") else found.frames
    seen = []
    decode = pipe.vae.decode

    def observe(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents)
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = observe
    try:
        pipe(**given)
    finally:
        del pipe.vae.decode
    return seen[-1]
