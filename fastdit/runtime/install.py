"""A rewritten forward goes into a module instance, below every hook, and out again.

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
    """This refuses a module whose innermost forward is neither its class's nor ours.

    Raises:
        UnsupportedModelError: Somebody else has replaced the instance's forward.
    """
    if not is_installable(module):
        replaced = module.__dict__["forward"]
        raise UnsupportedModelError(
            f"the forward of this {type(module).__name__} was replaced on the instance by "
            f"{getattr(replaced, '__qualname__', replaced)!r}; undo that before patching"
        )


def is_installable(module: nn.Module) -> bool:
    """This tells whether a module's innermost forward is its class's, or ours."""
    replaced = "forward" in module.__dict__ and _stock_holder(module) is None
    return is_installed(module) or not replaced


def install(module: nn.Module, link: Any) -> None:
    """The innermost forward of `module` becomes one that calls ``link(module, *args, **kwargs)``.

    Of a link that `compiles` it is the class's own where torch's compiler traces it; others stay eager.
    :func:`check_installable` must have passed, and nothing of ours be installed.
    """
    holder, key = _stock_holder(module) or (module.__dict__, "forward")
    module.__dict__[LINK] = link
    rewritten = _rewritten(type(module), getattr(link, "compiles", False))
    holder[key] = types.MethodType(rewritten, module)


def uninstall(module: nn.Module) -> None:
    """This undoes :func:`install`, wherever our forward is now. It does nothing on a module that has none."""
    for holder, key in _holders(module):
        if hasattr(_function(holder, key), _MARK):
            if holder is module.__dict__ and key == "forward":
                del holder[key]
            else:
                holder[key] = types.MethodType(type(module).forward, module)
    module.__dict__.pop(LINK, None)


def is_installed(module: nn.Module) -> bool:
    """This tells whether :func:`install` is in effect on the module."""
    return any(hasattr(_function(*holder), _MARK) for holder in _holders(module))


def _stock_holder(module: nn.Module) -> tuple[dict[str, Any], str] | None:
    """This finds where hooks keep the class's own forward, if they do."""
    stock = type(module).forward
    return next((holder for holder in _holders(module) if _function(*holder) is stock), None)


def _holders(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """The module's forward is in one of these dicts, under this key, or under several."""
    registry = module.__dict__.get("_diffusers_hook")
    for reference in () if registry is None else registry._fn_refs:
        yield vars(reference), "original_forward"
        yield vars(reference), "forward"
    yield module.__dict__, "_old_forward"
    yield module.__dict__, "forward"


def _function(holder: dict[str, Any], key: str) -> Any:
    return getattr(holder.get(key), "__func__", None)


@functools.cache
def _rewritten(cls: type[nn.Module], compiles: bool) -> Callable:
    """This makes the dispatcher for blocks of class `cls`, with the signature of the forward it stands for."""

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
