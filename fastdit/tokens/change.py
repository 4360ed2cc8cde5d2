"""Tokens chosen by how wrong their kept velocities are: RAS with the metric "change".

A token's score is the change of the velocity that the scheduler was given, between the last two computations of the
token, per unit of sigma, times how far sigma has moved since the last one. What is kept for that lies on the
device, a copy of the velocity and three numbers a token; the op `token_change` says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.tokens.active import TokenRun


@dataclass(frozen=True)
class Kept:
    """What is kept of the tokens of a batch of pictures.

    Attributes:
        last: [B, gh, gw, p, p, C], the velocities that were computed last.
        rate: fp32 [B, N], how fast they changed.
        sigma: fp32 [B, N], where they were computed.
        sigmas: fp32 [steps], those of the run.
        drops: int32 [B, N], how often each token was left out.
        age: int32 [B, N], for how many steps; None where nothing bounds that.
    """

    last: Tensor
    rate: Tensor
    sigma: Tensor
    sigmas: Tensor
    drops: Tensor
    age: Tensor | None


class ChangeRun(TokenRun):
    """The rule in one run.

    A step may compute more tokens than were chosen, after a prompt was swapped: those count as not computed, so that
    they are rather too early among the active ones than too late.

    Attributes:
        kept: What is known of the tokens' velocities; None before the first step that is looked at.
        inverse: Which tokens the step in progress computes, as `token_select` says it; None where all are.
    """

    def __init__(self, method: Any, run: Any) -> None:
        super().__init__(method, run)
        self.kept: Kept | None = None
        self.inverse: Tensor | None = None

    def choose(self, velocity: Tensor, delta: Any, coming: Any) -> Tensor | None:
        """The tokens whose kept velocities are the most wrong; looked at after dense steps, too."""
        score = self._scored(velocity)
        if score is None:
            return None
        kept = self.kept
        if coming is None:  # every token is active there
            self.inverse = None
            if kept.age is not None:
                kept.age.zero_()
            return None
        rows, self.inverse = self.select(
            score.view(*velocity.shape[:3], 1, 1, 1),
            coming,
            kept.drops,
            kept.age,
            starvation=0.0,
            metric="l2norm",
            max_age=self.method.max_age,
        )
        return rows

    def look(self, velocity: Tensor) -> None:
        """A velocity that is drawn tells nothing of how the computed ones change."""
        score = self._scored(velocity)
        if score is not None:
            self.inverse = torch.full_like(score, -1, dtype=torch.int32)

    def _scored(self, velocity: Tensor) -> Tensor | None:
        """How wrong each token is at the step that comes, what this step computed known; None where nobody asks."""
        step = self.run.step
        if not any(self.plan[step - self.first + 1 :]):
            return None
        if self.kept is None or len(self.kept.last) != len(velocity):
            self.kept, self.inverse = self._begin(velocity), None
        kept = self.kept
        return self.run.patched.ops.token_change(
            velocity,
            kept.last,
            kept.rate,
            kept.sigma,
            kept.sigmas[step : step + 2],
            inverse=self.inverse,
        )

    def end(self) -> None:
        """Only the history stays."""
        super().end()
        self.kept = self.inverse = None

    def _begin(self, velocity: Tensor) -> Kept:
        """Nothing was computed yet. Where nobody says the sigmas they count the steps."""
        run, batch, device = self.run, len(velocity), velocity.device
        numbers = torch.full((2, batch, self.tokens), float("inf"), device=device)
        numbers[1] = float("nan")
        counts = torch.zeros(2, batch, self.tokens, dtype=torch.int32, device=device)
        sigmas = run.sigmas or range(run.steps)
        return Kept(
            torch.zeros_like(velocity),
            *numbers,
            torch.tensor(sigmas, dtype=torch.float32, device=device),
            counts[0],
            counts[1] if self.method.max_age else None,
        )
