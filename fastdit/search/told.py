"""What a scheduler is told at the steps of a run, and where the latents were then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: steps are sums of outputs where they differ by no more, relatively
ADDS = 1e-3


@contextmanager
def told_of_steps(scheduler: Any, tell: Any) -> Iterator[None]:
    """Inside, `tell` is given the model's output, as the scheduler is, and the latents before and after each step."""
    own, before = scheduler.step, scheduler.__dict__.get("step")

    def step(output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(output, timestep, sample, *args, **kwargs)
        tell(output, sample, found[0])
        return found

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


class Told:
    """The outputs and the latents of a run.

    Args:
        outputs: Keep the outputs, too.

    Attributes:
        outputs: Of the model, as the scheduler is given them.
    """

    def __init__(self, outputs: bool = True) -> None:
        self.outputs: list[np.ndarray] = []
        self._keeps = outputs
        self._samples: list[np.ndarray] = []

    def __call__(self, output: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        if not self._samples:
            self._samples.append(before.float().cpu().numpy())
        if self._keeps:
            self.outputs.append(output.float().cpu().numpy())
        self._samples.append(after.float().cpu().numpy())

    def adds(self, sigmas: Sequence[float]) -> bool:
        """Whether the run moved by its outputs times the lengths of its steps, as Euler's along a flow."""
        if len(self.outputs) != len(sigmas) - 1 or self.outputs[0].shape != self._samples[0].shape:
            return False
        moved = np.tensordot(np.diff(sigmas), np.stack(self.outputs), 1)
        seen = self._samples[-1] - self._samples[0]
        return bool(np.linalg.norm(moved - seen) < ADDS * np.linalg.norm(seen))

    def way(self, own: Sequence[float], sigmas: Sequence[float]) -> np.ndarray:
        """How far this run, of steps at its `own` sigmas, had moved from the noise when another's steps end.

        Both lists fall, and have the end of the last step. Between this run's steps its latents lie on lines.
        """
        samples, falling, at = np.stack(self._samples), -np.array(own), -np.array(sigmas[1:])
        right = np.clip(np.searchsorted(falling, at), 1, len(falling) - 1)
        share = (at - falling[right - 1]) / np.diff(falling)[right - 1]
        share = share.reshape(-1, *[1] * (samples.ndim - 1)).astype(samples.dtype)
        return samples[right - 1] + share * (samples[right] - samples[right - 1]) - samples[0]
