"""RAS by the change of velocities: the rule over whole runs against a restatement in fp64, and its edges."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

import fastdit
import ralu_oracle
import tiny_models
from contract import distance, within_contract
from fastdit import RAS, ArgumentError
from fastdit.methods.ras import PRESETS
from fastdit.schedules.plan import RunPlan
from ras_oracle import RowOracle, by_change
from test_ralu import SHORT, SIZE, as_picture, start_of
from test_ras import NO_GPU, TOKENS, calls_per_step, noise_of, observed_run, single_run
from tiny_models import arguments, generate

STEPS, START, RESETS = 14, 4, (8,)
SETTINGS = {"metric": "change", "start": START, "resets": RESETS, "align": 1}


def restated(pipe, name, calls=None, **options):
    """(latents, rows of each step) of a stock run with the rule restated."""
    rule = {"packed": name.startswith("flux")} | options.pop("rule", {})
    steps = options.pop("run_steps", STEPS)
    choose = by_change(0.5, steps, START, RESETS, **rule)
    with RowOracle(pipe, choose, None, calls or calls_per_step(name)).installed() as truth:
        latents = generate(pipe, name, **options)
    return latents, truth.history


def assert_same_choice(history, expected):
    assert list(history) == list(expected)
    assert len(history) >= 5
    for step, rows in history.items():
        assert rows.tolist() == expected[step].tolist(), step
    # Neither a fixed set of tokens, nor the same for all images.
    assert len({tuple(rows[0].tolist()) for rows in history.values()}) > 2


@pytest.mark.diffusers
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux", "flux-dev", "pixart-sigma"])
def test_the_rule_over_a_whole_run(name, batch):
    """With guidance, of a picture that is not square, token set by token set."""
    pipe = tiny_models.pipeline(name, torch.float64)
    expected, rows = restated(pipe, name, batch=batch, steps=STEPS)
    for backend in ("reference", None):
        found, history = observed_run(
            pipe, name, RAS(**SETTINGS), backend, batch=batch, steps=STEPS
        )
        assert_same_choice(history, rows)
        assert distance(found, expected) <= 1e-9


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_without_guidance_and_square(name):
    pipe = tiny_models.pipeline(name, torch.float64)
    given = {"steps": STEPS, "cfg": False, "height": 16, "width": 16}
    expected, rows = restated(pipe, name, calls=1, **given)
    found, history = observed_run(pipe, name, RAS(**SETTINGS), **given)
    assert_same_choice(history, rows)
    assert distance(found, expected) <= 1e-9


@pytest.mark.parametrize("max_age", [1, 2])
def test_no_token_is_left_out_for_longer_than_max_age(max_age):
    pipe = tiny_models.pipeline("sd3", torch.float64)
    expected, rows = restated(pipe, "sd3", steps=STEPS, rule={"max_age": max_age})
    method = RAS(**SETTINGS, max_age=max_age)
    found, history = observed_run(pipe, "sd3", method, steps=STEPS)
    assert_same_choice(history, rows)
    assert distance(found, expected) <= 1e-9
    _, unbounded = observed_run(pipe, "sd3", RAS(**SETTINGS), steps=STEPS)
    assert any(unbounded[step].tolist() != history[step].tolist() for step in history)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sd3", FlowMatchHeunDiscreteScheduler), ("pixart-sigma", HeunDiscreteScheduler)],
)
def test_solvers_that_compute_twice_at_a_sigma(name, scheduler):
    """Tokens computed in the first call are as good as known in the second."""
    pipe = tiny_models.pipeline(name, torch.float64)
    pipe.scheduler = scheduler()
    calls = 2 * STEPS - 1
    expected, rows = restated(pipe, name, steps=STEPS, run_steps=calls)
    found, history = observed_run(pipe, name, RAS(**SETTINGS), steps=STEPS)
    assert_same_choice(history, rows)
    assert distance(found, expected) <= 1e-9
    sigmas = pipe.scheduler.sigmas
    twice = [step for step in history if step - 1 in history and sigmas[step] == sigmas[step - 1]]
    assert twice
    for step in twice:
        assert not set(history[step][0].tolist()) & set(history[step - 1][0].tolist())


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart-sigma"])
def test_a_batch_is_its_single_runs(name):
    pipe, method = tiny_models.pipeline(name, torch.float64), RAS(**SETTINGS | {"resets": (5,)})
    method = dataclasses.replace(method, start=2)
    whole, history = observed_run(pipe, name, method, batch=4, steps=6, latents=noise_of(name, 4))
    assert not torch.equal(history[2][0], history[2][1])
    for i in range(4):
        single, alone = single_run(pipe, name, method, i, noise_of(name, 4)[i : i + 1])
        for step, rows in alone.items():
            assert rows[0].tolist() == history[step][i].tolist()
        assert distance(single[0], whole[i]) <= 1e-9


@pytest.mark.diffusers
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_after_a_run_in_stages_it_begins_at_full_size(name):
    batch = 2
    stages, steps = dataclasses.replace(SHORT, steps=(2, 2, 7)), 11
    pipe = tiny_models.pipeline(name, torch.float64)
    noise, latents = start_of(name, batch)
    given = arguments(name, batch, steps, dtype=torch.float64, latents=latents, **SIZE)
    ras = RAS(0.5, metric="change", start=2, resets=(5,), align=1)
    handle = fastdit.patch(pipe, stages, ras)
    found = as_picture(name, pipe(**given).images)
    history = handle.last_run().selection.history
    handle.unpatch()
    rules = [by_change(0.5, 7, 2, (5,), packed=name == "flux") for _ in range(batch)]
    seen = {}

    def choose(b, step, velocity, sigmas):
        rows = rules[b](step, velocity, sigmas)
        if rows is not None:
            seen[step + 1, b] = rows[0].tolist()
        return rows

    with torch.no_grad():
        expected = ralu_oracle.run(pipe, stages, noise, given, None, choose)
    chosen = {(step, b): rows[b].tolist() for step, rows in history.items() for b in range(batch)}
    assert chosen == seen
    assert sorted(history) == [2, 3, 4, 6]
    within_contract(found, expected)


@pytest.mark.parametrize("name", ["sd3-img2img", "flux-img2img"])
def test_image_to_image_has_the_sigmas_of_its_own_steps(name):
    """Of ten steps, strength 0.6 executes the last six."""
    pipe = tiny_models.pipeline(name, torch.float64)
    rule = by_change(0.5, 6, 2, (4,), packed=name.startswith("flux"))

    def choose(step, velocity, sigmas):
        return rule(step, velocity, sigmas[4:])

    calls = calls_per_step(name.removesuffix("-img2img"))
    with RowOracle(pipe, choose, None, calls).installed() as truth:
        expected = generate(pipe, name, steps=10)
    method = RAS(metric="change", start=2, resets=(4,), align=1)
    found, history = observed_run(pipe, name, method, steps=10)
    assert sorted(history) == sorted(truth.history) == [2, 3, 5]
    for step, rows in history.items():
        assert rows.tolist() == truth.history[step].tolist(), step
    assert distance(found, expected) <= 1e-9


# --- the rule without a model


def token_run(method, steps, tokens, sigmas=None):
    """The choice of tokens in a run without a model, and what ends a step of it."""
    run = SimpleNamespace(patched=SimpleNamespace(ops=fastdit.ops.bind("reference")), steps=steps)
    run.first, run.step, run.resolution, run.plan_partial = 0, 0, None, lambda _: None
    run.sigmas, run.plan = sigmas or [], RunPlan(steps, None, ())
    made = method.begin(run)
    made.lay_out(tokens, NO_GPU)

    def observe(values):
        """Velocities [tokens] of single pixels; the rows that were chosen."""
        velocity = torch.as_tensor(values, dtype=torch.float32).view(1, 1, tokens, 1, 1, 1)
        made.observe(run.step, velocity, None)
        run.step += 1
        return None if made.active is None else made.active[0].tolist()

    return made, observe


def test_a_token_that_changes_fast_is_computed_more_often():
    """Token i changes by i each step; one of four is computed, the one that is off the most."""
    method = RAS(ratio=0.25, metric="change", start=2, resets=(), align=1)
    _, observe = token_run(method, 14, 4)
    observe([0.0, 0.0, 0.0, 0.0])
    rows, held, counts = None, [0.0] * 4, [0] * 4
    for step in range(1, 13):
        fresh = [float(i * step) for i in range(4)]
        held = [new if rows is None or i in rows else held[i] for i, new in enumerate(fresh)]
        rows = observe(held)
        counts[rows[0]] += 1
    # Those with a rate take turns in proportion to it; the one that never changes is left out.
    assert counts == [0, 2, 4, 6]


def test_sigmas_of_the_run_weigh_the_changes():
    """Steps of unlike length: the same change over a tenth of the distance is ten times the rate."""
    sigmas = [1.0, 0.9, 0.89, 0.5, 0.4]
    method = RAS(ratio=0.5, metric="change", start=2, resets=(), align=1)
    _, observe = token_run(method, 5, 2, sigmas)
    assert observe([0.0, 0.0]) is None
    assert observe([1.0, 0.9]) == [0]  # rates 10 and 9, both are 0.01 old
    # Token 0 has changed by 0.02 in 0.01: rate 2, 0.39 old, 0.78; token 1: rate 9, 0.4 old, 3.6.
    assert observe([1.02, 0.9]) == [1]


def test_tokens_without_two_values_come_first():
    """After one dense step nothing is known of any: half, then the other half, then by change."""
    method = RAS(ratio=0.5, metric="change", start=1, resets=(), align=1)
    _, observe = token_run(method, 6, 4)
    assert observe([0.0, 0.0, 0.0, 0.0]) == [2, 3]
    assert observe([0.0, 0.0, 5.0, 1.0]) == [0, 1]
    assert observe([5.0, 1.0, 5.0, 1.0]) == [0, 2]  # 2.5 x 1 and 0.5 x 1; 5 x 2 and 1 x 2


def test_a_velocity_that_is_no_number_is_computed_again():
    method = RAS(ratio=0.25, metric="change", start=2, resets=(), align=1)
    _, observe = token_run(method, 8, 4)
    observe([0.0, 0.0, 0.0, 0.0])
    assert observe([float("nan"), 9.0, 1.0, 1.0]) == [0]
    assert observe([1.0, 9.0, 1.0, 1.0]) == [0]  # its last value is none
    assert observe([1.1, 9.0, 1.0, 1.0]) == [1]


def test_it_forgets_a_run_and_its_dense_end():
    method = RAS(ratio=0.5, metric="change", start=2, resets=(3, 4), align=1)
    made, observe = token_run(method, 5, 4)
    observe([0.0] * 4)
    assert observe([1.0, 2.0, 3.0, 4.0]) == [2, 3]
    kept = made.kept
    observe([1.0, 2.0, 9.0, 9.0])  # nothing is left out any more
    assert kept.sigma.tolist() == [[1.0] * 4]
    made.end()
    assert made.kept is made.inverse is None


def test_a_loop_without_a_scheduler_has_its_timesteps():
    """Velocities that the user tells, at timesteps of unlike distances."""
    model = tiny_models.transformer("sd3", torch.float64)
    given = tiny_models.call("sd3", 1, torch.float64)
    method = RAS(**SETTINGS | {"resets": ()})
    timesteps = [1000.0, 900.0, 890.0, 700.0, 650.0, 400.0, 100.0]
    handle = fastdit.patch(model, method)
    rule = by_change(0.5, len(timesteps), START, ())
    chosen = {}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad(), handle.run(timesteps):
        velocity = None
        for step in range(len(timesteps)):
            model(**given)
            fresh = torch.randn(given["hidden_states"].shape, generator=draw, dtype=torch.float64)
            if step in chosen:
                mask = torch.zeros(1, TOKENS).scatter(1, chosen[step], 1).view(1, 1, 4, 8)
                mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3) > 0
                fresh = torch.where(mask, fresh, velocity)
            velocity = fresh
            run = handle.last_run()
            handle.advance(velocity)
            rows = rule(step, velocity, timesteps)
            if rows is not None:
                chosen[step + 1] = rows
    history = run.selection.history
    assert sorted(history) == [4, 5, 6]
    for step, rows in history.items():
        assert rows.tolist() == chosen[step].tolist()


# --- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"high_ratio": 1.0}, 'high_ratio must be None with metric="change", .* got 1.0'),
        ({"starvation": 0.1}, 'starvation must be None with metric="change", .* got 0.1'),
        ({"mode": "parity"}, 'metric must be "std" or "l2norm" with mode="parity"'),
        ({"metric": "changes"}, "metric must be one of std, l2norm, change, None, got 'changes'"),
    ],
)
def test_what_makes_no_sense_beside_it_is_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        RAS(**{"metric": "change"} | given)


def test_a_preset_can_take_it():
    with pytest.raises(ArgumentError, match="high_ratio must be None"):
        RAS.preset("sd3", metric="change")
    assert RAS.preset("sd3", metric="change", high_ratio=None).family == "sd3"
    assert RAS(metric="std").active(28, 4096)[4].high == 2048


def test_it_is_the_corrected_modes_own():
    assert RAS().rule == "change"
    assert RAS().active(28, 4096)[4].high == 0
    assert RAS(mode="parity").rule == "std"
    assert dataclasses.replace(RAS(), mode="parity").active(28, 4096)[4].high == 2048
    assert all(preset.rule == "std" for preset in PRESETS.values())
    with pytest.raises(ArgumentError, match=r'the default of mode="corrected", got 0\.3'):
        RAS(high_ratio=0.3)


def test_gradients_are_refused():
    model = tiny_models.transformer("sd3")
    handle = fastdit.patch(model, RAS(metric="change", start=1, align=1, resets=()))
    given = tiny_models.call("sd3", 1, torch.float32)
    given["hidden_states"] = given["hidden_states"].clone().requires_grad_()
    with pytest.raises(ArgumentError, match="no gradient"), handle.run([900.0, 700.0]):
        model(**given)
