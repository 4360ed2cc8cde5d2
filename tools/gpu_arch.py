"""Print the FASTDIT_CUDA_ARCHS of the GPU at hand; nothing where there is none."""

import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    letter = "a" if major in (9, 10) else ""  # these have instructions of their own
    print(f"{major}{minor}{letter}-real")
