"""What every backend of CUDA devices asks before it says that it can serve one."""

from __future__ import annotations

import torch


def refuse_device(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why a CUDA device cannot be used here; None if it can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device: no driver, or none visible"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        needed, has = (".".join(map(str, pair)) for pair in (capability, found))
        return f"it needs compute capability {needed}; this device has {has}"
    return None
