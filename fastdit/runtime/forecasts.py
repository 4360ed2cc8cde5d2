"""Whole steps that are forecast: the model does not run, its output is extrapolated from the last ones it computed.

That is one launch a step, and asks nothing of the model but that it returns tensors. Each guidance branch has its own
last outputs; at constant guidance a forecast of each is one of the guided velocity.

Where a trajectory bends sharply, as early ones do at high guidance, a line leads further away than a repeat. So an
adaptive forecast asks of each picture, when the model was computed, which of the two would have been nearer to that,
and goes by it until the model is computed again. The answer stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.blocks.active import ActiveTokens
from fastdit.blocks.nodes import Drawn, Nodes, Weights
from fastdit.blocks.token_nodes import Ring
from fastdit.errors import UnsupportedModelError
from fastdit.runtime.guard import Guard


class Outputs:
    """These are the last outputs of the model in one guidance branch.

    Args:
        adapts: Each picture's forecasts are the line only while that was nearer than a repeat.
        guard: The run's, which watches the forecasts, if anything does.

    Attributes:
        nodes: Their tensors, and other parts, laid flat.
        tokens: The last velocities of each token, in patches; None before a step computed some of the tokens.
    """

    def __init__(self, adapts: bool = False, guard: Guard | None = None) -> None:
        self._adapts = adapts
        self._guard = guard
        #: of each part [B], 1 where the line was nearer; nothing before the two were told apart
        self._shares: list[Tensor | None] = []
        self.nodes = Nodes()
        self.tokens: Ring | None = None
        self._shape: Any = None
        self._patches: Callable[[Tensor], Tensor]
        self._size: torch.Size

    def add(self, step: int, output: Any, weights: Weights, order: int) -> None:
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
            self.nodes, self._shape, self._shares = Nodes(), shape, []
        if self._guard is not None and self.nodes.moves(step, weights):
            drawn = self._drawn(step, 1, weights)[0].gathered()
            self._guard.watch(step, drawn, parts[0])
        if self._adapts and self.nodes.moves(step, weights):
            drawn = self._drawn(step, 1, weights)
            self._shares = [
                _nearer(part, each.gathered(), each.values[0]) if isinstance(each, Drawn) else None
                for part, each in zip(parts, drawn, strict=True)
            ]
        # The caller may write into what it gets.
        parts = [
            part.clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part
            for part in parts
        ]
        self.nodes = self.nodes.with_node(step, parts, order + 1, weights.sigmas)

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
        if self._adapts:
            rows = tokens.rows_of("image", laid.shape[1])
            line, repeat = (
                replace(self.tokens.drawn(step, n, weights, index), rows=rows, index=index)
                for n in (1, 0)
            )
            self._shares = [_nearer(fresh, line.gathered(), repeat.gathered())]
        self.tokens = self.tokens.with_rows(step, fresh, index, weights.table(sample.device))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw a forecast through."""
        return self.tokens is None and not self.nodes.steps

    def forecast(self, step: int, order: int, weights: Weights, ops: Any) -> Any:
        """This gives the output at a step as the model would return it; of fewer outputs, of a lower order."""
        if self.tokens is None:
            shares = self._shares or [None] * len(self.nodes.values[0])
            found = [
                each.written(ops, share) if isinstance(each, Drawn) else each
                for each, share in zip(self._drawn(step, order, weights), shares, strict=True)
            ]
            return tree_unflatten(found, self._shape)
        sample = self.tokens.values.new_empty(self._size)
        patches = self._patches(sample)
        found = self.tokens.drawn(step, order, weights).gathered()
        if self._shares:
            repeat = self.tokens.drawn(step, 0, weights).gathered()
            found = torch.where(_along(self._shares[0], found) > 0, found, repeat)
        patches.copy_(found.view(patches.shape))
        return tree_unflatten([sample], self._shape)

    def _drawn(self, step: int, order: int, weights: Weights) -> list[Any]:
        """Each part at a step; what is no tensor of floats is the last one."""
        used = self.nodes.kept(order + 1)
        return [
            Drawn(values, used.steps, step, weights)
            if isinstance(values[0], Tensor) and values[0].is_floating_point()
            else values[0]
            for values in zip(*used.values, strict=True)
        ]


def _nearer(truth: Tensor, line: Tensor, repeat: Tensor) -> Tensor:
    """[B], 1 for the pictures to which the line is nearer than the repeat, else 0."""
    off = [
        (each.float() - truth.float()).square().reshape(len(truth), -1).sum(1)
        for each in (line, repeat)
    ]
    return (off[0] < off[1]).to(torch.promote_types(truth.dtype, torch.float32))


def _along(share: Tensor, like: Tensor) -> Tensor:
    """[B] as a factor of [B, ...]."""
    return share.view(-1, *[1] * (like.ndim - 1))
