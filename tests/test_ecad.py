"""ECAD as a method: presets, groups of components, and schedules for other numbers of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits
from fastdit import ECAD, ArgumentError, CompositionError, Schedule, ScheduleError
from fastdit.methods import ecad
from oracle import Oracle, random_bits
from tiny_models import generate, sample


def made_for(steps, name="pixart-alpha", seed=0):
    bits, names = random_bits(tiny_models.FAMILIES[name].build(), steps, seed)
    return Schedule.from_bits(bits, names)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_all_true_schedule_is_the_baseline(family):
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, 3, 0, compute=1.1)
    inputs = [tiny_models.call(family, 2, step=step) for step in range(3)]
    with torch.no_grad():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, ECAD(Schedule.from_bits(bits, names)), backend="reference")
    with torch.no_grad(), handle.run(range(3)):
        for given, wanted in zip(inputs, expected, strict=True):
            same_bits(sample(model(**given)), wanted)
    with pytest.warns(UserWarning, match="reused nothing"):
        assert handle.report().reused == 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@given(
    st.integers(0, 2**16), st.sampled_from([0.05, 0.3, 0.7]), st.integers(1, 3), st.integers(1, 6)
)
@settings(max_examples=4, deadline=None)
def test_any_schedule_equals_the_hook_based_cache(family, seed, compute, batch, steps):
    """Also where its step 0 says False, on images that are not square, run by run on the fast path."""
    model = tiny_models.transformer(family, torch.float64)
    bits, names = random_bits(model, steps, seed, compute)
    inputs = [tiny_models.call(family, batch, torch.float64, step=step) for step in range(steps)]
    with torch.no_grad(), Oracle(model, bits).installed():
        expected = [sample(model(**given)) for given in inputs]
    handle = fastdit.patch(model, ECAD(Schedule.from_bits(bits, names)))
    with torch.no_grad(), handle.run(range(steps)):
        for given, wanted in zip(inputs, expected, strict=True):
            assert distance(sample(model(**given)), wanted) <= FORWARD_FP64


def test_lumina_runs_ecads_two_components():
    """`attn` stands for both attentions and their common projection, `ff` for the feed-forward."""
    model = tiny_models.transformer("lumina")
    bits = np.random.default_rng(0).random((5, 3, 2)) < 0.4
    each = np.concatenate([bits[..., :1]] * 3 + [bits[..., 1:]], axis=-1)
    inputs = [tiny_models.call("lumina", 2, step=step) for step in range(5)]
    with torch.no_grad(), Oracle(model, {"layers": each}).installed():
        expected = [sample(model(**given)) for given in inputs]
    schedule = Schedule.from_bits({"layers": bits}, {"layers": ["attn", "ff"]})
    handle = fastdit.patch(model, ECAD(schedule), backend="reference")
    with torch.no_grad(), handle.run(range(5)):
        for given, wanted in zip(inputs, expected, strict=True):
            same_bits(sample(model(**given)), wanted)


def test_a_component_is_not_set_by_name_and_in_its_group():
    bits = {"layers": np.ones((2, 3, 2))}
    schedule = Schedule.from_bits({"layers": bits["layers"] > 0}, {"layers": ["attn", "attn2"]})
    with pytest.raises(ScheduleError, match=r"attn2.*twice"):
        fastdit.patch(tiny_models.transformer("lumina"), ECAD(schedule))


def test_arguments():
    with pytest.raises(ScheduleError, match=r"must be a Schedule, .* got int"):
        ECAD(3)
    with pytest.raises(ArgumentError, match=r"resample must be None or \"sigma\", got 'time'"):
        ECAD(made_for(4), resample="time")
    model = tiny_models.transformer("pixart-alpha")
    with pytest.raises(CompositionError, match="Cached and ECAD"):
        fastdit.patch(model, fastdit.Cached(made_for(4)), ECAD(made_for(4)))


# ---- presets


def test_a_preset_is_a_file_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    made_for(4).save(tmp_path / "toy" / "fast.json")
    monkeypatch.setattr(ecad, "PRESETS", tmp_path)
    method = ECAD.preset("toy", "fast", resample="sigma")
    assert method.source == made_for(4)
    assert method.resample == "sigma"
    for model, name in (("toy", "slow"), ("../toy", "fast"), ("toy", "../toy/fast")):
        with pytest.raises(ArgumentError, match=r"there are: toy/fast"):
            ECAD.preset(model, name)


# ---- other numbers of steps


def test_another_number_of_steps_is_refused():
    pipe = tiny_models.pipeline("pixart-alpha")
    fastdit.patch(pipe, ECAD(made_for(4)))
    with pytest.raises(ScheduleError, match="4 steps but the run has 6"):
        generate(pipe, "pixart-alpha", steps=6)
    assert generate(pipe, "pixart-alpha", steps=4).isfinite().all()


SCHEDULERS = {
    "pixart-alpha": DPMSolverMultistepScheduler,
    "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


@pytest.mark.parametrize(("made", "steps"), [(6, 4), (4, 7)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rows_follow_the_timestep(name, made, steps):
    """Each step runs the row of the nearest timestep of a stock run with the schedule's number of steps."""
    bits, names = random_bits(tiny_models.FAMILIES[name].build(), made, 5)
    for value in bits.values():
        value[0] = True  # whichever step takes that row
    stock = {}
    for count in (made, steps):
        pipe = tiny_models.pipeline(name, scheduler=SCHEDULERS[name]())
        generate(pipe, name, steps=count)
        stock[count] = pipe.scheduler.timesteps.double()
    distance = (stock[steps][:, None] - stock[made][None]).abs()
    rows = [int(row.argmin()) for row in distance]
    assert rows[0] == 0
    assert len(set(rows)) == min(made, steps)
    pipe = tiny_models.pipeline(name, scheduler=SCHEDULERS[name]())
    mapped = {kind: value[rows].copy() for kind, value in bits.items()}
    calls = 2 if name == "flux" else 1
    with Oracle(pipe.transformer, mapped, calls).installed():
        expected = generate(pipe, name, steps=steps)
    method = ECAD(Schedule.from_bits(bits, names), resample="sigma")
    handle = fastdit.patch(pipe, method, backend="reference")
    with pytest.warns(UserWarning, match=f"a schedule of {made} steps in {steps}"):
        same_bits(generate(pipe, name, steps=steps), expected)
    with pytest.warns(UserWarning, match="by timestep"):
        explanation = handle.explain(tiny_models.HEIGHT * 8, tiny_models.WIDTH * 8, steps=steps)
    assert list(explanation.resampled) == rows
    assert f"its steps {', '.join(map(str, rows))}" in str(explanation)


def test_without_a_scheduler_no_timesteps_are_known():
    handle = fastdit.patch(
        tiny_models.transformer("pixart-alpha"), ECAD(made_for(4), resample="sigma")
    )
    with pytest.raises(ScheduleError, match="no scheduler tells"), handle.run(range(6)):
        pass


def test_a_scheduler_that_calls_twice_per_step_is_refused():
    pipe = tiny_models.pipeline("sd3", scheduler=FlowMatchHeunDiscreteScheduler())
    fastdit.patch(pipe, ECAD(made_for(4, "sd3"), resample="sigma"))
    with pytest.raises(ScheduleError, match="makes 7 transformer calls of 4 steps"):
        generate(pipe, "sd3", steps=3)


def test_resampled_rows_are_steps_of_the_schedule():
    schedule = made_for(4)
    layer = schedule.resampled([3, 1, 1]).layers["transformer_blocks"].bits
    before = schedule.layers["transformer_blocks"].bits
    assert layer[0].all()
    assert (layer[1:] == before[[1, 1]]).all()
    for rows in ([], [4], [-1]):
        with pytest.raises(ScheduleError, match="steps 0 to 3"):
            schedule.resampled(rows)


# ---- the size of caches


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms()))
def test_a_cap_on_the_caches_names_the_bytes_that_a_run_needs(name):
    """As many as `explain` predicts and as the run holds at its worst; one byte less is refused, the patch stays."""
    pipe = tiny_models.pipeline(name)
    schedule = made_for(5, name)
    handle = fastdit.patch(pipe, ECAD(schedule))
    one_length = not tiny_models.FAMILIES[name].reads_masks
    given = {"steps": 5, "prompt_per_image": True, "cfg": one_length}
    expected = generate(pipe, name, batch=2, **given)
    needed = handle.report().peak_cache_bytes
    if tiny_models.adapter_of(name).prompt_attentions:  # without whose keys it does, too
        handle = fastdit.patch(pipe, ECAD(schedule, max_cache_bytes=needed - 1))
        same_bits(generate(pipe, name, batch=2, **given), expected)
        needed = handle.report().peak_cache_bytes
    handle = fastdit.patch(pipe, ECAD(schedule, max_cache_bytes=needed - 1))
    with pytest.raises(
        ArgumentError, match=f"need {needed} bytes .* max_cache_bytes is {needed - 1}"
    ):
        generate(pipe, name, batch=2, **given)
    assert not handle.live_runs()
    assert generate(pipe, name, batch=1, **given).isfinite().all()  # half the rows fit
    fastdit.patch(pipe, ECAD(schedule, max_cache_bytes=needed))
    same_bits(generate(pipe, name, batch=2, **given), expected)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_caches_in_a_lower_precision(family):
    """Reused outputs are those of the hook-based cache rounded to bfloat16; half the bytes."""
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, 5, 2)
    inputs = [tiny_models.call(family, 2, step=step) for step in range(5)]
    exact, rounded = Oracle(model, bits), Rounded(model, bits)
    expected = []
    for oracle in (exact, rounded):
        with torch.no_grad(), oracle.installed():
            expected.append([sample(model(**given)) for given in inputs])
    schedule = Schedule.from_bits(bits, names)
    peaks = []
    for dtype, wanted in zip((None, "bfloat16"), expected, strict=True):
        handle = fastdit.patch(model, ECAD(schedule, cache_dtype=dtype), backend="reference")
        with torch.no_grad(), handle.run(range(5)):
            for given, value in zip(inputs, wanted, strict=True):
                # which keep what is behind the norm, and round that
                if family.startswith(("lumina", "zimage")):
                    assert distance(sample(model(**given)), value) < 0.05
                else:
                    same_bits(sample(model(**given)), value)
        peaks.append(handle.report().peak_cache_bytes)
    assert peaks[0] == 2 * peaks[1]


class Rounded(Oracle):
    """The plain cache, in bfloat16."""

    def wrap(self, forward, *name):
        cached = super().wrap(forward, *name)

        def rounding(*args, **kwargs):
            before = self.reused
            value = cached(*args, **kwargs)
            if self.reused == before:
                return value
            if isinstance(value, tuple):
                return tuple(part.bfloat16().float() for part in value)
            return value.bfloat16().float()

        return rounding


@pytest.mark.parametrize("most", [-1, 1.5, True, "1 GB"])
def test_wrong_caps(most):
    with pytest.raises(ArgumentError, match="max_cache_bytes must be"):
        ECAD(made_for(4), max_cache_bytes=most)


def test_wrong_precisions():
    with pytest.raises(ArgumentError, match="cache_dtype must be a name, 'bfloat16' or 'float16'"):
        ECAD(made_for(4), cache_dtype="int8")
