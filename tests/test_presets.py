"""Settings that were made for one model family are refused on another, and can be lifted off it by name."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdit
import fastdit.tiny
import tiny_models
from fastdit.cli.sampler import swap_scheduler
from fastdit.methods import ralu, ras
from fastdit.methods.ecad import PRESETS
from oracle import MODULES, Oracle

OTHER = {"sd3": "flux", "flux": "sd3", "lumina": "flux"}
METHODS = {
    **{f"RAS {name}": method for name, method in ras.PRESETS.items()},
    **{f"RALU {name}": method for name, method in ralu.PRESETS.items()},
    **{
        f"ECAD {path.parent.name}/{path.stem}": fastdit.ECAD.preset(path.parent.name, path.stem)
        for path in PRESETS.glob("*/*.json")
    },
}


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].family])
def test_a_preset_is_refused_on_another_family(name):
    method = METHODS[name]
    pipe = tiny_models.pipeline(OTHER[method.family])
    with pytest.raises(fastdit.ScheduleError, match=rf"{method.family} models.*family=None"):
        fastdit.patch(pipe, method)
    if not isinstance(method, fastdit.ECAD):  # whose schedule has the packaged model's blocks
        fastdit.patch(pipe, replace(method, family=None))
        fastdit.patch(tiny_models.pipeline(method.family), method)


def test_a_stage_refuses_the_preset_of_another_family():
    stages = fastdit.PerStage(fastdit.ECAD.preset("tiny", "fast"), None, None)
    with pytest.raises(fastdit.ScheduleError, match="sd3 models"):
        fastdit.patch(tiny_models.pipeline("flux"), fastdit.RALU.preset("flux-4x"), stages)


def test_a_routers_family_can_be_lifted():
    router = fastdit.HarmoniCa.preset("tiny").source
    with pytest.raises(fastdit.ScheduleError, match=r"sd3 model.*family=None"):
        fastdit.patch(tiny_models.pipeline("flux"), fastdit.HarmoniCa(router))
    assert replace(router, family=None).family is None


def test_changed_presets_keep_their_family():
    changed = fastdit.RAS.preset("sd3", ratio=0.25)
    assert changed == replace(fastdit.RAS.preset("sd3"), ratio=0.25)
    assert hash(changed) == hash(fastdit.RAS.preset("sd3", ratio=0.25))
    assert changed.family == "sd3"
    assert fastdit.RAS.preset("flux", family=None) == fastdit.RAS(metric="std")
    assert fastdit.RALU.preset("flux-4x", split=0.1).family == "flux"
    assert fastdit.ECAD.preset("tiny", "fast", resample="sigma").family == "sd3"
    assert fastdit.ECAD.preset("tiny", "fast", family=None).family is None


@pytest.mark.parametrize(
    "schedule", [fastdit.Schedule.every(2), fastdit.Schedule.from_bits([[[1]]], ["ff"])]
)
def test_a_schedule_in_place_of_a_method_is_told_its_method(schedule):
    with pytest.raises(fastdit.ArgumentError, match=r"give fastdit\.Cached\(it\)"):
        fastdit.patch(tiny_models.pipeline("sd3"), schedule)


SCHEDULES = sorted(path.stem for path in PRESETS.glob("tiny/*.json"))
SAMPLERS = (
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)


def drawn(pipe, steps):
    found = pipe(
        ["a red circle", "a blue square and a green cross"],
        num_inference_steps=steps,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="latent",
    )
    return found.images


@contextmanager
def plain_hooks(pipe, schedule, steps):
    """A stock pipeline runs a schedule: components by wrappers, the output of a step of one order by a hook."""
    pipe.scheduler.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    (kind, parts), layer = *MODULES["SD3Transformer2DModel"].items(), *schedule.layers.values()
    places = [list(parts).index(name) for name in layer.components]
    bits = np.ones((steps, len(pipe.transformer.transformer_blocks), len(parts)), dtype=bool)
    orders = np.zeros(bits.shape, dtype=int)
    bits[:, :, places], orders[:, :, places] = (
        layer.bits,
        0 if layer.orders is None else layer.orders,
    )
    # The last block has no feed-forward of the text.
    there = [[row[:, places].ravel()[:-1].tolist() for row in table] for table in (bits, orders)]
    whole = [
        by[0] if not any(row) and len(set(by)) == 1 else 0 for row, by in zip(*there, strict=True)
    ]
    nodes, calls = {}, iter(range(steps))

    def output(module, args, given):
        step, sample = next(calls), given[0]
        if not whole[step]:
            nodes[step] = sample.clone()
            return
        used = list(nodes)[-1 - whole[step] :]
        sample.zero_()
        for own in used:
            others = [sigmas[other] for other in used if other != own]
            at, there = sigmas[step], sigmas[own]
            sample += nodes[own] * float(np.prod([(at - o) / (there - o) for o in others]))

    handle = pipe.transformer.register_forward_hook(output)
    try:
        oracle = Oracle(pipe.transformer, {kind: bits}, orders={kind: orders}, sigmas=sigmas)
        with oracle.installed():
            yield whole
    finally:
        handle.remove()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_ships_runs_under_every_solver_as_plain_hooks_say(name, sampler):
    """Another sampler than the one it was searched under is warned of by name."""
    method = fastdit.ECAD.preset("tiny", name)
    source = method.source
    pipe = fastdit.tiny.load_pipeline().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    if sampler != type(pipe.scheduler).__name__:
        swap_scheduler(pipe, sampler)
    with plain_hooks(pipe, source, source.steps) as whole:
        expected = drawn(pipe, source.steps)
    handle = fastdit.patch(pipe, method, backend="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = drawn(pipe, source.steps)
    assert torch.linalg.norm(found - expected) <= 1e-9 * torch.linalg.norm(expected)
    assert handle.report().tokens_per_step.count(0) == sum(order > 0 for order in whole)
    said = [str(one.message) for one in caught if "searched under" in str(one.message)]
    if source.provenance["scheduler"] == sampler:
        assert not said
    else:
        assert f"under {source.provenance['scheduler']}, this run has {sampler}" in said[0]


def test_a_schedule_that_ships_is_refused_in_as_many_steps_of_heun():
    method = fastdit.ECAD.preset("tiny", SCHEDULES[0])
    pipe = fastdit.tiny.load_pipeline()
    swap_scheduler(pipe, "FlowMatchHeunDiscreteScheduler")
    fastdit.patch(pipe, method)
    steps = method.source.steps
    with pytest.raises(
        fastdit.ScheduleError, match=f"{steps} steps but the run has {2 * steps - 1}"
    ):
        drawn(pipe, steps)
