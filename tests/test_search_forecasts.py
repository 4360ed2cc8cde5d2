"""The search over orders of forecasts and over samplers: vectors, seeds, moves, ledger, and runs of what it finds."""

from __future__ import annotations

import functools
import json
import zlib
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pymoo")
import diffusers

import fastdit
import search_fakes
from fastdit.cli.distance import relative_l2
from fastdit.cli.sampler import swap_scheduler
from fastdit.cli.search import load_pipeline
from fastdit.errors import ArgumentError, ScheduleError, SearchError, UnsupportedModelError
from fastdit.schedules.schedule import Schedule
from fastdit.search import Operators, Settings, Work, ecad, moves, seeds, solution
from fastdit.search.ab2 import AB2Scheduler
from fastdit.search.evaluator import Evaluator, Task
from fastdit.search.evolve import LEDGER, evolve
from fastdit.search.front import on_axes
from fastdit.search.genome import Genome
from fastdit.search.ledger import Ledger
from fastdit.search.surrogate import Surrogate
from fastdit.spec import BlockKind, ModelSpec
from oracle import Oracle
from saved_pipelines import save_dit, save_sd3

SD3 = ModelSpec(
    "sd3",
    (BlockKind("transformer_blocks", 2, ("attn", "ff", "ff_context"), {(1, "ff_context")}),),
)
GENOME = Genome(SD3, 6, (0, 1, 2))
PROMPTS = ("a red circle", "a blue square")


def random_vector(genome: Genome, seed: int) -> np.ndarray:
    """Some steps whole, some not, all orders."""
    rng = np.random.default_rng(seed)
    shape = (genome.steps, len(genome.components))
    bits = rng.random(shape) < 0.5
    bits[rng.random(genome.steps) < 0.4] = False
    orders = rng.choice(genome.orders, shape)
    alike = rng.random(genome.steps) < 0.6
    orders[alike] = orders[alike][:, :1]
    return genome.join(bits, orders)


# ---- vectors


def test_a_vector_says_orders_and_comes_back():
    for seed in range(30):
        vector = random_vector(GENOME, seed)
        bits, orders = GENOME.parts(vector)
        assert (GENOME.join(bits, orders) == vector).all()
        assert (GENOME.from_bytes(GENOME.to_bytes(vector)) == vector).all()
        schedule = GENOME.schedule(vector)
        layer = schedule.layers["transformer_blocks"]
        for column, (_, block, name) in enumerate(GENOME.components):
            place = layer.components.index(name)
            assert (layer.bits[1:, block, place] == bits[1:, column]).all()
            reused = ~bits[1:, column]
            found = layer.orders[1:, block, place]
            assert (found[reused] == orders[1:, column][reused]).all()
        again = GENOME.vector(Schedule.from_json(schedule.to_json()))
        assert GENOME.key(again) == GENOME.key(vector)


def test_without_forecasts_vectors_and_names_are_what_they_were():
    plain = Genome(SD3, 6)
    for seed in range(20):
        bits = np.random.default_rng(seed).random((6, 5)) < 0.5
        vector = plain.join(bits)
        assert (vector == bits.ravel()).all()
        assert plain.size == plain.cells == 30
        assert GENOME.key(GENOME.join(bits)) == plain.key(vector)
    # As it was before there were orders.
    assert plain.key(plain.join(np.arange(30).reshape(6, 5) % 3 > 0)) == (
        "254b5553efd7fe100456d2bdf4be3ccc"
    )


def test_orders_that_change_nothing_do_not_make_another_candidate():
    bits = np.ones((6, 5), dtype=bool)
    bits[3] = False
    bits[4, 2] = False
    orders = np.ones((6, 5), dtype=int)
    vector = GENOME.join(bits, orders)
    other = orders.copy()
    other[[0, 1, 2, 5]] = 2  # what computes has no order
    other[4, [0, 1, 3, 4]] = 0
    assert GENOME.key(GENOME.join(bits, other)) == GENOME.key(vector)
    assert (GENOME.effective(GENOME.join(bits, other)) == GENOME.effective(vector)).all()
    for step, order in ((3, 0), (3, 2), (4, 0)):
        changed = orders.copy()
        changed[step] = order
        assert GENOME.key(GENOME.join(bits, changed)) != GENOME.key(vector)
    mixed = orders.copy()
    mixed[3, 0] = 0  # now its blocks are visited
    assert GENOME.key(GENOME.join(bits, mixed)) != GENOME.key(vector)


def test_a_line_through_one_output_repeats_it():
    bits = np.ones((6, 5), dtype=bool)
    bits[1, 0] = False
    repeated, line = GENOME.join(bits), GENOME.join(bits, 1)
    assert GENOME.key(repeated) == GENOME.key(line)
    bits[1] = False  # the model's whole output is kept, which the blocks' are not
    assert GENOME.key(GENOME.join(bits)) != GENOME.key(GENOME.join(bits, 1))
    assert GENOME.key(GENOME.join(bits, 2)) == GENOME.key(GENOME.join(bits, 1))


def test_a_step_of_one_order_is_forecast_although_a_block_lacks_a_component():
    vector = seeds.whole_steps(GENOME, [0, 1, 3], 1)
    assert (vector == seeds.whole_steps(GENOME, [0, 1, 3], 1)).all()
    from fastdit.schedules.plan import whole_forecasts

    assert whole_forecasts(GENOME.schedule(vector), SD3) == (0, 0, 1, 0, 1, 1)
    effective = GENOME.schedule(GENOME.effective(vector))
    assert whole_forecasts(effective, SD3) == (0, 0, 1, 0, 1, 1)


@pytest.mark.parametrize("orders", [(1,), (1, 0), (0, 0), (0, 3), (), (0, 1, 2, 3)])
def test_orders_are_checked(orders):
    with pytest.raises(ArgumentError, match=r"orders must be 0, or 0 with 1, 2 or both, got"):
        Work(("a",), orders=orders)


def test_a_schedule_of_orders_that_are_not_searched_is_refused():
    schedule = GENOME.schedule(seeds.whole_steps(GENOME, [0, 2, 4], 2))
    with pytest.raises(ScheduleError, match=r"has orders \[0, 2\], the search has \[0, 1\]"):
        Genome(SD3, 6, (0, 1)).vector(schedule)
    with pytest.raises(ScheduleError, match=r"the search has \[0\]"):
        seeds.first_population(Genome(SD3, 6), 8, [schedule])


# ---- seeds and moves


def test_forecasts_are_among_the_seeds():
    genome = Genome(SD3, 12, (0, 1))
    keys = {genome.key(v) for v in seeds.first_population(genome, 30)}
    plans = [seeds.halves(genome, 1), seeds.dense_early_steps(genome, 6, 1)]
    plans += [seeds.evenly_spread_steps(genome, 1)[5], seeds.fora(genome, 2)]
    assert {genome.key(plan) for plan in plans} <= keys
    assert len({genome.key(plan) for plan in plans}) == 4
    none = Genome(SD3, 12)
    assert not any(none.schedule(v).forecasts for v in seeds.first_population(none, 30))


def test_dense_early_steps_grow_apart():
    bits, _ = GENOME.parts(seeds.dense_early_steps(GENOME, 3, 1))
    assert bits.all(axis=1).tolist() == [True, True, False, True, False, False]
    genome = Genome(SD3, 20, (0, 1))
    bits, orders = genome.parts(seeds.dense_early_steps(genome, 8, 1))
    gaps = np.diff(np.flatnonzero(bits.all(axis=1)))
    assert (np.diff(gaps) >= -1).all()
    assert gaps[0] == 1
    assert gaps[-1] >= 3
    assert (orders == 1).all()


def test_halves_take_turns():
    bits, _ = GENOME.parts(seeds.halves(GENOME, 1))
    first, second = bits[:, :3], bits[:, 3:]
    assert first.all(axis=1).tolist() == [True, True, True, False, True, False]
    assert second.all(axis=1).tolist() == [True, True, False, True, False, True]


def test_moves_change_orders_by_the_step(monkeypatch):
    monkeypatch.setattr(moves, "ANOTHER", 0.0)
    parts, rng = moves.parts_of(GENOME.components), np.random.default_rng(3)
    seen = dict.fromkeys(("whole", "part", "bits"), 0)
    for _ in range(2000):
        vector = seeds.whole_steps(GENOME, [0, 1, 3], int(rng.integers(3)))
        before_bits, before_orders = GENOME.parts(vector.copy())
        moves.move(vector.reshape(6, -1), parts, rng)
        bits, orders = GENOME.parts(vector)
        if (bits != before_bits).any():
            seen["bits"] += 1
            continue
        changed = orders != before_orders
        assert changed.any(axis=1).sum() <= 1
        if changed.any():
            step = int(changed.any(axis=1).argmax())
            assert not before_bits[step].all()
            assert len(set(orders[step][changed[step]].tolist())) == 1
            seen["whole" if changed[step].all() else "part"] += 1
    assert min(seen.values()) > 50, seen


def test_moves_of_a_search_without_orders_are_what_they_were():
    """The random draws are the same, so that a search that was begun before goes on."""
    plain = Genome(SD3, 6)
    parts = moves.parts_of(plain.components)
    rows, rng = np.ones((6, 5), dtype=bool), np.random.default_rng(5)
    for _ in range(41):
        moves.move(rows, parts, rng)
    assert np.packbits(rows).tobytes().hex() == "fff9fffc"


# ---- the loop, on closed forms


class FakeForecasts(search_fakes.FakeWorkers):
    """A line does half of the harm that repeating does, and saves a whole step's rest where all of it is drawn."""

    genome = Genome(search_fakes.GENOME.spec, search_fakes.STEPS, (0, 1))

    def measure(self, task):
        if task.bits is None:
            return super().measure(task)
        bits, orders = self.genome.parts(self.genome.effective(self.genome.from_bytes(task.bits)))
        harm = (~bits * np.where(orders > 0, 0.5, 1.0)).ravel()
        spent = float(search_fakes.COST @ bits.ravel())
        losses = (0.2 + search_fakes.HARM[task.first : task.last] @ harm).tolist()
        return {"costs": {"macs": spent, "true-macs": spent}, "losses": losses}


WORK = Work(search_fakes.WORK.prompts, steps=search_fakes.STEPS, orders=(0, 1), quality="truth")
SETTINGS = Settings(4, 10, race=2, operators=Operators.of("step"), surrogate=3, even_steps=True)


def search(folder, settings=SETTINGS, work=WORK):
    found, ledger = evolve(folder, work, settings, (), FakeForecasts())
    ledger.close()
    return found


def test_the_search_finds_that_lines_are_better(tmp_path):
    found = search(tmp_path)
    assert found.gain > 0
    for candidate in found.front:
        bits, orders = found.genome.parts(found.genome.effective(candidate.vector))
        assert (orders[~bits] == 1).mean() > 0.5
    whole = [(c.key, c.values) for c in found.front]
    cut = tmp_path / "cut"
    search(cut, Settings(**{**vars(SETTINGS), "generations": 2}))
    assert [(c.key, c.values) for c in search(cut).front] == whole


def test_a_ledger_of_other_orders_or_another_sampler_is_refused_by_name(tmp_path):
    search(tmp_path)
    for changed, named in (({"orders": (0,)}, "orders"), ({"orders": (0, 1, 2)}, "orders")):
        work = Work(**{**vars(WORK), **changed})
        with pytest.raises(SearchError, match=rf"{named}.* was \[0, 1\] and is \[0"):
            ecad(None, tmp_path, work, SETTINGS, workers=FakeForecasts())
    work = Work(**{**vars(WORK), "scheduler": "recommended"})
    with pytest.raises(SearchError, match="scheduler was None and is 'recommended'"):
        ecad(None, tmp_path, work, SETTINGS, workers=FakeForecasts())


def test_a_ledger_from_before_there_were_orders_is_read(tmp_path):
    identity = {"steps": 3, "orders": [0], "scheduler": None}
    with closing(Ledger(tmp_path / LEDGER, {"steps": 3})):
        pass
    with closing(Ledger(tmp_path / LEDGER, identity)):
        pass
    with pytest.raises(SearchError, match=r"orders was \[0\] and is \[0, 1\]"):
        Ledger(tmp_path / LEDGER, {**identity, "orders": [0, 1]})


def without(path, *names):
    """A ledger whose first line does not say these, as an earlier version wrote it."""
    header, rest = path.read_bytes().split(b"\n", 1)
    entry = json.loads(header)
    del entry["crc"]
    for name in names:
        del entry["identity"][name]
    body = json.dumps(entry).encode()
    path.write_bytes(body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body) + rest)


def test_a_ledger_whose_losses_were_averaged_otherwise_is_refused_by_name(tmp_path, monkeypatch):
    search(tmp_path)
    without(tmp_path / LEDGER, "judgement", "samplers")
    with pytest.raises(
        SearchError, match=r"judgement was {'mean': 'arithmetic'} and is .*geometri"
    ):
        search(tmp_path)
    search(tmp_path / "new")
    monkeypatch.setattr(solution, "STEPS", STEPS + 1)
    with pytest.raises(SearchError, match=r"judgement was .*60} and is .*61}"):
        search(tmp_path / "new")
    # A mean of losses as they are is what an earlier search had.
    paired = replace(WORK, quality="paired")
    found = search(tmp_path / "paired", work=paired)
    without(tmp_path / "paired" / LEDGER, "judgement", "samplers")
    again = search(tmp_path / "paired", work=paired)
    assert [c.key for c in again.front] == [c.key for c in found.front]


def test_a_ledger_of_a_sampler_of_other_settings_is_refused_by_name(tmp_path, monkeypatch):
    search(tmp_path)
    facts = FakeForecasts().facts()
    changed = {**facts, "samplers": {"None": "FakeScheduler 1"}}
    monkeypatch.setattr(FakeForecasts, "facts", lambda self: changed)
    with pytest.raises(SearchError, match=r"samplers was .*FakeScheduler 0.* and is .*Scheduler 1"):
        search(tmp_path)


def test_the_surrogate_tells_orders_apart():
    genome, workers = FakeForecasts.genome, FakeForecasts()

    def worth(vectors):
        tasks = [Task("any", "losses", genome.to_bytes(v), 5, 0, 6) for v in vectors]
        found = [workers.measure(task) for task in tasks]
        values = [(np.mean(each["losses"]), each["costs"]["macs"]) for each in found]
        return on_axes(values, (250.0,), True)

    def parts(vectors):
        bits, orders = genome.parts(np.stack(vectors))
        bits = bits.copy()
        bits[:, 0] = True
        return bits, np.where(bits, 0, orders)

    known = [random_vector(genome, seed) for seed in range(150)]
    unseen = [random_vector(genome, seed) for seed in range(1000, 1150)]
    bits, _ = parts(known)
    truth = worth(unseen)[:, 0]

    def error(*features):
        known_features, unseen_features = features
        made = Surrogate(known_features[0], worth(known), False, *known_features[1:])
        return np.sqrt(((made(*unseen_features)[:, 0] - truth) ** 2).mean())

    with_orders = error(parts(known), parts(unseen))
    without = error((bits,), (parts(unseen)[0],))
    assert with_orders < 0.7 * without
    assert with_orders < 0.6 * truth.std()


# ---- real pipelines

SAMPLERS = {
    None: 6,
    "recommended": 6,
    "DPMSolverMultistepScheduler": 6,
    "FlowMatchHeunDiscreteScheduler": 11,
}


STEPS = 60


@pytest.fixture(autouse=True)
def solution_of_few_steps(monkeypatch):
    monkeypatch.setattr(solution, "STEPS", STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


def evaluator_of(folder, **settings) -> Evaluator:
    work = Work(PROMPTS, batch=2, backend="reference", **{"steps": 6, "orders": (0, 1), **settings})
    return Evaluator(functools.partial(load_pipeline, folder, "float32"), work)


def draw(pipeline, steps, **more):
    return pipeline(
        list(PROMPTS),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="latent",
        **more,
    ).images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_candidate_equals_a_plain_cache_under_its_sampler(folder, sampler):
    """Bits are of calls, of which Heun's sampler makes two a step; orders are of the sampler's own sigmas."""
    evaluator = evaluator_of(folder, scheduler=sampler, quality="truth")
    genome, calls = evaluator.genome, SAMPLERS[sampler]
    assert genome.steps == calls
    assert evaluator.facts()["calls"] == calls
    rng = np.random.default_rng(1)
    bits = rng.random((calls, 5)) < 0.5
    bits[0] = True
    bits[5, 0] = True  # not a whole step: those have no plain cache of components
    bits[:, 0] |= ~bits.any(axis=1)
    orders = rng.integers(2, size=bits.shape)
    vector = genome.join(bits, orders)
    task = Task("any", "losses", genome.to_bytes(vector), 6, 0, 2)
    found = evaluator.measure(task)

    stock = load_pipeline(folder, "float32")
    if sampler is not None:
        swap_scheduler(stock, sampler, 6)
    truth = load_pipeline(folder, "float32")
    truth.scheduler = AB2Scheduler.from_config(truth.scheduler.config, shift=1.0)
    solved = draw(truth, STEPS)
    draw(stock, 6)  # sets the sigmas
    sigmas = stock.scheduler.sigmas.tolist()[:calls]
    layer = genome.schedule(vector).layers["transformer_blocks"]
    kinds = {"transformer_blocks": layer.bits}, {"transformer_blocks": layer.orders}
    places = [("attn", "attn2", "ff", "ff_context").index(name) for name in layer.components]
    full = [np.ones((calls, 2, 4), dtype=kind["transformer_blocks"].dtype) for kind in kinds]
    for whole, kind in zip(full, kinds, strict=True):
        whole[:, :, places] = kind["transformer_blocks"]
    computes, drawn = ({"transformer_blocks": whole} for whole in full)
    with Oracle(stock.transformer, computes, orders=drawn, sigmas=sigmas).installed():
        cached = draw(stock, 6)
    expected = [relative_l2(*map(np.asarray, pair)) for pair in zip(cached, solved, strict=True)]
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-3, atol=1e-6)
    plain = [relative_l2(*map(np.asarray, p)) for p in zip(draw(stock, 6), solved, strict=True)]
    assert np.abs(np.subtract(plain, expected)).max() > 1e-3 * max(expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_whole_step_costs_nothing_and_its_file_runs_under_the_sampler(folder, sampler, tmp_path):
    evaluator = evaluator_of(folder, scheduler=sampler, quality="truth")
    genome, calls = evaluator.genome, SAMPLERS[sampler]
    vector = seeds.whole_steps(genome, range(0, calls, 2), 1)
    found = evaluator.measure(Task("any", "losses", genome.to_bytes(vector), 6, 0, 2))
    dense = evaluator.facts()["costs"]
    runs = len(range(0, calls, 2))
    for name in ("macs", "true-macs"):
        assert found["costs"][name] == pytest.approx(dense[name] * runs / calls, rel=0.02)

    genome.schedule(vector).save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["version"] == 2
    pipeline = load_pipeline(folder, "float32")
    if sampler is not None:
        swap_scheduler(pipeline, sampler, 6)
    handle = fastdit.patch(pipeline, fastdit.ECAD(tmp_path / "found.json"), backend="reference")
    by_file = draw(pipeline, 6)
    assert handle.report().tokens_per_step.count(0) == calls - runs
    fastdit.unpatch(pipeline)
    fastdit.patch(pipeline, fastdit.Cached(Schedule.every(2), order=1), backend="reference")
    assert torch.equal(draw(pipeline, 6), by_file)


def test_samplers_are_told_by_class_and_settings(folder):
    """Also the pipeline's own, which a search names only as such."""

    def own(shift, cls=diffusers.FlowMatchEulerDiscreteScheduler):
        pipeline = load_pipeline(folder, "float32")
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, shift=shift)
        return Evaluator(lambda: pipeline, Work(PROMPTS, steps=3)).facts()["samplers"]["None"]

    assert own(3.0) == own(3.0)
    assert len({own(3.0), own(1.0), own(3.0, diffusers.FlowMatchHeunDiscreteScheduler)}) == 3


def test_fewer_steps_of_heun_cost_their_calls(folder):
    evaluator = evaluator_of(folder, scheduler="FlowMatchHeunDiscreteScheduler", quality="truth")
    dense = evaluator.facts()["costs"]["macs"]
    found = evaluator.measure(Task("any", "losses", None, 3, 0, 2))
    assert found["costs"]["macs"] == pytest.approx(dense * 5 / 11)


def test_the_uncached_run_has_a_loss_beside_the_solution_and_less_with_more_steps(folder):
    evaluator = evaluator_of(folder, quality="truth")
    few, many = (
        np.mean(evaluator.measure(Task("any", "losses", None, steps, 0, 2))["losses"])
        for steps in (6, 48)
    )
    assert few > 0
    assert many < few / 2


def test_a_solution_needs_latents_and_a_sampler_without_noise(folder, tmp_path):
    with pytest.raises(ArgumentError, match="DiTPipeline does not give"):
        evaluator_of(save_dit(tmp_path), quality="truth")

    def noisy():
        pipeline = load_pipeline(folder, "float32")
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, stochastic_sampling=True
        )
        return pipeline

    with pytest.raises(ArgumentError, match="draws no noise at each step"):
        Evaluator(noisy, Work(PROMPTS, steps=3, quality="truth"))


def test_a_sampler_keeps_the_models_flow(folder):
    pipeline = load_pipeline(folder, "float32")
    shift = pipeline.scheduler.config.shift
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        swap_scheduler(pipeline, name)
        config = pipeline.scheduler.config
        assert config.prediction_type == "flow_prediction"
        assert config.use_flow_sigmas
        assert config.flow_shift == shift
    swap_scheduler(pipeline, "FlowMatchHeunDiscreteScheduler")
    assert pipeline.scheduler.config.shift == shift
    with pytest.raises(UnsupportedModelError, match="DDIMScheduler cannot stand for"):
        swap_scheduler(pipeline, "DDIMScheduler")
    for name in ("beauty", "recommended"):  # without a number of steps
        with pytest.raises(ArgumentError, match="--scheduler must be a scheduler class"):
            swap_scheduler(pipeline, name)
    with pytest.raises(ArgumentError, match="or recommended, got 'beauty'"):
        swap_scheduler(pipeline, "beauty", 3)


def test_the_command_searches_orders_under_a_sampler(folder, tmp_path):
    from typer.testing import CliRunner

    from fastdit.cli import commands

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["search", "--model", folder, "--prompts", prompts, "--out", tmp_path / "out"]
    arguments += ["--steps", 4, "--population", 6, "--generations", 1, "--orders", "0,1"]
    arguments += ["--scheduler", "recommended", "--quality", "truth", "--even-steps"]
    arguments += ["--guidance", 2.0, "--unit", "step", "--cost", "true-macs"]
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    found = runner.invoke(commands.app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    assert "no plan book: steps must be at least 8" in " ".join(found.output.split())
    files = [json.loads(p.read_text()) for p in (tmp_path / "out/front").glob("*.json")]
    assert {file["provenance"]["scheduler"] for file in files} == {"UniPCMultistepScheduler"}
    assert {file["provenance"]["num_inference_steps"] for file in files} == {4}
    forecasts = [file for file in files if file["version"] == 2]
    assert forecasts
    summary = json.loads((tmp_path / "out/search.json").read_text())
    assert summary["settings"]["orders"] == [0, 1]
    assert summary["settings"]["arguments"] == {"guidance_scale": 2.0}
    assert "forecasts" in {baseline["group"] for baseline in summary["baselines"]}
    for wrong, message in (("0;1", "--orders must be numbers"), ("1", "orders must be 0, or 0")):
        refused = runner.invoke(
            commands.app, [str(a) for a in [*arguments[:-2], "--orders", wrong]]
        )
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())
