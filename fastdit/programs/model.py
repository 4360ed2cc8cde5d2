"""A transformer as its programs know it: nothing in it may be other than what was there when they were recorded.

Looked at once a run, all modules and all that they hold, by identity: another module, attribute, setting or processor
makes another :class:`Model`, with programs of its own. Weights alone may be others, of the same shapes, dtypes and
devices, since programs read them where the modules do. Between the steps of a run hooks, forwards and processors are
looked at.

A model whose modules do what nobody can know from here has no programs: hooks, offloading, adapters of peft, classes of
somebody else's, weights of a class of their own.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_state
from torch.utils.hooks import RemovableHandle

from fastdit.observe import observed
from fastdit.programs.state import UnknownState, look

#: whose modules do nothing but what their tensors and settings say
KNOWN = ("torch.nn.", "diffusers.", "fastdit.blocks.held.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Model:
    """A transformer as it is now.

    Args:
        transformer: The model.
        is_ours: Tells whether a module's forward is one that was installed with the patch.

    Attributes:
        why: Why it has no programs; None where it may have.
        known: What else was found out of it, by name.
    """

    def __init__(self, transformer: nn.Module, is_ours: Any) -> None:
        self.known: dict[str, Any] = {}
        self._transformer = transformer
        self._modules = list(transformer.modules())
        self._dicts = [module.__dict__ for module in self._modules]
        self._owned = [d[name] for d in self._dicts for name in ("_parameters", "_buffers")]
        self._held = list(self._holds())
        self._looks: list[Any] = []
        self._hooked = self._hooks()
        self._processed = [d for d in self._dicts if "processor" in d]
        self._settings = [
            d["processor"].__dict__ for d in self._processed if hasattr(d["processor"], "__dict__")
        ]
        self._processors = list(self._processors_now())
        self._forwards = self._forwards_now()
        self.why = self._why_not(is_ours)
        try:
            self._looks = self._look()
        except UnknownState as unknown:
            self.why = self.why or str(unknown)

    def is_still(self, transformer: nn.Module) -> bool:
        """Whether nothing is another since."""
        if transformer is not self._transformer:
            return False
        if not (same_objects(self._holds(), self._held) and self.has_its_processors()):
            return False
        try:
            return self._looks == self._look() and self._hooked == self._hooks()
        except UnknownState:
            return False

    def has_its_processors(self) -> bool:
        """Whether its attention processors are what they were, which somebody may change between two steps."""
        return same_objects(self._processors_now(), self._processors)

    def has_its_forwards(self) -> bool:
        """Whether nobody has replaced a forward meanwhile, as diffusers' hooks do, also for one call of a step."""
        return self._forwards == self._forwards_now()

    def weights(self) -> dict[int, tuple[dict[str, Any], str]]:
        """Where each tensor of the modules is, by id."""
        return {
            id(tensor): (values, name)
            for values in (*self._owned, *self._dicts)
            for name, tensor in values.items()
            if isinstance(tensor, Tensor)
        }

    # ---- what is looked at

    def _holds(self) -> Iterable[Any]:
        """All that modules hold but for their weights, children included.

        Pipelines give the transformer an empty registry of hooks when they end; a hook in it replaces the forward.
        """
        children = [d["_modules"] for d in self._dicts]
        first = {name: held for name, held in self._dicts[0].items() if name != "_diffusers_hook"}
        return itertools.chain.from_iterable(map(dict.values, (first, *self._dicts[1:], *children)))

    def _look(self) -> list[Any]:
        tensors = itertools.chain.from_iterable(map(dict.values, self._owned))
        return [None if tensor is None else look(tensor) for tensor in tensors]

    def _hooks(self) -> list[int]:
        """How many hooks there are, but for those of the transformer itself, which are outside of its forward."""
        found = [len(d[name]) for d in self._dicts[1:] for name in _HOOKS]
        return [*found, *(len(getattr(module_state, name)) for name in _GLOBAL_HOOKS)]

    def _processors_now(self) -> Iterable[Any]:
        """The attention processors with their settings, and the backend that diffusers is told for all."""
        found = [d.get("processor") for d in self._processed]
        settings = itertools.chain.from_iterable(map(dict.values, self._settings))
        return (*found, _attention_backend(), *settings)

    def _forwards_now(self) -> list[Any]:
        return list(map(dict.get, self._dicts, itertools.repeat("forward")))

    def _why_not(self, is_ours: Any) -> str | None:
        if any(self._hooked):
            return "hooks are on its modules"
        if not is_ours(self._transformer):
            return "the forward of the transformer is not replaced"
        for name, module in self._transformer.named_modules():
            where, kind = name or "the transformer", type(module)
            if not f"{kind.__module__}.".startswith(KNOWN):
                return f"{where} is a {kind.__qualname__}, of another library"
            if "forward" in module.__dict__ and not is_ours(module):
                return f"the forward of {where} is somebody else's"
            if module is not self._transformer and observed(module):
                return f"hooks are on {where}"
            if module._compiled_call_impl is not None:
                return f"{where} is compiled"
            if module.training:
                return f"{where} is in training mode"
            if hasattr(module, "base_layer"):
                return f"{where} carries an adapter whose scale may change"
            processor = getattr(module, "processor", None)
            if processor is not None and not type(processor).__module__.startswith("diffusers."):
                return f"the attention processor of {where} is somebody else's"
        registry = self._transformer.__dict__.get("_diffusers_hook")
        if "_old_forward" in self._transformer.__dict__ or (registry and registry.hooks):
            return "offloading or caching hooks are on the transformer"
        return None


def same_objects(now: Iterable[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    found = list(now)
    return len(found) == len(before) and all(map(operator.is_, found, before))


def _attention_backend() -> Any:
    """What `diffusers.attention_backend` chose, if that was imported."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return getattr(getattr(dispatch, "_AttentionBackendRegistry", None), "_active_backend", None)


def hooks_so_far() -> int:
    """So many hooks were registered in this process; as long as it stays, there are no more."""
    return RemovableHandle.next_id
