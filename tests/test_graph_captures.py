"""Captures: how many there are, what they may not do, and that faults in what they read and write are noticed."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdit
import tiny_models
from contract import same_bits
from fastdit import ECAD, RAS, Cached, Dense, HarmoniCa, Schedule
from fastdit.account import pace
from fastdit.account.cost import Cost
from fastdit.adapters import find_adapter
from fastdit.programs import library
from fastdit.runtime import arena, graphs
from fastdit.schedules.plan import RunPlan, plan_run
from fastdit.tiny import load_pipeline
from oracle import random_bits
from replays import (
    CALLS,
    CASES,
    METHODS,
    STEPS,
    draw,
    graphs_of,
    loop,
    mode_of,
    tapes,
)
from tape import Tapes, ops_seen
from test_explain import sizes

__all__ = ["tapes"]

# ---- planted faults


WAITS = {
    "a host tensor": lambda: torch.tensor([1.0]),
    "a value that is read": lambda: torch.ones(1).item(),
    "a comparison": lambda: torch.equal(torch.ones(1), torch.ones(1)),
    "indices of what is not zero": lambda: torch.ones(2).nonzero(),
}


@pytest.mark.parametrize("fault", WAITS)
def test_what_waits_for_the_device_inside_a_capture_is_refused(fault, tapes, monkeypatch):
    """Such a call has no graph; it is right all the same."""
    stock = library.write

    def write(*given):
        run, *rest = stock(*given)

        def faulty(*args, **kwargs):
            WAITS[fault]()
            return run(*args, **kwargs)

        return faulty, *rest

    monkeypatch.setattr(library, "write", write)
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS["cached"](pipe))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, *METHODS["cached"](pipe), graphs=True)
    for _ in range(2):
        same_bits(draw("sd3", pipe, 0), expected)
    assert "could not be captured: RuntimeError: operation not" in handle.report().graphs


def hasty_move(moves):
    for home, leaf in moves:
        home.copy_(leaf)


def swapped_homes(self, owner, state, stock=arena.Arena.settle):
    found = stock(self, owner, state)
    slots = state.get("slots", {})
    alike = [key for key, value in slots.items() if isinstance(value, torch.Tensor)]
    if len(alike) > 1 and slots[alike[0]].shape == slots[alike[1]].shape:
        slots[alike[0]], slots[alike[1]] = slots[alike[1]], slots[alike[0]]
    return found


FAULTS = {
    "a ring that is moved in the wrong order": ("forecast", arena, "_move", hasty_move),
    "two slots, one in the other's place": ("cached", arena.Arena, "settle", swapped_homes),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_these_tests_notice_a_slot_in_the_wrong_place(fault, tapes, monkeypatch):
    method, where, name, planted = FAULTS[fault]
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS[method](pipe))
    expected = draw("sd3", pipe, 0)
    fastdit.patch(pipe, *METHODS[method](pipe), graphs=True)
    monkeypatch.setattr(where, name, planted)
    assert any(not torch.equal(draw("sd3", pipe, 0), expected) for _ in range(4))


def test_these_tests_notice_what_is_not_copied_in(tapes):
    """The latents and the modulations; timestep and prompts are read ahead of the graph."""
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, Dense())
    expected = draw("sd3", pipe, 3)
    fastdit.patch(pipe, Dense(), graphs=True)
    for seed in range(3):
        draw("sd3", pipe, seed)
    (graph,) = graphs_of(pipe).values()
    same_bits(draw("sd3", pipe, 3), expected)
    for place in (0, -1):
        home = graph.given[place]
        graph.given[place] = home.clone()
        assert not torch.equal(draw("sd3", pipe, 3), expected), place
        graph.given[place] = home
    same_bits(draw("sd3", pipe, 3), expected)


def test_these_tests_notice_an_output_that_is_notcopied_out(tapes, monkeypatch):
    model = tiny_models.transformer("sd3")
    eager = torch.stack(loop(model, fastdit.patch(model), 0))
    handle = fastdit.patch(model, graphs=True)
    monkeypatch.setattr(graphs, "copied_out", lambda output: output)
    found = [torch.stack(loop(model, handle, 0)) for _ in range(3)]
    assert not torch.equal(found[-1], eager)


# ---- how many graphs there are


def parts(pipe, every, order):
    """Attentions compute at each step, all else at every n-th."""
    bits, names = random_bits(pipe.transformer, STEPS_COUNTED, 0)
    for kind, array in bits.items():
        array[:] = False
        array[::every] = True
        array[:, :, ["attn" in name for name in names[kind]]] = True
    return Cached(Schedule.from_bits(bits, names), order=order)


STEPS_COUNTED = 20
FEW = {
    "dense": lambda pipe: [Dense()],
    "every(2)": lambda pipe: [Cached(Schedule.every(2))],
    "every(5)": lambda pipe: [Cached(Schedule.every(5))],
    "every(3), order 1": lambda pipe: [Cached(Schedule.every(3), order=1)],
    "every(3), order 2": lambda pipe: [Cached(Schedule.every(3), order=2)],
    "parts, order 1": lambda pipe: [parts(pipe, 3, 1)],
    "parts, order 2": lambda pipe: [parts(pipe, 3, 2)],
    "ras": lambda pipe: [RAS(ratio=0.5, align=1)],
}


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart-sigma", "lumina", "qwen"])
def test_signatures_are_few(name, method, tapes):
    """Graphs of a branch, however many steps there are, none of which a third run captures."""
    if name not in tiny_models.PIPELINES:
        pytest.skip("this diffusers has none")
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, *FEW[method](pipe), graphs=True)
    for seed in range(3):
        draw(name, pipe, seed, steps=STEPS_COUNTED, height=8, width=8)
    branches = [key[0] for key in graphs_of(pipe)]
    assert max(map(branches.count, branches)) <= 6
    assert handle.last_run().trace.captured == 0
    assert len(set(branches)) == CALLS.get(name, 1)


def few_rows():
    """An ECAD schedule of single components, five rows that take turns after a step that computes."""
    kept = np.random.default_rng(0).random((6, 6, 3)) < 0.5
    kept[0] = True
    bits = kept[[0, *(1 + step % 5 for step in range(19))]]
    names = ("attn", "ff", "ff_context")
    return Cached(Schedule.from_bits({"transformer_blocks": bits}, {"transformer_blocks": names}))


PRESETS = {
    "ECAD fast": (lambda: ECAD.preset("tiny", "fast"), 28),
    "ECAD faster": (lambda: ECAD.preset("tiny", "faster"), 28),
    "ECAD fastest": (lambda: ECAD.preset("tiny", "fastest"), 28),
    "single components": (few_rows, 20),
    "HarmoniCa": (lambda: HarmoniCa.preset("tiny", strict=False), 19),
}


@pytest.mark.filterwarnings("ignore:the schedule was searched under")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_schedule_has_no_more_graphs_than_distinct_rows(preset, tapes):
    make, steps = PRESETS[preset]
    pipe = load_pipeline()
    handle = fastdit.patch(pipe, make(), graphs=True)
    for _ in range(3):
        noise = torch.Generator().manual_seed(0)
        pipe("a red circle", num_inference_steps=steps, generator=noise, output_type="latent")
    plan = handle.last_run().plan
    rows = {
        tuple(tuple(sorted((k, v & 3) for k, v in block.items())) for block in step)
        for step in plan.actions
    }
    called = [step for step in range(steps) if not plan.forecast_order(step)]
    assert len(graphs_of(pipe)) <= len(rows)
    assert len(graphs_of(pipe)) > 1 or "ECAD" in preset  # whose other steps are forecast as a whole
    assert handle.last_run().trace.replayed == len(called) - 1


def test_over_the_cap_the_rarest_signatures_stay_eager(tapes):
    pipe = tiny_models.pipeline("sd3")
    method = Cached(Schedule.every(3))
    fastdit.patch(pipe, method)
    expected = draw("sd3", pipe, 0, steps=13)
    tapes.most = 0  # one is captured before it is full
    handle = fastdit.patch(pipe, method, graphs=True)
    for _ in range(4):
        same_bits(draw("sd3", pipe, 0, steps=13), expected)
    trace = handle.last_run().trace
    assert len(graphs_of(pipe)) == 1
    assert (trace.calls, trace.replayed) == (13, 8)  # the steps that reuse


@pytest.mark.parametrize("method", ["cached", "forecast", "ras + cached"])
@pytest.mark.parametrize("family", ["sd3", "flux", "pixart-sigma"])
def test_explain_says_what_stays(family, method, tapes):
    model = tiny_models.transformer(family)
    chosen = METHODS[method](type("Pipe", (), {"transformer": model}))
    handle = fastdit.patch(model, *chosen, graphs=True)
    predicted = handle.explain(steps=STEPS, **sizes(family, 2, 8, 16)).cache_bytes
    for _ in range(3):
        with torch.no_grad(), handle.run(range(STEPS)):
            for step in range(STEPS):
                model(**tiny_models.call(family, 2, step=step))
    (session,) = handle.last_run().patched.graphs.sessions.values()
    assert handle.report().peak_cache_bytes == session.kept.nbytes == predicted > 0


def test_the_bound_on_caches_wins(tapes):
    """Where slots that stay need more than slots that go, what may be kept decides."""
    pipe = tiny_models.pipeline("sd3")
    method = METHODS["cached"](pipe)[0]
    stays = fastdit.patch(pipe, method, graphs=True)
    for _ in range(2):
        expected = draw("sd3", pipe, 0)
    needed = stays.report().peak_cache_bytes
    bounded = Cached(method.source, max_cache_bytes=needed)
    handle = fastdit.patch(pipe, bounded, graphs=True)
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert mode_of(handle) == "replayed"
    fastdit.patch(pipe, Cached(method.source, max_cache_bytes=needed - 1), graphs=True)
    with pytest.raises(fastdit.ArgumentError, match="max_cache_bytes"):
        draw("sd3", pipe, 0)


def test_what_does_not_fit_where_it_stays_is_eager(tapes, monkeypatch):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, *METHODS["cached"](pipe))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, *METHODS["cached"](pipe), graphs=True)
    monkeypatch.setattr(graphs, "Arena", lambda most=None: arena.Arena(1000))
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert "need more than 1000 bytes" in handle.report().graphs


# ---- on the meta device


class OnMeta(Tapes):
    """Each capture is first run on tensors that hold nothing."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def __call__(self, compute, device):
        nothing = FakeTensorMode(allow_non_fake_inputs=True)
        with nothing, patch.object(arena.Arena, "settle", lambda *given: frozenset()):
            compute()
        self.ran += 1
        return super().__call__(compute, device)


@pytest.mark.parametrize(("name", "method"), [c for c in CASES if "img2img" not in c[0]])
def test_no_capture_needs_a_value(name, method, monkeypatch):
    made = OnMeta()
    members = {"__new__": lambda cls: made, "serves": staticmethod(lambda device: True)}
    monkeypatch.setattr("fastdit.runtime.capture.CudaCapture", type("Stand", (), members))
    pipe = tiny_models.pipeline(name)
    with ops_seen():
        handle = fastdit.patch(pipe, *METHODS[method](pipe), graphs=True)
        for _ in range(2):
            draw(name, pipe, 0)
    assert made.ran == len(graphs_of(pipe)) > 0
    assert handle.last_run().trace.ended is None


# ---- graphs="auto"


@pytest.fixture
def gpu(tapes, monkeypatch):
    """The CPU is taken for a GPU of some pace."""

    def paced(macs, bytes_):
        found = pace.Pace(macs, bytes_)
        monkeypatch.setattr("fastdit.account.explain.pace_of", lambda device: found)

    return paced


def test_auto_replays_where_the_device_waits_for_the_host(gpu):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), graphs="auto")
    gpu(1e15, 1e15)
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert mode_of(handle) == "replayed"
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), graphs="auto")
    gpu(1e6, 1e6)  # so slow that it never waits
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert handle.report().graphs == "since the GPU takes longer than the host at every step"
    assert not graphs_of(pipe)


def test_auto_on_the_cpu_is_eager_and_says_so(recwarn):
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, Dense(), graphs="auto")
    draw("sd3", pipe, 0)
    assert handle.report().graphs == "since the transformer is on cpu"
    assert "graphs    off: the model is on cpu" in str(handle.explain())
    assert not [each for each in recwarn if "eager" in str(each.message)]
    assert "graphs" not in str(fastdit.patch(pipe, Dense()).explain())


def test_the_rule_counts_each_step():
    """A reused step is of few launches and no products; one that computes, of many."""
    model = tiny_models.transformer("sd3")
    spec = find_adapter(model).spec(model)
    plan = plan_run([Cached(Schedule.every(2))], spec, 6)
    count = dataclasses.replace(Cost.of(model, 32, 5), itemsize=2)
    components = len(count.components)
    beside = pace.LAUNCHES_BESIDE * pace.LAUNCH_SECONDS
    whole = beside + components * pace.LAUNCHES * pace.LAUNCH_SECONDS
    dense = RunPlan(1, None, ())
    macs, reused = count.macs(dense), count.macs(plan.part(1, 2))
    assert 0 < reused < macs
    stages = [(count, plan, ())]

    def waits(seconds):
        """Where all the products of a step that computes take so long, and residuals no time."""
        return pace.steps_that_wait(stages, components, pace.Pace(macs / seconds, float("inf")))

    assert waits(whole * 1.01) == (0 if reused / macs * whole > beside else 3)
    assert waits(whole * 0.99) >= 3
    assert waits(whole * 100 * macs / reused) == 0
    assert waits(beside * 0.5) == 6
