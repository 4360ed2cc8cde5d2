"""The image error proxy: how much caching at one step changes the final latents (spec section 6).

Two published forms of lambda. As *released*, a telescoping chain: starting from a run that computes everything, one
more step caches in each run, and lambda is the mean squared change of the final latents. As *published*, each step is
compared by the squared norm between a run that caches everywhere and one that does not at this step.

Both contain the error that lambda is to weigh: where a step of the router computes, lambda falls to 0 and nothing but
the penalty moves that step, until the next estimate. A third form, not of the paper, divides it out. The *sensitivity*
is the released lambda over the mean squared change of the prediction at that step; then lambda_i times the loss of step
i is, to first order, how far caching there moves the final latents.

All runs of an estimate start from the same noise, and those that agree up to a step share it: a record of the
transformer's outputs stands in for the model, the pipeline and its scheduler go through their own arithmetic again,
so the result is exact. T (T + 1) / 2 forwards of one step for either form, where T runs of T steps are T^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks.forward import Forward, Slots
from fastdit.train.blending import COMPUTE, STOCK, Ratios
from fastdit.train.student import Trainee, squares

FORMS = ("released", "published", "sensitivity")


@dataclass
class Sampling:
    """This draws one run without gradients, or the rest of one.

    Attributes:
        trainee: What runs.
        ratios: Of each step: r [N], COMPUTE (and store), or STOCK (compute, store nothing).
        record: The transformer's outputs, one list for each step with one entry for each call. Steps already in it are
            not run; those that run are added.
        slots: What the slots hold when the first step runs, by call within a step.
        stop: The last step.
        predictions: What the scheduler got, of each step.
        latents: The result.
    """

    trainee: Trainee
    ratios: Sequence[Ratios]
    record: list[list[Tensor]] = field(default_factory=list)
    slots: dict[int, Slots] = field(default_factory=dict)
    stop: int | None = None
    predictions: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None

    def __post_init__(self) -> None:
        self.record = list(self.record)
        self.slots = dict(self.slots)
        self._replayed = len(self.record)

    def run(self, arguments: Mapping[str, Any]) -> Sampling:
        """The pipeline draws."""
        with torch.no_grad():
            self.trainee.run(self, arguments)
        return self

    def call(self, step: int, branch: int, forward: Callable[[Forward | None], Tensor]) -> Tensor:
        """The output comes from the record, or from the model."""
        if step < self._replayed:
            return self.record[step][branch].clone()  # a pipeline may write into what it gets
        if self.ratios[step] is STOCK:
            output = forward(None)
        else:
            held = self.slots.get(branch, {})
            output, self.slots[branch] = self.trainee.student(self.ratios[step], held, forward)
        if branch == 0:
            self.record.append([])
        self.record[step].append(output.clone())
        return output

    def step(self, step: int, prediction: Tensor) -> Tensor:
        """The scheduler gets what was predicted."""
        self.predictions.append(prediction.clone())
        return prediction

    def stepped(self, step: int, latents: Tensor) -> bool:
        """The run is over at the last step."""
        self.latents = latents
        return step == (len(self.ratios) - 1 if self.stop is None else self.stop)


def estimate(
    form: str,
    trainee: Trainee,
    ratios: Sequence[Tensor],
    arguments: Callable[[], Mapping[str, Any]],
    mean: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """This estimates lambda [T], float32, 0 at the first step, which always computes.

    Args:
        form: One of FORMS.
        ratios: r of every step, [T][N].
        arguments: Makes the pipeline's arguments anew, with generators that start over.
        mean: Takes means over this process's images to means over everybody's.
    """
    if form == "published":
        return mean(_published(trainee, list(ratios), arguments))
    moved, changed = mean(_chain(trainee, list(ratios), arguments))
    return torch.where(changed > 0, moved / changed, 0.0) if form == "sensitivity" else moved


def _chain(trainee: Trainee, ratios: list[Ratios], arguments: Callable[[], Any]) -> Tensor:
    """This gives [2, T]: mean squared change of the final latents, and of what the scheduler got at the step itself."""
    steps = len(ratios)
    found = torch.zeros(2, steps)
    before = Sampling(trainee, [COMPUTE] + [STOCK] * (steps - 1)).run(arguments())
    for step in range(1, steps):
        chain = [COMPUTE, *ratios[1 : step + 1], *[STOCK] * (steps - 1 - step)]
        # Up to this step the run before is the same; its slots were last written at the step before.
        run = Sampling(trainee, chain, before.record[:step], before.slots)
        run.run(arguments())
        # Both came to this step with the same latents.
        pairs = (run.latents, before.latents), (run.predictions[step], before.predictions[step])
        found[:, step] = torch.stack([squares(*pair).mean().cpu() for pair in pairs])
        before = run
    return found


def _published(trainee: Trainee, ratios: list[Ratios], arguments: Callable[[], Any]) -> Tensor:
    steps = len(ratios)
    ratios = [COMPUTE, *ratios[1:]]
    base = Sampling(trainee, ratios, stop=0).run(arguments())
    masked = []
    for step in range(1, steps):
        once = [*ratios[:step], COMPUTE, *ratios[step + 1 :]]
        fork = Sampling(trainee, once, base.record, base.slots).run(arguments())
        masked.append(fork.latents)
        base = Sampling(trainee, ratios, base.record, base.slots, stop=step)
        base.run(arguments())
    weights = torch.zeros(steps)
    for step, latents in enumerate(masked, start=1):
        weights[step] = squares(base.latents, latents).flatten(1).sum(1).mean().cpu()
    return weights
