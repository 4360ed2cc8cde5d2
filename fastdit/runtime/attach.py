"""A patch goes into a transformer and its pipeline, and out again, also half of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import nn

from fastdit.runtime.install import LINK, install, uninstall
from fastdit.runtime.links import BlockLink, CallLink, ComponentLink, ConditionLink

if TYPE_CHECKING:
    from fastdit.runtime.patched import Patched


@dataclass(frozen=True)
class Rewrites:
    """These are the modules whose forwards are rewritten.

    Attributes:
        blocks: (kind, block) in running order.
        embedders, prompts, conditions: See the adapter's members of these names.
        linears: Layers whose weights are kept packed.
        wrapped: (block, component, module) of components that are wrapped as they are.
    """

    blocks: Sequence[tuple[str, nn.Module]]
    embedders: Sequence[nn.Module] = ()
    prompts: Sequence[nn.Module] = ()
    conditions: Sequence[nn.Module] = ()
    linears: Sequence[nn.Linear] = ()
    wrapped: Sequence[tuple[int, str, nn.Module]] = ()

    def modules(self) -> list[nn.Module]:
        """These are all of them."""
        found = [block for _, block in self.blocks] + [module for *_, module in self.wrapped]
        return [*found, *self.embedders, *self.prompts, *self.conditions, *self.linears]


def attach(patched: Patched, transformer: nn.Module, pipeline: Any, rewrites: Rewrites) -> None:
    """This puts `patched` in; if that breaks off, nothing of it stays."""
    try:
        transformer.__dict__[LINK] = patched
        for index, (kind, block) in enumerate(rewrites.blocks):
            install(block, BlockLink(patched, kind, index))
        for module in rewrites.embedders:
            install(module, CallLink(patched, attrgetter("embed")))
        for module in rewrites.prompts:
            install(module, CallLink(patched, attrgetter("project_prompt")))
        for module in rewrites.conditions:
            install(module, ConditionLink(patched))
        for module in rewrites.linears:
            install(module, CallLink(patched, attrgetter("run.packed.linear")), compiles=True)
        for index, name, module in rewrites.wrapped:
            install(module, ComponentLink(patched, index, name))
        if patched.graphs is not None:
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
