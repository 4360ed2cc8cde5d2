"""What a method is: a frozen config that says, before a run, which fields of the plan it fills and with what.

A method knows block kinds and component names (a :class:`~fastdit.spec.ModelSpec`), never a model family or a
backend. What it keeps and decides while a run goes on is its :class:`MethodRun`, made by :meth:`Method.begin`. Adding a
method is adding a file here that exposes ``METHOD``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastdit.errors import ArgumentError, ScheduleError
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.forecast import Fitted
from fastdit.schedules.schedule import Schedule
from fastdit.spec import ModelSpec

#: percent of the objects that prompts asked the packaged model for, as `benchmarks/noisy_sampler.py` measured it
NOISE_COSTS = {"uncached": 90, "every(4)": 56, "RAS 0.25": 65}


@dataclass
class Step:
    """A step is done, and the scheduler or the user tells this of it.

    Attributes:
        velocity: What the scheduler was given, guidance applied; None where nobody says.
        delta: Difference of the sigmas over the step.
        latents: What the scheduler returns; writing into them changes the next step.
        scheduler: Who tells it; None for the user.
    """

    velocity: Tensor | None = None
    delta: Any = 1.0
    latents: Tensor | None = None
    scheduler: Any = None


class MethodRun:
    """A method keeps and decides this during one run; each run has its own. By itself it decides nothing.

    Hooks are called in the order in which they stand here, for each transformer call and then for each step. A call is
    a :class:`fastdit.runtime.call.Call`. A step has several calls where guidance is by calls of its own (FLUX with a
    negative prompt, Qwen-Image): what belongs to one of them is kept by `call.branch`, as in a dict.

    Args:
        method: The method.
        run: The :class:`fastdit.runtime.run.Run` that begins. `run.step` is the step in progress, `run.steps` their
            number, `run.timesteps.of(run.steps)` theirs; `run.timesteps` is None where no scheduler leads it.
    """

    def __init__(self, method: Any, run: Any) -> None:
        self.method = method
        self.run = run

    def layout(self, call: Any) -> Any:
        """The call's tokens have this :class:`~fastdit.tokens.layout.Layout`; None stands for the model's own."""
        return None

    def rows(self, call: Any) -> Tensor | None:
        """These image tokens [B, K] pass in this call; None stands for all."""
        return None

    def keeps_keys(self, call: Any) -> bool:
        """This tells whether calls of fewer tokens will read the keys and values of this call."""
        return False

    def actions(self, call: Any, planned: Sequence[Any]) -> Sequence[Any]:
        """Each block does this in the call: flags of `schedules/actions.py` by component; nothing where all compute.

        A cache that decides while it runs gives other ones than `planned`; what it never gives KEEP is not kept.
        """
        return planned

    def output(self, call: Any, sample: Tensor) -> Tensor:
        """The transformer gives this in place of `sample`: a forecast, or the sample itself."""
        return sample

    def begin_step(self, scheduler: Any, sample: Tensor) -> None:
        """The scheduler is about to step from `sample`."""

    def end_step(self, step: Step) -> None:
        """A step is done; what is chosen here is for the next."""

    def end(self) -> None:
        """The run is over, or was broken off: free what only it needs."""


def check_mode(method: Any) -> None:
    """A `mode` is "corrected", once called "fixed", which is warned of, or "parity"; another is an ArgumentError."""
    if method.mode == "fixed":
        warnings.warn('mode="fixed" is called "corrected" now', DeprecationWarning, stacklevel=4)
        object.__setattr__(method, "mode", "corrected")
    if method.mode not in ("corrected", "parity"):
        raise ArgumentError(f'mode must be "corrected" or "parity", got {method.mode!r}')


def check_noise(method: Method, noise: str) -> None:
    """Under a sampler that draws noise forecasts are an ArgumentError, and repeats are warned of; "" draws none."""
    if not noise:
        return
    if method.forecasts:
        check_no_noise(noise)
    drawn = ", ".join(f"{name} {share} %" for name, share in NOISE_COSTS.items())
    warnings.warn(
        f"{method.name} keeps outputs under a sampler that draws noise at each step ({noise}), each of a picture with "
        f"other noise; of the objects asked for, the packaged model drew: {drawn}",
        stacklevel=2,
    )


def check_no_noise(noise: str | None) -> None:
    """Forecasts under a sampler that draws noise are an ArgumentError; "" and None draw none."""
    if noise:
        raise ArgumentError(
            f"order must be 0 with a sampler that draws noise at each step ({noise}): outputs of unlike noise lie on "
            "no line"
        )


class Method:
    """This is the base of all methods, and does nothing by itself.

    Attributes:
        name: How errors, `explain` and `report` call it.
        writes: The plan fields it decides; two methods that share one do not compose. `"reuse"`: which components are
            reused, by `schedule` or by its run's `actions`. `"rows"`: which image tokens pass, by `active` and a
            :class:`~fastdit.tokens.active.TokenRun`. `"resolution"`: how many there are, as RALU does.
        needs: Fields that another method has to decide -> what to say where none does.
        bars: Fields that no other method may decide -> why, and what to do; `{other}` stands for that method.
        max_cache_bytes: Most bytes that caches may hold at once; None for no bound.
        cache_dtype: The precision in which reused outputs are kept, where it is less than the model's; None for the
            model's own.
        family: The model family that a preset's settings are for; None for settings that fit any.
        run_steps: The number of steps it was made for; None fits any.
        made_for: The only runs it fits, which is checked at a run's first transformer call; None fits any.
        otherwise: What to do about a run that it does not fit.
        asks_guidance: What it does depends on the guidance, which is read when a run starts.
        guard: It compares its forecasts with what the model gives, see `runtime/guard.py`.
        forecasts: It extrapolates outputs that it reuses, see `schedules/forecast.py`.
        adapts: Whole steps are extrapolated only where that was better than a repeat before.
        weighs_keys: Some keys of an attention count more than others.
        skips_steps: It leaves out whole steps and nothing else, so that any model will do.
        fits_waves: How many tokens it computes depends on the GPU.
        per_frame: Its `active` is told how many frames of a video the tokens are of, too.
    """

    name: str = ""
    writes: frozenset[str] = frozenset()
    needs: Mapping[str, str] = MappingProxyType({})
    bars: Mapping[str, str] = MappingProxyType({})
    max_cache_bytes: int | None = None
    cache_dtype: str | None = None
    family: str | None = None
    run_steps: int | None = None
    made_for: Conditions | None = None
    otherwise: str = "strict=False runs it all the same"
    asks_guidance: bool = False
    guard: bool = False
    forecasts: bool = False
    adapts: bool = False
    weighs_keys: bool = False
    skips_steps: bool = False
    fits_waves: bool = False
    per_frame: bool = False

    def check_steps(self, steps: int) -> None:
        """It refuses a number of steps that it does not fit, when a run starts."""

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        """It refuses a sampler that it does not fit, when a pipeline is patched and when a run starts.

        Args:
            noise: What makes the sampler draw noise at each step; "" for one that draws none.
            scheduler: The scheduler's class when a run starts; "" before, when there may still come another.
        """

    def check(self, spec: ModelSpec) -> None:
        """It refuses a model that it cannot run on, when patching, before anything changes.

        Raises:
            ScheduleError: Naming what differs.
        """
        if self.family not in (None, spec.family):
            raise ScheduleError(
                f"this {self.name} has settings for {self.family} models, the model is of the {spec.family} family; "
                "dataclasses.replace(method, family=None) runs them all the same"
            )

    def beside(self, steps: int | None = None) -> tuple[Method, ...]:
        """A run of `steps` steps goes by these methods as well; without a number: all that some of its runs do."""
        return ()

    def told(self, steps: int, others: Sequence[str] = ()) -> str:
        """This says what a run of `steps` steps comes to, where that follows from what was asked; else nothing.

        `others` names the other methods of the patch that leave something out.
        """
        return ""

    def bounds(self, steps: int) -> Mapping[int, float] | None:
        """Of a run of `steps` steps: step -> the most that a forecast may be off there; None where no guard watches."""
        return None

    def instead(self, run: Conditions, timesteps: Any) -> Method | None:
        """In a run of these conditions and timesteps this method has its place; None where it stays."""
        return None

    def begin(self, run: Any) -> MethodRun | None:
        """This begins what the method keeps and decides in `run`; None if its schedule says everything."""
        return None

    def schedule(self, spec: ModelSpec, steps: int, timesteps: Any = None) -> Schedule | None:
        """A method that writes ``"reuse"`` gives its schedule for a run of `steps` steps.

        `timesteps` are the run's, a :class:`fastdit.runtime.timesteps.Timesteps`; None where no scheduler leads it.
        """
        return None

    def active(self, steps: int, tokens: int) -> list[Any]:
        """A method that writes ``"rows"`` says what each of `steps` steps computes of `tokens` image tokens.

        Returns:
            For each step an object whose `keep` is the number of active tokens; None where all are.
        """
        return [None] * steps

    def fitted(self, plan: list[Any], tokens: int, waves: Any) -> list[Any]:
        """This is the `active` plan of `tokens` image tokens for a device, see :mod:`fastdit.tokens.waves`."""
        return plan

    def weights(self, steps: int, timesteps: Any = None) -> Fitted:
        """Of a run of `steps` steps that this method alone decides: the weights of forecasts of whole steps."""
        return {}

    def staged_schedule(
        self, spec: ModelSpec, stages: Sequence[int], timesteps: Any = None
    ) -> Schedule | None:
        """This is the schedule for a run in stages of so many steps; a run that is in none is a single one."""
        return self.schedule(spec, sum(stages), timesteps)
