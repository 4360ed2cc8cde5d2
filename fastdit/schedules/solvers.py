"""What is asked of diffusers' schedulers as solvers: at which sigma each step is, whether they draw noise, and
which of them needs the fewest steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdit.checks import is_whole
from fastdit.errors import ArgumentError, UnsupportedModelError

#: classes whose `step` draws noise whatever its arguments are
_ALWAYS = frozenset(
    {
        "CMStochasticIterativeScheduler",
        "CogVideoXDPMScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DDPMWuerstchenScheduler",
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KarrasVeScheduler",
        "LCMScheduler",
        "LTXEulerAncestralRFScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "ScoreSdeVeScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
    }
)
#: arguments of `step` that make it draw noise where they are more than 0
CHURN = ("eta", "s_churn")


def noise_of(scheduler: Any, given: Mapping[str, Any] | None = None) -> str:
    """This says what makes a scheduler draw noise at each step, or gives "" for one that draws none.

    Args:
        scheduler: A diffusers scheduler.
        given: Arguments of its `step` by name; some draw noise only where they say so.
    """
    config = getattr(scheduler, "config", {})
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if names & _ALWAYS:
        return type(scheduler).__name__
    if getattr(config, "stochastic_sampling", False):
        return "stochastic_sampling=True"
    algorithm = str(getattr(config, "algorithm_type", ""))
    if algorithm.startswith("sde-"):
        return f"algorithm_type={algorithm!r}"
    for name in CHURN:
        value = (given or {}).get(name)
        if isinstance(value, (int, float)) and value > 0:
            return f"{name}={value:g}"
    return ""


def step_sigmas(scheduler: Any) -> list[float]:
    """This gives the sigma of each transformer call of the run that a scheduler was set for.

    Solvers of higher order are polynomials of it, too; it is never the timestep, which several round to an integer. A
    scheduler without sigmas has those of its cumulative alphas, or, if it has none, its timesteps.
    """
    timesteps = [float(t) for t in scheduler.timesteps.tolist()]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)].tolist()]  # one wait at most
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timesteps
    kept = (float(alphas[round(t)]) for t in timesteps)
    return [((1 - a) / a) ** 0.5 for a in kept]


@dataclass(frozen=True)
class Advice:
    """This solver suits few steps.

    Attributes:
        scheduler: To put in the pipeline's place of the same name.
        arguments: For the pipeline's call.
        why: One sentence.

    Example:
        >>> advice = fastdit.recommend(pipe, 10)
        >>> pipe.scheduler = advice.scheduler
        >>> image = pipe("a red circle", **advice.arguments).images[0]
    """

    scheduler: Any
    arguments: Mapping[str, Any]
    why: str


def recommend(pipe: Any, steps: int) -> Advice:
    """This recommends a solver for a pipeline's runs of `steps` steps; the pipeline stays as it is.

    Flow-matching pipelines get UniPC of order 2 on their own sigmas, with the shift that `from_config` alone
    would lose; those that predict noise get it on theirs. Where UniPC cannot stand for it the scheduler stays.

    Raises:
        ArgumentError: `steps` is no int of at least 1.
        UnsupportedModelError: `pipe` has no scheduler of diffusers.
    """
    if not is_whole(steps) or steps < 1:
        raise ArgumentError(f"steps must be an int of at least 1, got {steps!r}")
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "config") or not hasattr(scheduler, "set_timesteps"):
        raise UnsupportedModelError(
            f"pipe must be a pipeline with a scheduler of diffusers, got {type(pipe).__name__}"
        )
    from diffusers import UniPCMultistepScheduler

    arguments, flow = {"num_inference_steps": steps}, _flow(type(scheduler))
    if why := _no_unipc(pipe, scheduler, flow):
        return Advice(scheduler, arguments, f"{type(scheduler).__name__} stays: {why}")
    settings: dict[str, Any] = {
        "solver_order": 2,
        "solver_type": "bh2",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    return Advice(
        converted(scheduler, UniPCMultistepScheduler, **settings),
        arguments,
        "UniPC of order 2 follows curved trajectories in fewer steps than Euler",
    )


def converted(scheduler: Any, cls: type, **settings: Any) -> Any:
    """This is a scheduler of another class for the same model, with a flow's sigmas where it follows one.

    Raises:
        UnsupportedModelError: One of the two follows a flow, and the other cannot.
    """
    config = scheduler.config
    flow = follows_flow(scheduler)
    accepted = inspect.signature(cls.__init__).parameters
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if flow and "use_flow_sigmas" in accepted:
        settings |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0 if config.get("use_dynamic_shifting") else shift,
        }
    elif flow and _flow(cls):
        settings = {"shift": shift, **settings}
    elif flow or _flow(cls):
        raise UnsupportedModelError(
            f"{cls.__name__} cannot stand for {type(scheduler).__name__}: "
            + ("the model gives velocities of a flow" if flow else "the model follows no flow")
        )
    return cls.from_config(config, **settings)


def follows_flow(scheduler: Any) -> bool:
    """Whether the model gives velocities of a flow."""
    return _flow(type(scheduler)) or bool(scheduler.config.get("use_flow_sigmas"))


def _flow(cls: type) -> bool:
    return any(each.__name__.startswith("FlowMatch") for each in cls.__mro__)


def _no_unipc(pipe: Any, scheduler: Any, flow: bool) -> str:
    """This says why UniPC cannot stand for a pipeline's scheduler; "" where it can."""
    config = scheduler.config
    if noise := noise_of(scheduler):
        return f"it draws noise ({noise}), for which the model may have been distilled"
    if not flow:
        return "it clips what it takes to be the picture" if config.get("clip_sample") else ""
    if any(cls.__name__.startswith("ZImage") for cls in type(pipe).__mro__):
        return "the pipeline gives it a list of sigmas, which UniPC does not take"
    if "strength" in inspect.signature(type(pipe).__call__).parameters:
        return "the pipeline has it add noise to a picture, which UniPC does otherwise"
    linear = config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear"
    return "UniPC cannot have its sigmas" if linear or config.get("invert_sigmas") else ""
