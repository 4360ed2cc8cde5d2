"""Put a rewritten forward into a module instance, below every hook, and take it out again.

Classes are never touched. diffusers' hook registry and accelerate both keep the forward they found when they were
attached; the rewritten one goes where that reference is, so hooks stay outside whether they came before or after.
Removal looks for our function wherever hooks may have moved it meanwhile, which also makes it work on a deep copy.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastdit.errors import UnsupportedModelError

_MARK = "_fastdit_forward"
#: instance attribute that links a module, a scheduler or a pipeline to what patched it
LINK = "_fastdit"


def check_installable(module: nn.Module) -> None:
    """Refuse a module whose innermost forward is neither its class's nor ours.

    Raises:
        UnsupportedModelError: Somebody else has replaced the instance's forward.
    """
    if not is_installed(module) and _stock_place(module) is None and "forward" in module.__dict__:
        replaced = module.__dict__["forward"]
        raise UnsupportedModelError(
            f"the forward of this {type(module).__name__} was replaced on the instance by "
            f"{getattr(replaced, '__qualname__', replaced)!r}; undo that before patching"
        )


def install(module: nn.Module, link: Any, compiles: bool = False) -> None:
    """Replace the innermost forward of `module` by one that calls ``link(module, *args, **kwargs)``.

    One that `compiles` is the class's own where torch's compiler traces it; others stay eager.
    :func:`check_installable` must have passed, and nothing of ours be installed.
    """
    owner, key = _stock_place(module) or (module.__dict__, "forward")
    module.__dict__[LINK] = link
    _set(owner, key, types.MethodType(_rewritten(type(module), compiles), module))


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`, wherever our forward sits now. Does nothing on a module that has none."""
    for owner, key in _places(module):
        if hasattr(_function(_get(owner, key)), _MARK):
            if owner is module.__dict__ and key == "forward":
                del owner[key]
            else:
                _set(owner, key, types.MethodType(type(module).forward, module))
    module.__dict__.pop(LINK, None)


def is_installed(module: nn.Module) -> bool:
    """Whether :func:`install` is in effect on the module."""
    return any(hasattr(_function(_get(owner, key)), _MARK) for owner, key in _places(module))


def _stock_place(module: nn.Module) -> tuple[Any, str] | None:
    """Where hooks keep the class's own forward, if they do."""
    stock = type(module).forward
    return next(
        (place for place in _places(module) if _function(_get(*place)) is stock),
        None,
    )


def _places(module: nn.Module) -> Iterator[tuple[Any, str]]:
    for reference in _hook_references(module):
        yield reference, "original_forward"
        yield reference, "forward"
    yield module.__dict__, "_old_forward"
    yield module.__dict__, "forward"


def _hook_references(module: nn.Module) -> list[Any]:
    registry = module.__dict__.get("_diffusers_hook")
    return list(registry._fn_refs) if registry is not None else []


def _function(method: Any) -> Any:
    return getattr(method, "__func__", None)


def _get(owner: Any, key: str) -> Any:
    return owner.get(key) if isinstance(owner, dict) else getattr(owner, key)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    else:
        setattr(owner, key, value)


@functools.cache
def _rewritten(cls: type[nn.Module], compiles: bool) -> Callable:
    """The dispatcher for blocks of class `cls`; it shows the signature of the forward it stands for."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiles and torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        link = self.__dict__.get(LINK)
        if link is None:  # unpatched, but somebody still holds on to this function
            return cls.forward(self, *args, **kwargs)
        return link(self, *args, **kwargs)

    found = forward
    if not compiles:
        found = torch.compiler.disable(
            forward,
            reason="fastdit's block dispatcher reads the step and the caches and stays eager; its attention and "
            "feed-forward calls are compiled apart. Use compile_repeated_blocks() or transformer.compile(), "
            "without fullgraph=True",
        )
    functools.update_wrapper(found, cls.forward)
    setattr(found, _MARK, True)
    return found
