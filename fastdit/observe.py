"""Whether anybody looks at what a module is given or gives, so that it may not be left out or replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def unobserved(module: nn.Module) -> bool:
    """Whether nobody looks into it or scales it: no hook, no adapter of peft."""
    return not any(observed(part) or hasattr(part, "base_layer") for part in module.modules())


def observed(module: nn.Module) -> bool:
    """Whether somebody's hook sees the module's inputs or outputs."""
    state: Mapping[str, Any] = module.__dict__
    registry = state.get("_diffusers_hook")
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or "_old_forward" in state
        or (registry is not None and registry.hooks)
    )
