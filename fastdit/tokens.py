"""Which image tokens a run computes: the plan of a token method, and the choice for each step.

A :class:`TokenRun` lives as long as a run. At the end of a step it sees the velocity that the scheduler got, guidance
applied and inactive tokens carried over, and chooses the active tokens of the next step; nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.methods.ras import RAS, ActiveTokens


class TokenRun:
    """The active tokens of one run.

    Attributes:
        method: Who decides.
        tokens: Image tokens, N.
        plan: What each step computes, counted from the run's first executed step; None where it is dense.
        rows: [B, K] active tokens of the step that comes, or None before a dense one.
        history: Step -> its rows, for the report.
    """

    def __init__(self, method: RAS, steps: int, tokens: int, ops: Any) -> None:
        self.method = method
        self.tokens = tokens
        self.plan = method.active(steps, tokens)
        self.rows: Tensor | None = None
        self.history: dict[int, Tensor] = {}
        self._steps = steps
        self._ops = ops
        self._drops: Tensor | None = None
        self._age: Tensor | None = None

    def at(self, step: int) -> ActiveTokens | None:
        """The plan of a step; dense beyond its end."""
        return self.plan[step] if step < len(self.plan) else None

    def observe(self, step: int, velocity: Tensor, delta: Any) -> None:
        """Choose the active tokens of the step after `step`.

        Args:
            velocity: [B, gh, gw, p, p, C], the velocity field in patches, any strides.
            delta: Difference of the sigmas over this step; only parity looks at it.

        Raises:
            ArgumentError: Parity with several images, or a velocity of other tokens; the run ends with its first step.
        """
        self.rows = None
        found = velocity.shape[1] * velocity.shape[2]
        if found != self.tokens:
            raise ArgumentError(
                f"{self.method.name} chooses among the {self.tokens} tokens of the picture by their velocity; "
                f"got that of {found} (a reference image has none)"
            )
        parity = self.method.mode == "parity"
        if parity and len(velocity) > 1:
            raise ArgumentError(
                f'mode="parity" is the published rule, which knows one image; got a batch of {len(velocity)}: '
                'draw them one by one, or use mode="fixed"'
            )
        coming = self.at(step + 1)
        if coming is None:  # every token is active there
            self._age = None
            return
        if parity:
            self.rows = self._choose_as_published(velocity, delta, coming)
        else:
            self.rows = self._choose(velocity, coming)
        self.history[step + 1] = self.rows

    def _choose(self, velocity: Tensor, coming: ActiveTokens) -> Tensor:
        method, batch = self.method, velocity.shape[0]
        if self._drops is None or self._drops.shape[0] != batch:
            self._drops = torch.zeros(batch, self.tokens, dtype=torch.int32, device=velocity.device)
            self._age = None
        if method.max_age and self._age is None:
            self._age = torch.zeros_like(self._drops)
        rows, _ = self._ops.token_select(
            velocity,
            self._drops,
            coming.keep,
            age=self._age,
            high=coming.high,
            starvation=method.starvation,
            metric=method.metric,
            max_age=method.max_age,
        )
        return rows

    def _choose_as_published(self, velocity: Tensor, delta: Any, coming: ActiveTokens) -> Tensor:
        """The published rule, roundings included: metric in the model's dtype, ties as torch.sort leaves them."""
        method = self.method
        if self._drops is None:
            count = -(self._steps + 1)
            self._drops = torch.full((self.tokens,), float(count), device=velocity.device)
        moved = (
            torch.as_tensor(delta) * velocity[0]
        )  # by the sigmas' own difference, not rounded first
        channels = moved.std(-1) if method.metric == "std" else moved.norm(dim=-1)
        metric = channels.mean(-1).mean(-1).flatten()  # two means, so two roundings
        metric = (metric * torch.exp(method.starvation * self._drops)).to(metric.dtype)
        order = torch.sort(metric).indices
        low = self.tokens - coming.keep - coming.high
        dropped = torch.cat([order[:low], order[self.tokens - coming.high :]])
        self._drops[dropped] += 1
        return order[low : self.tokens - coming.high][None]
