"""Whole steps that are forecast: the model does not run, its output is extrapolated from the last ones it computed.

That is one launch a step, and asks nothing of the model but that it returns tensors. Each guidance branch has its own
last outputs; at constant guidance a forecast of each is one of the guided velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.blocks.active import ActiveTokens
from fastdit.blocks.nodes import Drawn, Nodes, Weights
from fastdit.blocks.token_nodes import Ring
from fastdit.errors import UnsupportedModelError


class Outputs:
    """These are the last outputs of the model in one guidance branch.

    Attributes:
        nodes: Their tensors, and other parts, laid flat.
        tokens: The last velocities of each token, in patches; None before a step computed some of the tokens.
    """

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.tokens: Ring | None = None
        self._shape: Any = None
        self._patches: Callable[[Tensor], Tensor]
        self._size: torch.Size

    def add(self, step: int, output: Any, sigmas: Sequence[float], order: int) -> None:
        """This keeps what the model gave at a step, and what forecasts of `order` are drawn through, no more.

        Raises:
            UnsupportedModelError: It holds no tensors.
        """
        parts, shape = tree_flatten(output)
        if not any(isinstance(part, Tensor) for part in parts):
            raise UnsupportedModelError(
                f"a forecast needs an output of tensors, this model gives a {type(output).__name__}"
            )
        if shape != self._shape:
            self.nodes, self._shape = Nodes(), shape
        # The caller may write into what it gets.
        parts = [
            part.clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part
            for part in parts
        ]
        self.nodes = self.nodes.with_node(step, parts, order + 1, sigmas)

    def add_tokens(
        self,
        step: int,
        output: Any,
        tokens: ActiveTokens,
        patches: Callable[[Tensor], Tensor],
        weights: Weights,
        order: int,
    ) -> None:
        """This keeps the velocities of the tokens that a step computed.

        Args:
            output: Of a model that gives nothing but velocities, with those of all tokens.
            patches: Gives a view of them as [B, gh, gw, p, p, C].
        """
        (sample,), self._shape = tree_flatten(output)
        self._patches, self._size = patches, sample.shape
        if self.tokens is None:
            laid = tuple(patches(values[0]).flatten(1, 2) for values in self.nodes.values)
            self.tokens = Ring.of(Nodes(self.nodes.steps, laid), order + 1, "output", tokens.ages)
            self.nodes = Nodes()
        laid = patches(sample).flatten(1, 2)
        index = tokens.index("image", laid)
        fresh = laid.flatten(0, 1).index_select(0, index).unflatten(0, (len(laid), -1))
        self.tokens = self.tokens.with_rows(step, fresh, index, weights.table(sample.device))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw a forecast through."""
        return self.tokens is None and not self.nodes.steps

    def forecast(self, step: int, order: int, weights: Weights, ops: Any) -> Any:
        """This gives the output at a step as the model would return it; of fewer outputs, of a lower order."""
        if self.tokens is not None:
            sample = self.tokens.values.new_empty(self._size)
            patches = self._patches(sample)
            found = self.tokens.drawn(step, order, weights)
            patches.copy_(found.gathered().view(patches.shape))
            return tree_unflatten([sample], self._shape)
        used, found = self.nodes.kept(order + 1), []
        for values in zip(*used.values, strict=True):
            if isinstance(values[0], Tensor) and values[0].is_floating_point():
                found.append(Drawn(values, used.steps, step, weights).written(ops))
            else:
                found.append(values[0])
        return tree_unflatten(found, self._shape)
