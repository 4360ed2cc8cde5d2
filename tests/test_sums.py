"""PixArt's reused outputs kept as sums: equal to the hook-based cache, never more bytes, predicted to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdit
import tiny_models
from bench_ecad import reachable_bytes
from contract import FORWARD_FP64, distance, within_contract
from fastdit import ECAD, RAS, ArgumentError, Cached, Schedule
from fastdit.schedules.collapse import find_sums, passes
from oracle import Oracle
from test_cached import as_double
from tiny_models import sample

PARTS = ("attn1", "attn2", "ff")
KIND = "transformer_blocks"


def banded(seed, steps, blocks):
    """Random bits that often agree from block to block and step to step, as searched schedules do."""
    draw = np.random.default_rng(seed)
    bits = np.zeros((steps, blocks, 3), dtype=bool)
    for step in range(1, steps):
        first, last = sorted(draw.integers(0, blocks + 1, 2))
        kind = draw.random()
        if kind < 0.4:  # some blocks, of them most components
            bits[step, first:last] = draw.random((last - first, 3)) < 0.8
        elif kind < 0.5:  # single components anywhere
            bits[step] = draw.random((blocks, 3)) < 0.1
        elif kind < 0.6:
            bits[step] = True
    bits[0] = True
    return bits


# ---- the plan, by its definition


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 24), st.integers(1, 28))
def test_sums_are_allowed_and_pay(seed, steps, blocks):
    bits = banded(seed, steps, blocks).reshape(steps, -1)
    slots = [(index // 3, PARTS[index % 3]) for index in range(bits.shape[1])]
    plan = find_sums(bits, slots)
    assert [step.step for step in plan] == list(range(steps))
    found = {s for step in plan for s in step.made.values()}
    for s in found:
        places = [slots.index(slot) for slot in s.slots]
        assert places == sorted(places)
        life = bits[s.made + 1 : s.last + 1]
        between = life[:, places[0] : places[-1] + 1]
        assert len(life) > 1
        assert not between.any()  # reused in one run of each of its steps
        ends = s.last + 1
        assert ends == steps or bits[ends, places].all()  # so nobody wants the outputs again
        assert len(life) * (len(places) - 3) > passes(len(places))  # reads spared against made
        assert all(plan[s.made].made[slot] is s for slot in s.slots)
    for number, step in enumerate(plan):
        assert set().union(*step.used.values()) == {s for s in found if s.made < number <= s.last}
        kept = {s for s in found if s.made <= number < s.last}
        assert set(step.kept) == kept
        holding = [slot for s in kept for slot in s.slots]
        assert len(holding) == len(set(holding))  # a slot is in one sum at a time
        assert 3 * len(kept) < len(holding) or not kept  # and memory never grows


@pytest.mark.parametrize(("n", "uses"), [(2, 1), (3, 2), (5, 4)])
def test_every_collapses_whole_steps_that_are_used_more_than_once(n, uses):
    computes = np.broadcast_to((np.arange(10 * n) % n == 0)[:, None], (10 * n, 84))
    plan = find_sums(computes, [(i // 3, PARTS[i % 3]) for i in range(84)])
    found = {s for step in plan for s in step.made.values()}
    assert {(len(s.slots), s.last - s.made) for s in found} == ({(84, uses)} if uses > 1 else set())
    assert {s.made % n for s in found} <= {0}


# ---- whole models


def model_of(blocks, dtype):
    return tiny_models.randomise(tiny_models.pixart(sigma=True, layers=blocks)).to(dtype)


def calls(steps, batch, dtype, height=8, width=16):
    return [
        tiny_models.call("pixart-sigma", batch, dtype, height, width, step) for step in range(steps)
    ]


def expected_of(model, bits, inputs):
    with torch.no_grad(), Oracle(model, {KIND: bits}).installed():
        return [sample(model(**given)) for given in inputs]


def prompt(blocks):
    """Tokens' worth of what is kept of a prompt of 5: itself, and its keys and values of each block."""
    return 5 * (1 + 2 * blocks)


def ran(handle, model, inputs, seen=None, sigmas=None):
    with torch.no_grad(), handle.run(range(len(inputs)) if sigmas is None else sigmas):
        for given in inputs:
            yield sample(model(**given))
            if seen is not None:
                seen.append(reachable_bytes(handle))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(4, 9),
    blocks=st.sampled_from([2, 5, 13]),
    batch=st.integers(1, 3),
    size=st.sampled_from([(8, 8), (8, 16), (12, 4)]),
)
def test_sums_equal_the_cache_and_their_bytes_are_as_predicted(seed, steps, blocks, batch, size):
    bits = banded(seed, steps, blocks)
    model = model_of(blocks, torch.float64)
    inputs = calls(steps, batch, torch.float64, *size)
    expected = expected_of(model, bits, inputs)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, PARTS)))
    seen = []
    for actual, wanted in zip(ran(handle, model, inputs, seen), expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64
    said = handle.explain(
        steps=steps, batch=batch, cfg=False, height=8 * size[0], width=8 * size[1], text_tokens=5
    )
    assert max(seen) == said.cache_bytes == handle.report().peak_cache_bytes
    tokens = size[0] * size[1] // 4
    one_by_one = max(int((~later).sum()) for later in bits[1:]) * tokens + prompt(blocks)
    assert said.cache_bytes <= one_by_one * batch * model.inner_dim * 8


def test_sums_take_the_place_of_outputs():
    """Four blocks reused three times: 12 outputs become 3 and two vectors."""
    model, inputs = model_of(4, torch.float32), calls(4, 2, torch.float32)
    handle = fastdit.patch(model, Cached(Schedule.every(4)))
    said = handle.explain(steps=4, batch=2, cfg=False, height=64, width=128, text_tokens=5)
    assert said.collapse == "1 times 12 outputs are kept as 3 sums"
    x, text = 2 * 32 * model.inner_dim * 4, 2 * prompt(4) * model.inner_dim * 4
    assert said.cache_bytes == 3 * x + 2 * 2 * model.inner_dim * 4 + text
    seen = []
    list(ran(handle, model, inputs, seen))
    assert max(seen) == said.cache_bytes
    assert seen[-1] == text  # the prompt
    # one read and one write of the stream in each reused step, and the sums made once
    assert said.residual_bytes == 12 * x + 2 * 12 * x + 15 * x + 3 * (3 * x + 2 * x)


@pytest.mark.parametrize("blocks", [11, 13, 22])
def test_more_outputs_than_a_chunk(blocks):
    bits = np.zeros((4, blocks, 3), dtype=bool)
    model, inputs = model_of(blocks, torch.float64), calls(4, 1, torch.float64)
    expected = expected_of(model, bits, inputs)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, PARTS)))
    assert f"1 times {3 * blocks} outputs" in handle.explain(steps=4).collapse
    for actual, wanted in zip(ran(handle, model, inputs), expected, strict=True):
        assert distance(actual, wanted) <= FORWARD_FP64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_sums_err_at_most_twice_as_much_as_the_cache(dtype, seed):
    bits = banded(40 + seed, 8, 13)
    bits[3:6] = False
    model, inputs = model_of(13, dtype), calls(8, 2, dtype)
    expected = expected_of(model, bits, inputs)
    truth = expected_of(model_of(13, dtype).double(), bits, [as_double(g) for g in inputs])
    handle = fastdit.patch(model, ECAD(Schedule.from_bits(bits, PARTS)))
    assert "3 sums" in handle.explain(text_tokens=5).collapse
    actual = list(ran(handle, model, inputs))
    within_contract(torch.cat(actual), torch.cat(expected), torch.cat(truth))


def test_large_shared_gates_do_not_cancel():
    """Tables that all but undo the shared part: sums weighted by the tables alone would lose the difference."""
    dtype = torch.bfloat16
    model, inputs = model_of(6, dtype), calls(4, 1, dtype)
    with torch.no_grad():
        model.adaln_single.linear.bias += 50
        for block in model.transformer_blocks:
            block.scale_shift_table -= 50
    bits = np.zeros((4, 6, 3), dtype=bool)
    expected = expected_of(model, bits, inputs)
    truth_model = model_of(6, dtype).double()
    truth_model.load_state_dict(model.state_dict())
    truth = expected_of(truth_model, bits, [as_double(given) for given in inputs])
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, PARTS)))
    actual = list(ran(handle, model, inputs))
    within_contract(torch.cat(actual), torch.cat(expected), torch.cat(truth))


def test_a_lower_precision_halves_sums_too():
    model, inputs = model_of(4, torch.float32), calls(5, 1, torch.float32)
    handle = fastdit.patch(model, ECAD(Schedule.from_bits(np.zeros((5, 4, 3), bool), PARTS)))
    exact = list(ran(handle, model, inputs))
    method = ECAD(Schedule.from_bits(np.zeros((5, 4, 3), bool), PARTS), cache_dtype="bfloat16")
    handle = fastdit.patch(model, method)
    seen = []
    for actual, wanted in zip(ran(handle, model, inputs, seen), exact, strict=True):
        assert 0 <= distance(actual, wanted) < 0.01
    said = handle.explain(steps=5, cfg=False, height=64, width=128, text_tokens=5)
    x, others = 32 * model.inner_dim * 2, (2 + prompt(4)) * model.inner_dim * 4
    assert max(seen) == said.cache_bytes == 3 * x + others


# ---- off, and changes within a run


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("reference", "off on the reference backend"),
        ("hook", "off: hooks look at blocks"),
        ("rows", "off: steps compute a part of the tokens"),
        ("once", "none: no run of reused outputs stays long enough to pay"),
    ],
)
def test_where_sums_are_off(change, reason):
    model, inputs = model_of(4, torch.float64), calls(6, 1, torch.float64)
    n = 2 if change == "once" else 3
    methods = [Cached(Schedule.every(n))] + (
        [RAS(0.5, start=2, align=1)] if change == "rows" else []
    )
    if change == "hook":
        model.transformer_blocks[2].register_forward_hook(lambda *_: None)
    handle = fastdit.patch(model, *methods, backend="reference" if change == "reference" else None)
    said = handle.explain(steps=6, cfg=False, height=64, width=128, text_tokens=5)
    assert said.collapse == reason
    assert reason in str(said)
    seen = []
    list(ran(handle, model, inputs, seen))
    x = 32 * model.inner_dim * 8
    text = 0 if change == "reference" else prompt(4) * model.inner_dim * 8
    assert max(seen) == 12 * x + text
    if change != "rows":  # whose keys are counted too
        assert said.cache_bytes == max(seen)


def test_there_are_none_in_fp16():
    handle = fastdit.patch(model_of(4, torch.float16), Cached(Schedule.every(3)))
    assert handle.explain(steps=6).collapse == "off: sums may leave the range of fp16"


def test_families_with_gates_of_their_own_say_nothing():
    handle = fastdit.patch(tiny_models.transformer("sd3"), Cached(Schedule.every(3)))
    assert handle.explain(steps=6).collapse == ""


def change_inputs(inputs, what, at):
    """From a step on another batch, or another text."""
    text = inputs[0]["encoder_hidden_states"] + 1
    for step in range(at, len(inputs)):
        if what == "batch":
            inputs[step] = tiny_models.call("pixart-sigma", 1, torch.float64, step=step)
        elif what == "text":
            inputs[step]["encoder_hidden_states"] = text


def check_through_change(handle, model, inputs, expected, sigmas, what, at):
    """Each step of a run, of which one brings a hook, or gradients from then on."""
    with torch.no_grad(), handle.run(sigmas):
        for step, (given, wanted) in enumerate(zip(inputs, expected, strict=True)):
            if what == "hook" and step == at:
                model.transformer_blocks[1].register_forward_hook(lambda *_: None)
            with torch.set_grad_enabled(what == "grad" and step >= at):
                actual = sample(model(**given)).detach()
            assert distance(actual, wanted) <= FORWARD_FP64, step


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("what", ["batch", "text", "grad", "hook"])
def test_changes_within_a_run(what, at):
    """Another batch, another text, and what makes sums come or go: the step computes, and the next ones reuse that."""
    model, inputs = model_of(4, torch.float64), calls(5, 2, torch.float64)
    change_inputs(inputs, what, at)
    anew = np.zeros((5, 4, 3), dtype=bool)
    anew[at] = True
    expected = expected_of(model, anew, inputs)
    bits = np.zeros((5, 4, 3), dtype=bool)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, PARTS)))
    check_through_change(handle, model, inputs, expected, range(5), what, at)


def test_a_cap_holds_for_sums():
    model, inputs = model_of(4, torch.float32), calls(4, 2, torch.float32)
    x = 2 * 32 * model.inner_dim * 4
    others = 2 * (2 + 5) * model.inner_dim * 4  # vectors of the gates, and the prompt
    needed = 3 * x + others
    schedule = Schedule.from_bits(np.zeros((4, 4, 3), dtype=bool), PARTS)
    handle = fastdit.patch(model, ECAD(schedule, max_cache_bytes=needed))
    assert len(list(ran(handle, model, inputs))) == 4
    handle = fastdit.patch(model, ECAD(schedule, max_cache_bytes=needed - 1))
    with pytest.raises(ArgumentError, match=f"need {needed} bytes"):
        list(ran(handle, model, inputs))
    model.transformer_blocks[0].register_forward_hook(lambda *_: None)  # one by one, then
    handle = fastdit.patch(model, ECAD(schedule, max_cache_bytes=needed))
    with pytest.raises(ArgumentError, match=f"need {12 * x + 2 * 5 * model.inner_dim * 4} bytes"):
        list(ran(handle, model, inputs))
