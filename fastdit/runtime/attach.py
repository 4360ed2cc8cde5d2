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


def rewrites(patched: Patched, transformer: nn.Module) -> list[Rewrite]:
    """The forwards of these modules are rewritten."""
    adapter = patched.adapter
    blocks = adapter.blocks(transformer)
    following = [kind for kind, _ in blocks[1:]] + [None]
    found: list[Rewrite] = [
        (block, partial(BlockLink, kind=kind, index=index, ends=kind != following[index]))
        for index, (kind, block) in enumerate(blocks)
    ]
    if patched.writer("rows") or patched.writer("resolution"):
        found += _of_call("embed", adapter.embedders(transformer))
    elif not patched.eager:
        found += _of_call("embed", adapter.position_embeddings_of(transformer), compiles=True)
        found += _of_call("embed", adapter.table_embeddings_of(transformer), compiles=True)
    keys = [] if patched.eager else adapter.prompt_key_layers_of(transformer)
    if not patched.eager:
        found += _of_call("project_prompt", adapter.prompt_projections_of(transformer))
        found += _of_call("project_prompt_keys", keys, compiles=True)
        conditions = adapter.condition_embeddings_of(transformer)
        found += [(module, ConditionLink) for module in conditions]
        found += _of_call("modulate", adapter.shared_modulations_of(transformer), compiles=True)
        found += _of_call("norm_output", adapter.output_norms_of(transformer), compiles=True)
        output = adapter.modulated_output_of(transformer)
        for method, module in zip(("hold_output", "project_held"), output, strict=False):
            found += _of_call(method, [module], compiles=True)
    packed = [layer for layer in patched.linears if layer not in keys]
    found += _of_call("run.prepacked.linear", packed, compiles=True)
    for index, name, module in adapter.wrapped(transformer):
        found.append((module, partial(ComponentLink, index=index, name=name)))
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
        if not patched.compiles or patched.programs is not None:
            install(transformer, patched)
        transformer.register_forward_pre_hook(patched.forward_pre_hook, with_kwargs=True)
        transformer.register_forward_hook(patched.forward_hook, with_kwargs=True, always_call=True)
        if pipeline is not None:
            patched.followed.follow(pipeline)
        if patched.shed is not None:
            patched.shed.put_away()
    except BaseException:
        remove(transformer)
        raise


def refuse_while_running(transformer: nn.Module, verb: str) -> None:
    """The patch is not taken away from under a run.

    Raises:
        FastDiTError: A run is in progress.
    """
    patched = transformer.__dict__.get(LINK)
    if patched is not None:
        patched.runs.refuse_while_running(verb)


def remove(transformer: nn.Module, verb: str = "unpatch") -> None:
    """This takes the patch out, if there is one. The link to it goes last, so that it can be repeated if broken off.

    Raises:
        FastDiTError: A run is in progress.
    """
    patched = transformer.__dict__.get(LINK)
    if patched is None:
        return
    refuse_while_running(transformer, verb)
    if patched.shed is not None:
        patched.shed.give_back()
    for module in (*transformer.modules(), *patched.blocks):
        if module is not transformer:
            uninstall(module)
    _remove_hooks(transformer, patched)
    patched.followed.unfollow()
    patched.runs.end()
    uninstall(transformer)


def _remove_hooks(transformer: nn.Module, patched: Patched) -> None:
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(transformer, kind)
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is patched:
                for suffix in ("_with_kwargs", "_always_called"):
                    getattr(transformer, kind + suffix, {}).pop(key, None)
                hooks.pop(key, None)  # the hook itself last: an interrupted removal finds it again
