"""Replayed runs: the bits of eager ones, whatever changes between two runs, and eager where they cannot be replayed."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, Cached, CompositionError, Dense, Schedule
from fastdit.patch import handle_of
from oracle import random_bits
from tape import Tapes, storage

STEPS = 5
MODES = ["warming up", "captured", "replayed", "replayed"]
#: not those that take the length of a prompt from the host: what is captured once would not hold
STEADY = [name for name, form in tiny_models.FAMILIES.items() if not form.reads_masks]
SPARSE = [name for name in tiny_models.forms("layouts") if name in STEADY]


@pytest.fixture
def tapes(monkeypatch):
    """What captures in place of CUDA."""
    made = Tapes()
    members = {"__new__": lambda cls: made, "serves": staticmethod(lambda device: True)}
    monkeypatch.setattr("fastdit.runtime.capture.CudaCapture", type("Stand", (), members))
    return made


def ras():
    return RAS(ratio=0.5, start=2, resets=(), align=1)


def random_schedule(pipe, seed=0):
    return Cached(Schedule.from_bits(*random_bits(pipe.transformer, STEPS, seed)))


METHODS = {
    "dense": lambda pipe: [Dense()],
    "cached": lambda pipe: [random_schedule(pipe)],
    "ras": lambda pipe: [ras()],
    "ras + cached": lambda pipe: [ras(), random_schedule(pipe, 1)],
}
CASES = [
    *[(name, "cached") for name, pipe in tiny_models.PIPELINES.items() if pipe.family in STEADY],
    *[(name, "ras + cached") for name in SPARSE],
    ("sd3", "dense"),
    ("flux", "ras"),
]


def draw(name, pipe, seed, **kwargs):
    """Latents of a run, each seed with other noise and another prompt."""
    given = tiny_models.arguments(name, seed=seed, **{"steps": STEPS} | kwargs)
    for key, value in given.items():
        if key.endswith("embeds"):
            given[key] = value + 0.1 * seed
    return tiny_models.latents_of(pipe, given).clone()


def close(actual, expected):
    """Equal but for the modulations of a step, which are made by themselves once a run has been left."""
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def read_from_outside(tapes, pipe):
    """Storages that the tapes read and that are neither weights nor copies."""
    transformer = pipe.transformer
    graphs = handle_of(pipe).last_run().patched.graphs
    known = {storage(t) for t in (*transformer.parameters(), *transformer.buffers())}
    for recording in graphs.recordings.values():
        known |= {storage(t) for t in recording.held.values()}
        for inputs in recording.inputs.values():
            known |= {storage(t) for t in inputs.buffers if isinstance(t, torch.Tensor)}
    return {tuple(t.shape) for s, t in tapes.outside.items() if s not in known}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_replayed_runs_have_the_bits_of_eager_ones(name, method, tapes):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = [draw(name, pipe, seed) for seed in range(4)]
    eager = fastdit.report(pipe)
    handle = fastdit.patch(pipe, *METHODS[method](pipe), cuda_graphs=True)
    for seed, mode in enumerate(MODES):
        same_bits(draw(name, pipe, seed), expected[seed])
        assert handle.report().graphs == mode
    assert not read_from_outside(tapes, pipe)
    report = handle.report()
    for fact in ("steps", "tokens_per_step", "computed", "reused", "peak_cache_bytes", "live"):
        assert getattr(report, fact) == getattr(eager, fact), fact


@pytest.fixture
def replayed(tapes):
    """A pipeline whose next run is a replay, its handle, and the same eager one's latents by seed."""

    def made(method="ras + cached", name="sd3", **kwargs):
        pipe = tiny_models.pipeline(name)
        fastdit.patch(pipe, *METHODS[method](pipe))
        eager = {seed: draw(name, pipe, seed, **kwargs) for seed in range(3)}
        handle = fastdit.patch(pipe, *METHODS[method](pipe), cuda_graphs=True)
        for seed in range(2):
            draw(name, pipe, seed, **kwargs)
        return pipe, handle, eager

    return made


def test_each_kind_of_run_is_recorded_apart(replayed):
    pipe, handle, eager = replayed()
    wide = {"height": 16, "width": 8, "batch": 2}
    expected = {seed: draw("sd3", reference_of(pipe), seed, **wide) for seed in range(3)}
    for seed, mode in enumerate(MODES[:3]):
        same_bits(draw("sd3", pipe, seed, **wide), expected[seed])
        assert handle.report().graphs == mode
    same_bits(draw("sd3", pipe, 2), eager[2])
    assert handle.report().graphs == "replayed"


def reference_of(pipe):
    """The same pipeline with the same methods, eager."""
    other = tiny_models.pipeline("sd3")
    fastdit.patch(other, *handle_of(pipe).last_run().patched.methods)
    return other


def test_weights_written_in_place_are_read_and_moved_ones_make_another_kind(replayed):
    pipe, handle, eager = replayed()
    weight = pipe.transformer.proj_out.weight
    with torch.no_grad():
        weight.mul_(2)
    doubled = draw("sd3", pipe, 2)
    assert handle.report().graphs == "replayed"
    assert not torch.equal(doubled, eager[2])
    pipe.transformer.proj_out.weight = torch.nn.Parameter(weight.detach() / 2)
    for seed, mode in ((0, "warming up"), (1, "captured"), (2, "replayed")):
        same_bits(draw("sd3", pipe, seed), eager[seed])
        assert handle.report().graphs == mode


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_swapped_on_the_way_is_the_eager_runs(method, replayed):
    pipe, handle, _ = replayed(method)

    def swap(pipe, step, timestep, given):
        return {"prompt_embeds": given["prompt_embeds"] + 1} if step == 2 else {}

    swapping = {
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = draw("sd3", reference_of(pipe), 2, **swapping)
    found = draw("sd3", pipe, 2, **swapping)
    assert handle.report().graphs == "left"
    if "ras" in method:  # where a sparse step becomes a dense one
        assert found.isfinite().all()
    else:
        close(found, expected)
    for mode in MODES[:3]:  # it recovers
        draw("sd3", pipe, 0)
        assert handle.report().graphs == mode


def test_a_run_that_was_broken_off_is_followed_by_a_replay(replayed):
    pipe, handle, eager = replayed()

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 2
        return {}

    draw("sd3", pipe, 0, callback_on_step_end=stop)
    same_bits(draw("sd3", pipe, 2), eager[2])
    assert handle.report().graphs == "replayed"


def test_a_capture_that_was_broken_off_is_not_replayed(tapes):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, random_schedule(pipe))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, random_schedule(pipe), cuda_graphs=True)
    draw("sd3", pipe, 0)

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 2
        return {}

    draw("sd3", pipe, 0, callback_on_step_end=stop)
    assert handle.report().graphs == "captured"
    for mode in MODES[:3]:
        same_bits(draw("sd3", pipe, 0), expected)
        assert handle.report().graphs == mode


@pytest.mark.parametrize("fails", [0, 2, 4])
@pytest.mark.parametrize("method", ["dense", "cached"])
def test_a_failed_capture_is_done_eagerly_and_said_once(method, fails, tapes):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, *METHODS[method](pipe), cuda_graphs=True)
    draw("sd3", pipe, 0)
    tapes.fails = fails
    found = draw("sd3", pipe, 0)
    assert handle.report().graphs == "left"
    if method == "dense" or fails == 0:
        close(found, expected)
    assert found.isfinite().all()
    with pytest.warns(UserWarning, match="could not be captured: RuntimeError: operation not"):
        same_bits(draw("sd3", pipe, 0), expected)
    assert "could not be captured" in handle.report().graphs


def hooked(pipe):
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *args: None)


def watched(pipe):
    pipe.transformer.register_forward_hook(lambda *args: None)


def trained(pipe):
    pipe.transformer.transformer_blocks[0].ff.base_layer = torch.nn.Identity()


WHY = {
    hooked: "hooks are on transformer_blocks.1",
    watched: "somebody else's hooks",
    trained: "transformer_blocks.0.ff carries an adapter",
}


@pytest.mark.parametrize("change", WHY, ids=lambda change: change.__name__)
def test_what_cannot_be_replayed_runs_eagerly_and_says_why(change, replayed):
    pipe, handle, eager = replayed("cached")
    change(pipe)
    with pytest.warns(UserWarning, match=WHY[change]):
        found = draw("sd3", pipe, 2)
    assert WHY[change] in handle.report().graphs
    assert torch.allclose(found, eager[2], atol=1e-4)  # a hook makes residuals settle earlier


def test_the_cpu_is_not_captured():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, cuda_graphs=True)
    with pytest.warns(UserWarning, match="the transformer is on cpu"):
        draw("sd3", pipe, 0)
    assert handle.report().graphs == "since the transformer is on cpu"
    assert "CUDA graphs: since the transformer is on cpu" in str(handle.report())


def test_stages_are_refused():
    pipe = tiny_models.pipeline("sd3")
    with pytest.raises(CompositionError, match="cuda_graphs cannot replay RALU"):
        fastdit.patch(pipe, RALU.preset("sd3-2x", selector="gradient"), cuda_graphs=True)
    assert "_fastdit" not in pipe.transformer.__dict__


def test_unpatching_leaves_nothing(replayed):
    pipe, handle, _ = replayed()
    with handle.disabled():
        disabled = draw("sd3", pipe, 2)
    handle.unpatch()
    assert "forward" not in pipe.transformer.__dict__
    stock = tiny_models.pipeline("sd3")
    same_bits(draw("sd3", pipe, 2), draw("sd3", stock, 2))
    same_bits(disabled, draw("sd3", stock, 2))


def test_a_copied_pipeline_records_its_own_runs(replayed):
    pipe, handle, eager = replayed()
    other = copy.deepcopy(pipe)
    for seed, mode in enumerate(MODES[:3]):
        same_bits(draw("sd3", other, seed), eager[seed])
        assert fastdit.report(other).graphs == mode
    same_bits(draw("sd3", pipe, 2), eager[2])
    assert handle.report().graphs == "replayed"


def sibling_of(pipe):
    """Another pipeline over the same transformer, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_recording_serves_one_run_at_a_time(method, replayed):
    """A run inside one of its signature is eager, whatever that does with the recording; and so the other way."""
    pipe, handle, eager = replayed(method)
    other, modes = sibling_of(pipe), []

    def nested(pipe, step, timestep, given):
        if step == 2:
            inner.append(draw("sd3", other, 1))
            modes.append(handle.report().graphs)
        return {}

    for seed in range(3):
        inner = []
        same_bits(draw("sd3", pipe, seed, callback_on_step_end=nested), eager[seed])
        assert handle.report().graphs == "replayed"
        same_bits(inner[0], eager[1])
    assert modes == ["since another run of its signature is in progress"] * 3
    same_bits(draw("sd3", other, 2), eager[2])
    assert handle.report().graphs == "replayed"


def test_runs_of_two_kinds_are_replayed_at_once(replayed):
    pipe, handle, eager = replayed()
    other, modes = sibling_of(pipe), []
    wide = {"height": 16, "width": 8, "batch": 2}
    expected = draw("sd3", reference_of(pipe), 1, **wide)

    def nested(pipe, step, timestep, given):
        if step == 2:
            same_bits(draw("sd3", other, 1, **wide), expected)
            modes.append(handle.report().graphs)
        return {}

    for seed in range(3):
        same_bits(draw("sd3", pipe, seed, callback_on_step_end=nested), eager[seed])
        assert handle.report().graphs == "replayed"
    assert modes == MODES[:3]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_threads_with_graphs_have_the_bits_of_eager_runs(workers, replayed):
    pipe, _, eager = replayed()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(lambda s: draw("sd3", sibling_of(pipe), s), i % 3) for i in range(16)]
    for i, job in enumerate(jobs):
        same_bits(job.result(), eager[i % 3])


def loop(model, handle, seed, autocast_from=STEPS):
    """The velocities of a run."""
    timesteps, velocities = torch.linspace(1000, 100, STEPS), []
    given = {
        name: value + 0.1 * seed
        for name, value in tiny_models.call("sd3", 2).items()
        if isinstance(value, torch.Tensor)
    }
    latents = given["hidden_states"]
    with torch.no_grad(), handle.run(timesteps):
        for step, t in enumerate(timesteps):
            now = {"hidden_states": latents, "timestep": t.expand(2)}
            with torch.autocast("cpu", torch.bfloat16, enabled=step >= autocast_from):
                velocities.append(model(**given | now).sample)
            latents = latents - velocities[-1] / STEPS
            handle.advance()
    return velocities


def test_a_loop_written_by_hand(tapes):
    model = tiny_models.transformer("sd3")
    bits = Schedule.from_bits(*random_bits(model, STEPS, 3))
    eager = [loop(model, fastdit.patch(model, Cached(bits)), seed) for seed in range(4)]
    handle = fastdit.patch(model, Cached(bits), cuda_graphs=True)
    found = []
    for seed, mode in enumerate(MODES):
        found.append(loop(model, handle, seed))
        assert handle.report().graphs == mode
    for seed in range(4):  # a later run does not write into what an earlier one gave
        same_bits(torch.stack(found[seed]), torch.stack(eager[seed]))


def test_autocast_that_begins_inside_a_run_leaves_it(tapes):
    model = tiny_models.transformer("sd3")
    method = Cached(Schedule.every(2))
    eager = loop(model, fastdit.patch(model, method), 0, autocast_from=3)
    handle = fastdit.patch(model, method, cuda_graphs=True)
    for _ in range(3):
        loop(model, handle, 0)
    found = loop(model, handle, 0, autocast_from=3)
    assert handle.report().graphs == "left"
    same_bits(torch.stack(found), torch.stack(eager))


@pytest.mark.parametrize("way", ["between runs", "inside a run"])
def test_a_prompt_written_in_place_under_inference_mode_is_copied(way, replayed):
    """Torch counts no writes to such tensors."""
    pipe, _, _ = replayed("cached")
    given = tiny_models.arguments("sd3", steps=STEPS, seed=2)
    names = [name for name in given if name.endswith("embeds")]

    def draw_twice(pipe):
        with torch.inference_mode():
            prompt = {name: given[name].clone() for name in names}
            found = []
            for scale in (1.0, 0.5):
                for tensor in prompt.values():
                    tensor.mul_(scale)

                def write(pipe, step, timestep, tensors):
                    if way == "inside a run" and step == 2:
                        tensors["prompt_embeds"].mul_(0.5)
                    return tensors

                noise = torch.Generator().manual_seed(2)
                options = {
                    "callback_on_step_end": write,
                    "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
                }
                found.append(pipe(**given | prompt | options | {"generator": noise}).images.clone())
        return found

    expected = draw_twice(reference_of(pipe))
    found = draw_twice(pipe)
    for mine, wanted in zip(found, expected, strict=True):
        close(mine, wanted)


def test_a_loop_that_is_given_up_gives_its_recording_back(tapes):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = tiny_models.pipeline("sd3", scheduler=scheduler)
    handle = fastdit.patch(pipe, cuda_graphs=True)
    for seed in range(2):
        draw("sd3", pipe, seed)
    model, given = pipe.transformer, tiny_models.call("sd3", 2)

    def give_up():
        scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for t in scheduler.timesteps[:2]:
                model(**given | {"timestep": t.expand(2)})

    modes = []
    for _ in range(4):
        thread = threading.Thread(target=give_up)
        thread.start()
        thread.join()
        gc.collect()
        modes.append(handle.report().graphs)
    assert "since another run of its signature is in progress" not in modes
    eager = draw("sd3", reference_of(pipe), 1)
    for mode in (*MODES[2:3], "replayed"):
        same_bits(draw("sd3", pipe, 1), eager)
        assert handle.report().graphs == mode
