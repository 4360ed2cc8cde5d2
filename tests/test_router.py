"""Router files, the schedules a router gives, and the method that runs one."""

from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastdit
import fastdit.tiny
import tiny_models
from contract import same_bits
from fastdit.methods import ecad
from fastdit.schedules.conditions import Conditions

KIND = "transformer_blocks"
NAMES = {KIND: ("attn1", "ff")}


def router(steps=4, blocks=3, seed=0, **more):
    logits = 2 * np.random.default_rng(seed).standard_normal((steps, blocks, 2))
    return fastdit.Router({KIND: logits}, NAMES, **more)


# ---- schedules


@settings(max_examples=25, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=24, max_size=24),
    tau=st.floats(0, 0.99),
)
def test_a_component_computes_where_the_sigmoid_exceeds_tau(logits, tau):
    table = np.array(logits, np.float32).reshape(4, 3, 2)
    bits = fastdit.Router({KIND: table}, NAMES).schedule(tau).layers[KIND].bits
    for (step, block, component), bit in np.ndenumerate(bits):
        logit = float(table[step, block, component])
        assert bit == (step == 0 or 1 / (1 + np.exp(-logit)) > tau)


def test_tau_is_the_routers_own_unless_given():
    found = router(tau=0.6)
    assert found.schedule() == found.schedule(0.6) != found.schedule(0.1)
    assert found.schedule(0).reuse_share == 0


@pytest.mark.parametrize("tau", [-0.1, 1, "0.1", True, float("nan")])
def test_a_threshold_outside_its_range_is_refused(tau):
    for make in (router().schedule, lambda t: fastdit.HarmoniCa(router(), tau=t)):
        with pytest.raises(fastdit.ArgumentError, match="tau must be"):
            make(tau)


def test_a_sweep_reuses_the_least_logits_first():
    found = router(steps=5)
    targets = [0, 0.25, 0.5, 0.8]
    family = found.sweep(targets)
    for target, schedule in zip(targets, family, strict=True):
        assert found.cache_utilisation(schedule) == pytest.approx(target, abs=0.5 / 30)
        bits, logits = schedule.layers[KIND].bits[1:], found.logits[KIND][1:]
        if not bits.all() and bits.any():
            assert logits[~bits].max() <= logits[bits].min()
    assert family[-1].layers[KIND].bits[1:].sum() == 0


def test_a_sweep_by_arithmetic_weighs_the_components():
    macs = {KIND: np.array([[1.0, 5.0]] * 3)}
    found = router(steps=6)
    (schedule,) = found.sweep([0.5], macs)
    reused = ((~schedule.layers[KIND].bits) * macs[KIND]).sum() / (6 * 18)
    assert reused == pytest.approx(0.5, abs=2.5 / 108)


def test_what_the_model_lacks_is_neither_reused_nor_counted():
    logits = np.full((4, 2, 2), -5.0)
    logits[:, 1, 1] = np.inf
    found = fastdit.Router({KIND: logits}, NAMES)
    assert found.entries == 12
    assert found.cache_utilisation(found.schedule()) == 0.75
    assert found.schedule().layers[KIND].bits[:, 1, 1].all()
    assert found.cache_utilisation(found.sweep([0.75])[0]) == 0.75


@pytest.mark.parametrize("target", [0.76, -0.1, float("nan")])
def test_a_share_out_of_reach_is_refused(target):
    with pytest.raises(fastdit.ArgumentError, match=r"targets must be shares from 0 to 0\.7500"):
        router().sweep([target])


def test_every_second_step_on_an_even_number_is_half():
    """The upper rows of the published tables: FORA with interval 2 is listed at 50.00 %."""
    found = router(steps=20)
    every = fastdit.Schedule.every(2).bind(
        fastdit.spec.ModelSpec("dit", (fastdit.spec.BlockKind(KIND, 3, NAMES[KIND]),)), 20
    )
    assert found.cache_utilisation(every) == 0.5


# ---- files


def test_a_file_gives_back_what_was_saved(tmp_path):
    found = router(
        family="dit",
        conditions=Conditions("DDIMScheduler", (999.0, 500.5, 1.0), 16, 4.0),
        tau=0.3,
        provenance={"beta": 7e-8},
    )
    path = tmp_path / "router.safetensors"
    found.save(path)
    back = fastdit.Router.load(path)
    same_bits(torch.tensor(back.logits[KIND]), torch.tensor(found.logits[KIND]))
    for name in ("components", "family", "conditions", "tau", "provenance", "sha256"):
        assert getattr(back, name) == getattr(found, name), name


def test_a_schedule_file_says_which_router_it_is_from(tmp_path):
    found = router()
    found.schedule(0.2).save(tmp_path / "schedule.json")
    back = fastdit.Schedule.load(tmp_path / "schedule.json")
    assert back == found.schedule(0.2)
    assert back.provenance["router"] == found.sha256


def damaged(path, **changes):
    """The file with facts of its header replaced."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["fastdit"])
    save_file(load_file(path), path, metadata={"fastdit": json.dumps(facts | changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format"),
        ({"version": 3}, "newer fastdit"),
        ({"components": {KIND: ["attn1"]}}, r"shape \[steps, blocks, 1\]"),
        ({"components": {"others": ["attn1", "ff"]}}, "block kinds"),
        ({"tau": 7}, "tau"),
        ({"conditions": {"shape": 1}}, "shape"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "router.safetensors"
    router().save(path)
    damaged(path, **changes)
    with pytest.raises(fastdit.ScheduleError, match=message) as caught:
        fastdit.Router.load(path)
    assert str(path) in str(caught.value)


def test_what_is_no_router_file_is_refused(tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.write_bytes(b"")
    save_file({"logits." + KIND: np.zeros((1, 1, 2), np.float32)}, other)
    for path in (empty, other, tmp_path / "missing", tmp_path):
        with pytest.raises(fastdit.ScheduleError, match="not a router file"):
            fastdit.Router.load(path)


# ---- the checkpoints of others


def checkpoint(path, rows, **more):
    routers = {f"{i}.prob": torch.nn.Parameter(row) for i, row in enumerate(rows)}
    torch.save({"routers": routers, "opt": {}, "args": argparse.Namespace(lr=0.01)} | more, path)


def test_a_published_checkpoint_is_read_last_step_first(tmp_path):
    """Entry i counts towards the noise, 2 b is the attention of block b and 2 b + 1 its feed-forward."""
    rows = torch.arange(24.0).reshape(4, 6) - 12
    checkpoint(tmp_path / "router.pt", rows)
    found = fastdit.Router.from_checkpoint(tmp_path / "router.pt").logits[KIND]
    assert found.shape == (4, 3, 2)
    assert found[3, 1, 0] == rows[0, 2]
    assert found[1, 2, 1] == rows[2, 5]
    assert (found[0] == 5).all()


def test_learning_to_cache_computes_every_second_step(tmp_path):
    checkpoint(tmp_path / "router.pt", torch.full((6, 4), -4.0))
    found = fastdit.Router.from_checkpoint(tmp_path / "router.pt", alternate=True)
    computes = found.schedule().layers[KIND].bits.all(axis=(1, 2))
    assert computes.tolist() == [True, False] * 3


class Planted:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    witness = tmp_path / "witness"
    checkpoint(tmp_path / "bad.pt", torch.zeros(2, 2), args=Planted(f"touch {witness}"))
    with pytest.raises(fastdit.ScheduleError, match="not a router checkpoint"):
        fastdit.Router.from_checkpoint(tmp_path / "bad.pt")
    assert not witness.exists()


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    checkpoint(tmp_path / "odd.pt", torch.zeros(2, 3))
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (
        ("weights.pt", "0.prob"),
        ("odd.pt", "multiple of the 2"),
        ("text.pt", "not a router checkpoint"),
        ("missing.pt", "not a router checkpoint"),
    ):
        with pytest.raises(fastdit.ScheduleError, match=message):
            fastdit.Router.from_checkpoint(tmp_path / name)


# ---- the method


def fitting(pipe, steps=4, value=None, seed=3, **more):
    """A router with random logits, or all of one value, for a pipeline's transformer."""
    spec = tiny_models.spec_of(pipe)
    generator = np.random.default_rng(seed)
    logits = {}
    for kind in spec.kinds:
        shape = (steps, kind.count, len(kind.components))
        logits[kind.name] = (
            3 * generator.standard_normal(shape) if value is None else np.full(shape, value)
        )
    names = {kind.name: kind.components for kind in spec.kinds}
    return fastdit.Router(logits, names, spec.family, **more)


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms()))
def test_logits_of_five_are_bit_equal_to_stock(name):
    pipe = tiny_models.pipeline(name)
    stock = tiny_models.generate(pipe, name)
    fastdit.patch(pipe, fastdit.HarmoniCa(fitting(pipe, value=5.0)), backend="reference")
    same_bits(tiny_models.generate(pipe, name), stock)


def test_an_order_is_in_the_file_and_in_every_schedule(tmp_path):
    """A file of before has none and repeats; one that extrapolates is not read by what would repeat."""
    path = tmp_path / "router.safetensors"
    plain, drawn = router(), router(order=2)
    hashes, versions = set(), []
    for found in (plain, drawn):
        found.save(path)
        back = fastdit.Router.load(path)
        assert (back.order, back.sha256) == (found.order, found.sha256)
        hashes.add(back.sha256)
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["fastdit"])
        versions.append(facts["version"])
        assert ("order" in facts) == (found.order > 0)
        schedules = [back.schedule(), back.schedule(0.5), *back.sweep([0.3])]
        assert [one.forecasts for one in schedules] == [found.order > 0] * 3
        orders = schedules[0].layers[KIND].orders
        assert (orders == np.where(schedules[0].layers[KIND].bits, 0, found.order)).all()
    assert versions == [1, 2]
    assert len(hashes) == 2
    damaged(path, order=3)
    with pytest.raises(fastdit.ScheduleError, match="order must be 0, 1 or 2, got 3"):
        fastdit.Router.load(path)
    damaged(path, version=1)
    with pytest.raises(fastdit.ScheduleError, match="exactly the fields"):
        fastdit.Router.load(path)


def test_the_method_takes_the_routers_order_unless_given():
    assert not fastdit.HarmoniCa(router()).forecasts
    assert fastdit.HarmoniCa(router(order=1)).forecasts
    assert not fastdit.HarmoniCa(router(order=1), order=0).forecasts
    assert fastdit.HarmoniCa(router(), order=2).forecasts
    with pytest.raises(fastdit.ScheduleError, match="order must be 0, 1 or 2, got 3"):
        fastdit.HarmoniCa(router(), order=3)
    pipe = tiny_models.pipeline("sd3")
    spec = tiny_models.spec_of(pipe)
    method = fastdit.HarmoniCa(fitting(pipe, order=1), order=2)
    layers = method.schedule(spec, 4).layers.values()
    assert {int(order) for layer in layers for order in layer.orders[~layer.bits]} == {2}


@pytest.mark.parametrize("name", ["pixart-sigma", "flux"])  # blocks of one kind, and of two
def test_a_sweep_goes_through_ecads_files_into_its_search(name, tmp_path):
    from fastdit.search.genome import Genome
    from fastdit.search.seeds import first_population

    pipe = tiny_models.pipeline(name)
    found = fitting(pipe)
    genome = Genome(tiny_models.spec_of(pipe), found.steps)
    family, read = found.sweep([0.25, 0.5, 0.75]), []
    for number, schedule in enumerate(family):
        schedule.save(tmp_path / f"{number}.json", layout="ecad")
        read.append(fastdit.Schedule.load(tmp_path / f"{number}.json"))
    seeds = [vector.tobytes() for vector in first_population(genome, 12, read)]
    assert len({genome.vector(schedule).tobytes() for schedule in family} & set(seeds)) == 3


def test_auto_takes_a_router_of_whole_blocks():
    logits = np.where(np.arange(4)[:, None, None] % 2, -4.0, 4.0) * np.ones((4, 3, 2))
    method = fastdit.HarmoniCa(fastdit.Router({KIND: logits}, NAMES), order="auto")
    assert method.adapts
    assert method.forecasts
    with pytest.raises(fastdit.ScheduleError, match=r'order="auto" takes .* step 1 '):
        fastdit.HarmoniCa(router(), order="auto")


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms()))
def test_a_router_runs_as_its_schedule(name, tmp_path):
    pipe = tiny_models.pipeline(name)
    found = fitting(pipe)
    found.save(tmp_path / "router.safetensors")
    fastdit.patch(pipe, fastdit.Cached(found.schedule(0.4)))
    expected = tiny_models.generate(pipe, name)
    handle = fastdit.patch(pipe, fastdit.HarmoniCa(tmp_path / "router.safetensors", tau=0.4))
    same_bits(tiny_models.generate(pipe, name), expected)
    report = handle.report()
    square = tiny_models.FAMILIES[name].square  # it draws at one size
    size = {} if square else tiny_models.asked(name)
    text = tiny_models.TEXT - (name == "lumina2")  # whose mask hides one
    explained = handle.explain(**size, text_tokens=text)
    assert explained.reuse_share == pytest.approx(report.reuse_share)
    assert explained.flop_speedup == pytest.approx(report.flop_speedup)
    assert report.reuse_share > 0.1
    assert report.flop_speedup > 1.05
    assert f"{report.flop_speedup:.2f}x fewer" in str(report)
    assert f"{explained.reuse_share:.2%} of all components" in str(explained)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (Conditions(scheduler="DDIMScheduler"), "scheduler is FlowMatchEulerDiscreteScheduler"),
        (Conditions(timesteps=(1000.0, 700.0, 500.0, 250.0)), "timesteps is"),
        (Conditions(image_tokens=64), "image_tokens is 32, it was made for 64"),
        (Conditions(guidance=7.0), "guidance is 4, it was made for 7"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_run_that_was_not_trained_for_is_refused_by_name(conditions, message):
    pipe = tiny_models.pipeline("sd3")
    found = fitting(pipe, conditions=conditions)
    handle = fastdit.patch(pipe, fastdit.HarmoniCa(found))
    with pytest.raises(fastdit.ScheduleError, match=message):
        tiny_models.generate(pipe, "sd3")
    assert handle.report().steps == 0
    fastdit.patch(pipe, fastdit.HarmoniCa(found, strict=False))
    tiny_models.generate(pipe, "sd3")


def test_another_model_is_refused_when_patching():
    pipe = tiny_models.pipeline("pixart-sigma")
    with pytest.raises(fastdit.ScheduleError, match="trained on a sd3 model"):
        fastdit.patch(pipe, fastdit.HarmoniCa(fitting(tiny_models.pipeline("sd3"))))
    with pytest.raises(fastdit.ScheduleError, match="4 transformer_blocks"):
        fastdit.patch(pipe, fastdit.HarmoniCa(router(blocks=4, family="pixart")))
    with pytest.raises(fastdit.ScheduleError, match="router must be"):
        fastdit.HarmoniCa(3)


def test_another_number_of_steps_is_refused():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, fastdit.HarmoniCa(fitting(pipe, steps=5)))
    with pytest.raises(fastdit.ScheduleError, match="5 steps but the run has 4"):
        tiny_models.generate(pipe, "sd3")


# ---- the one that ships


def test_a_preset_is_a_file_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    router().save(tmp_path / "toy" / "router.safetensors")
    monkeypatch.setattr(ecad, "PRESETS", tmp_path)
    method = fastdit.HarmoniCa.preset("toy", tau=0.4)
    assert method.source.sha256 == router().sha256
    assert method.tau == 0.4
    for model in ("tiny", "../toy"):
        with pytest.raises(fastdit.ArgumentError, match=r"there are: toy"):
            fastdit.HarmoniCa.preset(model)


def test_the_router_of_the_package_reuses_what_heun_computes_twice():
    """The second call at a sigma repeats the first; a run at the router's threshold is what it was made for."""
    pipe = fastdit.tiny.load_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    method = fastdit.HarmoniCa.preset("tiny")
    second = np.stack(
        [logits.mean((1, 2), where=np.isfinite(logits)) for logits in method.source.logits.values()]
    )[0]
    assert (second[2::2] < second[1:-1:2]).mean() > 0.8
    handle = fastdit.patch(pipe, method)
    pipe("a large red circle", num_inference_steps=10, output_type="latent")
    assert 0.2 < handle.report().reuse_share < 0.7
