"""Whole steps that are forecast: the model does not run, its output is extrapolated from the last ones it computed.

That is one launch a step, and asks nothing of the model but that it returns tensors. Each guidance branch has its own
last outputs; at constant guidance a forecast of each is one of the guided velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.blocks.nodes import Drawn, Nodes, Weights
from fastdit.errors import UnsupportedModelError


class Outputs:
    """These are the last outputs of the model in one guidance branch.

    Attributes:
        nodes: Their tensors, and other parts, laid flat.
        tokens: The last velocities of each token, once a step computed some of them; None before.
    """

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.tokens: Ring | None = None
        self._shape: Any = None

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

    def add_rows(
        self, step: int, patches: Tensor, index: Tensor, weights: Weights, order: int
    ) -> None:
        """This keeps the patches [B, gh, gw, p, p, C] of the tokens that a step computed, at `index` [B K] of all."""
        if self.tokens is None:
            
        fresh = patches.flatten(0, 2).index_select(0, index).unflatten(0, (len(patches), -1))
        self.tokens = self.tokens.with_rows(step, fresh, index, weights.table(fresh.device))

    def forecast(self, step: int, order: int, weights: Weights, ops: Any) -> Any:
        """This gives the output at a step as the model would return it; of fewer outputs, of a lower order."""
        used, found = self.nodes.kept(order + 1), []
        for values in zip(*used.values, strict=True):
            if isinstance(values[0], Tensor) and values[0].is_floating_point():
                found.append(Drawn(values, used.steps, step, weights).written(ops))
            else:
                found.append(values[0])
        return tree_unflatten(found, self._shape)
