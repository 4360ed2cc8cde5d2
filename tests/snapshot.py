"""Everything patching could leave behind on a model or scheduler, as one comparable value."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_state_dict_hooks",
)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Tree, classes, instance attributes, forwards, hooks, processors and parameters of a model."""
    return {
        name: {
            "class": type(part),
            "id": id(part),
            "attributes": {key: _value(value) for key, value in part.__dict__.items()},
            "forward": _function(part.forward),
            "hooks": {key: dict(getattr(part, key)) for key in HOOKS},
            "diffusers": _registry(part),
            "processor": getattr(part, "processor", None),
            "parameters": {key: id(p) for key, p in part._parameters.items()},
        }
        for name, part in module.named_modules()
    } | {"state": {key: _value(value) for key, value in module.state_dict().items()}}


def scheduler_snapshot(scheduler: Any) -> dict[str, Any]:
    """Class and attribute names of a scheduler, with those values that a run does not change."""
    return {
        "class": type(scheduler),
        "attributes": set(scheduler.__dict__),
        "config": dict(scheduler.config),
        "methods": (scheduler.step.__func__, scheduler.set_timesteps.__func__),
    }


def _value(value: Any) -> Any:
    """Something whose equality means: the same object, or an equal plain one."""
    if isinstance(value, Tensor):
        return ("tensor", value.data_ptr(), value._version)
    if isinstance(value, dict):
        return {key: _value(entry) for key, entry in value.items()}
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return value
    return _function(value)


def _function(value: Any) -> Any:
    return (id(getattr(value, "__self__", None)), getattr(value, "__func__", value))


def _registry(module: nn.Module) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return None
    references = [
        (_function(ref.forward), _function(ref.original_forward)) for ref in registry._fn_refs
    ]
    return list(registry.hooks.items()), references
