"""Solvers: sigmas, noise, and advice, on stock pipelines and on a flow whose solution is known."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

import fastdit
import tiny_models
from fastdit.schedules.solvers import noise_of, step_sigmas
from fastdit.search import solution

SPREAD = 0.5  # of the data, N(0, SPREAD^2)


def velocity(x, sigma):
    """E[noise - data | x] where x = (1 - sigma) data + sigma noise."""
    kept = (1 - sigma) * SPREAD**2
    return x * (sigma - kept) / ((1 - sigma) * kept + sigma**2)


def solve(scheduler, arguments, unit=1000.0):
    """The end of the flow from x = 1; the solution goes to SPREAD."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**arguments)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, step_sigmas(scheduler), strict=True):
        x = scheduler.step(velocity(x, sigma), t, x, return_dict=False)[0]
    return float(x)


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, prompt):
        """Nothing is drawn."""


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [6, 10])
def test_a_recommended_solver_is_nearer_in_as_many_steps(shift, steps):
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    advice = fastdit.recommend(Pipe(euler), steps)
    arguments = dict(advice.arguments)
    assert arguments == {"num_inference_steps": steps}
    found = abs(solve(advice.scheduler, arguments) - SPREAD)
    plain = abs(solve(euler, arguments) - SPREAD)
    assert found < plain * (0.5 if shift == 1.0 else 0.85)
    assert advice.scheduler.config.flow_shift == shift


@pytest.mark.parametrize(
    ("scheduler", "given"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"mu": 1.1}),
        (
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
            {},
        ),
    ],
    ids=["shift", "dynamic shift", "unipc"],
)
def test_the_solution_is_that_of_the_flow(scheduler, given):
    """Steps shifted as the pipeline's own stop far from it: their last is long."""
    solver = solution.solver(Pipe(scheduler), 100)
    found = solve(solver, {"num_inference_steps": 100, **given})
    assert abs(found - SPREAD) < 3e-4 * SPREAD
    shifted = solve(
        fastdit.recommend(Pipe(scheduler), 100).scheduler, {"num_inference_steps": 100, **given}
    )
    assert abs(found - SPREAD) < abs(shifted - SPREAD)


FLOW = [name for name, pipe in tiny_models.PIPELINES.items() if "Flow" in pipe.scheduler.__name__]


@pytest.mark.parametrize("family", tiny_models.PIPELINES)
def test_no_pipeline_becomes_another_in_silence(family):
    """A flow model's outputs are taken for velocities, and noise for noise."""
    pipe = tiny_models.pipeline(family)
    before = pipe.scheduler
    advice = fastdit.recommend(pipe, 5)
    assert pipe.scheduler is before
    if "img2img" in family or family == "zimage" or before.config.get("clip_sample"):
        assert advice.scheduler is before
        return
    assert isinstance(advice.scheduler, UniPCMultistepScheduler)
    flows = family in FLOW
    assert advice.scheduler.config.prediction_type == (
        "flow_prediction" if flows else before.config.prediction_type
    )
    assert bool(advice.scheduler.config.use_flow_sigmas) == flows
    usual = tiny_models.generate(pipe, family, steps=5)
    pipe.scheduler = advice.scheduler
    found = tiny_models.generate(pipe, family, steps=5)
    assert torch.isfinite(found).all()
    assert found.std() < 5 * usual.std()


def test_dynamic_shifts_go_on():
    """The pipeline reads the shift's settings off the scheduler, so they must be there."""
    settings = {
        "use_dynamic_shifting": True,
        "base_shift": 0.3,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    pipe = tiny_models.pipeline("flux", scheduler=FlowMatchEulerDiscreteScheduler(**settings))
    advice = fastdit.recommend(pipe, 8)
    for name, value in settings.items():
        assert advice.scheduler.config[name] == value, name
    tiny_models.generate(pipe, "flux", steps=8)
    own = step_sigmas(pipe.scheduler)
    pipe.scheduler = advice.scheduler
    tiny_models.generate(pipe, "flux", steps=8)
    np.testing.assert_allclose(step_sigmas(pipe.scheduler), own, atol=2e-3)


def test_models_that_predict_noise():
    ddim = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", beta_end=0.01)
    advice = fastdit.recommend(Pipe(ddim), 8)
    assert isinstance(advice.scheduler, UniPCMultistepScheduler)
    assert advice.scheduler.config.prediction_type == "epsilon"
    assert torch.equal(advice.scheduler.betas, ddim.betas)
    assert "clips" in fastdit.recommend(Pipe(DDIMScheduler(clip_sample=True)), 8).why


def test_a_distilled_model_keeps_its_sampler():
    pipe = Pipe(LCMScheduler())
    advice = fastdit.recommend(pipe, 4)
    assert advice.scheduler is pipe.scheduler
    assert "draws noise (LCMScheduler)" in advice.why


@pytest.mark.parametrize("steps", [0, True, 2.0])
def test_steps_are_checked(steps):
    with pytest.raises(fastdit.ArgumentError, match="steps must be an int of at least 1"):
        fastdit.recommend(Pipe(FlowMatchEulerDiscreteScheduler()), steps)


def test_something_else_is_refused():
    with pytest.raises(fastdit.UnsupportedModelError, match="pipe must be a pipeline"):
        fastdit.recommend(object(), 4)


def schedulers():
    """Every scheduler of the installed diffusers that can be made, set for 10 steps, and stepped."""
    for name in sorted(dir(diffusers)):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        try:
            made = getattr(diffusers, name)()
            made.set_timesteps(10)
        except Exception:  # it needs arguments, or a package
            continue
        yield name, made


def test_noise_is_seen_by_what_steps_do():
    """One that is said to draw no noise gives the same bits whatever the generator; most others do not."""
    checked = 0
    for name, made in schedulers():
        if getattr(made, "timesteps", None) is None or len(made.timesteps) < 2:
            continue
        ends = []
        for seed in (0, 1):
            one = copy.deepcopy(made)
            torch.manual_seed(seed)
            x = torch.ones(1, 4, 8, 8)
            try:
                for t in one.timesteps[:3]:
                    scale = getattr(one, "scale_model_input", lambda x, t: x)
                    x = one.step(scale(x, t) * 0.1, t, x, return_dict=False)[0]
            except Exception:
                break
            ends.append(x)
        if len(ends) < 2:
            continue
        checked += 1
        assert torch.equal(*ends) or noise_of(made), name
    assert checked >= 20
