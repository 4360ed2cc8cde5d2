"""Runs on the edges: by whom they are led, from where they begin, and what is read off a pipeline's call."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, ArgumentError, Cached, Dense, HarmoniCa, Router, Schedule
from fastdit.schedules.conditions import Conditions
from oracle import random_bits
from snapshot import scheduler_snapshot, snapshot
from tiny_models import generate

EVERY_2 = Cached(Schedule.every(2))
RAS_METHOD = RAS(start=2, resets=(), align=1)
STAGES = RALU((1, 1, 3), (0.2, 0.3, 1.0), (8.0, 2.8, 2.2), 0.0255, 0.3, selector="gradient")
SIZE = {"height": 16, "width": 24}


def with_own_scheduler(pipe, cls=None):
    """Another pipeline over the same models, as a server makes one per request."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    cls = type(pipe).__mro__[1] if cls is None else cls
    made = cls(**{**pipe.components, "scheduler": scheduler})
    if hasattr(pipe, "vae_scale_factor"):
        made.vae_scale_factor = pipe.vae_scale_factor
    made.set_progress_bar_config(disable=True)
    return made


# ---- schedulers


class Delegating:
    """Hands everything on to a scheduler inside."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Slotted(FlowMatchEulerDiscreteScheduler):
    """Cannot become another class."""

    __slots__ = ("more",)


@pytest.mark.parametrize("wrap", [Delegating, lambda inner: Slotted()], ids=["wrapper", "slots"])
def test_a_scheduler_that_cannot_lead_is_refused_and_nothing_stays(wrap):
    pipe = tiny_models.pipeline("sd3")
    stock, before = pipe.scheduler, snapshot(pipe.transformer)
    pipe.scheduler = wrap(stock)
    with pytest.raises(fastdit.UnsupportedModelError, match=r"scheduler must"):
        fastdit.patch(pipe, EVERY_2)
    assert snapshot(pipe.transformer) == before
    pipe.scheduler = stock
    fastdit.patch(pipe, EVERY_2)
    expected = generate(pipe, "sd3")
    pipe.scheduler = wrap(stock)  # and one that is put in later
    with pytest.raises(fastdit.UnsupportedModelError, match=r"scheduler must"):
        generate(pipe, "sd3")
    pipe.scheduler = stock
    same_bits(generate(pipe, "sd3"), expected)


def test_after_a_scheduler_was_swapped_a_sibling_with_the_old_one_goes_on():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, EVERY_2)
    expected = generate(pipe, "sd3")
    sibling = type(pipe)(**pipe.components)
    sibling.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for one in (pipe, sibling, pipe, sibling):
        same_bits(generate(one, "sd3"), expected)
        assert handle.report().reused == 2 * 8
        assert handle.cache_bytes() == 0


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms("changes_resolution")))
@pytest.mark.parametrize(
    "method",
    [RAS_METHOD, STAGES, dataclasses.replace(STAGES, selector="edges")],
    ids=["RAS", "RALU", "edges"],
)
def test_a_pipeline_with_a_scheduler_of_its_own_is_led_by_it(name, method):
    """From its first call on, also when the pipeline that was patched is gone."""
    given = {"steps": 5, **SIZE}
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, method)
    expected = generate(pipe, name, **given)
    sibling = with_own_scheduler(pipe)
    same_bits(generate(sibling, name, **given), expected)
    pipe = with_own_scheduler(sibling)
    same_bits(generate(pipe, name, **given), expected)
    same_bits(generate(pipe, name, **given), expected)


def test_sigmas_of_the_users_own_are_refused_where_stages_decide_them():
    sigmas = (np.linspace(1, 0.2, 5) ** 2).tolist()
    for name in ("sd3", "flux"):
        pipe = tiny_models.pipeline(name)
        handle = fastdit.patch(pipe, STAGES)
        expected = generate(pipe, name, steps=5, **SIZE)
        for one in (pipe, with_own_scheduler(pipe)):
            with pytest.raises(fastdit.ScheduleError, match="sigmas cannot be given to a run"):
                generate(one, name, steps=5, sigmas=sigmas, **SIZE)
            assert not handle.live_runs()
        same_bits(generate(pipe, name, steps=5, **SIZE), expected)


# ---- image to image through a sibling


@pytest.mark.parametrize(
    ("name", "base", "cls"),
    [
        ("sd3-img2img", "sd3", StableDiffusion3Img2ImgPipeline),
        ("flux-img2img", "flux-dev", FluxImg2ImgPipeline),
    ],
)
@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_image_to_image_is_the_same_through_a_sibling(name, base, cls, scheduler):
    """Rows of a schedule are the scheduler's indices, whether or not it was known when the run began."""
    if scheduler is FlowMatchHeunDiscreteScheduler and name.startswith("flux"):
        pytest.skip("FLUX's pipeline does not take it")
    pipe = tiny_models.pipeline(name, scheduler=scheduler())
    calls = 5 if scheduler is FlowMatchEulerDiscreteScheduler else 9
    method = Cached(Schedule.from_bits(*random_bits(pipe.transformer, calls, 2)))
    fastdit.patch(pipe, method, backend="reference")
    expected = generate(pipe, name, steps=5)
    fastdit.unpatch(pipe)
    patched = tiny_models.pipeline(base, scheduler=scheduler())
    fastdit.patch(patched, method, backend="reference")
    for own in (True, False):
        scheduler_ = scheduler() if own else patched.scheduler
        sibling = cls(**{**patched.components, "scheduler": scheduler_})
        sibling.set_progress_bar_config(disable=True)
        for _ in range(2):
            same_bits(generate(sibling, name, steps=5), expected)


# ---- hand-written loops


def guided_loop(pipe, handle, steps, tell):
    """The pipeline's own arithmetic over its bare transformer, both branches in one batch."""
    model, given = pipe.transformer, tiny_models.arguments("sd3", steps=steps, dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = pipe.prepare_latents(1, 4, 8, 16, torch.float64, "cpu", given["generator"])
    prompt, pooled = (
        torch.cat([given[f"negative_{name}"], given[name]])
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    with torch.no_grad(), handle.run(scheduler.timesteps):
        for t in scheduler.timesteps:
            v = model(
                torch.cat([x, x]),
                timestep=t.expand(2),
                encoder_hidden_states=prompt,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            u, c = v.chunk(2)
            v = u + given["guidance_scale"] * (c - u)
            x = scheduler.step(v, t, x, return_dict=False)[0]
            handle.advance(velocity=v) if tell else handle.advance()
    return x


def test_a_loop_that_tells_its_velocity_chooses_the_tokens_of_a_pipeline():
    pipe = tiny_models.pipeline("sd3", torch.float64)
    fastdit.patch(pipe, RAS_METHOD, backend="reference")
    expected = generate(pipe, "sd3", steps=8)
    history = fastdit.report(pipe).active
    fastdit.unpatch(pipe)
    handle = fastdit.patch(pipe.transformer, RAS_METHOD, backend="reference")
    same_bits(guided_loop(pipe, handle, 8, tell=True), expected)
    found = handle.report().active
    assert all((found[step] == history[step]).all() for step in history)
    assert not torch.equal(guided_loop(pipe, handle, 8, tell=False), expected)


@pytest.mark.parametrize("velocity", [1.0, torch.zeros(3), torch.zeros(1, 4, 8, 12)])
def test_a_velocity_that_is_none_is_refused(velocity):
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, RAS(start=1, align=1))
    with torch.no_grad(), handle.run(range(3)):
        model(**tiny_models.call("sd3"))
        with pytest.raises(ArgumentError, match="velocity"):
            handle.advance(velocity=velocity)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_scheduler_that_is_never_stepped_is_followed_by_timestep(calls):
    """An inversion or an edit takes timesteps and updates latents itself; memory must not grow."""
    pipe = tiny_models.pipeline("pixart-sigma", scheduler=DDIMScheduler())
    model = pipe.transformer

    def loop(probe=lambda: None):
        pipe.scheduler.set_timesteps(8)
        latents = tiny_models.call("pixart-sigma")["hidden_states"]
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                given = tiny_models.call("pixart-sigma", timestep=float(t))
                for _ in range(calls):
                    noise = model(**given | {"hidden_states": latents})[0]
                latents = latents - 0.05 * noise.chunk(2, dim=1)[0]
                probe()
        return latents

    stock, held = loop(), []
    handle = fastdit.patch(pipe, Dense(), backend="reference")
    same_bits(loop(), stock)
    handle = fastdit.patch(pipe, EVERY_2, backend="reference")
    found = loop(lambda: held.append(handle.cache_bytes()))
    assert max(held) == max(held[:4])
    assert (
        handle.report().reused == calls * 9 * 3
    )  # every second step, but for the one that shows it
    assert not torch.equal(found, stock)
    handle.unpatch()
    flow = tiny_models.pipeline("sd3")
    fastdit.patch(flow, STAGES)
    flow.scheduler.set_timesteps(5)
    given = tiny_models.call("sd3", height=16, width=24)

    def unstepped():
        for t in flow.scheduler.timesteps:
            flow.transformer(**given | {"timestep": t.expand(given["hidden_states"].shape[0])})

    with torch.no_grad(), pytest.raises(fastdit.ScheduleError, match="RALU leads the scheduler"):
        unstepped()


# ---- what a router was trained for


def router_of(pipe, name, **conditions):
    """Every second step of four."""
    spec = tiny_models.spec_of(pipe)
    logits = {
        kind.name: np.where(np.arange(4)[:, None, None] % 2 == 0, 5.0, -5.0)
        * np.ones((4, kind.count, len(kind.components)))
        for kind in spec.kinds
    }
    components = {kind.name: kind.components for kind in spec.kinds}
    return HarmoniCa(Router(logits, components, spec.family, Conditions(**conditions)))


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "dit", "lumina", "flux-dev"])
def test_guidance_is_read_off_the_call_that_runs(name):
    """Not off a property, which some pipelines lack, and which a sibling's call leaves as it was."""
    pipe = tiny_models.pipeline(name)
    right, wrong = (3.5, 9.0) if name == "flux-dev" else (4.0, 9.0)
    fastdit.patch(pipe, router_of(pipe, name, guidance=right))
    sibling = with_own_scheduler(pipe)
    expected = generate(pipe, name, cfg=name != "flux-dev")
    for one in (pipe, sibling):
        with pytest.raises(fastdit.ScheduleError, match=f"guidance is {wrong:g}, it was made for"):
            generate(one, name, guidance_scale=wrong, cfg=name != "flux-dev")
        same_bits(generate(one, name, cfg=name != "flux-dev"), expected)


def test_true_guidance_of_a_distilled_model_is_a_condition_of_its_own():
    pipe = tiny_models.pipeline("flux-dev")
    fastdit.patch(pipe, router_of(pipe, "flux-dev", guidance=3.5, true_guidance=1.0))
    generate(pipe, "flux-dev", cfg=False)
    with pytest.raises(fastdit.ScheduleError, match="true_guidance is 4, it was made for 1"):
        generate(pipe, "flux-dev", cfg=True)


# ---- undone


def test_unpatching_leaves_classes_hooks_and_schedulers_of_siblings_as_they_were():
    pipe = tiny_models.pipeline("sd3")
    sibling = with_own_scheduler(pipe, StableDiffusion3Pipeline)
    hooks = dict(pipe.vae.decoder._forward_pre_hooks)
    schedulers = [scheduler_snapshot(one.scheduler) for one in (pipe, sibling)]
    generate(sibling, "sd3")
    fastdit.patch(pipe, EVERY_2)
    for one in (pipe, sibling):
        generate(one, "sd3")
    assert pipe.vae.decoder._forward_pre_hooks != hooks
    assert type(pipe) is not StableDiffusion3Pipeline
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    fastdit.unpatch(pipe)
    assert pipe.vae.decoder._forward_pre_hooks == hooks
    for one, scheduler in zip((pipe, sibling), schedulers, strict=True):
        assert type(one) is StableDiffusion3Pipeline
        assert "_fastdit" not in one.__dict__
        now = scheduler_snapshot(one.scheduler)
        assert (now["class"], now["methods"]) == (scheduler["class"], scheduler["methods"])
        assert "_fastdit" not in one.scheduler.__dict__


def test_what_is_made_of_a_patched_pipeline_is_an_ordinary_one():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, EVERY_2)
    expected = generate(pipe, "sd3")
    made = type(pipe).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert type(made) is StableDiffusion3Pipeline
    same_bits(generate(made, "sd3"), expected)
    scheduler = DPMSolverMultistepScheduler()
    assert "_fastdit" not in scheduler.__dict__
