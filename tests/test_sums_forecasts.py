"""PixArt's forecasts kept as sums: equal to plain hooks, never more bytes, predicted to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdit
import tiny_models
from bench_ecad import reachable_bytes
from contract import FORWARD_FP64, distance, same_bits, within_contract
from dispatch_trace import Trace
from fastdit import Cached, Schedule
from fastdit.account.cost import Cost
from fastdit.schedules.collapse import find_sums, passes
from fastdit.schedules.plan import plan_run
from oracle import Oracle
from test_cached import as_double
from test_sums import (
    KIND,
    PARTS,
    banded,
    calls,
    change_inputs,
    check_through_change,
    model_of,
    prompt,
    ran,
)
from tiny_models import sample


def orders_like(bits, seed):
    """Random orders, most often one for all of a step, or of all."""
    draw = np.random.default_rng(seed)
    orders = np.zeros(bits.shape, dtype=int)
    orders[:] = draw.integers(0, 3)
    for step in range(len(bits)):
        kind = draw.random()
        if kind < 0.3:
            orders[step] = draw.integers(0, 3)
        elif kind < 0.4:
            orders[step, draw.integers(0, bits.shape[1]) :] = draw.integers(0, 3)
    return orders


def part_of_each_step(bits, n=4):
    """All but the first block follow every(n)."""
    bits = np.zeros_like(bits)
    bits[::n] = True
    bits[:, 0] = True
    return bits


def grid(steps):
    """Sigmas of unlike distance."""
    return np.linspace(1.0, 0.05, steps) ** 1.5


# ---- the plan, by its definition


def nodes_at(computes, step, order):
    return tuple(np.flatnonzero(computes[: step + 1])[-1 - order :])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 20), st.integers(1, 28))
def test_sums_of_forecasts_are_allowed_and_pay(seed, steps, blocks):
    bits = banded(seed, steps, blocks)
    orders = orders_like(bits, seed).reshape(steps, -1)
    bits = bits.reshape(steps, -1)
    slots = [(index // 3, PARTS[index % 3]) for index in range(bits.shape[1])]
    plan = find_sums(bits, slots, orders=orders)
    found = {s for step in plan for s in step.made.values()}
    summed = set()
    for s in found:
        places = [slots.index(slot) for slot in s.slots]
        assert places == sorted(places)
        held = [np.flatnonzero(bits[: s.made + 1, place])[-1] for place in places]
        assert not summed & {*zip(places, held, strict=True)}  # an output is in one sum at most
        summed |= {*zip(places, held, strict=True)}
        weighed = set()
        for place, node in zip(places, held, strict=True):
            reads = {
                step: nodes
                for step in range(s.made + 1, steps)
                if not bits[step, place]
                and node in (nodes := nodes_at(bits[:, place], step, orders[step, place]))
            }
            assert tuple(reads) == s.uses  # so nobody wants the output again
            weighed.add(tuple(nodes if len(nodes) > 1 else () for nodes in reads.values()))
            assert (
                bits[s.made, place]
                or len(nodes_at(bits[:, place], s.made, orders[s.made, place])) == 1
            )
        assert len(weighed) == 1
        assert not bits[list(s.uses), places[0] : places[-1] + 1].any()  # in one run of each
        assert len(s.uses) * (len(places) - 3) > passes(len(places))  # reads spared against made
        assert all(plan[s.made].newest[slot] is s for slot in s.slots)
    for number, step in enumerate(plan):
        assert set().union(*step.used.values()) == {s for s in found if number in s.uses}
        assert set(step.kept) == {s for s in found if s.made <= number < s.last}
        assert all(len(s.slots) > 3 for s in step.kept)  # memory never grows


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 4])
def test_an_output_is_summed_once_and_used_while_forecasts_are_drawn_through_it(n, order):
    bits = np.broadcast_to((np.arange(8 * n) % n == 0)[:, None], (8 * n, 81))
    orders = np.full(bits.shape, order)
    plan = find_sums(bits, [(i // 3, PARTS[i % 3]) for i in range(81)], orders=orders)
    found = sorted({s for step in plan for s in step.made.values()}, key=lambda s: s.made)
    uses = (n - 1) * (order + 1)
    if uses == 1:
        assert not found
    else:
        assert [s.made for s in found][:6] == [n * i for i in range(6)]
        assert {len(s.uses) for s in found[:6]} == {uses}
        assert {len(s.slots) for s in found} == {81}
        assert max(len(step.kept) for step in plan) == order + 1


# ---- whole models


def expected_of(model, bits, orders, inputs, sigmas):
    with (
        torch.no_grad(),
        Oracle(model, {KIND: bits}, orders={KIND: orders}, sigmas=sigmas).installed(),
    ):
        return [sample(model(**given)) for given in inputs]


def patched(model, bits, orders, **options):
    return fastdit.patch(model, Cached(Schedule.from_bits(bits, PARTS, orders=orders)), **options)


@settings(max_examples=14, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(4, 9),
    blocks=st.sampled_from([2, 5, 13]),
    batch=st.integers(1, 2),
    size=st.sampled_from([(8, 8), (8, 16), (12, 4)]),
    regular=st.booleans(),
)
def test_sums_equal_plain_hooks_and_their_bytes_are_as_predicted(
    seed, steps, blocks, batch, size, regular
):
    bits = banded(seed, steps, blocks)
    bits = part_of_each_step(bits, 2 + seed % 3) if regular else bits
    orders = orders_like(bits, seed)
    # No step is left out as a whole: then its output would be kept beside.
    bits[:, 0, 0] |= ~bits.any(axis=(1, 2))
    model, sigmas = model_of(blocks, torch.float64), grid(steps)
    inputs = calls(steps, batch, torch.float64, *size)
    expected = expected_of(model, bits, orders, inputs, sigmas)
    handle = patched(model, bits, orders)
    seen = []
    for actual, wanted in zip(ran(handle, model, inputs, seen, sigmas), expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64
    said = handle.explain(
        steps=steps, batch=batch, cfg=False, height=8 * size[0], width=8 * size[1], text_tokens=5
    )
    assert max(seen) == said.cache_bytes == handle.report().peak_cache_bytes


@pytest.mark.parametrize(
    ("dtype", "order", "seed"),
    [
        (torch.float32, 1, 0),
        (torch.float32, 2, 1),
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 1, 2),
        (torch.bfloat16, 2, 0),
        (torch.bfloat16, 2, 2),
    ],
    ids=str,
)
def test_sums_err_at_most_twice_as_much_as_the_cache(dtype, order, seed):
    bits = part_of_each_step(np.zeros((12, 13, 3), dtype=bool), 2 + seed)
    orders = np.full(bits.shape, order)
    model, inputs, sigmas = model_of(13, dtype), calls(12, 2, dtype), grid(12)
    expected = expected_of(model, bits, orders, inputs, sigmas)
    wide = [as_double(each) for each in inputs]
    truth = expected_of(model_of(13, dtype).double(), bits, orders, wide, sigmas)
    handle = patched(model, bits, orders)
    assert "36 outputs are kept as 3 sums" in handle.explain(steps=12, text_tokens=5).collapse
    actual = list(ran(handle, model, inputs, sigmas=sigmas))
    within_contract(torch.cat(actual), torch.cat(expected), torch.cat(truth))


def test_sums_take_the_place_of_outputs():
    """Five of six blocks are drawn by lines: 15 outputs of two steps each become two times 3 sums, read in one pass."""
    bits = part_of_each_step(np.zeros((12, 6, 3), dtype=bool))
    orders = np.ones(bits.shape, dtype=int)
    model, inputs = model_of(6, torch.float32), calls(12, 2, torch.float32)
    handle = patched(model, bits, orders)
    said = handle.explain(steps=12, batch=2, cfg=False, height=64, width=128, text_tokens=5)
    assert said.collapse == "3 times 15 outputs are kept as 3 sums"
    x, text = 2 * 32 * model.inner_dim * 4, 2 * prompt(6) * model.inner_dim * 4
    assert said.cache_bytes == 2 * (3 * x + 2 * 2 * model.inner_dim * 4) + text
    seen = []
    list(ran(handle, model, inputs, seen, grid(12)))
    assert max(seen) == said.cache_bytes


#: what updates the stream; of the last one the trace counts the norm's output, in place of its read of the stream
UPDATES = ("fastdit::gated_residual", "fastdit::residual_norm_modulate")


def moved(trace):
    """Bytes of token tensors that residual updates and the making of sums move."""
    kernels = (k for k in trace.kernels if k.name in (*UPDATES, "fastdit::collapse"))
    return sum(kernel.large_bytes for kernel in kernels)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("first", ["attn1", "ff"])
def test_bytes_and_launches_of_steps_are_as_planned(first, order):
    """Of a model in which one component always computes, the others at every fourth step."""
    bits = np.zeros((12, 6, 3), dtype=bool)
    bits[::4] = True
    bits[:, 0 if first == "attn1" else 5, PARTS.index(first)] = True
    orders = np.full(bits.shape, order)
    model, inputs = model_of(6, torch.float32), calls(12, 2, torch.float32, 16, 16)
    method = Cached(Schedule.from_bits(bits, PARTS, orders=orders))
    handle, count = fastdit.patch(model, method), Cost.of(model, 64, 5, 2)
    plan = plan_run([method], count.spec, 12, collapse=True)
    x = 2 * 64 * model.inner_dim * 4
    with torch.no_grad(), handle.run(grid(12)):
        for step, given in enumerate(inputs):
            with Trace(large=x // 2) as trace:
                model(**given)
            until = [count.residual_bytes(plan.part(0, end)) for end in (step, step + 1)]
            # Positions, of one image, are added to the patches before the first block, or with its residuals.
            alone = first == "attn1" or not step % 4
            positions = (5 if alone else 1) * x // 2
            assert moved(trace) == until[1] - until[0] + positions
            if step % 4:
                adding = [k for k in trace.kernels if k.name in UPDATES]
                nodes = min(order, step // 4) + 1
                if first == "attn1":  # what it gives is added with the sums, at the end
                    assert [k.large_bytes for k in adding] == [positions, (1 + 3 * nodes + 2) * x]
                else:
                    assert [k.large_bytes for k in adding] == [
                        (3 * nodes + 2) * x + positions,
                        3 * x,
                    ]


# ---- whole runs


SAMPLERS = {"dpm": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("order", [1, 2])
def test_whole_runs_equal_plain_hooks(sampler, order):
    """At the scheduler's own sigmas; the tiny pipelines' model has three blocks, of which eight components reuse."""
    pipe = tiny_models.pipeline("pixart-sigma", torch.float64, scheduler=SAMPLERS[sampler]())
    pipe.transformer = model_of(5, torch.float64)
    tiny_models.generate(pipe, "pixart-sigma", steps=9)
    bits = part_of_each_step(np.zeros((9, 5, 3), dtype=bool), 3)
    orders = np.full(bits.shape, order)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    with Oracle(pipe.transformer, {KIND: bits}, orders={KIND: orders}, sigmas=sigmas).installed():
        expected = tiny_models.generate(pipe, "pixart-sigma", batch=2, steps=9)
    schedule = Schedule.from_bits(bits, PARTS, orders=orders)
    handle = fastdit.patch(pipe, Cached(schedule))
    said = handle.explain(
        tiny_models.HEIGHT, tiny_models.WIDTH, 2, 9, text_tokens=tiny_models.TEXT, cfg=True
    )
    assert "12 outputs are kept as 3 sums" in said.collapse
    found = tiny_models.generate(pipe, "pixart-sigma", batch=2, steps=9)
    within_contract(found, expected)
    assert handle.report().peak_cache_bytes == said.cache_bytes


# ---- off, and changes within a run


def test_steps_at_one_sigma_have_no_sums_of_forecasts():
    """An output replaces the one at its sigma, so a plan does not know what is drawn through what."""
    pipe = tiny_models.pipeline("pixart-sigma", torch.float64, scheduler=HeunDiscreteScheduler())
    pipe.transformer = model_of(5, torch.float64)
    tiny_models.generate(pipe, "pixart-sigma", steps=5)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    steps = len(pipe.scheduler.timesteps)
    bits = part_of_each_step(np.zeros((steps, 5, 3), dtype=bool), 3)
    orders = np.ones(bits.shape, dtype=int)
    with Oracle(pipe.transformer, {KIND: bits}, orders={KIND: orders}, sigmas=sigmas).installed():
        expected = tiny_models.generate(pipe, "pixart-sigma", steps=5)
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, PARTS, orders=orders)))
    said = "off: steps at one sigma replace each other in forecasts"
    assert handle.explain(steps=steps).collapse == said
    within_contract(tiny_models.generate(pipe, "pixart-sigma", steps=5), expected)


def test_a_loop_that_tells_one_sigma_twice_has_none_either():
    bits = part_of_each_step(np.zeros((9, 5, 3), dtype=bool), 3)
    orders = np.ones(bits.shape, dtype=int)
    model, inputs = model_of(5, torch.float64), calls(9, 1, torch.float64)
    sigmas = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.3]
    expected = expected_of(model, bits, orders, inputs, sigmas)
    handle, seen = patched(model, bits, orders), []
    found = []
    with torch.no_grad(), handle.run(sigmas):
        for given in inputs:
            found.append(sample(model(**given)))
            seen.append(reachable_bytes(handle))
            handle.advance()
    for actual, wanted in zip(found, expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64
    tokens = inputs[0]["hidden_states"][0, 0].numel() // 4
    assert max(seen) == (2 * 12 * tokens + prompt(5)) * model.inner_dim * 8


def test_reference_adds_each_forecast_by_itself():
    bits = part_of_each_step(np.zeros((8, 5, 3), dtype=bool), 3)
    orders = np.ones(bits.shape, dtype=int)
    model, inputs = model_of(5, torch.float32), calls(8, 1, torch.float32)
    handle, seen = patched(model, bits, orders, backend="reference"), []
    found = list(ran(handle, model, inputs, seen, grid(8)))
    x = inputs[0]["hidden_states"][0, 0].numel() // 4 * model.inner_dim * 4
    assert max(seen) == 2 * 12 * x
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)  # nor with hooks
    handle = patched(model, bits, orders, backend="reference")
    for actual, wanted in zip(ran(handle, model, inputs, sigmas=grid(8)), found, strict=True):
        same_bits(actual, wanted)


@pytest.mark.parametrize("at", [2, 5, 6])
@pytest.mark.parametrize("what", ["batch", "text", "hook", "grad"])
def test_changes_within_a_run(what, at):
    """Another batch or text, and what makes sums come or go, empty the slots: the next forecasts begin anew."""
    bits = part_of_each_step(np.zeros((10, 5, 3), dtype=bool), 3)
    orders = np.full(bits.shape, 2)
    model, inputs, sigmas = model_of(5, torch.float64), calls(10, 2, torch.float64), grid(10)
    change_inputs(inputs, what, at)
    expected = []
    oracle = Oracle(model, {KIND: bits}, orders={KIND: orders}, sigmas=sigmas)
    with torch.no_grad(), oracle.installed():
        for step, given in enumerate(inputs):
            if step == at:
                oracle.drop()
            expected.append(sample(model(**given)))
    handle = patched(model, bits, orders)
    check_through_change(handle, model, inputs, expected, sigmas, what, at)


def test_a_lower_precision_halves_sums_of_forecasts_too():
    bits = part_of_each_step(np.zeros((9, 5, 3), dtype=bool), 3)
    orders = np.ones(bits.shape, dtype=int)
    model, inputs = model_of(5, torch.float32), calls(9, 1, torch.float32)
    exact = list(ran(patched(model, bits, orders), model, inputs, sigmas=grid(9)))
    method = Cached(Schedule.from_bits(bits, PARTS, orders=orders), cache_dtype="bfloat16")
    handle, seen = fastdit.patch(model, method), []
    for actual, wanted in zip(ran(handle, model, inputs, seen, grid(9)), exact, strict=True):
        assert 0 <= distance(actual, wanted) < 0.02
    said = handle.explain(steps=9, cfg=False, height=64, width=128, text_tokens=5)
    x, others = 32 * model.inner_dim * 2, (2 * 2 + prompt(5)) * model.inner_dim * 4
    assert max(seen) == said.cache_bytes == 2 * 3 * x + others
