"""Which image tokens a run computes: the plan of a token method, and what is kept of those left out.

A :class:`TokenRun` lives as long as a run. At the end of a step it sees the velocity that the scheduler got, guidance
applied and inactive tokens carried over, and the method's rule, :meth:`TokenRun.choose`, names the active tokens of the
next step; nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.methods.base import MethodRun, Step
from fastdit.tokens.clip import rows_of_clip
from fastdit.tokens.waves import Waves, waves_of


class TokenRun(MethodRun):
    """The active tokens of one run; a method that writes "rows" begins a subclass with a rule of its own.

    Attributes:
        first: The run's step from which steps count here: its first executed one, or the full resolution's.
        tokens: Image tokens, N; 0 before the first call that has them.
        plan: What each step computes, counted from `first`; None where it is dense.
        active: [B, K] tokens of the step that comes, or None before a dense one.
        history: Step -> its tokens, for the report.
    """

    def __init__(self, method: Any, run: Any) -> None:
        super().__init__(method, run)
        self.first = 0
        self.tokens = 0
        self.plan: list[Any] = []
        self.active: Tensor | None = None
        self.history: dict[int, Tensor] = {}

    def rows(self, call: Any) -> Tensor | None:
        """The active tokens; None for all, also where a CFG branch is seen for the first time."""
        if not self._acts(call):
            return None
        arguments, run = call.arguments, self.run
        if torch.is_grad_enabled() and arguments.hidden_states.requires_grad:
            raise ArgumentError(
                f"{self.method.name} has no gradient: run under torch.no_grad(), or inside `with handle.disabled()`"
            )
        if not self.tokens:
            latents = arguments.hidden_states
            size = latents.shape[0], arguments.text
            waves = waves_of(run.patched, call.transformer, latents.device, *size)
            self.lay_out(run.patched.adapter.moved_tokens(arguments), waves)
        planned = self.at(run.step - self.first) is not None
        batch, rows = arguments.hidden_states.shape[0], self.active
        if not planned or rows is None or call.branch.velocity is None or batch % rows.shape[0]:
            return None
        return rows.repeat(batch // rows.shape[0], 1).long()

    def keeps_keys(self, call: Any) -> bool:
        """Whether this step or the next has fewer tokens; with a schedule, which may reuse an attention, all do."""
        if not self._acts(call):
            return False
        coming = self.at(self.run.step - self.first + 1)
        return call.rows is not None or coming is not None or bool(self.run.plan.actions)

    def output(self, call: Any, sample: Tensor) -> Tensor:
        """The velocities of all tokens: those that were left out keep theirs."""
        if not self._acts(call):
            return sample
        branch, run = call.branch, self.run
        if call.rows is None:
            kept, given = sample.clone(), sample  # the caller may write into what it gets
        else:
            kept = run.patched.adapter.scatter_output(sample, call.rows, branch.velocity, run.patch)
            given = kept.clone()
        branch.velocity = kept
        if run.scheduler is None:
            run.outputs.append(kept)
        return given

    def end_step(self, step: Step) -> None:
        """Choose the active tokens of the next step."""
        if self.tokens and step.velocity is not None:
            run = self.run
            patches = self._patches(step.velocity)
            self.observe(run.step - self.first, patches, step.delta)

    def _patches(self, velocity: Tensor) -> Tensor:
        """A velocity in patches.

        Raises:
            ArgumentError: It is of another size than the image.
        """
        run = self.run
        try:
            patches = run.patched.adapter.patches(velocity, run.patch)
        except (RuntimeError, IndexError):
            patches = None
        if patches is None or patches.shape[1] * patches.shape[2] != self.tokens:
            raise ArgumentError(
                f"velocity must be that of the picture's {self.tokens} tokens (a reference image has none) in a run "
                f"over {tuple(run.latents)}, got {tuple(velocity.shape)}"
            )
        return patches

    def end(self) -> None:
        """Only the history stays."""
        self.active = None

    def at(self, step: int) -> Any:
        """The plan of a step; dense beyond its end."""
        return self.plan[step] if step < len(self.plan) else None

    def _acts(self, call: Any) -> bool:
        return call.layout is None or call.layout.name == "full"

    def lay_out(self, tokens: int, waves: Waves) -> None:
        """Lay out the plan, now that the number of tokens is known, and what they ask of the device."""
        run = self.run
        resolution = run.resolution
        self.first = resolution.stage.first if resolution is not None else run.first or 0
        self.tokens = tokens
        frames = 1
        if self.method.per_frame:
            frames = run.patched.adapter.frames(run.latents, run.positions, run.patch)
        plan = active_of(self.method, run.steps - self.first, tokens, frames)
        self.plan = self.method.fitted(plan, tokens, waves)
        # A component that computes some rows does not replace what the others hold.
        dense = (None,) * self.first
        run.plan_partial(tuple(step is not None for step in (*dense, *self.plan)))

    def observe(self, step: int, velocity: Tensor, delta: Any) -> None:
        """Choose the active tokens of the step after `step`, or none before one that is forecast as a whole.

        Args:
            velocity: [B, gh, gw, p, p, C], the velocity field in patches, any strides.
            delta: Difference of the sigmas over this step.
        """
        self.active = None
        if self.run.plan.forecast_order(self.first + step + 1):
            self.look(velocity)
            return
        self.active = self.choose(velocity, delta, self.at(step + 1))
        if self.active is not None:
            self.history[step + 1] = self.active

    def look(self, velocity: Tensor) -> None:
        """See the velocity of a step before one that is forecast as a whole, which computes no token and ages none."""

    def choose(self, velocity: Tensor, delta: Any, coming: Any) -> Tensor | None:
        """The rule: which tokens are active in the step that comes. It is asked before each that computes.

        Args:
            velocity, delta: As in `observe`.
            coming: What the method's `active` gave for that step; None where it is dense.

        Returns:
            int32 [B, K] of `coming.keep` tokens in ascending order, on the velocity's device; None before a dense step.
            With a batch of one of them for all.
        """
        raise TypeError(f"{self.method.name} does not say which tokens are active")

    def select(
        self, field: Tensor, coming: Any, drops: Tensor, age: Tensor | None, **rule: Any
    ) -> tuple[Tensor, Tensor]:
        """The op `token_select` over a clip, or over each of its frames, which lie below each other in the field.

        Args:
            field: As that op has it, [B, gh, gw, p, p, C].
            coming: A step of the plan with `keep`, `high` and `frames`.
            drops, age: int32 [B, N], contiguous.
            rule: Its other arguments.

        Returns:
            Rows, int32 [B, K], ascending; and an inverse map [B, N], -1 where a token was dropped.
        """
        frames, (batch, tokens) = coming.frames, drops.shape
        field = field.unflatten(1, (frames, -1)).flatten(0, 1)
        drops, age = (t if t is None else t.view(batch * frames, -1) for t in (drops, age))
        rows, inverse = self.run.patched.ops.token_select(
            field, drops, coming.keep // frames, age=age, high=coming.high // frames, **rule
        )
        return rows_of_clip(rows, frames, tokens), inverse.view(batch, tokens)


def active_of(method: Any, steps: int, tokens: int, frames: int) -> list[Any]:
    """What a method computes of `tokens` tokens at each of `steps` steps, of a clip of so many frames."""
    if method.per_frame:
        return method.active(steps, tokens, frames)
    return method.active(steps, tokens)
