"""What a training is told, and what it tells: its settings, the checks of them, and an epoch's progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdit.errors import ArgumentError


@dataclass(frozen=True)
class Progress:
    """One epoch.

    Attributes:
        epoch: How many are done.
        loss: Mean squared error of the guided output, mean over the steps.
        weighted: The same weighted by lambda, and the penalty added: what was minimised.
        reuse: Share of all cells that the threshold reuses (CUR).
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
            f"reuse {self.reuse:.1%} of cells, {self.mac_reuse:.1%} of arithmetic, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training, beside the model and the prompts; see :class:`HarmoniCa`."""

    steps: int
    beta: float
    target: float | None
    lr: float
    epochs: int
    batch: int
    lambda_form: str | None
    lambda_every: int
    normalise: bool
    pairs: bool
    whole_steps: bool
    tau: float
    keep: str
    spread: float
    seed: int


def whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def real(name: str, value: Any) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (fits and math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ArgumentError(f"{name} must be a number in (0, 1), got {value!r}")
    return float(value)


def one_of(name: str, value: Any, accepted: Sequence[Any]) -> Any:
    if value not in accepted:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}"
        )
    return value
