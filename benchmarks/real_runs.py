"""Stock pipelines around transformers of the published sizes, which draw from embeddings to latents.

Random weights (`real_models.py`), so the pictures mean nothing and the seconds everything. Prompts come as embeddings
and latents go out: neither a text encoder nor the last decoding is timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from real_models import RealModel, build_vae

SIDE, TINY_SIDE = 1024, 128  # pixels
TINY_STEPS = 6


class Runs:
    """One model's pipeline and what draws with it.

    Args:
        real: The model.
        tiny: No width, few tokens and steps.
        shallow: Four blocks of a kind.

    Attributes:
        steps: The model's usual number.
    """

    def __init__(
        self,
        real: RealModel,
        device: torch.device,
        dtype: torch.dtype,
        tiny: bool,
        shallow: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.real = real
        self.tiny = tiny
        self.steps = TINY_STEPS if tiny else real.steps
        depths = dict.fromkeys(real.depths(), 4) if shallow else {}
        self.pipe = _pipeline(real, real.build(device, dtype, tiny, **depths), tiny)
        self.pipe.set_progress_bar_config(disable=True)
        side = TINY_SIDE if tiny else SIDE
        self.prompt = _prompt(real, self.transformer, 8 if tiny else real.text)
        self.prompt |= {"height": side, "width": side, "output_type": "latent"}
        if real.cls == "FluxTransformer2DModel":
            self.prompt["guidance_scale"] = 3.5

    @property
    def transformer(self) -> nn.Module:
        """The pipeline's."""
        return self.pipe.transformer

    def draw(self, steps: int | None = None) -> Tensor:
        """Latents, of the same noise at each call."""
        generator = torch.Generator(self.transformer.device).manual_seed(0)
        steps = steps or self.steps
        return self.pipe(**self.prompt, num_inference_steps=steps, generator=generator).images


def _pipeline(real: RealModel, transformer: nn.Module, tiny: bool) -> Any:
    """The model's stock pipeline around `transformer`, with a VAE where RALU looks for edges."""
    import diffusers

    if real.cls == "PixArtTransformer2DModel":
        return diffusers.PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    weight = next(transformer.parameters())
    vae = build_vae((32,) * 4) if tiny else build_vae()
    parts = {
        "vae": vae.to(weight.device, weight.dtype),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    } | dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if real.cls == "FluxTransformer2DModel":
        return diffusers.FluxPipeline(**parts)
    return diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def _prompt(real: RealModel, model: nn.Module, text: int) -> dict[str, Any]:
    """Embeddings of a prompt, and of a negative one where the model is guided by it."""
    weight = next(model.parameters())

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=weight.device, dtype=weight.dtype)

    config = model.config
    if real.cls == "PixArtTransformer2DModel":
        mask = torch.ones(1, text, device=weight.device)
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": new(1, text, config.caption_channels),
            "negative_prompt_embeds": new(1, text, config.caption_channels),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "use_resolution_binning": False,
        }
    given = {
        "prompt_embeds": new(1, text, config.joint_attention_dim),
        "pooled_prompt_embeds": new(1, config.pooled_projection_dim),
    }
    if real.batch > 1:
        given |= {f"negative_{name}": torch.randn_like(value) for name, value in given.items()}
    return given
