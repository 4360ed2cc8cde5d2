"""Stock pipelines run unchanged on a patched transformer: whole runs, all schedulers, image to image, callbacks."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._pytree import tree_map_only

import fastdit
import tiny_models
from contract import RUN_FP64, distance, same_bits, within_contract
from tiny_models import generate

pytestmark = pytest.mark.diffusers

PIPELINES = list(tiny_models.PIPELINES)


def flow(scheduler: type) -> object:
    """A multistep scheduler of diffusers in its flow-matching form."""
    return scheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


SCHEDULERS = {
    "sd3": {
        "heun": FlowMatchHeunDiscreteScheduler,
        "dpm++": lambda: flow(DPMSolverMultistepScheduler),
        "unipc": lambda: flow(UniPCMultistepScheduler),
        "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    },
    "flux": {"shifted": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)},
    "pixart-sigma": {
        "ddim": DDIMScheduler,
        "unipc": UniPCMultistepScheduler,
        "heun": HeunDiscreteScheduler,
        "euler": EulerDiscreteScheduler,
        "sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    },
    "dit": {"dpm++": DPMSolverMultistepScheduler},
    "lumina": {
        "heun": FlowMatchHeunDiscreteScheduler,
        "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    },
}
PAIRS = [(name, scheduler) for name, some in SCHEDULERS.items() for scheduler in some]


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_dense_run_is_bit_equal_on_reference(name, batch, cfg):
    pipe = tiny_models.pipeline(name)
    stock = generate(pipe, name, batch=batch, cfg=cfg)
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, name, batch=batch, cfg=cfg), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_dense_run_is_exact_in_fp64(name):
    pipe = tiny_models.pipeline(name, torch.float64)
    stock = generate(pipe, name, height=24, width=8)
    fastdit.patch(pipe)
    assert distance(generate(pipe, name, height=24, width=8), stock) <= RUN_FP64


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_dense_run_errs_at_most_twice_as_much_as_stock(name, dtype):
    """Over several seeds together, so that one lucky stock rounding does not decide."""
    truth_pipe = tiny_models.pipeline(name, dtype)
    truth_pipe.transformer.double()  # the same rounded weights
    truth_pipe.vae.double()
    pipe = tiny_models.pipeline(name, dtype)

    def runs(pipe):
        results = []
        for seed in range(3):
            given = tiny_models.arguments(name, 3, seed=seed, dtype=dtype)
            results.append(tiny_models.latents_of(pipe, to_dtype_of(pipe, given)))
        return torch.cat(results)

    stock = runs(pipe)
    fastdit.patch(pipe)
    within_contract(runs(pipe), stock, runs(truth_pipe))


def to_dtype_of(pipe, given):
    """Floating arguments in the dtype of the pipeline's transformer."""
    dtype = pipe.transformer.dtype
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)


@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_any_scheduler_keeps_its_bits(name, scheduler):
    make = SCHEDULERS[name][scheduler]
    pipe = tiny_models.pipeline(name, scheduler=make())
    stock = generate(pipe, name, steps=5)
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, name, steps=5), stock)
    assert fastdit.report(pipe).steps == len(pipe.scheduler.timesteps)


CALLING_BACK = [
    name
    for name, entry in tiny_models.PIPELINES.items()
    if "callback_on_step_end" in inspect.signature(entry.pipeline.__call__).parameters
]


@pytest.mark.parametrize("name", CALLING_BACK)
def test_callbacks_see_and_edit_what_they_always_did(name):
    seen = []

    def edit(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0.9}

    pipe = tiny_models.pipeline(name)
    stock = generate(pipe, name, callback_on_step_end=edit)
    expected = seen[:]
    seen.clear()
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, name, callback_on_step_end=edit), stock)
    assert [entry[:2] for entry in seen] == [entry[:2] for entry in expected]
    for (*_, actual), (*_, before) in zip(seen, expected, strict=True):
        same_bits(actual, before)


def test_skip_layer_guidance_through_the_pipeline():
    """Its second call leaves out blocks, here also the last but one, so that no residual may cross blocks."""
    pipe = tiny_models.pipeline("sd3", torch.float64)
    options = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 0.7,
        "steps": 5,
    }
    stock = generate(pipe, "sd3", **options)
    fastdit.patch(pipe)
    within_contract(generate(pipe, "sd3", **options), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_same_plan_and_seed_give_the_same_bits(name):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
    first = generate(pipe, name, seed=5)
    generate(pipe, name, seed=6)
    same_bits(generate(pipe, name, seed=5), first)
