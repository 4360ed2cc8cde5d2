"""The DDIM sampler that the published routers were trained with: each step goes to the next timestep of the list.

diffusers' own takes t - 1000 // T for the step before, which is the list's neighbour for "leading" spacing alone: with
"linspace" and ten steps it pairs 999 with 899 where the list says 888 (spec section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor


class ListedDDIM(DDIMScheduler):
    """This is DDIM with eta 0 and no clipping, on the neighbours of its own timestep list.

    Example:
        >>> pipe.scheduler = ListedDDIM.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """It gives sqrt(a') x0 + sqrt(1 - a') eps, x0 = (x - sqrt(1 - a) eps) / sqrt(a); a' = 1 after the last step."""
        later = self.timesteps[self.timesteps < timestep]
        here = self.alphas_cumprod[int(timestep)].to(sample)
        there = (
            self.alphas_cumprod[int(later[0])].to(sample) if len(later) else torch.ones_like(here)
        )
        start = (sample - (1 - here).sqrt() * model_output) / here.sqrt()
        moved = there.sqrt() * start + (1 - there).sqrt() * model_output
        return DDIMSchedulerOutput(moved, start) if return_dict else (moved, start)
