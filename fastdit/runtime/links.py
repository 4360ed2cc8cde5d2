"""What the rewritten forwards of a patched model call; a deep copy of the model gets links to its own patch.

Each finds the call in progress in its thread. Outside of one, and in one that is stock, the module's own forward runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fastdit.runtime.patched import Patched


class Link:
    """Base of all: knows the patched model."""

    __slots__ = ("patched",)

    def __init__(self, patched: Patched) -> None:
        self.patched = patched


class BlockLink(Link):
    """Of a block.

    Stock too where gradients are wanted and no plan acts: another order of the same operations would accumulate them in
    another order.
    """

    __slots__ = ("index", "kind")

    def __init__(self, patched: Patched, kind: str, index: int) -> None:
        super().__init__(patched)
        self.kind = kind
        self.index = index

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
        forward.start_block(self.index)
        return adapter.forwards[self.kind](module, forward, *args, **kwargs)


class ComponentLink(Link):
    """Of a component that was wrapped as it is."""

    __slots__ = ("index", "name")

    def __init__(self, patched: Patched, index: int, name: str) -> None:
        super().__init__(patched)
        self.index = index
        self.name = name

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def compute() -> Any:
            return type(module).forward(module, *args, **kwargs)

        forward = self.patched.here.forward
        if forward is None or forward.index != self.index or not forward.actions:
            return compute()
        return forward.component(self.name, compute)


class EmbedLink(Link):
    """Of a module that embeds patches, or their positions."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.patched.here.call
        if call is None or call.run is None:
            return type(module).forward(module, *args, **kwargs)
        return call.embed(module, *args, **kwargs)


class ConditionLink(Link):
    """Of the module that embeds timestep and prompt for all adaLN layers."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.patched.here.forward
        ahead = None if forward is None else forward.modulations
        found = None if ahead is None else ahead.given()
        return type(module).forward(module, *args, **kwargs) if found is None else found


class PromptLink(Link):
    """Of a projection of the prompt."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.patched.here.call
        if call is None or call.forward is None:
            return type(module).forward(module, *args, **kwargs)
        return call.project_prompt(module, *args, **kwargs)


class LinearLink(Link):
    """Of a block's linear layer, whose weights are kept packed."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = self.patched.here.call
        if call is None or call.forward is None:
            return type(module).forward(module, *args, **kwargs)
        return call.run.packed.linear(module, *args, **kwargs)
