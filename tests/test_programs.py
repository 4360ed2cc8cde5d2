"""Programs of transformer calls: the bits of the calls that were recorded, whatever changes between two of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.utils._pytree import tree_map

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, Cached, Dense, Schedule
from fastdit.blocks import attention
from fastdit.patch import handle_of
from fastdit.programs import library
from fastdit.programs.program import Program
from fastdit.runtime import programmed
from oracle import random_bits
from tiny_models import sample

STEPS = 6
NAMES = list(tiny_models.PIPELINES)
SPARSE = [
    name for name in NAMES if tiny_models.PIPELINES[name].family in tiny_models.forms("layouts")
]
RESIZED = tiny_models.forms("changes_resolution")


def ras(**more):
    return RAS(**{"ratio": 0.5, "start": 2, "resets": (), "align": 1} | more)


def random_schedule(pipe, seed=0):
    return Cached(Schedule.from_bits(*random_bits(pipe.transformer, STEPS, seed)))


def ralu(pipe):
    return RALU((2, 2, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")


METHODS = {
    "dense": lambda pipe: [Dense()],
    "every(2)": lambda pipe: [Cached(Schedule.every(2))],
    "every(3), order 1": lambda pipe: [Cached(Schedule.every(3), order=1)],
    "random": lambda pipe: [random_schedule(pipe)],
    "random in bf16": lambda pipe: [
        Cached(random_schedule(pipe, 2).source, cache_dtype="bfloat16")
    ],
    "random, order 1": lambda pipe: [Cached(random_schedule(pipe, 3).source, order=1)],
    "ras": lambda pipe: [ras()],
    "ras + random": lambda pipe: [ras(), random_schedule(pipe, 1)],
    "ras + every(3), order 1": lambda pipe: [ras(), Cached(Schedule.every(3), order=1)],
    "ralu": lambda pipe: [ralu(pipe)],
}
CASES = [
    (name, method)
    for name in NAMES
    for method in METHODS
    if not ("ras" in method and name not in SPARSE)
    and not (method == "ralu" and name not in RESIZED)
]


def draw(name, pipe, seed=0, **more):
    """Latents of a run, each seed with other noise and another prompt."""
    if tiny_models.PIPELINES[name].family in RESIZED and "img2img" not in name:
        more |= {"height": 16, "width": 24}
    given = tiny_models.arguments(name, seed=seed, steps=STEPS, **more)
    for key, value in given.items():
        if key.endswith("embeds"):
            given[key] = tree_map(lambda each: each + 0.1 * seed, value)
    return tiny_models.latents_of(pipe, given).clone()


def programs_of(pipe):
    """What was recorded of a pipeline's transformer: its programs, and why there are no others."""
    found = list(handle_of(pipe).last_run().patched.programs.found.values())
    made = [each for each in found if isinstance(each, Program)]
    return made, [each for each in found if isinstance(each, str)]


@pytest.fixture
def interpreted(monkeypatch):
    """interpreted(function, ...) calls it without programs: the truth for what they do."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(library.Programs, "get", lambda self, kind: "for comparison")
            return function(*args, **kwargs)

    return call


@pytest.fixture
def ran(monkeypatch):
    """How many programs ran."""
    count = []
    stock = programmed.run

    def run(program, *args, **kwargs):
        count.append(program)
        return stock(program, *args, **kwargs)

    monkeypatch.setattr(programmed, "run", run)
    return count


@pytest.mark.parametrize(("name", "method"), CASES)
def test_programs_have_the_bits_of_the_calls_they_stand_for(name, method, interpreted, ran):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = [interpreted(draw, name, pipe, seed) for seed in range(2)]
    told = fastdit.report(pipe)
    assert not ran
    for seed in (0, 1, 1, 0):
        same_bits(draw(name, pipe, seed), expected[seed])
    found = fastdit.report(pipe)
    for fact in ("steps", "tokens_per_step", "computed", "reused", "peak_cache_bytes", "live"):
        assert getattr(found, fact) == getattr(told, fact), fact
    assert len(ran) >= 2 * len(handle_of(pipe).last_run().records) - 2 or "order" in method


def changed(pipe, name, seed, change, step=2, **more):
    """The latents of a run in which `change(pipe)` happens after a step."""

    def callback(pipe, index, timestep, given):
        if index == step:
            change(pipe)
        return given

    def old_callback(index, timestep, latents):
        callback(pipe, index, timestep, {})

    if name.startswith("pixart"):
        return draw(name, pipe, seed, callback=old_callback, callback_steps=1, **more)
    return draw(name, pipe, seed, callback_on_step_end=callback, **more)


def replace_weight(pipe):
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def write_weight(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].weight.mul_(1.5)


def write_table(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].scale_shift_table.add_(1)


def add_hook(pipe):
    layer = pipe.transformer.transformer_blocks[1].ff
    layer.register_forward_hook(lambda module, args, output: output * 1.5)


class Loud(ModelHook):
    def post_forward(self, module, output):
        return output * 1.5


def register_hook(pipe):
    """As diffusers' guiders do for one of a step's calls, and its caches and offloading."""
    layer = pipe.transformer.transformer_blocks[1].ff
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Loud(), "loud")


class Louder(type(tiny_models.transformer("sd3").transformer_blocks[0].attn.processor)):
    def __call__(self, *args, **kwargs):
        image, text = super().__call__(*args, **kwargs)
        return image * 1.5, text


def set_processor(pipe):
    pipe.transformer.transformer_blocks[1].attn.processor = Louder()


def replace_module(pipe):
    block = pipe.transformer.transformer_blocks[1]
    block.ff.net[2] = nn.Linear(128, 32)
    tiny_models.randomise(block.ff.net[2], 5)


def set_eps(pipe):
    pipe.transformer.transformer_blocks[1].norm2.eps = 0.5


IN_MID_RUN = {
    "a weight that is another tensor": ("sd3", replace_weight),
    "a weight that was written": ("sd3", write_weight),
    "a table that was written": ("pixart-sigma", write_table),
    "a hook": ("sd3", add_hook),
    "a hook of diffusers'": ("sd3", register_hook),
    "a processor": ("sd3", set_processor),
}
BETWEEN_RUNS = IN_MID_RUN | {
    "a module": ("sd3", replace_module),
    "a setting": ("sd3", set_eps),
}


def test_the_attention_backend_that_diffusers_is_told_is_seen(monkeypatch):
    """Whether for a model, or for all in a `with`: then the processors are asked anew."""
    from diffusers.models import attention_dispatch

    pipe = tiny_models.pipeline("flux")
    module = type(pipe.transformer.transformer_blocks[0].attn.processor).__module__
    stock, asked = attention_dispatch.dispatch_attention_fn, []

    def dispatch(*args, **kwargs):
        asked.append(kwargs.get("backend"))
        return stock(*args, **kwargs)

    def times():
        asked.clear()
        draw("flux", pipe)
        return len(asked)

    monkeypatch.setattr(f"{module}.dispatch_attention_fn", dispatch)
    fastdit.patch(pipe, Dense())
    times()
    first_calls = times()  # the others are programs
    with attention_dispatch.attention_backend("_native_math"):  # which is set around each attention
        assert times() == times() > first_calls
        assert any("settings" in why for why in programs_of(pipe)[1])
    assert times() > times() == first_calls
    pipe.transformer.set_attention_backend("native")
    assert times() > times() == first_calls


@pytest.mark.parametrize("what", IN_MID_RUN)
def test_what_changes_in_a_run_is_seen(what, interpreted, ran):
    name, change = IN_MID_RUN[what]
    found = []
    for first in (lambda f, *args: f(*args), interpreted):
        pipe = tiny_models.pipeline(name)
        fastdit.patch(pipe, Cached(Schedule.every(2)))
        plain = first(draw, name, pipe)
        first(draw, name, pipe)
        found.append(first(changed, pipe, name, 0, change))
        assert not torch.equal(plain, found[-1])
    same_bits(*found)
    assert ran


@pytest.mark.parametrize("what", BETWEEN_RUNS)
def test_what_changes_between_two_runs_is_seen(what, interpreted, ran):
    name, change = BETWEEN_RUNS[what]
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    plain = draw(name, pipe)
    same_bits(draw(name, pipe), plain)
    assert ran
    change(pipe)
    found = draw(name, pipe)
    same_bits(found, interpreted(draw, name, pipe))
    assert not torch.equal(found, plain)


def swap_prompt(pipe, index, timestep, given):
    return {"prompt_embeds": given["prompt_embeds"] + 1} if index == 2 else {}


@pytest.mark.parametrize("method", ["dense", "every(2)", "ras", "ras + random"])
def test_a_prompt_swapped_on_the_way(method, interpreted, ran):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS[method](pipe))
    more = {
        "callback_on_step_end": swap_prompt,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = interpreted(draw, "sd3", pipe, **more)
    plain = draw("sd3", pipe)
    for _ in range(2):
        same_bits(draw("sd3", pipe, **more), expected)
        same_bits(draw("sd3", pipe), plain)
    assert ran


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flux-dev", {"guidance_scale": 7.0}),
        ("sd3", {"guidance_scale": 7.0}),
        ("sd3", {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.2, 0.1]}),
        ("sd3", {"batch": 2}),
        ("sd3", {"cfg": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["every(2)", "random, order 1"])
def test_what_a_run_is_given_is_no_constant(name, more, method, interpreted, ran):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = [interpreted(draw, name, pipe, 0, **given) for given in ({}, more)]
    assert not torch.equal(*expected) if expected[0].shape == expected[1].shape else True
    for _ in range(3):
        for given, truth in zip(({}, more), expected, strict=True):
            same_bits(draw(name, pipe, 0, **given), truth)
    assert ran


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loop_by_hand(mode, interpreted, ran):
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, Cached(Schedule.every(2)))
    calls = [tiny_models.call("sd3", 2, step=step) for step in range(STEPS)]

    def loop():
        with mode(), handle.run([call["timestep"][0] for call in calls]):
            return torch.cat([sample(model(**call)) for call in calls]).clone()

    expected = interpreted(loop)
    for _ in range(3):
        same_bits(loop(), expected)
    assert ran


def test_gradients_have_no_programs(ran):
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, Dense())
    call = tiny_models.call("sd3")
    with handle.run(range(2)):
        for _ in range(2):
            sample(model(**call)).sum().backward()
    assert not ran
    assert model.proj_out.weight.grad is not None


def test_threads_share_programs_and_nothing_else(interpreted, ran):
    """Several requests of one kind at the same time, each with its own prompt, seed and caches."""
    pipes = [tiny_models.pipeline("sd3")]
    fastdit.patch(pipes[0], *METHODS["ras + random"](pipes[0]))
    scheduler = pipes[0].scheduler
    pipes += [
        type(pipes[0]).from_pipe(pipes[0], scheduler=type(scheduler).from_config(scheduler.config))
        for _ in range(2)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    expected = [interpreted(draw, "sd3", pipes[0], seed) for seed in range(3)]
    draw("sd3", pipes[0])
    together = threading.Barrier(3)

    def request(seed):
        def wait(pipe, index, timestep, given):
            together.wait(60)
            return {}

        return draw("sd3", pipes[seed], seed, callback_on_step_end=wait)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(request, range(3)))
    for actual, truth in zip(found, expected, strict=True):
        same_bits(actual, truth)
    assert len(ran) >= 3 * (STEPS - 1)


@pytest.mark.parametrize("method", ["dense", "random", "ras"])
def test_prompts_of_unlike_length_have_programs_of_their_own(method, interpreted, ran):
    """Lumina 2 puts their pictures in other places, which a mask follows."""
    pipe = tiny_models.pipeline("lumina2")
    fastdit.patch(pipe, *METHODS[method](pipe))
    masks = torch.ones(2, 3, tiny_models.TEXT, dtype=torch.int64)
    masks[1, 0, -2:] = masks[1, 2, -1:] = 0
    for mask in (*masks, *masks):
        told = {"batch": 3, "prompt_attention_mask": mask}
        expected = interpreted(draw, "lumina2", pipe, **told)
        before = len(ran)
        same_bits(draw("lumina2", pipe, **told), expected)
    assert len(ran) - before >= STEPS


def test_what_reads_values_stays_as_it_is(interpreted, ran, monkeypatch):
    """As Lumina 2 reads the lengths of prompts, where nobody does so once for a run."""
    monkeypatch.setattr(type(tiny_models.adapter_of("lumina2")), "restates_model", False)
    pipe = tiny_models.pipeline("lumina2")
    fastdit.patch(pipe, Dense())
    expected = interpreted(draw, "lumina2", pipe)
    for _ in range(2):
        same_bits(draw("lumina2", pipe), expected)
    made, why = programs_of(pipe)
    assert not made
    assert not ran
    assert any("tolist" in each for each in why), why


def test_a_module_of_somebody_else_is_run(ran):
    pipe = tiny_models.pipeline("sd3")
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    calls = []

    class Counting(type(layer)):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    layer.__class__ = Counting
    fastdit.patch(pipe, Dense())
    calls.clear()
    draw("sd3", pipe)
    draw("sd3", pipe)
    assert len(calls) == 2 * STEPS
    assert not ran


def test_the_fused_attention_has_programs(interpreted, ran, monkeypatch):
    """The form that stands in for the stock attention on a GPU."""
    monkeypatch.setattr(attention, "fuses", lambda device: True)
    for name in ("sd3.5", "flux", "qwen") if tiny_models.HAS_QWEN else ("sd3.5", "flux"):
        pipe = tiny_models.pipeline(name)
        fastdit.patch(pipe, Cached(Schedule.every(2)))
        expected = interpreted(draw, name, pipe)
        ran.clear()
        for _ in range(2):
            same_bits(draw(name, pipe), expected)
        assert len(ran) > STEPS


def test_no_more_programs_are_kept_than_that(interpreted, ran, monkeypatch):
    monkeypatch.setattr(library, "MOST_PROGRAMS", 3)
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS["random"](pipe))
    expected = interpreted(draw, "sd3", pipe)
    for _ in range(3):
        same_bits(draw("sd3", pipe), expected)
        assert sum(map(len, programs_of(pipe))) <= 3


def test_reference_has_none(ran):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, backend="reference")
    draw("sd3", pipe)
    draw("sd3", pipe)
    assert not ran


def test_programs_hold_no_tensor_of_a_run():
    """What is left of a run's memory once it is over: nothing but what a program folded, which depends on no run."""
    import gc
    import weakref

    pipe = tiny_models.pipeline("flux-dev")
    fastdit.patch(pipe, *METHODS["random"](pipe))
    kept = []

    def keep(pipe, index, timestep, given):
        branches = handle_of(pipe).last_run().branches.values()
        kept.extend(
            weakref.ref(value)
            for branch in branches
            for value in branch.slots.values()
            if isinstance(value, torch.Tensor)
        )
        return {}

    draw("flux-dev", pipe, callback_on_step_end=keep)
    assert kept
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
