"""RALU, region-adaptive latent upsampling (arXiv 2507.08422): few tokens early, all of them late.

A run has three stages. The first denoises at half the resolution, with a quarter of the tokens. Then the tokens that
hold the most edges are split into four, and the second stage runs on tokens of both sizes; then all others are split,
and the third runs at full resolution. Each time a token is split what was one value becomes four that share their
noise: scaling the state and adding anti-correlated noise makes it a point of the trajectory again, at an earlier time,
from which the next stage sets out on a grid of its own.

Two modes. `"parity"` follows the published implementation: a token that is split is copied four times, which tiles its
2 x 2 latent pixels over 4 x 4; noise has unit variance also on the tokens that are not split; edges are those of a
picture whose darker half is clipped. `"corrected"` draws each latent pixel twice as large, as the paper's nearest
neighbours are, gives those tokens the variance the equations ask for, looks at the whole range, and lets a coarse token
among fine ones lie in the middle of its four cells and count as four keys. The noise that four copies or four pixels
share is cancelled in either. Random numbers are drawn for every image from its own initial
latents, never from a global generator.

A run without a mixed stage may split all tokens at once in two better ways, see `lift`: then every query meets keys of
its own stride alone, noise is new only where the coarse picture had none, and the full stage can begin late.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastdit.checks import is_whole, one_of, real, whole
from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import Method, check_mode
from fastdit.tokens import lift, stages
from fastdit.tokens.resolution import ResolutionRun
from fastdit.tokens.stages import Stage

SELECTORS = ("edges", "gradient", "variance", "change")
LIFTS = ("pixels", "spectrum", "picture")
#: token layouts of the three stages
LAYOUTS = ("coarse", "mixed", "full")


@dataclass(frozen=True)
class RALU(Method):
    """This method runs the early steps on fewer, larger tokens.

    Attributes:
        steps: Steps of the three stages; `num_inference_steps` must be their sum. A stage of 0 steps is left out.
        ends: Times at which they end, rising to 1; 0 is noise and 1 is data.
        shifts: Timestep shifts h of the stages; leave out these and `noise` to have both solved.
        noise: The constant c in (0, 1/4] of the noise added between them.
        split: Share r in [0, 1] of the coarse tokens that are split early.
        selector: What splits a token early: "edges" of the decoded half-size picture, "gradient" or "variance" of its
            latents, or the "change" of their velocity over the last two coarse steps. Edges need the pipeline's VAE
            once in a run; under offload it moves in for that.
        lift: How coarse tokens become fine ones. "pixels" draws each latent pixel twice as large. The others need
            `steps` without a mixed stage: "spectrum" keeps the coarse picture as the low half of the fine one's cosine
            transform, and "picture" also decodes the clean estimate, enlarges it and encodes it again, once in a run.
        weigh_keys: Whether the key of a coarse token counts as four beside those of fine tokens, each of which covers a
            quarter of what it does, and not as one. None is True but in "parity", which never does that. It takes
            diffusers' stock attention processors.
        mode: "corrected" or "parity".
        align: The tokens of the mixed stage, text included, are made a multiple of this; 1 leaves `split` as it is.
            128 suits GPUs.
        base_shift: The shift the model was made for; used where shifts and noise are solved.
        family: The only model family it may run on, which a preset knows; None for any.

    Example:
        >>> fastdit.patch(pipe, fastdit.RALU.preset("flux-5x"))
        >>> pipe("a red circle", num_inference_steps=15)
    """

    steps: Sequence[int] = (5, 6, 7)
    ends: Sequence[float] = (0.3, 0.45, 1.0)
    shifts: Sequence[float] | None = None
    noise: float | None = None
    split: float = 0.3
    selector: str = "edges"
    lift: str = "pixels"
    weigh_keys: bool | None = None
    mode: str = "corrected"
    align: int = 1
    base_shift: float = 3.0
    family: str | None = None

    name = "RALU"
    writes = frozenset({"resolution"})

    def __post_init__(self) -> None:
        self._check_stages()
        real("split", self.split, "in [0, 1]", lambda x: 0 <= x <= 1)
        real("base_shift", self.base_shift, "above 0", lambda x: x > 0)
        one_of("selector", self.selector, SELECTORS)
        check_mode(self)
        if self.weigh_keys not in (None, False) and (
            self.weigh_keys is not True or self.mode == "parity"
        ):
            raise ArgumentError(
                'weigh_keys must be True, False or None, and not True with mode="parity", which is as published, '
                f"got {self.weigh_keys!r}"
            )
        self._check_lift()
        if self.selector == "change" and self.steps[1] and self.steps[0] < 2:
            raise ArgumentError(
                f'selector="change" needs at least 2 coarse steps, got steps={self.steps}'
            )
        whole("align", self.align)
        if (self.shifts is None) != (self.noise is None):
            given = "shifts" if self.noise is None else "noise"
            raise ArgumentError(
                f"shifts and noise belong together: give both or neither, got {given}"
            )
        if self.shifts is None:
            self._solve()
            return
        for shift in _triple("shifts", self.shifts):
            real("shifts", shift, "above 0", lambda x: x > 0)
        object.__setattr__(self, "shifts", tuple(self.shifts))
        real("noise", self.noise, "in (0, 1/4]", lambda x: 0 < x <= 0.25)

    def _check_stages(self) -> None:
        for name in ("steps", "ends"):
            object.__setattr__(self, name, tuple(_triple(name, getattr(self, name))))
        if not all(is_whole(count) and count >= 0 for count in self.steps) or not any(self.steps):
            raise ArgumentError(
                f"steps must be three whole numbers of at least 0, not all 0, got {self.steps!r}"
            )
        for end in self.ends:
            real("ends", end, "in (0, 1]", lambda x: 0 < x <= 1)
        reached = self._of_stages(self.ends)
        if reached[-1] != 1 or any(a >= b for a, b in itertools.pairwise(reached)):
            raise ArgumentError(
                f"ends must rise to 1 over the stages that have steps, got {self.ends!r}"
            )

    def _check_lift(self) -> None:
        one_of("lift", self.lift, LIFTS)
        if self.lift == "pixels":
            return
        if self.mode == "parity":
            raise ArgumentError(
                f'lift must be "pixels" with mode="parity", which is as published, got {self.lift!r}'
            )
        if self.steps[1]:
            raise ArgumentError(
                f'lift must be "pixels" with a mixed stage, got {self.lift!r} with steps={self.steps}; '
                f"steps=({self.steps[0]}, 0, {self.steps[2]}) has none"
            )

    def _solve(self) -> None:
        steps, ends = self._of_stages(self.steps), self._of_stages(self.ends)
        shifts, z = ((self.base_shift,), 2.0)
        if len(steps) > 1:
            shifts, z = stages.solve(steps, ends, self.base_shift)
        solved = iter(shifts)
        shifts = tuple(next(solved) if count else self.base_shift for count in self.steps)
        object.__setattr__(self, "shifts", shifts)
        object.__setattr__(self, "noise", 1 / z**2)

    def _of_stages(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """These values are of the stages that have steps."""
        return tuple(value for value, count in zip(values, self.steps, strict=True) if count)

    # ---- construction

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RALU:
        """These are the published settings of a model at a speed-up; `changes` are other arguments.

        "flux-4x", "flux-5x" and "flux-7x" for FLUX.1-dev; "sd3-2x" and "sd3-3x" for SD3-medium; "schnell" and
        "sd35-turbo", whose shifts and noise were never published and are solved as the others were.
        They run on that model's family only; `family=None` lets them run on any. "late" is none of the paper's: it
        has no mixed stage and leaves the coarse one late, for any family.
        """
        one_of("preset", name, PRESETS)
        return replace(PRESETS[name], **changes)

    @staticmethod
    def solve(
        steps: Sequence[int], ends: Sequence[float], base_shift: float = 3.0
    ) -> tuple[tuple[float, float, float], float]:
        """This solves noise-timestep matching for ((h1, h2, h3), Z) from the published starting point; c is 1 / Z^2.

        Args:
            steps: Of each stage, at least 1.
            ends: Times at which the stages end, the last 1.
            base_shift: The shift the model was made for: 3 for FLUX.1-dev and SD3, 1 for FLUX.1-schnell.
        """
        asked = RALU(steps, ends, (1.0, 1.0, 1.0), 0.25, base_shift=base_shift)
        if 0 in asked.steps:
            raise ArgumentError(f"steps must be at least 1 in every stage, got {asked.steps!r}")
        return stages.solve(asked.steps, asked.ends, base_shift)

    @staticmethod
    def latest_end(latents: Tensor, share: float = 0.01, noise: float = 0.25) -> float:
        """How late a coarse stage may end, by the spectrum of a VAE: the time for `ends`.

        The full stage begins with nothing but noise where the coarse picture tells nothing. At this time the signal
        that is missing there has, on the mean, at most `share` of that noise's power.

        Args:
            latents: Clean latents [..., h, w] of pictures at full size, scaled as the transformer takes them.
            share: Above 0.
            noise: The constant c, as for the method.
        """
        real("share", share, "above 0", lambda x: x > 0)
        real("noise", noise, "in (0, 1/4]", lambda x: 0 < x <= 0.25)
        return stages.latest_end(lift.new_power(latents), share, noise)

    # ---- the plan

    def begin(self, run: Any) -> ResolutionRun:
        return ResolutionRun(self, run)

    @property
    def weighs_keys(self) -> bool:
        asked = self.mode == "corrected" if self.weigh_keys is None else self.weigh_keys
        return asked and self.steps[1] > 0

    @property
    def run_steps(self) -> int:
        return sum(self.steps)

    @property
    def run_sigmas(self) -> list[float]:
        """Each step begins at one of these sigmas."""
        return [sigma for stage in self.stages() for sigma in stage.sigmas[:-1]]

    def check_steps(self, steps: int) -> None:
        """A run of another number of steps is a ScheduleError that names both."""
        if steps != self.run_steps:
            raise ScheduleError(
                f"RALU has stages of {', '.join(map(str, self.steps))} steps, {self.run_steps} together, but the run "
                f"has {steps}; use num_inference_steps={self.run_steps}"
            )

    def stages(self) -> tuple[Stage, ...]:
        """These stages have steps, in running order."""
        found: list[Stage] = []
        first, entry = 0, (0.0, 1.0, 0.0)
        parts = zip(LAYOUTS, self.steps, self.ends, self.shifts, strict=True)
        for layout, steps, end, shift in self._of_stages(parts):
            start, scale, deviation = entry
            sigmas = tuple(stages.sigma_grid(start, end, shift, steps))
            found.append(Stage(layout, first, sigmas, scale, deviation))
            first += steps
            entry = stages.transition(end, self.noise)
        return tuple(found)

    def split_count(self, coarse: int, text: int, frames: int = 1) -> int:
        """So many of `coarse` tokens are split early, beside `text` tokens: as many of each frame.

        Raises:
            ScheduleError: No number of them gives a length that `align` asks for.
        """
        wanted = int(coarse // frames * self.split)
        fitting = [
            k
            for k in range(coarse // frames + 1)
            if (coarse + 3 * k * frames + text) % self.align == 0
        ]
        if not fitting:
            raise ScheduleError(
                f"RALU align={self.align} fits no split of {coarse} coarse tokens beside {text} text tokens"
                + (f" in {frames} frames alike" if frames > 1 else "")
            )
        return frames * min(fitting, key=lambda k: abs(k - wanted))

    def tokens(self, full: int, text: int, frames: int = 1) -> list[int]:
        """Each step has so many image tokens, of `full` at full resolution."""
        coarse = full // 4
        count = {"coarse": coarse, "full": full}
        if self.steps[1]:
            count["mixed"] = coarse + 3 * self.split_count(coarse, text, frames)
        return [count[stage.layout] for stage in self.stages() for _ in range(stage.steps)]


def _triple(name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != 3:
        raise ArgumentError(f"{name} must be three numbers, one for each stage, got {values!r}")
    return values


_FLUX, _DEEP = (0.3, 0.45, 1.0), (0.2, 0.3, 1.0)

PRESETS = {
    "flux-4x": RALU((5, 6, 7), _FLUX, (5.019, 2.589, 2.226), 0.02506, 0.3, family="flux"),
    "flux-5x": RALU((4, 5, 6), _FLUX, (5.12, 2.64, 2.25), 0.0177, 0.2, family="flux"),
    # The paper's text says 0.2; its code and its count of operations say 0.1.
    "flux-7x": RALU((2, 3, 5), _DEEP, (8.141, 2.856, 2.193), 6.261**-2, 0.1, family="flux"),
    "sd3-2x": RALU((5, 6, 9), _DEEP, (6.21, 2.23, 1.97), 0.0586, 0.3, family="sd3"),
    "sd3-3x": RALU((3, 3, 6), (0.25, 0.3, 1.0), (6.40, 2.60, 2.23), 0.0255, 0.2, family="sd3"),
    "schnell": RALU(
        (1, 1, 2), _FLUX, (1.008, 0.568, 0.864), 0.25, 0.3, base_shift=1.0, family="flux"
    ),
    "sd35-turbo": RALU((1, 1, 2), _FLUX, (4.603, 2.277, 2.612), 38.5**-2, 0.3, family="sd3"),
    # The time is what `latest_end` says of the VAE in the package; the shifts are that of the models.
    "late": RALU((5, 0, 5), (0.5, 0.75, 1.0), (3.0, 3.0, 3.0), 0.25, lift="picture"),
}

METHOD = RALU
