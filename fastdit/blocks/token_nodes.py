"""Kept outputs whose tokens were computed at unlike steps, and what is drawn through them, token by token.

Where steps compute some of the tokens, the last computed values of one are of other steps than its neighbour's. They
lie in a ring of as many buffers as a forecast has nodes: each token's value goes into the buffer that holds its oldest
one, or its last one if that is of the same sigma. So a step is one scatter, and nothing is moved. Where values go, and
with what weights they are read, depends on nothing but when which tokens were computed, so components that computed
alike share it (:class:`Ages`), and it is worked out on the device, which nobody waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.blocks.active import ActiveTokens, CachedRows
from fastdit.blocks.nodes import Drawn, Nodes, Weights


@dataclass(eq=False, repr=False)
class Ages:
    """When the values of each token were computed.

    Attributes:
        steps: int64 [R, B S], of each buffer and token; -1 where there is no value.
    """

    steps: Tensor
    _after: dict[int, tuple[Ages, Tensor]] = field(default_factory=dict, init=False)
    _weights: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict, init=False)

    def after(self, step: int, index: Tensor, sigmas: Tensor) -> tuple[Ages, Tensor]:
        """This is what holds once `step` computed the tokens at `index` [n], and where each goes, of R B S places."""
        if step not in self._after:
            own = self.steps[:, index]
            last, buffer = own.max(dim=0)
            replaces = (last >= 0) & (sigmas[last.clamp(min=0)] == sigmas[step])
            buffer = torch.where(replaces, buffer, own.argmin(dim=0))
            places = buffer * self.steps.shape[1] + index
            steps = self.steps.flatten().index_fill(0, places, step).view_as(self.steps)
            self._after[step] = Ages(steps), places
        return self._after[step]

    def weights(
        self, step: int, order: int, index: Tensor, sigmas: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """These are Lagrange's weights [R, n] at a step of the last order + 1 values, or as many as there are.

        A buffer with none, or an older one, has weight 0.
        """
        key = step, order, dtype
        if key not in self._weights:
            own = self.steps[:, index]
            newer = (own.unsqueeze(0) > own.unsqueeze(1)).sum(dim=1)
            used = (own >= 0) & (newer <= order)
            nodes = sigmas[own.clamp(min=0)]
            found = used.to(nodes.dtype)
            for i, node in enumerate(nodes):
                for j, other in enumerate(nodes):
                    if j != i:
                        both = used[i] & used[j]
                        factor = (sigmas[step] - other) / torch.where(both, node - other, 1.0)
                        found[i] *= torch.where(both, factor, 1.0)
            self._weights[key] = found.to(dtype)
        return self._weights[key]

    def deeper(self, depth: int) -> Ages:
        """The same with empty buffers behind."""
        more = self.steps.new_full((depth - len(self.steps), self.steps.shape[1]), -1)
        return Ages(torch.cat([self.steps, more]))


class Ring(NamedTuple):
    """The last values of each token of one stream.

    Attributes:
        values: [R, B, S, ...].
        ages: When each was computed.
    """

    values: Tensor
    ages: Ages

    @classmethod
    def of(cls, nodes: Nodes, depth: int, part: str, known: dict[Any, Ages]) -> Ring:
        """A ring holds what was computed of all tokens; `known` are those of the other components."""
        first = nodes.values[0]
        values = first.new_zeros(depth, *first.shape)
        for buffer, value in zip(values, nodes.values, strict=False):
            buffer.copy_(value)
        steps = [*nodes.steps[:depth], *[-1] * (depth - len(nodes.steps))]
        key = part, first.shape[:2], tuple(steps)
        if key not in known:
            column = torch.tensor(steps, device=first.device)[:, None]
            known[key] = Ages(column.repeat(1, first.shape[0] * first.shape[1]))
        return cls(values, known[key])

    def with_rows(self, step: int, fresh: Tensor, index: Tensor, sigmas: Tensor) -> Ring:
        """A step computed these rows [B, K, ...], which lie at `index` [B K] of all; in place where that is allowed."""
        ages, places = self.ages.after(step, index, sigmas)
        values = self.values
        if values.is_inference() and not torch.is_inference_mode_enabled():
            values = values.clone()
        values.flatten(0, 2).index_copy_(0, places, fresh.to(values.dtype).flatten(0, 1))
        return Ring(values, ages)

    def drawn(self, step: int, order: int, weights: Weights, index: Tensor | None = None) -> Drawn:
        """Each token at `index`, of all where None, through its own last values."""
        depth, batch, count = self.values.shape[:3]
        device = self.values.device
        if index is None:
            index = torch.arange(batch * count, device=device)
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        by_token = self.ages.weights(step, order, index, weights.table(device), dtype)
        by_token = by_token.view(depth, batch, -1)
        return Drawn(self.values.unbind(), (), step, weights, by_token)

    def deeper(self, depth: int) -> Ring:
        """The same with room for more values of a token."""
        more = self.values.new_zeros(depth - len(self.values), *self.values.shape[1:])
        return Ring(torch.cat([self.values, more]), self.ages.deeper(depth))


class TokenNodes(NamedTuple):
    """The last computed outputs of a component, of which steps compute some of the tokens, stream by stream.

    Attributes:
        parts: Of each stream; None for a stream that the module drops. Text is always computed as a whole.
        joined: Whether the output is a tuple of streams.
    """

    parts: tuple[Nodes | Ring | None, ...]
    joined: bool

    @classmethod
    def of(cls, nodes: Nodes) -> TokenNodes:
        """What was computed at whole steps so far."""
        if not isinstance(nodes.values[0], (tuple, list)):
            return cls((nodes,), False)
        parts = zip(*nodes.values, strict=True)
        return cls(
            tuple(None if some[0] is None else Nodes(nodes.steps, some) for some in parts), True
        )

    def with_node(
        self,
        step: int,
        value: Any,
        count: int,
        tokens: ActiveTokens,
        layout: Sequence[str],
        weights: Weights,
    ) -> TokenNodes:
        """A step computed its tokens, and `count` values are kept of each."""
        values = value if self.joined else (value,)
        found: list[Nodes | Ring | None] = []
        for held, fresh, part in zip(self.parts, values, layout, strict=False):
            if held is None:
                found.append(None)
            elif part == "text" or (tokens.rows is None and isinstance(held, Nodes)):
                found.append(held.with_node(step, fresh, count, weights.sigmas))
            else:
                if isinstance(held, Nodes):
                    held = Ring.of(held, count, part, tokens.ages)
                elif len(held.values) < count:
                    held = held.deeper(count)
                index = tokens.index(part, held.values[0])
                found.append(held.with_rows(step, fresh, index, weights.table(fresh.device)))
        return TokenNodes(tuple(found), self.joined)

    def kept(self, count: int) -> TokenNodes:
        """These are the last `count` of them; a ring keeps its size."""
        parts = (part.kept(count) if isinstance(part, Nodes) else part for part in self.parts)
        return self._replace(parts=tuple(parts))

    def drawn(
        self,
        step: int,
        order: int,
        tokens: ActiveTokens,
        layout: Sequence[str],
        weights: Weights,
    ) -> Any:
        """The output of the step's tokens, each through its own last values."""
        found = tuple(
            None if held is None else _drawn(held, step, order, tokens, part, weights)
            for held, part in zip(self.parts, layout, strict=False)
        )
        return found if self.joined else found[0]


def _drawn(
    held: Nodes | Ring, step: int, order: int, tokens: ActiveTokens, part: str, weights: Weights
) -> Tensor | CachedRows | Drawn:
    whole = part == "text" or tokens.rows is None
    if isinstance(held, Ring):
        index = tokens.index(part, held.values[0])
        drawn: Tensor | Drawn = held.drawn(step, order, weights, index)
    else:
        drawn = held.drawn(step, order, weights)
    if whole:
        return drawn
    if isinstance(drawn, Tensor):
        return tokens.stored(drawn, (part,))
    first = drawn.values[0]
    return replace(
        drawn, rows=tokens.rows_of(part, first.shape[1]), index=tokens.index(part, first)
    )
