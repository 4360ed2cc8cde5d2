"""The trained whole of the ``transformer`` stage: two text encoders and the denoiser.

Bundles them into one module so that they share an optimiser, an average and a checkpoint,
and computes the flow-matching loss. The training loop is in ``train_transformer.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .models import build_text_encoder, build_transformer
from .recipe import Sizes
from .shapes import SHAPES_RECIPE
from .tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection


class Denoiser(torch.nn.Module):
    """Stock transformer and text encoders are used the way Stable Diffusion 3 uses them."""

    def __init__(self, sizes: Sizes = SHAPES_RECIPE.sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.text_encoder = build_text_encoder(sizes.text, sizes.words)
        self.text_encoder_2 = build_text_encoder(sizes.text, sizes.words)
        self.transformer = build_transformer(sizes.transformer, sizes.text, sizes.vae)
        self.tokenizer = build_tokenizer(sizes.text.max_tokens, sizes.words)

    def encoders(self) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
        """These are both text encoders, in the order in which their features are joined."""
        return self.text_encoder, self.text_encoder_2

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text becomes token features ``[n, tokens, 2 * width]`` and pooled features ``[n, 2 * width]``."""
        ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders()]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return tokens, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def loss(
        self,
        latents: torch.Tensor,
        captions: list[str],
        noise: torch.Generator,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> torch.Tensor:
        """The flow-matching loss is the mean squared error of the predicted velocity.

        Parameters
        ----------
        latents : torch.Tensor
            Scaled latents ``[n, channels, h, w]``, float32.
        captions : list of str
            One per latent; ``""`` trains the unconditional branch.
        noise : torch.Generator
            Draws noise and times.
        mean, std : float
            Of the logit of the time. What is drawn where is decided at noisy times, which
            a positive mean favours; edges are drawn at the others.
        """
        tokens, pooled = self.encode(captions)
        sigma = torch.sigmoid(torch.randn(len(latents), generator=noise) * std + mean)
        gaussian = torch.randn(latents.shape, generator=noise)
        level = sigma[:, None, None, None]
        predicted = self.transformer(
            hidden_states=(1.0 - level) * latents + level * gaussian,
            timestep=sigma * 1000.0,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (predicted - (gaussian - latents)).square().mean()
