"""RAS, region-adaptive sampling (arXiv 2502.10389): at most steps only some image tokens pass the transformer.

After `start` dense steps, and except at the dense steps `resets`, a step computes K of the N image tokens. The others
keep their keys and values, and the velocity of the last step at which they were active, so every token moves at every
step. Which tokens are active is decided by the velocity of the step before: per token, by the standard deviation over
the latent channels (eq. 1), or by how wrong the velocity that is kept for it has become (`tokens/change.py`): "change",
the corrected mode's own metric.

Two modes. `"parity"` follows the published implementation: its lists of dropped tokens, metric in the model's dtype,
drop counters that start at -(S + 1) and make a dropped token's metric larger, unstable ties. `"corrected"` differs
where that is a defect: fp32 metric, stable ties, and dropped tokens are the less likely to be dropped again, at both
ends of the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdit.checks import is_whole, one_of, real, whole
from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import Method, check_mode, check_noise
from fastdit.tokens.active import TokenRun
from fastdit.tokens.change import ChangeRun
from fastdit.tokens.waves import Waves

#: resets of the published runs, by number of steps
PUBLISHED_RESETS = {14: (8,), 28: (12, 20), 30: (12, 22)}
METRICS = ("std", "l2norm", "change")
#: steps from one reset to the next, with the metric "change"
BETWEEN_RESETS = 4
#: what stands for arguments that are left out, with the published metrics
HIGH_RATIO, STARVATION = 1.0, 0.1


@dataclass(frozen=True)
class Linear:
    """More tokens are dropped as the run goes on: `step` more in each `every` steps, `ratio` kept on average."""

    step: int
    every: int

    def __post_init__(self) -> None:
        if not is_whole(self.step):
            raise ArgumentError(f"step must be an int, got {self.step!r}")
        whole("every", self.every)


@dataclass(frozen=True)
class SparseStep:
    """One sparse step computes this.

    Attributes:
        keep: Active image tokens, K.
        high: How many of the dropped tokens come from the end of the order with the large metric.
        frames: Each of so many frames has its share of both, and an order of its own.
    """

    keep: int
    high: int
    frames: int = 1


class RASRun(TokenRun):
    """RAS chooses by how often and how long each token was left out so far in the run."""

    def __init__(self, method: Any, run: Any) -> None:
        super().__init__(method, run)
        self._drops: Tensor | None = None
        self._age: Tensor | None = None

    def choose(self, velocity: Tensor, delta: Any, coming: SparseStep | None) -> Tensor | None:
        """It takes the tokens that moved most, or least, counting how often they were dropped.

        Raises:
            ArgumentError: Parity with several images; the run ends with its first step.
        """
        parity = self.method.mode == "parity"
        if parity and len(velocity) > 1:
            raise ArgumentError(
                f'mode="parity" is the published rule, which knows one image; got a batch of {len(velocity)}: '
                'draw them one by one, or use mode="corrected"'
            )
        if coming is None:  # every token is active there
            self._age = None
            return None
        if parity:
            return self._choose_as_published(velocity, delta, coming)
        return self._choose(velocity, coming)

    def end(self) -> None:
        """The run's history stays, and nothing else."""
        super().end()
        self._drops = self._age = None

    def _choose(self, velocity: Tensor, coming: SparseStep) -> Tensor:
        method, batch = self.method, velocity.shape[0]
        if self._drops is None or self._drops.shape[0] != batch:
            self._drops = torch.zeros(batch, self.tokens, dtype=torch.int32, device=velocity.device)
            self._age = None
        if method.max_age and self._age is None:
            self._age = torch.zeros_like(self._drops)
        rows, _ = self.select(
            velocity,
            coming,
            self._drops,
            self._age,
            starvation=method.rate_of_drops,
            metric=method.rule,
            max_age=method.max_age,
        )
        return rows

    def _choose_as_published(self, velocity: Tensor, delta: Any, coming: SparseStep) -> Tensor:
        """The published rule has its roundings: metric in the model's dtype, ties as torch.sort leaves them."""
        method = self.method
        if self._drops is None:
            count = -(len(self.plan) + 1)
            self._drops = torch.full((self.tokens,), float(count), device=velocity.device)
        moved = torch.as_tensor(delta) * velocity[0]  # by the sigmas' own difference, not rounded
        channels = moved.std(-1) if method.rule == "std" else moved.norm(dim=-1)
        metric = channels.mean(-1).mean(-1).flatten()  # two means, so two roundings
        metric = (metric * torch.exp(method.rate_of_drops * self._drops)).to(metric.dtype)
        order = torch.sort(metric).indices
        low = self.tokens - coming.keep - coming.high
        dropped = torch.cat([order[:low], order[self.tokens - coming.high :]])
        self._drops[dropped] += 1
        return order[low : self.tokens - coming.high][None]


def check_align(method: RAS) -> None:
    """This refuses an `align` that is neither a number nor "wave", and "wave" where nothing is rounded."""
    if not isinstance(method.align, str):
        whole("align", method.align)
    elif method.align != "wave":
        raise ArgumentError(
            f'align must be a whole number from 1 on or "wave", got {method.align!r}'
        )
    elif method.mode == "parity":
        raise ArgumentError(
            'align must be a number with mode="parity", whose published counts are not rounded, got "wave"'
        )


@dataclass(frozen=True)
class RAS(Method):
    """This method computes a part of the image tokens at each step.

    Attributes:
        ratio: Mean share of active tokens in a sparse step, in (0, 1]. 1 skips nothing.
        start: Dense steps before the first sparse one, at least 1.
        resets: Dense steps in between. None is every fourth one with "change", and the published choice for the number
            of steps with a published metric.
        metric: "change", how wrong a token's kept velocity is: its last observed change per unit of sigma times how far
            sigma has moved since; or as published, "std" or "l2norm" over the latent channels. None is "change", and
            in "parity", which knows only the published ones, "std".
        high_ratio: Share of the dropped tokens taken from the large end of a published metric; 1, which None stands
            for, drops the tokens with the largest, as the paper's text says. Not with "change", which drops the
            smallest.
        starvation: k in exp(k D) of a published metric, D the times a token was dropped; None stands for 0.1. Not with
            "change", whose tokens come back by their age.
        schedule: None for the same number of tokens at all steps, or `Linear`.
        mode: "corrected" or "parity". The published rule knows one image, so parity refuses more.
        align: The active count is rounded to the nearest multiple, at least one; 1 is exact. Parity does not round.
            "wave" moves it by up to an eighth, to where the GPU's last wave of tiles is fullest; elsewhere it is 64.
        max_age: A token that was inactive for so many steps is active at the next; None for no bound. Not in "parity".
            With "change" it bounds what a velocity that did not change at all would be left out.
        family: The only model family it may run on, which a preset knows; None for any.
        per: What of a video has the active tokens: "clip", where they may all lie in one frame, or "frame", so that as
            many tokens of each latent frame are active, chosen among its own. A picture is one frame. Not "frame" in
            "parity".

    Example:
        >>> fastdit.patch(pipe, fastdit.RAS(ratio=0.5))
        >>> fastdit.patch(pipe, fastdit.RAS.preset("sd3", ratio=0.25))
    """

    ratio: float = 0.5
    start: int = 4
    resets: Sequence[int] | None = None
    metric: str | None = None
    high_ratio: float | None = None
    starvation: float | None = None
    schedule: Linear | None = None
    mode: str = "corrected"
    align: int | str = 64
    max_age: int | None = None
    family: str | None = None
    per: str = "clip"

    name = "RAS"
    writes = frozenset({"rows"})

    def __post_init__(self) -> None:
        real("ratio", self.ratio, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.high_ratio is not None:
            real("high_ratio", self.high_ratio, "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.starvation is not None:
            real("starvation", self.starvation, "at least 0", lambda x: x >= 0)
        whole("start", self.start)
        check_align(self)
        if self.max_age is not None:
            whole("max_age", self.max_age)
        one_of("metric", self.metric, (*METRICS, None))
        check_mode(self)
        one_of("per", self.per, ("clip", "frame"))
        if self.per_frame and self.mode == "parity":
            raise ArgumentError(
                'per must be "clip" with mode="parity", whose published rule knows one image, got "frame"'
            )
        if self.rule == "change":
            self._check_change()
        if self.schedule is not None and not isinstance(self.schedule, Linear):
            raise ArgumentError(
                f"schedule must be None or Linear(step, every), got {self.schedule!r}"
            )
        if self.resets is not None:
            if isinstance(self.resets, (str, bytes)) or not isinstance(self.resets, Sequence):
                raise ArgumentError(
                    f"resets must be a sequence of steps or None, got {self.resets!r}"
                )
            for step in self.resets:
                whole("resets", step)
            object.__setattr__(self, "resets", tuple(sorted(set(self.resets))))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RAS:
        """These are a model's published settings, "sd3", "lumina-next" or "flux"; `changes` are other arguments.

        They run on that model's family only; `family=None` lets them run on any.
        FLUX was never published by RAS's authors: its settings are SD3's with the code's default `high_ratio`.
        """
        one_of("preset", name, PRESETS)
        return replace(PRESETS[name], **changes)

    def _check_change(self) -> None:
        """This refuses what has no meaning beside the metric "change"."""
        if self.mode == "parity":
            raise ArgumentError(
                'metric must be "std" or "l2norm" with mode="parity", which is the published rule, got "change"'
            )
        for name, why in (
            ("high_ratio", "it drops the tokens with the smallest change"),
            ("starvation", "a token's age brings it back"),
        ):
            value = getattr(self, name)
            if value is not None:
                raise ArgumentError(
                    f'{name} must be None with metric="change", the default of mode="corrected", got {value!r}: {why}; '
                    'metric="std" takes it'
                )

    @property
    def fits_waves(self) -> bool:
        """Whether `align` is "wave"."""
        return self.align == "wave"

    @property
    def per_frame(self) -> bool:
        """Whether each frame has its own active tokens."""
        return self.per == "frame"

    @property
    def rule(self) -> str:
        """This metric chooses the tokens."""
        if self.metric is None:
            return "std" if self.mode == "parity" else "change"
        return self.metric

    @property
    def rate_of_drops(self) -> float:
        """This is k of exp(k D)."""
        return STARVATION if self.starvation is None else self.starvation

    def begin(self, run: Any) -> TokenRun:
        return ChangeRun(self, run) if self.rule == "change" else RASRun(self, run)

    def check_steps(self, steps: int) -> None:
        """A run that `start` or explicit resets do not fit is a ScheduleError that says which."""
        if self.ratio < 1 and self.start >= steps:
            raise ScheduleError(
                f"RAS start={self.start} leaves no sparse step in a run of {steps} steps; accepted is 1 to {steps - 1}"
            )
        for reset in self.resets or ():
            if reset >= steps:
                raise ScheduleError(
                    f"RAS resets has step {reset}, but the run has steps 0 to {steps - 1}"
                )

    def resets_for(self, steps: int) -> tuple[int, ...]:
        """These steps of `steps` are dense after the start of a run."""
        if self.resets is not None:
            return tuple(self.resets)
        if self.rule == "change":
            return tuple(range(self.start + BETWEEN_RESETS, steps, BETWEEN_RESETS))
        if steps in PUBLISHED_RESETS:
            return PUBLISHED_RESETS[steps]
        if steps < 8:
            return ()  # the published figures at 7 steps only fit none
        if steps < 16:
            return ((self.start + steps) // 2,)
        third = (steps - self.start) / 3  # 12 and 20 of 28
        return (self.start + int(third), self.start + int(2 * third))

    def dropped(self, steps: int, tokens: int) -> list[int]:
        """These are the published numbers of dropped tokens, one for each step (RAS section 3.3, code)."""
        average = int((1 - self.ratio) * tokens)
        resets = set(self.resets_for(steps))
        found = []
        for step in range(steps):
            count = average
            if self.schedule is not None:
                blocks = (steps + self.start) // self.schedule.every
                count += self.schedule.step * (step // self.schedule.every - blocks // 2)
                count = 64 * math.floor(count / 64)
            dense = step < self.start or step in resets
            found.append(0 if dense else min(max(count, 0), tokens - 1))
        return found

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        """The velocities that tokens keep are of a picture with other noise."""
        check_noise(self, noise)

    def active(self, steps: int, tokens: int, frames: int = 1) -> list[SparseStep | None]:
        """Counts are of all `frames` together, and of one as they would be of a picture of its size."""
        tokens //= frames
        share = 0.0 if self.rule == "change" else HIGH_RATIO
        share = share if self.high_ratio is None else self.high_ratio
        found: list[SparseStep | None] = []
        for count in self.dropped(steps, tokens):
            if self.mode == "parity":
                low, high = int(count * (1 - share)), int(count * share)
                count = low + high
            else:
                # All frames together are a multiple; `fitted` rounds the others.
                unit = 1 if self.fits_waves else self.align // math.gcd(self.align, frames)
                keep = min(tokens, max(1, round((tokens - count) / unit)) * unit)
                count = tokens - keep if count else 0
                high = round(count * share)
            keep = tokens - count
            found.append(SparseStep(frames * keep, frames * high, frames) if count else None)
        return found

    def fitted(
        self, plan: list[SparseStep | None], tokens: int, waves: Waves
    ) -> list[SparseStep | None]:
        if not self.fits_waves:
            return plan
        return [step and self._fitted(step, tokens, waves) for step in plan]

    def _fitted(self, step: SparseStep, tokens: int, waves: Waves) -> SparseStep | None:
        frames, share = step.frames, step.high / (tokens - step.keep)
        # What frames have no share in is left out, which fills no wave more.
        keep = max(1, waves.nearest(step.keep, tokens) // frames)
        tokens //= frames
        if keep == tokens:
            return None
        return SparseStep(frames * keep, frames * round((tokens - keep) * share), frames)


PRESETS = {
    "sd3": RAS(metric="std", high_ratio=0.3, family="sd3"),
    "lumina-next": RAS(metric="std", schedule=Linear(256, 4), family="lumina"),
    "flux": RAS(metric="std", family="flux"),
}

METHOD = RAS
