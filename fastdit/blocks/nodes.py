"""Outputs that are extrapolated: the last computed ones of a component, and what is drawn through them.

A drawn output is a weighted sum of kept ones, so the residual stream can take it as that many branches, and nothing is
written down in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.schedules.forecast import Fitted, last_nodes, weights


@dataclass(eq=False, repr=False)
class Weights:
    """The weights of a run's forecasts, in the memory of the device that reads them.

    Attributes:
        sigmas: The sigma of each step.
        fitted: Those in place of the polynomial's.
    """

    sigmas: list[float]
    fitted: Fitted = field(default_factory=dict)
    _made: dict[Any, Tensor] = field(default_factory=dict, init=False)

    def of(
        self,
        step: int,
        nodes: Sequence[Sequence[int]],
        like: Tensor,
        changes: bool = False,
        places: Sequence[int | None] = (),
    ) -> Tensor:
        """This gives, one after the other, the weights at `step` of outputs of the steps in each of `nodes`.

        An empty one stands for an output that is what it is, of weight 1. They are fp64 where `like` is, else fp32.
        With `changes` they are to be added to the first output. Where `places` has a number for one of `nodes`, it is
        the weight of that one alone of its outputs.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = tuple(map(tuple, nodes)), tuple(places), dtype, like.device, changes
        return self.by_key(step, key)

    def by_key(self, step: int, key: Any) -> Tensor:
        """These are the weights at `step` by nodes, places, dtype, device, and whether they are changes."""
        if (step, key) not in self._made:
            nodes, places, dtype, device, changes = key
            found: list[float] = []
            known: dict[Sequence[int], tuple[float, ...]] = {(): (1.0,)}
            for steps, place in zip(nodes, places or [None] * len(nodes), strict=True):
                if steps not in known:
                    known[steps] = self._own(step, tuple(steps))
                own = known[steps]
                found += own if place is None else (own[place],)
            found[0] -= changes
            with (
                torch._C.DisableTorchFunction()
            ):  # who records a call finds them here, other ones at other steps
                made = torch.tensor(found, dtype=dtype).to(device, non_blocking=True)
            self._made[step, key] = made
        return self._made[step, key]

    def _own(self, step: int, nodes: tuple[int, ...]) -> tuple[float, ...]:
        """Those that were fitted for these nodes; for others a line's where any were fitted, else the polynomial's."""
        if (step, nodes) in self.fitted:
            return self.fitted[step, nodes]
        drawn = nodes[:2] if self.fitted else nodes
        found = weights([self.sigmas[node] for node in drawn], self.sigmas[step])
        return (*found, *[0.0] * (len(nodes) - len(drawn)))

    def made_at(self, step: int) -> dict[Any, Tensor]:
        """Those of a step that were made so far, by key."""
        return {key: made for (at, key), made in self._made.items() if at == step}

    def table(self, device: torch.device) -> Tensor:
        """This is the sigma of each step known so far, fp64."""
        key = "sigmas", (len(self.sigmas), device)
        if key not in self._made:
            self._made[key] = torch.tensor(self.sigmas, dtype=torch.float64).to(device)
        return self._made[key]


@dataclass(frozen=True, eq=False, repr=False)
class HeldSums:
    """What several slots hold in place of an output each; see `sums.py`.

    Attributes:
        slots: Those slots, in running order.
        sums: Of each part of the outputs: by their gates, and those of each group without, added up, [1 + groups, B, n,
            D]; or all without, [1, B, n, D].
        shared: What the gates had in common then, [B, groups, D]; None where they are the same in all blocks.
    """

    slots: tuple[Any, ...]
    sums: tuple[Tensor, ...]
    shared: Tensor | None


@dataclass(frozen=True)
class Drawn:
    """An output drawn through computed ones, latest first, all of one shape.

    Attributes:
        values: The computed outputs; only one of them where it has a place.
        nodes: Their steps; none where those differ from token to token.
        step: The step it is drawn for.
        weights: Those of the run.
        by_token: Weights of each token that is meant, [values, B, K]; None where they are those of the nodes.
        rows, index: Which tokens are meant, as in :class:`~fastdit.blocks.active.CachedRows`; None for all.
        place: Which of the nodes the one value is of; None where there is a value of each.
    """

    values: tuple[Any, ...]
    nodes: tuple[int, ...]
    step: int
    weights: Weights
    by_token: Tensor | None = None
    rows: Tensor | None = None
    index: Tensor | None = None
    place: int | None = None

    @property
    def shape(self) -> torch.Size:
        whole = self.values[0].shape
        return whole if self.rows is None else torch.Size((*self.rows.shape, *whole[2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    def tokens(self, some: slice) -> Drawn:
        """This is the same of some of the tokens, all of which are meant."""
        values = tuple(value[:, some] for value in self.values)
        by_token = None if self.by_token is None else self.by_token[:, :, some].contiguous()
        return Drawn(values, self.nodes, self.step, self.weights, by_token)

    def part(self, place: int, value: Tensor) -> Drawn:
        """This is what one node adds to it, with this value for that node's output."""
        return replace(self, values=(value,), place=place)

    def written(self, ops: Any, share: Tensor | None = None) -> Tensor:
        """This writes it down in one launch, where no gradient is wanted: as the last value and its changes.

        With `share` [B] the changes of each sample are taken so many times.
        """
        first = self.values[0]
        if torch.is_grad_enabled():
            found = self.gathered()
            if share is None:
                return found
            return first + share.view(-1, *[1] * (first.ndim - 1)).to(first) * (found - first)
        flat = [v.flatten(1, -2) if v.ndim > 2 else v.unsqueeze(1) for v in self.values]
        weights = self.weights.of(self.step, [self.nodes], first, changes=True)
        if share is not None:
            each = weights[:, None, None] * share[None, :, None]
            weights = each.expand(-1, -1, flat[0].shape[1]).contiguous()
        return ops.gated_residual(flat[0], flat, [None] * len(flat), weights=weights).view_as(first)

    def gathered(self) -> Tensor:
        """This writes it down, rounded once."""
        values = self.values
        if self.rows is not None:
            values = [v.flatten(0, 1).index_select(0, self.index).view(self.shape) for v in values]
        if self.by_token is None:
            places = [self.place]
            weights = self.weights.of(self.step, [self.nodes], values[0], places=places)
        else:
            weights = self.by_token.view(*self.by_token.shape, *[1] * (values[0].ndim - 2))
        total = sum(value.to(weights.dtype) * w for value, w in zip(values, weights, strict=True))
        return total.to(self.dtype)


class Nodes(NamedTuple):
    """The last computed outputs of a component in one guidance branch.

    Attributes:
        steps: When each was computed, latest first.
        values: The outputs, tensors or tuples of them.
    """

    steps: tuple[int, ...] = ()
    values: tuple[Any, ...] = ()

    def with_node(self, step: int, value: Any, count: int, sigmas: Sequence[float]) -> Nodes:
        """This adds an output, and keeps the last `count` at distinct sigmas."""
        held = dict(zip((step, *self.steps), (value, *self.values), strict=True))
        steps = last_nodes([*reversed(self.steps), step], sigmas, count - 1)
        return Nodes(steps, tuple(held[node] for node in steps))

    def moves(self, step: int, weights: Weights) -> bool:
        """Whether a line can be drawn, to a sigma that none of them has."""
        sigmas = weights.sigmas
        return len(self.steps) > 1 and sigmas[step] not in (sigmas[node] for node in self.steps)

    def with_newest(self, value: Any) -> Nodes:
        """These are the same with something else for the last one."""
        return self._replace(values=(value, *self.values[1:]))

    def kept(self, count: int) -> Nodes:
        """These are the last `count` of them."""
        if len(self.steps) <= count:
            return self
        return Nodes(self.steps[:count], self.values[:count])

    def drawn(self, step: int, order: int, weights: Weights) -> Any:
        """This gives the output at a step; of fewer outputs than the order asks for, of a lower one."""
        steps, values = self.steps[: order + 1], self.values[: order + 1]
        if len(steps) == 1:
            return values[0]
        # What other steps computed may be part of sums, so parts are told apart where it is added.
        if all(isinstance(value, (tuple, list)) for value in values):
            return tuple(
                None if parts[0] is None else Drawn(parts, steps, step, weights)
                for parts in zip(*values, strict=True)
            )
        return Drawn(values, steps, step, weights)
