"""What a run is like, as far as a learned schedule depends on it: sampler, timesteps, size and guidance.

Plain data, compared field by field; a field that nobody can tell is None and fits everything.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from fastdit.errors import ScheduleError

#: relative difference up to which two timesteps, or two guidance scales, are the same
CLOSE = 1e-4


@dataclass(frozen=True)
class Conditions:
    """A run has these conditions, or something was made for them.

    Attributes:
        scheduler: Class name of the scheduler.
        timesteps: Those of the run, in the order in which they are visited.
        image_tokens: Image tokens of a batch row, which stands for the resolution.
        guidance: Guidance scale, as the pipeline calls it.
        true_guidance: Scale of the classifier-free guidance of a distilled model, which has both; 1 where it is off.
        noise: What made the sampler draw noise at each step, "" where it drew none, of what something was made for. A
            run's is not known before its steps.
    """

    scheduler: str | None = None
    timesteps: tuple[float, ...] | None = None
    image_tokens: int | None = None
    guidance: float | None = None
    true_guidance: float | None = None
    noise: str | None = None

    @classmethod
    def of(cls, scheduler: Any, image_tokens: int | None, given: Mapping[str, Any]) -> Conditions:
        """They are read off a run's scheduler, which may be None, and what its pipeline's call was `given`."""
        timesteps = getattr(scheduler, "timesteps", None)
        return cls(
            None if scheduler is None else type(scheduler).__name__,
            None if timesteps is None else tuple(float(t) for t in timesteps.tolist()),
            image_tokens,
            **guidance_of(given),
        )

    def differing(self, run: Conditions) -> list[str]:
        """What another run is like that these conditions say otherwise, field by field; what nobody says is alike."""
        found = []
        for field in fields(self):
            wanted, given = getattr(self, field.name), getattr(run, field.name)
            if wanted is not None and given is not None and not _same(wanted, given):
                found.append(f"{field.name} is {_short(given)}, it was made for {_short(wanted)}")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """Files keep the fields so: without the later ones, where they are not known."""
        found = asdict(self)
        for later in ("true_guidance", "noise"):
            if found[later] is None:
                del found[later]
        return found

    def check(self, run: Conditions, method: str, otherwise: str) -> None:
        """This refuses another run than these conditions say; `otherwise` is what to do about it.

        Raises:
            ScheduleError: Naming every field that differs.
        """
        if found := self.differing(run):
            raise ScheduleError(f"{method} does not fit this run: {'; '.join(found)}. {otherwise}")


def guidance_of(given: Mapping[str, Any]) -> dict[str, float | None]:
    """This reads the guidance of :class:`Conditions` off a pipeline call's arguments or variables."""
    scale, true = (_number(given.get(name)) for name in ("guidance_scale", "true_cfg_scale"))
    if true is not None:
        negative = ("negative_prompt", "negative_prompt_embeds")
        applies = given.get("do_true_cfg", any(given.get(name) is not None for name in negative))
        true = true if applies and true > 1 else 1.0
    return {"guidance": scale, "true_guidance": true}


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, numbers.Real) else None


def _same(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, tuple):
        return len(wanted) == len(given) and all(map(_same, wanted, given))
    if isinstance(wanted, float):
        return math.isclose(wanted, given, rel_tol=CLOSE, abs_tol=CLOSE)
    return wanted == given


def _short(value: Any) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    shown = ", ".join(f"{v:g}" for v in value[:3])
    return f"[{shown}, ...] ({len(value)})" if len(value) > 3 else f"[{shown}]"
