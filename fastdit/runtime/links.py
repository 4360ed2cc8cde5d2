"""The rewritten forwards of a patched model call these links; a deep copy of the model gets links to its own patch.

Each finds the call in progress in its thread. Outside of one, and in one that is stock, the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fastdit.runtime.patched import Patched


@dataclass(eq=False, repr=False)
class BlockLink:
    """The adapter's forward stands for a block's.

    The block is stock too where gradients are wanted and no plan acts: another order of the same operations would
    accumulate them in another order.

    Attributes:
        ends: It is the last block of its list.
    """

    patched: Patched
    kind: str
    index: int
    ends: bool

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patched = self.patched
        forward = patched.here.forward
        if forward is None:
            return type(module).forward(module, *args, **kwargs)
        adapter = patched.adapter
        if torch.is_grad_enabled() and not forward.actions:
            parts = adapter.components[self.kind]
            forward.computed += sum(
                adapter.has_component(self.kind, module, part) for part in parts
            )
            return type(module).forward(module, *args, **kwargs)
        forward.start_block(self.index, self.ends)
        return adapter.forwards[self.kind](module, forward, *args, **kwargs)


@dataclass(eq=False, repr=False)
class ComponentLink:
    """A component that is wrapped as it is runs only where the plan says so."""

    patched: Patched
    index: int
    name: str

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def compute() -> Any:
            return type(module).forward(module, *args, **kwargs)

        forward = self.patched.here.forward
        if forward is None or forward.index != self.index or not forward.actions:
            return compute()
        return forward.component(self.name, compute)


@dataclass(eq=False, repr=False)
class ConditionLink:
    """The module that embeds timestep and prompt for all adaLN layers is left out where these were made ahead."""

    patched: Patched

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.patched.here.forward
        ahead = None if forward is None else forward.modulations
        found = None if ahead is None else ahead.given()
        if found is None:
            return type(module).forward(module, *args, **kwargs)
        return self.patched.adapter.embedded(module, found, *args, **kwargs)


@dataclass(eq=False, repr=False)
class CallLink:
    """A method of the call in progress computes the module.

    Attributes:
        method: Gets it of the call.
        compiles: Torch's compiler traces the module's own forward.
    """

    patched: Patched
    method: Callable[[Any], Callable[..., Any]]
    compiles: bool = False

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.patched.here.call
        if call is None or call.forward is None:
            return type(module).forward(module, *args, **kwargs)
        return self.method(call)(module, *args, **kwargs)
