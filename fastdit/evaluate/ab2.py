"""Adams and Bashforth's method of second order as a scheduler: the strongest baseline that uses each output twice.

x' = x + h (v + h / (2 h') (v - v')), where h is the step, h' the one before and v' its velocity; Euler's step first. It
is what Euler takes from a velocity that is drawn on as a line.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class AB2Scheduler(FlowMatchEulerDiscreteScheduler):
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
