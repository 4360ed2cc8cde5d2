"""Previews show the image as it forms: what each step of a run takes the clean image to be.

A latent after a few steps is mostly noise. What looks like the image is the estimate that the step itself makes: where
the straight line from the sample along the model's output ends. It is decoded only when somebody looks.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import ArgumentError


class Previews:
    """These are the estimates of one run's steps, as `Handle.watch` collects them.

    Attributes:
        latents: One estimate for each executed step, as the pipeline holds its latents.
        grid: Tokens down and across, which packed latents do not show.
    """

    def __init__(self, adapter: Any, pipeline: Any) -> None:
        self.latents: list[Tensor] = []
        self._adapter = adapter
        self._pipeline = pipeline
        self.grid: tuple[int, int] = (0, 0)
        self._run: Any = None

    def begin(self, run: Any) -> bool:
        """An earlier run is forgotten and this one watched, unless it begins inside a run that is watched."""
        before = self._run and self._run()
        if before is not None and before.live and before.first is not None:
            return False
        self._run = weakref.ref(run)
        self.latents.clear()
        return True

    def add(self, scheduler: Any, velocity: Tensor, timestep: Any, sample: Tensor) -> None:
        """This keeps the estimate of the step that `scheduler` is about to do."""
        self.latents.append(estimate(scheduler, velocity, timestep, sample))

    @torch.no_grad()
    def pictures(self, sample: int = 0) -> list[np.ndarray]:
        """The pipeline's VAE decodes one picture for each executed step, uint8 [H, W, 3].

        Args:
            sample: Which image of the batch.

        Raises:
            ArgumentError: No run was watched, or there is no such image.
        """
        if not self.latents:
            raise ArgumentError(
                "no run was watched: call the pipeline inside `with handle.watch()`"
            )
        if not 0 <= sample < len(self.latents[0]):
            raise ArgumentError(f"sample must be 0 to {len(self.latents[0]) - 1}, got {sample}")
        pipe, vae = self._pipeline, self._pipeline.vae
        processor = getattr(pipe, "image_processor", None) or pipe.video_processor
        found = []
        for latents in self.latents:
            one = self._adapter.latent_image(latents[sample : sample + 1], self.grid)
            image = self._adapter.decode(one, vae)
            drawn = processor.postprocess(image, output_type="np")[0]
            found.append(np.round(drawn * 255).astype(np.uint8))
        return found


def estimate(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """This is the clean sample that a step sees, in the sample's dtype.

    For flow models the end of the line, x + (sigma_end - sigma) v; for others DDIM's x0 (arXiv 2010.02502, eq. 12) from
    noise or velocity. Any other scheduler gives its sample as it is.
    """
    prediction = scheduler.config.get("prediction_type")
    if prediction in (None, "flow_prediction") and hasattr(scheduler, "sigmas"):
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index or scheduler.index_for_timestep(timestep)
        sigmas = scheduler.sigmas
        return (sample + (sigmas[-1] - sigmas[index]) * output).to(sample.dtype)
    if not hasattr(scheduler, "alphas_cumprod"):
        return sample
    # A model that learns its variance puts it behind the channels of the sample.
    output = output[:, : sample.shape[1]]
    signal = scheduler.alphas_cumprod.to(sample.device)[torch.as_tensor(timestep).long()]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    if prediction == "epsilon":
        return ((sample - sigma * output) / alpha).to(sample.dtype)
    if prediction == "v_prediction":
        return (alpha * sample - sigma * output).to(sample.dtype)
    return output if prediction == "sample" else sample
