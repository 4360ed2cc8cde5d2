"""Euler's method on the trailing grid, and Adams and Bashforth's of second order, as schedulers.

The trailing grid is 1, 1 - 1/n, ..., 1/n before the shift; pipelines that give levels of their own have theirs. Adams
and Bashforth's is the strongest baseline that uses each output twice:
x' = x + h (v + h / (2 h') (v - v')), where h is the step, h' the one before and v' its velocity; Euler's step first. It
is what Euler takes from a velocity that is drawn on as a line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class TrailingScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's with the trailing grid where no levels are given."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As diffusers', whose pipelines ask for these names."""
        if sigmas is None and timesteps is None and num_inference_steps:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


class AB2Scheduler(TrailingScheduler):
    """It has Euler's sigmas and arguments."""

    before: tuple[Tensor, float] | None = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """The velocity in the middle of the step stands for that at its beginning."""
        if self.step_index is None:  # a run begins without a velocity
            self._init_step_index(timestep)
            self.before = None
        here, there = (float(self.sigmas[self.step_index + i]) for i in (0, 1))
        velocity = model_output
        if self.before is not None:
            older, sigma = self.before
            velocity = velocity + (there - here) / (2 * (here - sigma)) * (velocity - older)
        self.before = model_output, here
        return super().step(velocity, timestep, sample, **kwargs)
