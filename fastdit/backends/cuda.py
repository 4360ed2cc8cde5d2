"""The CUDA kernels of csrc: one pass over memory, sums in fp32, one rounding at the end.

fp32, bf16 and fp16 on devices of compute capability 8.0 and up; fp64 is left to `reference`. Any
width and alignment is served, and gives the same bits; addresses and strides that are multiples of
16 bytes are quicker. Launches go to torch's current stream and nothing waits. Nothing is allocated,
but for the keys of token_select and the partial sums of blend_backward, which torch allocates: calls
can be captured into a CUDA graph.
Rows that are out of range are undefined: their values are on the device, where looking at them
would wait.
"""

from __future__ import annotations

import functools

import torch

from fastdit.backends._compiled import DTYPE_CODES, Compiled, load
from fastdit.backends._device import refuse_device

_cuda, _MISSING = load("_cuda")
CAPABILITY = (8, 0)  # bf16 conversions


class Cuda(Compiled):
    name = "cuda"
    # Above `triton`, whose launches cost the host several times as much.
    priority = 8

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPE_CODES:
            return f"it has float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if self.module is None:
            return f"{_MISSING}; install where nvcc is found"
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        return refuse_device(device, CAPABILITY) or self._refuse_build(device)

    def _refuse_build(self, device: torch.device) -> str | None:
        built = self.module.info()["archs"]
        found = torch.cuda.get_device_capability(device)
        if runs_on(built, found):
            return None
        return (
            f"it was built for {built}, not for {found[0]}.{found[1]}: install again with "
            "FASTDIT_CUDA_ARCHS"
        )

    def _context(self, x, stored):
        device = x.device.index
        return device, torch._C._cuda_getCurrentRawStream(device)

    def _scratch(self, shape, device):
        return torch.empty(shape, dtype=torch.int32, device=device)


@functools.cache
def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for these CMAKE_CUDA_ARCHITECTURES runs on a device.

    A real target serves its own major version from its minor version on, one with a letter its own
    device only; a virtual one is compiled by the driver for any newer device.
    """
    major, _ = capability
    for target in built.replace(";", " ").split():
        number, _, kind = target.partition("-")
        digits = number.rstrip("af")
        own = int(digits[:-1]), int(digits[-1])
        same_major = own[0] == major and own <= capability
        if kind != "virtual" and (own == capability if number.endswith("a") else same_major):
            return True
        if kind != "real" and number == digits and own <= capability:
            return True
    return False


BACKEND = Cuda(_cuda)
