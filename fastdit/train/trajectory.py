"""One trajectory of a training: teacher and student at each step, on a stock pipeline, and what they are compared by.

The "guided" loss is the mean squared difference of what the scheduler gets. The "released" one is the authors': of all
channels that the transformer gives, in every row of its batch. Those that the scheduler gets are compared as the
pipeline combined them, which both halves of guidance share; those that the pipeline drops, the predicted variances of
DiT and PixArt, as they are. Both are the same where a pipeline drops no channels, and without guidance the released
one is of the plain outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdit.blocks.forward import Forward, Slots
from fastdit.errors import ArgumentError
from fastdit.train.blending import COMPUTE
from fastdit.train.pair import Pair
from fastdit.train.student import squares

if TYPE_CHECKING:
    from fastdit.train.harmonica import HarmoniCa

LOSSES = ("guided", "released")


class Trajectory:
    """This drives the pipeline through one run, and trains at each step."""

    def __init__(self, training: HarmoniCa) -> None:
        self._training = training
        self._slots: dict[int, Slots] = {}
        self._ratios: Tensor | None = None
        self._outputs: list[tuple[Tensor, Tensor]] = []
        steps = len(training.logits)
        self.losses = [0.0] * steps
        self.weighted = [0.0] * steps

    def call(self, step: int, branch: int, forward: Callable[[Forward | None], Tensor]) -> Tensor:
        """Teacher and student run; where nothing is trained the model alone does, which fills the slots."""
        training, held = self._training, self._slots.get(branch, {})
        student = training.trainee.student
        if not training.logits[step].requires_grad:
            output, self._slots[branch] = student(COMPUTE, held, forward)
            return output
        teacher = forward(None)
        with torch.enable_grad():
            if self._ratios is None:
                self._ratios = torch.sigmoid(training.logits[step])
            blended, self._slots[branch] = student(self._ratios, held, forward, teacher)
            output = Pair.of(blended, teacher)
        self._outputs.append((blended, teacher))
        return output

    def step(self, step: int, prediction: Tensor) -> Tensor:
        """This trains on what the pipeline made of the outputs; the student's goes on, or in pairs the teacher's."""
        if not self._training.logits[step].requires_grad:
            return prediction
        if not isinstance(prediction, Pair):
            raise ArgumentError(
                "the pipeline gave its scheduler a prediction that is cut off from the transformer's output"
            )
        student, teacher = prediction.__dict__["student"], prediction.__dict__["teacher"]
        with torch.enable_grad():
            loss = squares(teacher, student).mean()
            if self._training.settings.loss == "released":
                loss = _with_dropped(loss, student.shape, self._outputs)
            self.losses[step] = float(loss.detach())
            self.weighted[step] = self._training.update(step, loss, self._ratios)
        self._ratios = None
        self._outputs.clear()
        return teacher if self._training.settings.pairs else student.detach()

    def stepped(self, step: int, latents: Tensor) -> bool:
        """The run is over after the last step."""
        return step == len(self._training.logits) - 1


def _with_dropped(
    guided: Tensor, shape: torch.Size, outputs: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The released loss is made of the guided one, the prediction's shape and each call's (student, teacher)."""
    kept, given = shape[1], outputs[0][0].shape[1]
    if len(shape) < 4 or kept == given:  # tokens, or all channels
        return guided
    dropped = [squares(teacher[:, kept:], student[:, kept:]).mean() for student, teacher in outputs]
    return (kept * guided + (given - kept) * torch.stack(dropped).mean()) / given
