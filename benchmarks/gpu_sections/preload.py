"""Everything that sections import, once: their processes are forks of the one that imports this.

Nothing here may touch the GPU, which no fork could then use; `place.py` looks whether that held.
"""

from __future__ import annotations

import contextlib
import os

# Whether there is a GPU is asked of its library of monitoring, which needs no context.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# What is not installed is missed by the section that needs it, which says so.
with contextlib.suppress(Exception):
    import torch._dynamo
    import torch._inductor  # noqa: F401

with contextlib.suppress(Exception):
    import fastdit.tiny  # noqa: F401

with contextlib.suppress(Exception):
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        PixArtSigmaPipeline,
        StableDiffusion3Pipeline,
    )
