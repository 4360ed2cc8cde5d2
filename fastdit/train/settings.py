"""What a training is told, its settings, and what it tells, an epoch's progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """An epoch tells this when it is done.

    Attributes:
        epoch: How many are done.
        loss: Mean squared error of the student, mean over the steps.
        weighted: The same weighted by lambda, and the penalty added: what was minimised.
        reuse: Share of all entries that the threshold reuses (CUR).
        mac_reuse: The same weighted by multiply-accumulates.
        seconds: Of this epoch.
    """

    epoch: int
    loss: float
    weighted: float
    reuse: float
    mac_reuse: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: loss {self.loss:.3e}, weighted {self.weighted:.3e}, "
            f"reuse {self.reuse:.1%} of entries, {self.mac_reuse:.1%} of arithmetic, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Settings:
    """These decide the result of a training, beside the model and the prompts; see :class:`HarmoniCa`."""

    steps: int
    beta: float
    target: float | None
    lr: float
    epochs: int
    batch: int
    loss: str
    lambda_form: str | None
    lambda_every: int
    normalise: bool
    pairs: bool
    whole_steps: bool
    tau: float
    keep: str
    spread: float
    seed: int
    order: int
