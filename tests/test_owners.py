"""Whose run is it: threads, tasks, nested calls and several pipelines over one transformer, and how runs end.

Every answer is compared, bit for bit, with what one fresh process would draw. Interleavings are forced: threads meet
at a barrier inside every transformer call, tasks at every `await`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline

import fastdit
import tiny_models
from contract import same_bits
from fastdit import ECAD, RALU, RAS, Cached, FastDiTError, HarmoniCa, Schedule, ScheduleError
from fastdit.runtime.install import LINK
from oracle import random_bits
from snapshot import scheduler_snapshot, snapshot
from tiny_models import generate

EVERY_2 = Cached(Schedule.every(2))
SPARSE = RAS(start=1, resets=(), align=1)
STAGED = RALU((2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")


def evolved(pipe):
    """A random schedule of 4 steps."""
    return ECAD(Schedule.from_bits(*random_bits(pipe.transformer, 4, 3)))


def learned(pipe):
    """A random router of 4 steps."""
    from fastdit.adapters import find_adapter

    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    generator = np.random.default_rng(0)
    logits = {
        kind.name: 3 * generator.standard_normal((4, kind.count, len(kind.components)))
        for kind in spec.kinds
    }
    names = {kind.name: kind.components for kind in spec.kinds}
    return HarmoniCa(fastdit.Router(logits, names, spec.family))


METHODS = {
    "dense": lambda pipe: (),
    "cached": lambda pipe: (EVERY_2,),
    "ecad": lambda pipe: (evolved(pipe),),
    "harmonica": lambda pipe: (learned(pipe),),
    "ras": lambda pipe: (SPARSE,),
    "ras+cached": lambda pipe: (SPARSE, EVERY_2),
    "ralu": lambda pipe: (STAGED,),
    "ralu+cached": lambda pipe: (STAGED, EVERY_2),
}
FAMILIES = tiny_models.one_each(tiny_models.forms("layouts"), -1)
CASES = [
    (name, method)
    for name in FAMILIES
    for method in METHODS
    if not method.startswith("ralu") or tiny_models.adapter_of(name).changes_resolution
]
SOME = [("sd3", "cached"), ("flux-dev", "ras+cached"), ("sd3", "ralu"), ("pixart-sigma", "ras")]


class Stop(Exception):
    """Raised by a test inside a run."""


@functools.cache
def steps_of(method):
    return 7 if method.startswith("ralu") else 4


def patched(name, method="cached", backend="reference", **options):
    """A patched pipeline, its handle, and what its public state is read from."""
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, *METHODS[method](pipe), backend=backend, **options)
    return pipe, handle, pipe.transformer.__dict__[LINK]


@functools.cache
def serial(name, method="cached", backend="reference", seeds=3):
    """The latents of seeds 0, 1, ... drawn one after the other by a pipeline that does nothing else."""
    pipe, *_ = patched(name, method, backend)
    return [generate(pipe, name, seed=seed, steps=steps_of(method)) for seed in range(seeds)]


def draw(pipe, name, method="cached", seed=0, **more):
    return generate(pipe, name, seed=seed, steps=steps_of(method), **more)


def own_scheduler(pipe):
    return type(pipe.scheduler).from_config(pipe.scheduler.config)


def copied(pipe):
    """diffusers' server: a shallow copy with a scheduler of its own."""
    made = copy.copy(pipe)
    made.scheduler = own_scheduler(pipe)
    return made


def from_pipe(pipe):
    made = type(pipe).from_pipe(pipe, scheduler=own_scheduler(pipe))
    return _set_up(made, pipe)


def assembled(pipe):
    made = type(pipe)(**{**pipe.components, "scheduler": own_scheduler(pipe)})
    return _set_up(made, pipe)


def _set_up(made, pipe):
    if hasattr(pipe, "vae_scale_factor"):
        made.vae_scale_factor = pipe.vae_scale_factor
    made.set_progress_bar_config(disable=True)
    return made


def blocks_of(pipe):
    model = pipe.transformer
    names = ("layers", "blocks", "transformer_blocks")
    return next(getattr(model, name) for name in names if hasattr(model, name))


@contextlib.contextmanager
def lockstep(pipe, threads):
    """All threads meet inside each call of the transformer, before its second block."""
    barrier = threading.Barrier(threads, timeout=60)

    def meet(*_):
        barrier.wait()

    hook = blocks_of(pipe)[1].register_forward_pre_hook(meet)
    try:
        yield barrier
    finally:
        hook.remove()


def together(jobs, barrier=None):
    """The results of jobs in a thread each, in order."""

    def run(job):
        try:
            return job()
        except BaseException:
            if barrier is not None:
                barrier.abort()
            raise

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def idle(state):
    """Nothing of a run is left; of a call that had none when it was broken off there may be an empty shell."""
    call = state.here.call
    return (
        not state.runs.live()
        and state.runs.cache_bytes() == 0
        and (call is None or call.run is None)
    )


# ---- pipelines in threads


@pytest.mark.parametrize(("name", "method"), CASES)
def test_requests_in_threads_equal_their_serial_results(name, method):
    """The patched pipeline, one made of it and a copy: each led by its own scheduler, in one transformer at once."""
    pipe, _, state = patched(name, method)
    pipes = [pipe, from_pipe(pipe), copied(pipe)]
    for _ in range(2):  # as strangers, then as known ones
        with lockstep(pipe, 3) as barrier:
            jobs = [
                functools.partial(draw, one, name, method, seed) for seed, one in enumerate(pipes)
            ]
            found = together(jobs, barrier)
        for actual, expected in zip(found, serial(name, method), strict=True):
            same_bits(actual, expected)
    assert idle(state)


@pytest.mark.parametrize(("name", "method"), SOME)
def test_requests_in_threads_have_the_bits_of_serial_ones_on_cpu(name, method):
    pipe, _, state = patched(name, method, "cpu")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        pipes = [assembled(pipe), copied(pipe), pipe]
        jobs = [functools.partial(draw, one, name, method, seed) for seed, one in enumerate(pipes)]
        found = together(jobs)
    finally:
        sys.setswitchinterval(before)
    for actual, expected in zip(found, serial(name, method, "cpu"), strict=True):
        same_bits(actual, expected)
    assert idle(state)


@pytest.mark.parametrize(("name", "method"), SOME)
def test_requests_of_an_event_loop(name, method):
    """asyncio.to_thread hands its task's context to the thread, but not its runs."""
    pipe, handle, state = patched(name, method)

    async def request(seed):
        with handle.disabled():  # of this task, not of the thread
            return await asyncio.to_thread(draw, copied(pipe), name, method, seed)

    async def main():
        return await asyncio.gather(*map(request, range(3)))

    for actual, expected in zip(asyncio.run(main()), serial(name, method), strict=True):
        same_bits(actual, expected)
    assert idle(state)


# ---- nested calls


@pytest.mark.parametrize(("name", "method"), SOME)
@pytest.mark.parametrize("make", [copied, from_pipe])
def test_a_run_inside_a_run(name, method, make):
    """A hook inside the transformer's own call draws with a sibling, at every call of one step."""
    pipe, _, state = patched(name, method)
    sibling, inner, calls = make(pipe), [], []

    def nest(*_):
        calls.append(0)
        if len(calls) in (2, 3):
            hook.remove()
            inner.append(draw(sibling, name, method, 1))

    hook = blocks_of(pipe)[1].register_forward_pre_hook(nest)
    same_bits(draw(pipe, name, method, 0), serial(name, method)[0])
    same_bits(inner[0], serial(name, method)[1])
    assert idle(state)


@pytest.mark.parametrize("method", ["cached", "ras+cached"])
def test_one_transformer_in_pipelines_of_two_kinds(method):
    pipe, _, state = patched("sd3", method)

    def variation(pipe):
        parts = {**pipe.components, "scheduler": own_scheduler(pipe)}
        made = _set_up(StableDiffusion3Img2ImgPipeline(**parts), pipe)
        return generate(made, "sd3-img2img", seed=1, steps=8)

    expected = variation(patched("sd3", method)[0])
    inner = []

    def nest(pipe, step, timestep, tensors):
        if step == 1:
            inner.append(variation(pipe))
        return tensors

    outer = draw(pipe, "sd3", method, 0, callback_on_step_end=nest)
    same_bits(outer, serial("sd3", method)[0])
    same_bits(inner[0], expected)
    same_bits(variation(pipe), expected)
    assert idle(state)


# ---- loops written by hand


def loop_inputs(name, seed, steps=4):
    return [
        tiny_models.call(name, step=step + 10 * seed, timestep=900.0 - 150 * step)
        for step in range(steps)
    ]


def outputs(model, inputs):
    with torch.no_grad():
        return [model(**given)[0] for given in inputs]


LOOPS = [("pixart-sigma", "ras+cached"), ("sd3", "cached"), ("lumina", "ras"), ("flux", "ecad")]


def bare(name, method):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe.transformer, *METHODS[method](pipe), backend="reference")
    return pipe, handle, pipe.transformer.__dict__[LINK]


@functools.cache
def serial_loops(name, method, loops=3):
    pipe, handle, _ = bare(name, method)
    found = []
    for seed in range(loops):
        with handle.run(range(4)):
            found.append(outputs(pipe.transformer, loop_inputs(name, seed)))
    return found


@pytest.mark.parametrize(("name", "method"), LOOPS)
def test_loops_in_threads(name, method):
    pipe, handle, state = bare(name, method)

    def loop(seed):
        with handle.run(range(4)):
            return outputs(pipe.transformer, loop_inputs(name, seed))

    with lockstep(pipe, 3) as barrier:
        found = together([functools.partial(loop, seed) for seed in range(3)], barrier)
    for actual, expected in zip(found, serial_loops(name, method), strict=True):
        list(map(same_bits, actual, expected))
    assert idle(state)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [(*case, True) for case in LOOPS] + [("sd3", "cached", False), ("flux", "ecad", False)],
)
def test_interleaved_loops_of_tasks_in_one_thread(name, method, said):
    """A task that another one makes in the midst of its loop does not go on with that loop."""
    pipe, handle, _ = bare(name, method)

    async def loop(seed):
        found = []
        with handle.run(range(4)) if said else contextlib.nullcontext():
            for step, given in enumerate(loop_inputs(name, seed)):
                if step == 1 and seed < 2:
                    child = asyncio.create_task(loop(seed + 1))
                with (
                    torch.no_grad()
                ):  # the thread's mode, which other tasks would leave as they found it
                    found.append(pipe.transformer(**given)[0])
                await asyncio.sleep(0)
        return [found, *(await child if seed < 2 else ())]

    for actual, expected in zip(asyncio.run(loop(0)), serial_loops(name, method), strict=True):
        list(map(same_bits, actual, expected))


def led_loop(pipe, scheduler, seed, before=False, meet=lambda: None):
    """A loop that a scheduler leads, with or without a call before it that is of no step."""
    scheduler.set_timesteps(4)
    given = tiny_models.call("sd3", step=seed)
    latents = given["hidden_states"]
    with torch.no_grad():
        if before:
            pipe.transformer(**{**given, "timestep": torch.zeros(1)})
        for t in scheduler.timesteps:
            now = {**given, "hidden_states": latents, "timestep": t.expand(1)}
            velocity = pipe.transformer(**now)[0]
            latents = scheduler.step(velocity, t, latents).prev_sample
            meet()
    return latents


@pytest.mark.parametrize("method", ["cached", "ecad", "ras", "ras+cached"])
def test_loops_led_by_schedulers_in_threads(method):
    expected = [
        led_loop(pipe, pipe.scheduler, seed)
        for seed in range(2)
        for pipe, *_ in [patched("sd3", method)]
    ]
    pipe, _, state = patched("sd3", method)
    known = copied(pipe)
    draw(known, "sd3", method)  # so that its scheduler is followed
    jobs = [
        functools.partial(led_loop, pipe, one.scheduler, seed)
        for seed, one in enumerate((pipe, known))
    ]
    with lockstep(pipe, 2) as barrier:
        found = together(jobs, barrier)
    list(map(same_bits, found, expected))
    assert idle(state)


class Caller:
    """Somebody's own pipeline."""

    def __init__(self, pipe, before):
        self.transformer, self.scheduler, self.before = pipe.transformer, pipe.scheduler, before

    def __call__(self, seed):
        scheduler, given = self.scheduler, tiny_models.call("sd3", step=seed)
        latents = given["hidden_states"]
        scheduler.set_timesteps(4)
        with torch.no_grad():
            if self.before:
                self.transformer(**{**given, "timestep": torch.zeros(1)})
            for t in scheduler.timesteps:
                now = {**given, "hidden_states": latents, "timestep": t.expand(1)}
                velocity = self.transformer(**now)[0]
                latents = scheduler.step(velocity, t, latents).prev_sample
        return latents


@dataclasses.dataclass
class Unhashable(Caller):
    """Equal to others of the same parts."""

    transformer: object
    scheduler: object
    before: bool = False


class Slotted(Caller):
    __slots__ = ()

    def __call__(self, seed):
        return Caller.__call__(self, seed)


class Bare:
    """Without a dictionary, and nothing can refer to it weakly."""

    __slots__ = ("before", "scheduler", "transformer")
    __init__ = Caller.__init__
    __call__ = Caller.__call__


@pytest.mark.parametrize(
    "make",
    [
        lambda pipe: Unhashable(pipe.transformer, pipe.scheduler),
        lambda pipe: Slotted(pipe, False),
        lambda pipe: Bare(pipe, False),
    ],
    ids=["dataclass", "empty slots", "slots"],
)
def test_pipelines_of_somebodys_own(make):
    expected = [Caller(patched("sd3", "ras")[0], False)(seed) for seed in range(2)]
    pipe, _, state = patched("sd3", "ras")
    caller = make(copied(pipe))
    for seed in range(2):
        same_bits(caller(seed), expected[seed])
        assert idle(state)
    fastdit.unpatch(pipe)
    assert "step" not in vars(type(caller.scheduler)) or "_fastdit" not in vars(caller.scheduler)


@pytest.mark.parametrize("method", ["cached", "ras+cached"])
def test_a_call_before_the_loop_is_a_branch_of_its_own(method):
    expected = Caller(patched("sd3", method)[0], False)(0)
    pipe, _, state = patched("sd3", method)
    caller = Caller(pipe, True)
    for _ in range(2):
        same_bits(caller(0), expected)
    assert idle(state)


@pytest.mark.parametrize("method", ["cached", "ras+cached"])
def test_a_call_before_a_loop_that_a_scheduler_leads(method):
    one, other = patched("sd3", method)[0], patched("sd3", method)[0]
    expected = led_loop(one, one.scheduler, 0)
    same_bits(led_loop(other, other.scheduler, 0, before=True), expected)


# Three schedulers whose timesteps are made in different ways.
@pytest.mark.parametrize("name", ["flux-dev", "pixart-sigma", "lumina"])
def test_timesteps_of_a_stranger_are_those_of_a_known_pipeline(name):
    """A schedule of another number of steps is mapped by timestep, also where timesteps depend on the size."""
    options = {"use_dynamic_shifting": True} if name == "flux-dev" else {}
    scheduler = tiny_models.PIPELINES[name].scheduler(**options)
    pipe = tiny_models.pipeline(name, scheduler=scheduler)
    bits = random_bits(pipe.transformer, 6, 0)
    fastdit.patch(pipe, ECAD(Schedule.from_bits(*bits), resample="sigma"), backend="reference")
    with pytest.warns(UserWarning, match="by timestep"):
        expected = draw(pipe, name)
    stranger = copied(pipe)
    with pytest.warns(UserWarning, match="by timestep"):
        same_bits(draw(stranger, name), expected)


def test_advance_leads_as_a_pipeline_does():
    """A hand-written loop with guidance that says what it steps with computes the tokens that a pipeline would."""
    pipe, handle, state = patched("sd3", "ras")
    arguments = tiny_models.arguments("sd3", steps=4)
    latents = torch.randn(
        1, 4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    scheduler = own_scheduler(pipe)
    scheduler.set_timesteps(4)

    def both(name):
        return torch.cat([arguments[f"negative_{name}"], arguments[name]])

    with torch.no_grad(), handle.run(scheduler.timesteps):
        for t in scheduler.timesteps:
            velocity = pipe.transformer(
                hidden_states=torch.cat([latents] * 2),
                timestep=t.expand(2),
                encoder_hidden_states=both("prompt_embeds"),
                pooled_projections=both("pooled_prompt_embeds"),
                return_dict=False,
            )[0]
            without, given = velocity.chunk(2)
            velocity = without + 4.0 * (given - without)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
            handle.advance(velocity)
    same_bits(latents, serial("sd3", "ras")[0])
    assert idle(state)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 4, 8, 8), (4,)])
def test_advance_refuses_a_velocity_of_another_size(shape):
    pipe, handle, _ = bare("sd3", "ras")
    inputs = loop_inputs("sd3", 0)
    with handle.run(range(4)):
        outputs(pipe.transformer, inputs[:1])
        with pytest.raises(fastdit.ArgumentError, match="velocity must be that of"):
            handle.advance(torch.zeros(shape))


# ---- what is refused


def test_one_scheduler_in_two_runs_is_refused_and_the_first_goes_on():
    pipe, _, state = patched("sd3")
    refused = []

    def again(pipe, step, timestep, tensors):
        if step == 3:  # the run has ended
            return tensors
        twin = copy.copy(pipe)  # with the same scheduler
        for job in (lambda: draw(pipe, "sd3"), lambda: draw(twin, "sd3")):
            for call in (job, lambda job=job: together([job])):  # here, and in another thread
                before = copy.deepcopy(pipe.scheduler.__dict__.get("timesteps"))
                with pytest.raises(ScheduleError, match="from_pipe") as caught:
                    call()
                refused.append(caught.value)
                assert torch.equal(pipe.scheduler.timesteps, before)
        return tensors

    same_bits(draw(pipe, "sd3", callback_on_step_end=again), serial("sd3")[0])
    assert len(refused) == 3 * 4
    same_bits(draw(pipe, "sd3", seed=1), serial("sd3")[1])
    assert idle(state)


class Slow(FlowMatchEulerDiscreteScheduler):
    """Lets others in while it sets its timesteps."""

    def set_timesteps(self, *args, **kwargs):
        meanwhile = self.__dict__.pop("meanwhile", None)
        if meanwhile is not None:
            meanwhile()
        super().set_timesteps(*args, **kwargs)


def test_one_scheduler_is_refused_to_two_that_set_it_at_once():
    pipe, _, state = patched("sd3")
    pipe.scheduler = Slow.from_config(pipe.scheduler.config)
    draw(pipe, "sd3")
    refused = []

    def other():
        with pytest.raises(ScheduleError, match="from_pipe") as caught:
            generate(pipe, "sd3", steps=5)
        refused.append(caught.value)

    pipe.scheduler.meanwhile = lambda: together([other])
    same_bits(draw(pipe, "sd3"), serial("sd3")[0])
    assert len(refused) == 1
    same_bits(draw(pipe, "sd3", seed=1), serial("sd3")[1])
    assert idle(state)


@pytest.mark.parametrize("method", ["cached", "ras", "ralu"])
def test_a_model_that_is_patched_in_the_midst_of_a_stock_run(method):
    """The rest of the run counts from where it stands; sigmas can no longer be replaced, which is refused."""
    pipe = tiny_models.pipeline("sd3")

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            fastdit.patch(pipe, *METHODS[method](pipe), backend="reference")
        return tensors

    if method == "ralu":
        with pytest.raises(ScheduleError, match="at step 2 of its run"):
            draw(pipe, "sd3", method, callback_on_step_end=callback)
    else:
        draw(pipe, "sd3", method, callback_on_step_end=callback)
        state = pipe.transformer.__dict__[LINK]
        assert sorted(state.runs.last().records) == [2, 3]
    same_bits(draw(pipe, "sd3", method, 1), serial("sd3", method)[1])


def test_patch_and_unpatch_are_refused_while_a_run_is_live():
    pipe, handle, _ = patched("sd3")
    verbs = {
        "patch": [lambda: fastdit.patch(pipe, SPARSE), lambda: fastdit.patch(pipe.transformer)],
        "unpatch": [lambda: fastdit.unpatch(pipe), handle.unpatch],
    }

    def refused(what):
        for verb, calls in verbs.items():
            for call in calls:
                for job in (call, lambda call=call: together([call])):
                    with pytest.raises(FastDiTError, match=f"cannot {verb} .* while {what}"):
                        job()

    def callback(pipe, step, timestep, tensors):
        if step < 3:
            refused("a call of a pipeline")
        return tensors

    same_bits(draw(pipe, "sd3", callback_on_step_end=callback), serial("sd3")[0])
    with handle.run(range(4)):
        refused("a `with handle.run")
    same_bits(draw(pipe, "sd3"), serial("sd3")[0])
    handle.unpatch()
    assert LINK not in pipe.transformer.__dict__


# ---- disabled, watch, report, run


def test_disabled_is_of_the_runs_that_begin_inside_it_here():
    pipe, handle, _ = patched("sd3")
    fresh = tiny_models.pipeline("sd3")
    stock = draw(fresh, "sd3", seed=1)
    sibling, found = copied(pipe), []

    def nest(pipe, step, timestep, tensors):
        if step == 1:
            with handle.disabled():
                found.append(draw(sibling, "sd3", seed=1))
                found.extend(together([lambda: draw(copied(pipe), "sd3", seed=1)]))
            found.append(draw(sibling, "sd3", seed=1))
        return tensors

    same_bits(draw(pipe, "sd3", callback_on_step_end=nest), serial("sd3")[0])
    cached = serial("sd3")[1]
    for actual, expected in zip(found, (stock, cached, cached), strict=True):
        same_bits(actual, expected)


def test_disabled_of_a_task_is_not_of_its_children():
    pipe, handle, _ = bare("sd3", "cached")
    model, inputs = pipe.transformer, loop_inputs("sd3", 0)
    stock = outputs(tiny_models.transformer("sd3"), inputs)

    async def loop():
        found = []
        for given in inputs:
            found += outputs(model, [given])
            await asyncio.sleep(0)
        return found

    async def main():
        with handle.disabled():
            child = asyncio.create_task(loop())
            return await loop(), await child

    own, child = asyncio.run(main())
    list(map(same_bits, own, stock))
    list(map(same_bits, child, serial_loops("sd3", "cached")[0]))


def test_watch_keeps_the_frames_of_this_threads_run():
    pipe, handle, _ = patched("sd3")
    with handle.watch() as expected:
        draw(pipe, "sd3")
    sibling = copied(pipe)

    def other():
        with handle.watch() as frames:
            draw(sibling, "sd3", seed=1)
        return frames

    def one():
        with handle.watch() as frames:
            draw(pipe, "sd3")
        return frames

    with lockstep(pipe, 3) as barrier:
        frames, others, _ = together([one, other, lambda: draw(copied(pipe), "sd3")], barrier)
    assert len(frames.latents) == len(others.latents) == 4
    list(map(same_bits, frames.latents, expected.latents))
    same_bits(others.latents[-1], serial("sd3")[1])


def test_report_tells_of_this_threads_last_run_else_of_the_last_of_all():
    pipe, handle, _ = patched("sd3")
    generate(pipe, "sd3", steps=3)

    def other():
        before = handle.report().steps
        generate(copied(pipe), "sd3", steps=5)
        return before, handle.report().steps

    assert together([other])[0] == (3, 5)
    assert handle.report().steps == 3
    handle.reset()
    assert handle.report().steps == 5


def test_report_in_a_callback_tells_of_the_run_in_progress():
    pipe, handle, _ = patched("sd3")
    seen = []

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            generate(copied(pipe), "sd3", steps=5)
            seen.append(handle.report().steps)
        return tensors

    generate(pipe, "sd3", steps=3, callback_on_step_end=callback)
    assert seen == [5]
    assert handle.report().steps == 3


def test_a_run_by_hand_outranks_a_scheduler_that_is_followed():
    """Also inside a pipeline's call; a pipeline's call inside of it is led by its own scheduler."""
    pipe, handle, state = patched("sd3")
    expected = serial_loops("sd3", "cached")
    inner = []

    def nest(pipe, step, timestep, tensors):
        if step == 1:
            with handle.run(range(4)):
                inner.append(outputs(pipe.transformer, loop_inputs("sd3", 0)))
        return tensors

    same_bits(draw(pipe, "sd3", callback_on_step_end=nest), serial("sd3")[0])
    list(map(same_bits, inner[0], expected[0]))
    pipe.scheduler.set_timesteps(3)
    inputs = loop_inputs("sd3", 1)
    with handle.run(range(4)):
        found = outputs(pipe.transformer, inputs[:2])
        same_bits(draw(copied(pipe), "sd3", seed=1), serial("sd3")[1])
        found += outputs(pipe.transformer, inputs[2:])
    list(map(same_bits, found, expected[1]))
    handle.reset()
    assert idle(state)


# ---- how a run ends


def interrupt_after(step):
    def callback(pipe, now, timestep, tensors):
        pipe._interrupt = now == step
        return tensors

    return callback


@pytest.mark.parametrize("first", [False, True], ids=["known", "first call"])
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("sd3", "cached", {}),
        ("flux-dev", "ras+cached", {}),
        ("sd3", "ras", {"pack_weights": True, "backend": "cpu"}),
        ("sd3", "ralu+cached", {}),
    ],
)
def test_an_interrupted_run_holds_nothing_while_the_autoencoder_decodes(
    name, method, options, first
):
    pipe, _, state = patched(name, method, **options)
    target = copied(pipe) if first else pipe
    held, during = [], []

    def count():
        return state.runs.cache_bytes() + sum(run.prepacked.nbytes for run in state.runs.live())

    hooks = [
        pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda *_: held.append(count())),
        pipe.transformer.register_forward_hook(lambda *_: during.append(count())),
    ]
    draw(target, name, method, output_type="np", callback_on_step_end=interrupt_after(2))
    assert max(during) > 0
    assert held == [0]
    for hook in hooks:
        hook.remove()
    wanted = serial(name, method, options.get("backend", "reference"))[1]
    actual = draw(copied(pipe), name, method, 1)
    if not options.get("pack_weights"):
        same_bits(actual, wanted)
    assert idle(state)


def fail_in(pipe, where, error):
    """(options of the call, how to undo it) that make a request fail in its third step."""
    calls = []

    def fail(*_, **__):
        calls.append(0)
        if len(calls) == 3:
            raise error

    if where == "callback":
        return {"callback_on_step_end": lambda pipe, step, t, tensors: fail() or tensors}, list
    if where == "autoencoder":
        calls += [0, 0]
        hook = pipe.vae.decoder.conv_in.register_forward_pre_hook(fail)
        return {"output_type": "np"}, hook.remove
    if where == "block":
        return {}, blocks_of(pipe)[1].register_forward_pre_hook(fail).remove
    step = pipe.scheduler.step

    def broken(*args, **kwargs):
        fail()
        return step(*args, **kwargs)

    pipe.scheduler.step = broken
    return {}, lambda: pipe.scheduler.__dict__.pop("step")


ERRORS = {
    "Stop": Stop,
    "KeyboardInterrupt": KeyboardInterrupt,
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("full"),
}


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize("first", [False, True], ids=["known", "first call"])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["callback", "autoencoder", "block", "scheduler"])
def test_a_run_ends_with_any_exception(where, kind, first, kept):
    pipe, _, state = patched("sd3", "ras+cached")
    target, error = copied(pipe) if first else pipe, ERRORS[kind]()
    options, undo = fail_in(target, where, error)
    with contextlib.suppress(type(error)):
        draw(target, "sd3", "ras+cached", **options)
    assert error.__traceback__ is not None
    undo()
    if not kept:
        error.__traceback__ = None
    if not (first and kept):  # a stranger's frame lives as long as the exception
        assert idle(state)
    same_bits(draw(copied(pipe), "sd3", "ras+cached", 1), serial("sd3", "ras+cached")[1])
    error.__traceback__ = None
    assert idle(state)
    same_bits(draw(target, "sd3", "ras+cached", 2), serial("sd3", "ras+cached")[2])


@pytest.mark.parametrize("part", ["pipelines.py", "owners.py"])
def test_a_call_that_is_broken_off_in_what_ends_it(part):
    pipe, _, state = patched("sd3", "ras+cached")
    draw(pipe, "sd3", "ras+cached")
    requests = copied(pipe)
    draw(requests, "sd3", "ras+cached")
    for at in range(1, 10_000, 1 if part == "pipelines.py" else 97):
        broken = interrupted(lambda: draw(requests, "sd3", "ras+cached"), at, part)
        assert idle(state), at
        if not broken:
            break
    assert at > 3
    same_bits(draw(pipe, "sd3", "ras+cached", 1), serial("sd3", "ras+cached")[1])


# ---- patch and unpatch, broken off


def everything(pipes):
    """What a patch could leave behind on pipelines, as one comparable value."""
    return [
        (
            snapshot(pipe.transformer),
            snapshot(pipe.vae),
            scheduler_snapshot(pipe.scheduler),
            type(pipe),
            set(pipe.__dict__),
        )
        for pipe in pipes
    ]


def interrupted(work, at, part="/fastdit/"):
    """Whether `work` was broken off before its line number `at` in a `part` of fastdit."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if part not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def siblings():
    """Pipelines over one transformer, and how they are."""
    pipe = tiny_models.pipeline("sd3")
    pipes = [pipe, copied(pipe), from_pipe(pipe)]
    for one in pipes:
        draw(one, "sd3")  # what a run sets stays
    return pipes, everything(pipes)


def test_unpatch_leaves_siblings_as_they_were():
    pipes, before = siblings()
    fastdit.patch(pipes[0], SPARSE, backend="reference")
    for one in pipes:
        draw(one, "sd3")
    assert everything(pipes) != before
    fastdit.unpatch(pipes[1])
    assert everything(pipes) == before


def test_the_hook_on_a_decoder_goes_with_the_last_pipeline_that_has_it():
    pipes = [tiny_models.pipeline("sd3", seed=seed) for seed in range(2)]
    pipes[1].vae = pipes[0].vae
    before = everything(pipes)
    for pipe in pipes:
        fastdit.patch(pipe, EVERY_2, backend="reference")
    fastdit.unpatch(pipes[0])
    state, held = pipes[1].transformer.__dict__[LINK], []
    hook = pipes[1].vae.decoder.conv_in.register_forward_pre_hook(
        lambda *_: held.append(state.runs.cache_bytes())
    )
    draw(pipes[1], "sd3", output_type="np", callback_on_step_end=interrupt_after(2))
    assert held == [0]
    hook.remove()
    fastdit.unpatch(pipes[1])
    assert [one[1] for one in everything(pipes)] == [one[1] for one in before]


def test_unpatch_takes_the_hook_off_a_copied_and_off_a_replaced_decoder():
    pipe, _, _ = patched("sd3")
    copies = copy.deepcopy(pipe)
    fastdit.unpatch(copies)
    first, pipe.vae = pipe.vae, tiny_models.vae()
    draw(pipe, "sd3")
    fastdit.unpatch(pipe)
    for vae in (copies.vae, first, pipe.vae):
        assert not vae.decoder._forward_pre_hooks


def test_unpatch_can_be_repeated_after_it_was_broken_off():
    pipes, before = siblings()
    for at in range(1, 10_000, 31):
        fastdit.patch(pipes[0], EVERY_2, backend="reference")
        state = pipes[0].transformer.__dict__[LINK]
        for one in pipes[1:]:
            state.followed.follow(one)
        broken = interrupted(lambda: fastdit.unpatch(pipes[0]), at, "/runtime/")
        fastdit.unpatch(pipes[0])
        assert everything(pipes) == before, at
        if not broken:
            break


def test_a_patch_that_is_broken_off_leaves_nothing():
    pipe = tiny_models.pipeline("sd3")
    generate(pipe, "sd3", steps=1)
    before = everything([pipe])
    for at in range(1, 10_000, 23):
        broken = interrupted(
            lambda: fastdit.patch(pipe, SPARSE, backend="reference"), at, "/runtime/"
        )
        if not broken:
            break
        assert everything([pipe]) == before, at
    assert LINK in pipe.transformer.__dict__
    fastdit.unpatch(pipe)
    assert everything([pipe]) == before


# ---- what is kept


def test_an_ended_run_keeps_neither_pipeline_nor_scheduler():
    pipe, handle, _ = patched("sd3")
    request = copied(pipe)
    draw(request, "sd3")
    gone = [weakref.ref(request), weakref.ref(request.scheduler)]
    del request
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert handle.report().steps == 4


def test_loops_that_tasks_give_up_go_with_them():
    pipe, _, state = bare("sd3", "cached")

    async def loop(seed):
        for given in loop_inputs("sd3", seed)[:2]:
            outputs(pipe.transformer, [given])
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*map(loop, range(5)))

    asyncio.run(main())
    gc.collect()
    assert len(state.runs.live()) <= 1  # the last, which the report is about


def test_runs_may_be_counted_while_others_begin():
    """Another thread begins a run between any two lines of the count."""
    _, handle, state = bare("sd3", "cached")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as other:
        stack.enter_context(handle.run(range(4)))

        def trace(frame, event, argument):
            other.submit(lambda: stack.enter_context(handle.run(range(4)))).result()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert state.runs.cache_bytes() == 0
        finally:
            sys.settrace(before)
        assert len(state.runs.live()) > 2
        other.submit(stack.close).result()
    assert idle(state)


# ---- `with`, broken off


def test_run_and_disabled_leave_nothing_where_they_break_off_as_they_begin():
    """What comes later here is neither stock nor of a run that is over."""
    pipe, handle, state = bare("sd3", "cached")
    for enter in (lambda: handle.run(range(4)), handle.disabled):
        for at in range(1, 1000, 3):
            entered = []

            def work(enter=enter, entered=entered):
                with enter():
                    entered.append(True)

            interrupted(work, at)
            if entered:
                break
            found = outputs(pipe.transformer, loop_inputs("sd3", 0))
            list(map(same_bits, found, serial_loops("sd3", "cached")[0]))
            handle.reset()
            assert idle(state)
        assert at > 3
