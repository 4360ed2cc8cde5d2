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
from fastdit import Cached, Schedule
from fastdit.patch import handle_of
from fastdit.programs.program import Program
from fastdit.runtime import graphs
from oracle import random_bits
from replays import (
    CALLS,
    CASES,
    METHODS,
    MODES,
    STEPS,
    draw,
    graphs_of,
    loop,
    mode_of,
    random_schedule,
    ras,
    reference_of,
    replayed,
    tapes,
)
from tape import storage

__all__ = ["replayed", "tapes"]


def read_from_outside(tapes, pipe):
    """Storages that the tapes read and that are neither weights, nor a program's own, nor where a session keeps."""
    run = handle_of(pipe).last_run()
    transformer, patched = pipe.transformer, run.patched
    known = [*transformer.parameters(), *transformer.buffers()]
    for session in patched.graphs.sessions.values():
        for each in (session.kept, session.tables, session.given):
            known += each.tensors.values()
    for program in patched.programs.found.values():
        if isinstance(program, Program):
            known += [t for t in program.run.__globals__.values() if isinstance(t, torch.Tensor)]
    known = set(map(storage, known))
    return {tuple(t.shape) for s, t in tapes.outside.items() if s not in known}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_replayed_runs_have_the_bits_of_eager_ones(name, method, tapes):
    pipe = tiny_models.pipeline(name)
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = [draw(name, pipe, seed) for seed in range(4)]
    eager = fastdit.report(pipe)
    handle = fastdit.patch(pipe, *METHODS[method](pipe), graphs=True)
    for seed in range(4):
        same_bits(draw(name, pipe, seed), expected[seed])
    assert not read_from_outside(tapes, pipe)
    report, run = handle.report(), handle.last_run()
    for fact in ("steps", "tokens_per_step", "computed", "reused", "live"):
        assert getattr(report, fact) == getattr(eager, fact), fact
    trace = run.trace
    stages = 2 if "ralu" in method else 0  # after the first
    first = CALLS.get(tiny_models.PIPELINES[name].family, 1)
    assert trace.replayed == trace.calls - first * (1 + stages) > 0, str(trace)
    assert trace.captured == 0
    assert report.peak_cache_bytes == sum(
        s.kept.nbytes for s in run.patched.graphs.sessions.values()
    )


def test_each_size_has_a_session(replayed):
    pipe, handle, eager = replayed()
    wide = {"height": 16, "width": 8, "batch": 2}
    expected = {seed: draw("sd3", reference_of(pipe), seed, **wide) for seed in range(4)}
    for seed, mode in enumerate(MODES):
        same_bits(draw("sd3", pipe, seed, **wide), expected[seed])
        assert mode_of(handle) == mode
    same_bits(draw("sd3", pipe, 2), eager[2])
    assert mode_of(handle) == "replayed"
    assert len(handle.last_run().patched.graphs.sessions) == 2


def test_weights_written_in_place_are_read_and_moved_ones_are_captured_anew(replayed):
    pipe, handle, eager = replayed()
    weight = pipe.transformer.proj_out.weight
    with torch.no_grad():
        weight.mul_(2)
    doubled = draw("sd3", pipe, 2)
    assert mode_of(handle) == "replayed"
    assert not torch.equal(doubled, eager[2])
    pipe.transformer.proj_out.weight = torch.nn.Parameter(weight.detach() / 2)
    for seed, mode in enumerate(("captured", "replayed", "replayed")):
        same_bits(draw("sd3", pipe, seed), eager[seed])
        assert mode_of(handle) == mode


@pytest.mark.parametrize("way", ["another parameter", "other data"])
def test_a_weight_moved_inside_a_run_is_seen(way, replayed):
    pipe, *_ = replayed("dense")
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    stock = layer.weight.detach().clone()

    def move(pipe, step, timestep, given):
        if step == 2:
            if way == "other data":
                layer.weight.data = stock * 2
            else:
                layer.weight = torch.nn.Parameter(stock * 2)
        return {}

    found = draw("sd3", pipe, 2, callback_on_step_end=move)
    other = reference_of(pipe)
    layer = other.transformer.transformer_blocks[1].ff.net[2]
    same_bits(found, draw("sd3", other, 2, callback_on_step_end=move))


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_swapped_on_the_way_is_the_eager_runs(method, replayed):
    pipe, handle, eager = replayed(method)

    def swap(pipe, step, timestep, given):
        return {"prompt_embeds": given["prompt_embeds"] + 1} if step == 2 else {}

    swapping = {
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = draw("sd3", reference_of(pipe), 2, **swapping)
    for _ in range(3):
        same_bits(draw("sd3", pipe, 2, **swapping), expected)
        same_bits(draw("sd3", pipe, 2), eager[2])
    assert mode_of(handle) == "replayed"


@pytest.mark.parametrize("run", [1, 3])
def test_a_run_that_was_broken_off_leaves_nothing(run, tapes):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS["ras + cached"](pipe))
    expected = [draw("sd3", pipe, seed) for seed in range(3)]
    handle = fastdit.patch(pipe, *METHODS["ras + cached"](pipe), graphs=True)

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 2
        return {}

    for _ in range(run):
        draw("sd3", pipe, 0)
    draw("sd3", pipe, 0, callback_on_step_end=stop)
    for _ in range(2):
        for seed in range(3):
            same_bits(draw("sd3", pipe, seed), expected[seed])
    assert mode_of(handle) == "replayed"


@pytest.mark.parametrize("fails", [0, 2, 4])
@pytest.mark.parametrize("method", ["dense", "cached", "forecast"])
def test_a_failed_capture_costs_nothing_but_graphs(method, fails, tapes):
    """The run goes on eagerly, with the same bits; it is said once, and another model is not concerned."""
    pipe, other = tiny_models.pipeline("sd3"), tiny_models.pipeline("pixart-sigma")
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, *METHODS[method](pipe), graphs=True)
    tapes.fails = fails if method != "dense" else 0
    with pytest.warns(UserWarning, match="not be captured: RuntimeError: operation not") as said:
        found = [draw("sd3", pipe, 0) for _ in range(4)]
    for latents in found:
        same_bits(latents, expected)
    assert sum("could not be captured" in str(each.message) for each in said) == 1
    assert "could not be captured: RuntimeError: operation not" in handle.report().graphs
    tapes.fails = None
    fastdit.patch(other, *METHODS[method](other))
    expected = draw("pixart-sigma", other, 0)
    handle = fastdit.patch(other, *METHODS[method](other), graphs=True)
    for _ in range(4):
        same_bits(draw("pixart-sigma", other, 0), expected)
    assert mode_of(handle) == "replayed"


def hooked(pipe):
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *args: None)


def watched(pipe):
    """Such a hook sees what comes out, which is that of a replay."""
    pipe.transformer.register_forward_hook(lambda *args: None)


def trained(pipe):
    pipe.transformer.transformer_blocks[0].ff.base_layer = torch.nn.Identity()


def quantised(pipe):
    """Nobody knows what such a weight is made of, and where."""
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    weight = torch.Tensor._make_subclass(type("Quantised", (torch.Tensor,), {}), layer.weight.data)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)


WHY = {
    hooked: "hooks are on",
    quantised: "a tensor is a Quantised",
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


def test_what_has_no_program_is_eager_and_says_why(tapes):
    """RAS keeps the age of each token that is forecast."""
    pipe = tiny_models.pipeline("sd3")
    methods = [ras(), random_schedule(pipe, 3, order=1)]
    fastdit.patch(pipe, *methods)
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, *methods, graphs=True)
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert "hold a TokenNodes" in handle.report().graphs


def test_a_table_on_the_host_is_copied_once(tapes, monkeypatch):
    """Lumina's rotary table, which is complex, and made anew for each step; another size has another one."""
    monkeypatch.setattr(graphs, "lies_elsewhere", lambda tensor, device: tensor.is_complex())
    pipe = tiny_models.pipeline("lumina")
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    expected = [draw("lumina", pipe, seed) for seed in range(4)]
    fastdit.patch(pipe, Cached(Schedule.every(2)), graphs=True)
    copies = []
    for seed in range(4):
        same_bits(draw("lumina", pipe, seed), expected[seed])
        homes = {home for graph in graphs_of(pipe).values() for home in graph.hosts.values()}
        copies.append([home._version for home in homes])
    assert len(copies[-1]) == 1
    assert copies[-1] == copies[-2]
    table = next(home for graph in graphs_of(pipe).values() for home in graph.hosts.values())
    held = table.clone()
    (session,) = handle_of(pipe).last_run().patched.graphs.sessions.values()
    next(iter(session.copied.values())).mul_(2)  # as if that had been another one
    table.zero_()
    same_bits(draw("lumina", pipe, 0), expected[0])
    same_bits(table, held)


def test_the_cpu_is_not_captured():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, graphs=True)
    with pytest.warns(UserWarning, match="the transformer is on cpu"):
        draw("sd3", pipe, 0)
    assert handle.report().graphs == "since the transformer is on cpu"
    assert "CUDA graphs: since the transformer is on cpu" in str(handle.report())


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
        assert mode_of(handle_of(other)) == mode
    same_bits(draw("sd3", pipe, 2), eager[2])
    assert mode_of(handle) == "replayed"


def sibling_of(pipe):
    """Another pipeline over the same transformer, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_session_serves_one_run_at_a_time(method, replayed):
    """A run inside one of its size is eager, whatever that does with the session; and so the other way."""
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
        assert mode_of(handle) == "replayed"
        same_bits(inner[0], eager[1])
    assert modes == ["since another run of its size is in progress"] * 3
    same_bits(draw("sd3", other, 2), eager[2])
    assert mode_of(handle) == "replayed"


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
        assert mode_of(handle) == "replayed"
    assert [mode.partition(",")[0] for mode in modes] == MODES[:3]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_threads_with_graphs_have_the_bits_of_eager_runs(workers, replayed):
    pipe, _, eager = replayed()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(lambda s: draw("sd3", sibling_of(pipe), s), i % 3) for i in range(16)]
    for i, job in enumerate(jobs):
        same_bits(job.result(), eager[i % 3])


def test_a_loop_written_by_hand(tapes):
    model = tiny_models.transformer("sd3")
    bits = Schedule.from_bits(*random_bits(model, STEPS, 3))
    eager = [loop(model, fastdit.patch(model, Cached(bits)), seed) for seed in range(4)]
    handle = fastdit.patch(model, Cached(bits), graphs=True)
    found = []
    for seed, mode in enumerate(MODES):
        found.append(loop(model, handle, seed))
        assert mode_of(handle) == mode
    for seed in range(4):  # a later run does not write into what an earlier one gave
        same_bits(torch.stack(found[seed]), torch.stack(eager[seed]))


def test_autocast_that_begins_inside_a_run_leaves_it(tapes):
    model = tiny_models.transformer("sd3")
    method = Cached(Schedule.every(2))
    eager = loop(model, fastdit.patch(model, method), 0, autocast_from=3)
    handle = fastdit.patch(model, method, graphs=True)
    for _ in range(3):
        loop(model, handle, 0)
    found = loop(model, handle, 0, autocast_from=3)
    assert mode_of(handle) == "replayed"
    assert handle.last_run().trace.replayed == 2
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
        same_bits(mine, wanted)


def test_a_loop_that_is_given_up_gives_its_session_back(tapes):
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = tiny_models.pipeline("sd3", scheduler=scheduler)
    handle = fastdit.patch(pipe, graphs=True)
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
    assert "since another run of its size is in progress" not in modes
    eager = draw("sd3", reference_of(pipe), 1)
    for mode in (*MODES[2:3], "replayed"):
        same_bits(draw("sd3", pipe, 1), eager)
        assert mode_of(handle) == mode
