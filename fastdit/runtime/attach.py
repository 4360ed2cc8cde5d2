"""A patch goes into a transformer and its pipeline, and out again, also half of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import nn

from fastdit.runtime.install import LINK, install, uninstall
from fastdit.runtime.links import BlockLink, CallLink, ComponentLink, ConditionLink

if TYPE_CHECKING:
    from fastdit.runtime.patched import Patched

#: a module, and what makes the link that its rewritten forward calls
Rewrite = tuple[nn.Module, Callable[["Patched"], Callable[..., Any]]]


def rewrites(
    adapter: Any, transformer: nn.Module, embeds: bool, eager: bool, linears: Sequence[nn.Linear]
) -> list[Rewrite]:
    """The forwards of these modules are rewritten.

    Args:
        embeds: The modules that embed patches are among them.
        eager: Nothing is computed once for several calls.
        linears: Layers whose weights are kept packed.
    """
    blocks, wrapped = adapter.blocks(transformer), adapter.wrapped(transformer)
    found: list[Rewrite] = [
        (block, partial(BlockLink, kind=kind, index=index))
        for index, (kind, block) in enumerate(blocks)
    ]
    if embeds:
        found += _of_call("embed", adapter.embedders(transformer))
    if not eager:
        found += _of_call("project_prompt", adapter.prompt_projections_of(transformer))
        conditions = adapter.condition_embeddings_of(transformer)
        found += [(module, ConditionLink) for module in conditions]
    found += _of_call("run.prepacked.linear", linears, compiles=True)
    found += [
        (module, partial(ComponentLink, index=index, name=name)) for index, name, module in wrapped
    ]
    return found


def _of_call(method: str, modules: Sequence[nn.Module], compiles: bool = False) -> list[Rewrite]:
    link = partial(CallLink, method=attrgetter(method), compiles=compiles)
    return [(module, link) for module in modules]


def attach(
    patched: Patched, transformer: nn.Module, pipeline: Any, rewritten: Sequence[Rewrite]
) -> None:
    """This puts `patched` in; if that breaks off, nothing of it stays."""
    try:
        transformer.__dict__[LINK] = patched
        for module, link in rewritten:
            install(module, link(patched))
        if patched.graphs is not None or patched.forecasts:
            install(transformer, patched)
        transformer.register_forward_pre_hook(patched.forward_pre_hook, with_kwargs=True)
        transformer.register_forward_hook(patched.forward_hook, with_kwargs=True, always_call=True)
        if pipeline is not None:
            patched.followed.follow(pipeline)
    except BaseException:
        remove(transformer)
        raise


def remove(transformer: nn.Module, verb: str = "unpatch") -> None:
    """This takes the patch out, if there is one. The link to it goes last, so that it can be repeated if broken off.

    Raises:
        FastDiTError: A run is in progress.
    """
    patched = transformer.__dict__.get(LINK)
    if patched is None:
        return
    patched.runs.refuse_while_running(verb)
    parts = {id(module): module for module in (*transformer.modules(), *patched.blocks)}
    del parts[id(transformer)]
    for module in parts.values():
        uninstall(module)
    _remove_hooks(transformer, patched)
    patched.followed.unfollow()
    patched.runs.end()
    uninstall(transformer)


def _remove_hooks(transformer: nn.Module, patched: Patched) -> None:
    for names in (
        ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
        ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ):
        hooks = getattr(transformer, names[0])
        for key in [
            key for key, hook in hooks.items() if getattr(hook, "__self__", None) is patched
        ]:
            # The hook itself last: an interrupted removal finds it again.
            for name in reversed(names):
                getattr(transformer, name).pop(key, None)
