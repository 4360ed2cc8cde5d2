"""Whether anybody looks at what a module is given or gives, so that it may not be left out or replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

#: classes of accelerate's and diffusers' hooks that move weights
_MOVING = (
    "AlignDevicesHook",
    "GroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LazyPrefetchGroupOffloadingHook",
)


def unobserved(module: nn.Module) -> bool:
    """Whether nobody looks into it or scales it: no hook, no adapter of peft."""
    return not any(observed(part) or hasattr(part, "base_layer") for part in module.modules())


def unobserved_where_called(module: nn.Module) -> bool:
    """Whether nobody does so but to move weights in: where modules are called as they are, or not at all."""
    return not any(
        (observed(part) and not _moved(part)) or hasattr(part, "base_layer")
        for part in module.modules()
    )


def _moved(module: nn.Module) -> bool:
    """Whether all hooks of the module are those of offloading."""
    state: Mapping[str, Any] = module.__dict__
    registry, hook = state.get("_diffusers_hook"), state.get("_hf_hook")
    hooks = [*(() if registry is None else registry.hooks.values()), *([hook] if hook else [])]
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"]) and all(
        type(hook).__name__ in _MOVING for hook in hooks
    )


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
