"""Runs: where they begin and end, what is dropped and when, and how changes inside a run are met."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import DDIMScheduler

import fastdit
import tiny_models
from contract import same_bits
from fastdit import Cached, Schedule
from fastdit.patch import handle_of
from fastdit.runtime.install import LINK
from oracle import Oracle, random_bits
from tiny_models import generate, sample

NAMES = tiny_models.one_each(tiny_models.forms(), -1)
EVERY_2 = Cached(Schedule.every(2))


def patched(name, method=EVERY_2, **kwargs):
    pipe = tiny_models.pipeline(name, **kwargs)
    fastdit.patch(pipe, method, backend="reference")
    return pipe, pipe.transformer.__dict__[LINK]


class Stop(Exception):
    """Raised by a test inside a run."""


# ---- the end of a run


@pytest.mark.parametrize("name", NAMES)
def test_caches_are_gone_before_the_autoencoder_decodes(name):
    pipe, session = patched(name)
    held = []
    decode = pipe.vae.decode

    def watch(*args, **kwargs):
        held.append(session.runs.cache_bytes())
        return decode(*args, **kwargs)

    pipe.vae.decode = watch
    during = []
    pipe.transformer.register_forward_hook(lambda *_: during.append(session.runs.cache_bytes()))
    pipe(**tiny_models.arguments(name, output_type="np"))
    assert held == [0]
    assert max(during) > 0
    assert session.runs.cache_bytes() == 0
    assert session.here.call is None


@pytest.mark.parametrize("where", ["callback", "transformer", "block"])
def test_an_aborted_run_leaves_no_state(where):
    pipe, session = patched("sd3")
    expected = generate(pipe, "sd3", seed=2)

    def fail(*args, **kwargs):
        if session.runs.last().step == 1:
            raise Stop

    options, hook = {}, None
    if where == "callback":
        options["callback_on_step_end"] = lambda pipe, step, t, tensors: fail() or tensors
    elif where == "transformer":
        hook = pipe.transformer.proj_out.register_forward_hook(fail)
    else:
        hook = pipe.transformer.transformer_blocks[1].norm1.linear.register_forward_hook(fail)
    with pytest.raises(Stop):
        generate(pipe, "sd3", seed=1, **options)
    assert session.here.call is None
    if hook is not None:
        hook.remove()
    same_bits(generate(pipe, "sd3", seed=2), expected)
    assert session.runs.cache_bytes() == 0


def test_an_aborted_run_leaves_nothing_though_its_exception_is_kept():
    pipe, session = patched("sd3")
    held = []

    def fail(pipe, step, timestep, tensors):
        held.append(session.runs.cache_bytes())
        raise Stop

    with pytest.raises(Stop) as kept:
        generate(pipe, "sd3", callback_on_step_end=fail)
    assert held[0] > 0
    assert session.runs.cache_bytes() == 0
    assert not session.runs.live()
    assert kept.value is not None


def can_be_interrupted(pipeline):
    """By a callback."""
    known = inspect.signature(pipeline.__call__).parameters
    return hasattr(pipeline, "interrupt") and "callback_on_step_end" in known


@pytest.mark.parametrize(
    "name", [name for name in NAMES if can_be_interrupted(tiny_models.PIPELINES[name].pipeline)]
)
def test_caches_of_an_interrupted_run_are_gone_before_the_autoencoder_decodes(name):
    pipe, session = patched(name)
    held = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *args, **kwargs: (
        held.append(session.runs.cache_bytes()) or decode(*args, **kwargs)
    )

    def interrupt(pipe, step, timestep, tensors):
        held.append(session.runs.cache_bytes())
        pipe._interrupt = step == 2
        return tensors

    given = {"steps": 5, "callback_on_step_end": interrupt, "output_type": "np"}
    generate(pipe, name, **given)
    assert held[0] > 0
    assert held[2:] == [held[2], 0]


def test_an_interrupted_run_ends_with_the_pipeline_call():
    pipe, session = patched("sd3")
    expected = generate(pipe, "sd3", seed=2)

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    generate(pipe, "sd3", seed=1, callback_on_step_end=interrupt)
    assert fastdit.report(pipe).steps == 2
    assert session.runs.cache_bytes() == 0
    same_bits(generate(pipe, "sd3", seed=2), expected)


# ---- between runs


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_other_sizes_batches_and_steps_follow_each_other(name):
    pipe, session = patched(name)
    variants = [
        {"batch": 1},
        {"batch": 3},
        {"height": 16, "width": 8},
        {"steps": 6},
        {"cfg": False},
    ]
    expected = [generate(patched(name)[0], name, **options) for options in variants]
    for options, wanted in zip(variants, expected, strict=True):
        same_bits(generate(pipe, name, **options), wanted)
        assert session.runs.cache_bytes() == 0


# ---- inside a run


def guidance_off_after(last):
    """The callback of diffusers' documentation: no guidance after a step, so half the batch."""

    def callback(pipe, step, timestep, tensors):
        if step == last:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                tensors[name] = tensors[name].chunk(2)[-1]
        return tensors

    return callback


@pytest.mark.parametrize("seed", range(3))
def test_guidance_switched_off_inside_a_run_refreshes_the_caches(seed):
    pipe = tiny_models.pipeline("sd3")
    steps = 6
    bits, names = random_bits(pipe.transformer, steps, seed)
    options = {
        "steps": steps,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    oracle = Oracle(pipe.transformer, bits)
    switch = guidance_off_after(2)

    def drop_too(pipe, step, timestep, tensors):
        if step == 2:
            oracle.drop()
        return switch(pipe, step, timestep, tensors)

    with oracle.installed():
        expected = generate(pipe, "sd3", callback_on_step_end=drop_too, **options)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    same_bits(generate(pipe, "sd3", callback_on_step_end=switch, **options), expected)


@pytest.mark.parametrize("tensor", ["prompt_embeds", "pooled_prompt_embeds"])
@pytest.mark.parametrize("way", ["new tensor", "in place", "in place, then copied"])
def test_embeddings_swapped_inside_a_run_refresh_the_caches(tensor, way):
    pipe = tiny_models.pipeline("sd3")
    bits, names = random_bits(pipe.transformer, 5, 1)
    oracle = Oracle(pipe.transformer, bits)
    options = {"steps": 5, "callback_on_step_end_tensor_inputs": ["latents", tensor]}

    def swap(pipe, step, timestep, tensors):
        if step == 2:
            oracle.drop()
            if way == "new tensor":
                tensors[tensor] = tensors[tensor] * 0.5
            else:
                tensors[tensor].mul_(0.5)
            if way == "in place, then copied":
                tensors[tensor] = tensors[tensor].clone()
        return tensors

    with oracle.installed():
        expected = generate(pipe, "sd3", callback_on_step_end=swap, **options)
    fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)), backend="reference")
    same_bits(generate(pipe, "sd3", callback_on_step_end=swap, **options), expected)


def test_equal_embeddings_in_new_memory_keep_the_caches():
    pipe, _ = patched("sd3")
    expected = generate(pipe, "sd3")

    def copy(pipe, step, timestep, tensors):
        return {name: value.clone() for name, value in tensors.items()}

    inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    actual = generate(
        pipe, "sd3", callback_on_step_end=copy, callback_on_step_end_tensor_inputs=inputs
    )
    same_bits(actual, expected)
    assert fastdit.report(pipe).reused == 2 * 8


def test_inference_mode_and_no_grad_may_follow_each_other_inside_a_run():
    model = tiny_models.transformer("pixart-sigma")
    inputs = [tiny_models.call("pixart-sigma", step=step) for step in range(4)]
    handle = fastdit.patch(model, EVERY_2)
    with torch.no_grad(), handle.run(range(4)):
        expected = [sample(model(**given)) for given in inputs]
    modes = (torch.inference_mode, torch.no_grad, torch.no_grad, torch.inference_mode)
    with handle.run(range(4)):
        for mode, given, wanted in zip(modes, inputs, expected, strict=True):
            with mode():
                same_bits(sample(model(**given)).clone(), wanted)


# ---- image to image


@pytest.mark.parametrize("name", tiny_models.IMAGE_TO_IMAGE)
def test_image_to_image_computes_first_and_indexes_by_scheduler_step(name):
    pipe = tiny_models.pipeline(name)
    bits, names = random_bits(pipe.transformer, 5, 0, compute=-1)  # all reused but step 3
    for kind in bits:
        bits[kind][3] = True
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)))
    generate(pipe, name, steps=5, cfg=False)  # strength 0.6: steps 2, 3 and 4
    records = handle.last_run().records
    assert sorted(records) == [2, 3, 4]
    computed = [records[step].computed for step in (2, 3, 4)]
    assert computed == [computed[0], computed[0], 0]
    assert computed[0] > 0


# ---- loops without a scheduler


@pytest.fixture(params=["pixart-sigma", "lumina"])  # of timesteps that fall, and that rise
def loop(request):
    """A bare transformer, its inputs, and the oracle's outputs for a random schedule; Lumina's timesteps rise."""
    model = tiny_models.transformer(request.param)
    bits, names = random_bits(model, 5, 2)
    inputs = [tiny_models.call(request.param, step=step) for step in range(5)]
    with torch.no_grad(), Oracle(model, bits).installed():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend="reference")
    with torch.no_grad():
        yield handle, model, inputs, expected


def test_a_loop_inside_run_is_followed_by_timestep(loop):
    handle, model, inputs, expected = loop
    for _ in range(2):
        with handle.run(torch.arange(5)):
            for given, wanted in zip(inputs, expected, strict=True):
                same_bits(sample(model(**given)), wanted)
        assert handle.cache_bytes() == 0


def test_a_loop_with_advance_needs_no_timesteps(loop):
    handle, model, inputs, _ = loop
    same = [{**given, "timestep": inputs[0]["timestep"]} for given in inputs]
    fastdit.unpatch(model)
    bits, names = random_bits(model, 5, 2)
    with Oracle(model, bits).installed():
        expected = [sample(model(**given)) for given in same]
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)), backend="reference")
    for _ in range(2):
        with handle.run(range(5)):
            for given, wanted in zip(same, expected, strict=True):
                same_bits(sample(model(**given)), wanted)
                handle.advance()


def test_a_loop_may_say_nothing(loop):
    """Timesteps fall within a run and rise between runs; two calls at one timestep are two branches of a step."""
    _, model, inputs, expected = loop
    for _ in range(2):
        for given, wanted in zip(inputs, expected, strict=True):
            same_bits(sample(model(**given)), wanted)
            same_bits(sample(model(**given)), wanted)


def test_reset_starts_a_new_run(loop):
    handle, model, inputs, expected = loop
    model(**inputs[0])
    model(**inputs[1])
    handle.reset()
    for given, wanted in zip(inputs, expected, strict=True):
        same_bits(sample(model(**given)), wanted)


@pytest.mark.parametrize("advance", [True, False])
def test_one_call_too_many_is_refused(loop, advance):
    handle, model, inputs, expected = loop
    extra = inputs[0] | {"timestep": 2 * inputs[-1]["timestep"] - inputs[-2]["timestep"]}
    with handle.run(range(5)):
        for given in inputs:
            model(**given)
            if advance:
                handle.advance()
        with pytest.raises(fastdit.ScheduleError, match="step 6 of a run of 5"):
            model(**extra)
    # Outside the run the model is callable again, and so is a next run.
    model(**extra)
    with handle.run(range(5)):
        for given, wanted in zip(inputs, expected, strict=True):
            same_bits(sample(model(**given)), wanted)


def test_a_scheduler_does_not_lead_a_run_the_user_leads():
    """A hand-written loop over a patched pipeline's transformer that also calls the scheduler's step."""
    pipe, _ = patched("pixart-sigma", scheduler=DDIMScheduler())
    handle = handle_of(pipe)
    pipe.scheduler.set_timesteps(4)
    latents = tiny_models.call("pixart-sigma")["hidden_states"]
    with torch.no_grad(), handle.run(pipe.scheduler.timesteps):
        for t in pipe.scheduler.timesteps:
            given = tiny_models.call("pixart-sigma", timestep=float(t)) | {"hidden_states": latents}
            noise = sample(pipe.transformer(**given)).chunk(2, dim=1)[0]
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    report = handle.report()
    assert (report.steps, report.reused) == (4, 2 * 9)


def test_a_scheduler_leads_a_hand_written_loop_over_a_pipeline():
    pipe, _ = patched("pixart-sigma", scheduler=DDIMScheduler())
    handle = handle_of(pipe)
    pipe.scheduler.set_timesteps(4)
    latents = tiny_models.call("pixart-sigma")["hidden_states"]
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            given = tiny_models.call("pixart-sigma", timestep=float(t)) | {"hidden_states": latents}
            noise = sample(pipe.transformer(**given)).chunk(2, dim=1)[0]
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
            handle.advance()  # says nothing new
    report = handle.report()
    assert (report.steps, report.reused) == (4, 2 * 9)


def test_advance_outside_a_run_is_an_error():
    handle = fastdit.patch(tiny_models.transformer("dit"))
    with pytest.raises(fastdit.ArgumentError, match="run"):
        handle.advance()
    with pytest.raises(fastdit.ArgumentError, match="timesteps"), handle.run([]):
        pass


# ---- disabled


def test_disabled_runs_the_stock_model_whatever_the_schedule():
    pipe = tiny_models.pipeline("sd3")
    stock = generate(pipe, "sd3", steps=7)
    bits, names = random_bits(pipe.transformer, 4, 0)
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)))
    cached = generate(pipe, "sd3", steps=4)
    with handle.disabled():
        same_bits(generate(pipe, "sd3", steps=7), stock)  # a number of steps the schedule refuses
        with handle.disabled():
            same_bits(generate(pipe, "sd3", steps=7), stock)
        same_bits(generate(pipe, "sd3", steps=7), stock)
        handle.advance()
    same_bits(generate(pipe, "sd3", steps=4), cached)


def test_disabled_in_a_hand_written_run():
    model = tiny_models.transformer("dit")
    inputs = tiny_models.call("dit")
    with torch.no_grad():
        stock = sample(model(**inputs))
        handle = fastdit.patch(model, EVERY_2)
        with handle.disabled(), handle.run(range(2)):
            same_bits(sample(model(**inputs)), stock)
            handle.advance()
