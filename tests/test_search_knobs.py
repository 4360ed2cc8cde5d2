"""A search over more than schedules: RAS's ratio, the number of steps and the solver beside them."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

pytest.importorskip("pymoo")

from pymoo.core.population import Population

import fastdit
import search_fakes
from fastdit.cli.distance import relative_l2
from fastdit.cli.sampler import swap_scheduler
from fastdit.cli.search import load_pipeline
from fastdit.errors import ArgumentError, ScheduleError, SearchError
from fastdit.search import Knobs, Operators, Settings, Work, ecad, seeds
from fastdit.search.ab2 import AB2Scheduler
from fastdit.search.calibrate import calibrate
from fastdit.search.evaluator import Evaluator, Task
from fastdit.search.evolve import evolve
from fastdit.search.found import book_of
from fastdit.search.front import on_axes
from fastdit.search.genome import Genome
from fastdit.search.knobs import Run
from fastdit.search.nsga2 import Nsga2
from fastdit.search.quality import average
from fastdit.search.surrogate import Surrogate
from saved_pipelines import save_sd3

KNOBS = Knobs((8, 6, 4), (1.0, 0.5), ("own", "recommended"))
SPEC = search_fakes.GENOME.spec
GENOME = Genome(SPEC, 8, (0, 1), knobs=KNOBS)
RUNS = list(KNOBS.runs())


def random_vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(GENOME.size) < 0.5


# ---- knobs


def test_all_bits_stand_for_a_run_and_each_run_has_bits():
    assert len(set(RUNS)) == 12
    assert RUNS[0] == Run(8, 1.0, "own")
    assert KNOBS.size == 4
    for run in RUNS:
        assert KNOBS.read(KNOBS.write(run)) == run
    every = np.array([[i >> b & 1 for b in range(4)] for i in range(16)], dtype=bool)
    assert {KNOBS.read(bits) for bits in every} == set(RUNS)
    assert KNOBS.read(np.array([0, 1, 0, 0], dtype=bool)).steps == 6  # the place is the number
    assert not Knobs().size
    assert Knobs().read(np.zeros(0, dtype=bool)) == Run()


def test_a_run_in_stages_has_the_pipeline_s_own_solver():
    knobs = Knobs((8, 6), (1.0, 0.5), ("recommended", "own"), (0.0, 0.25))
    runs = list(knobs.runs())
    assert len(set(runs)) == len(runs) == 12
    every = np.array([[i >> b & 1 for b in range(4)] for i in range(16)], dtype=bool)
    assert {knobs.read(bits) for bits in every} == set(runs)
    assert {run.solver for run in runs if run.coarse} == {"own"}
    ralu = Run(8, coarse=0.25).ralu(8)
    assert ralu.steps == (2, 0, 6)
    assert Run(8).ralu(8) is None
    genome = Genome(SPEC, 8, (0, 1), knobs=knobs)
    vector = genome.embed(seeds.uncached(genome.alone(Run(8))), Run(8, 1.0, "own", 0.25))
    assert genome.reused(vector) == 2 * len(genome.components)
    # Where the resolution changes everything computes, whatever a schedule says.
    nothing = genome.join(np.zeros((8, len(genome.components))), run=Run(8, 1.0, "own", 0.25))
    rows = genome.parts(genome.effective(nothing))[0].all(axis=1)
    assert rows.nonzero()[0].tolist() == [0, 2]


def test_a_turn_sets_one_knob_to_another_value():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        bits = KNOBS.write(RUNS[rng.integers(len(RUNS))])
        before = KNOBS.read(bits)
        KNOBS.turn(bits, rng)
        changed = asdict(before).items() - asdict(KNOBS.read(bits)).items()
        assert len(changed) == 1
        seen.add((before, KNOBS.read(bits)))
    assert {pair[1].steps for pair in seen if pair[0].steps == 8} == {8, 6, 4}
    only = Knobs(ratios=(1.0, 0.5))
    bits = only.write(Run())
    only.turn(bits, rng)
    assert only.read(bits) == Run(None, 0.5, None)


def test_knobs_are_crossed_one_by_one():
    rng = np.random.default_rng(0)
    one, other = RUNS[0], RUNS[-1]
    seen = set()
    for _ in range(100):
        pair = [KNOBS.read(b) for b in KNOBS.cross(KNOBS.write(one), KNOBS.write(other), rng)]
        for name in ("steps", "ratio", "solver"):
            assert {getattr(run, name) for run in pair} == {getattr(r, name) for r in (one, other)}
        seen.add(pair[0])
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (4, 8)}, "steps must fall and be at least 2"),
        ({"steps": (8, 1)}, "steps must fall and be at least 2"),
        ({"ratios": (1.0, 0.5, 0.0)}, "ratios must fall and be above 0"),
        ({"ratios": (0.5,)}, "ratios must begin with 1, without RAS"),
        ({"ratios": ()}, "ratios must begin with 1"),
        ({"solvers": ("own", "own")}, "solvers must be distinct"),
        ({"coarse": (0.5,)}, "coarse must rise from 0"),
        ({"coarse": (0.0, 1.0)}, "coarse must rise from 0 and be below 1"),
    ],
)
def test_knobs_are_checked(values, message):
    with pytest.raises(ArgumentError, match=message):
        Knobs(**values)
    with pytest.raises(ArgumentError, match=r"ratio 0\.3 is not searched"):
        KNOBS.write(Run(8, 0.3, "own"))


def test_the_uncached_run_comes_first():
    for knobs in (Knobs(steps=(8, 4)), Knobs(solvers=("recommended", "own"))):
        with pytest.raises(
            ArgumentError, match="begin with the uncached run's steps and scheduler"
        ):
            Work(("a",), steps=6, knobs=knobs)
    Work(("a",), steps=8, scheduler="recommended", knobs=Knobs(solvers=("recommended", "own")))


# ---- vectors


def test_a_run_of_fewer_steps_takes_rows_at_the_same_part():
    assert GENOME.taken(Run(8)).tolist() == list(range(8))
    assert GENOME.taken(Run(4)).tolist() == [0, 2, 4, 6]
    assert GENOME.taken(Run(6)).tolist() == [0, 1, 2, 4, 5, 6]
    for seed, run in enumerate(RUNS):
        alone = GENOME.alone(run)
        assert (alone.steps, alone.knobs) == (run.steps, Knobs())
        vector = np.random.default_rng(seed).random(alone.size) < 0.5
        embedded = GENOME.embed(vector, run)
        assert GENOME.run(embedded) == run
        assert (GENOME.own(embedded) == vector).all()
        assert GENOME.schedule(embedded) == alone.schedule(vector)
        assert GENOME.schedule(embedded).steps == run.steps


def test_rows_that_no_step_takes_mean_nothing():
    for seed in range(40):
        vector = random_vector(seed)
        rows = vector[: GENOME.table].reshape(8, -1)  # a view
        left = np.setdiff1d(np.arange(8), GENOME.taken(GENOME.run(vector)))
        before = GENOME.key(vector), GENOME.effective(vector).tobytes(), GENOME.reused(vector)
        parts = [part.copy() for part in GENOME.parts(vector)]
        rows[left] ^= True
        assert before == (
            GENOME.key(vector),
            GENOME.effective(vector).tobytes(),
            GENOME.reused(vector),
        )
        assert not GENOME.parts(vector)[0][left].any()
        for found, part in zip(GENOME.parts(vector[None]), parts, strict=True):
            assert (found[0] == part).all()


def test_a_name_tells_runs_apart_and_their_bits_do_not():
    alone = {run.steps: np.ones(GENOME.alone(run).size, dtype=bool) for run in RUNS}
    keys = {GENOME.key(GENOME.embed(alone[run.steps], run)) for run in RUNS}
    assert len(keys) == len(RUNS)
    vector = random_vector(3)
    vector[GENOME.table :] = (0, 1, 0, 0)
    other = vector.copy()
    other[GENOME.table :] = (1, 0, 0, 0)
    assert GENOME.key(vector) == GENOME.key(other)
    assert (GENOME.effective(vector) == GENOME.effective(other)).all()
    assert GENOME.key(GENOME.effective(vector)) == GENOME.key(vector)


def test_what_a_run_leaves_out_is_counted():
    def reused(run):
        return GENOME.reused(GENOME.embed(seeds.uncached(GENOME.alone(run)), run))

    components = len(GENOME.components)
    assert reused(RUNS[0]) == 0
    assert reused(Run(6, 1.0, "own")) == 2 * components
    assert reused(Run(8, 0.5, "own")) == components * sum(
        step is not None for step in Run(8, 0.5).ras.active(8, 4096)
    )


def test_under_ras_an_attention_that_nobody_reads_still_runs():
    """Its keys and values are those of later steps: bits that differ there are two candidates."""
    from fastdit.spec import BlockKind, ModelSpec

    flux = ModelSpec(
        "flux",
        (BlockKind("single", 1, ("attn", "to_out"), frozenset(), {"attn": "to_out"}),),
    )
    genome = Genome(flux, 8, knobs=Knobs(ratios=(1.0, 0.5)))
    bits = np.ones((8, 2), dtype=bool)
    bits[3, 1] = False
    less = bits.copy()
    less[3, 0] = False
    for run, alike in ((Run(), True), (Run(ratio=0.5), False)):
        keys = {genome.key(genome.join(each, run=run)) for each in (bits, less)}
        assert (len(keys) == 1) == alike


# ---- seeds and moves


def test_seeds_are_plain_runs_then_ras_alone_then_forecasts_of_each():
    vectors = seeds.first_population(GENOME, 40)
    runs = [GENOME.run(vector) for vector in vectors]
    plain = [run for run in RUNS if run.ras is None]
    assert runs[:12] == [*plain, *(run for run in RUNS if run.ras)]
    keys = {GENOME.key(vector) for vector in vectors}
    for run in plain:
        alone = GENOME.alone(run)
        assert GENOME.key(GENOME.embed(seeds.uncached(alone), run)) in keys
        assert GENOME.key(GENOME.embed(seeds.halves(alone, 1), run)) in keys
        even = seeds.evenly_spread_steps(alone, 1)[run.steps // 2 - 1]
        assert GENOME.key(GENOME.embed(even, run)) in keys
    assert len(keys) > 35


@pytest.mark.parametrize("unit", ["step", "bit"])
def test_children_of_one_run_are_of_others(unit):
    rng = np.random.default_rng(0)
    first = rng.random((24, GENOME.size)) < 0.5
    first[:, GENOME.table :] = False
    parts = GENOME.components, len(GENOME.orders), GENOME.knobs
    operators = Operators(2, 0.5, 1.0, mutation_bits=40.0, unit=unit)
    algorithm = Nsga2(first, 24, 2, operators, *parts)
    seen = set()
    for _ in range(8):
        vectors = algorithm.ask()
        assert vectors.shape[1] == GENOME.size
        seen |= {GENOME.run(vector) for vector in vectors}
        algorithm.tell(rng.random((len(vectors), 2)), np.ones(len(vectors)))
    assert len(seen) > 6


def test_a_step_crossover_exchanges_whole_rows_and_knobs():
    parts = GENOME.components, len(GENOME.orders), GENOME.knobs
    parents = np.stack([np.full(GENOME.size, value) for value in (False, True)])
    still = Operators(2, 1.0, 0.0, unit="step")
    algorithm = Nsga2(parents, 2, 2, still, *parts).algorithm
    rng, crossover, runs = np.random.default_rng(0), algorithm.mating.crossover, set()
    for _ in range(40):
        population = Population.new(X=parents)
        found = crossover.do(algorithm.problem, population, np.array([[0, 1]]), random_state=rng)
        one, other = found.get("X")
        assert (one != other).all()
        rows = one[: GENOME.table].reshape(8, -1)
        assert (rows == rows[:, :1]).all()
        runs.add(GENOME.run(one))
    assert len(runs) == 8


# ---- the loop, on closed forms

WORK = Work(search_fakes.WORK.prompts, steps=8, orders=(0, 1), quality="truth", knobs=KNOBS)
SETTINGS = Settings(5, 24, race=2, operators=Operators.of("step"), surrogate=4)
HARM = np.random.default_rng(3).uniform(0.02, 0.05, (WORK.items, 8, len(GENOME.components)))


class FakeRuns(search_fakes.FakeWorkers):
    """The recommended solver does a tenth of the harm; RAS spares half of it for as much harm as a repeat."""

    def facts(self):
        facts = {**search_fakes.FACTS, "calls": 8, "costs": {"macs": 400.0, "true-macs": 400.0}}
        return {**facts, "schedulers": {"None": "A", "own": "A", "recommended": "B"}}

    def measure(self, task):
        items = slice(task.first, task.last)
        if task.bits is None:
            lost = 1.0 if task.solver in (None, "own") else 0.1
            spent = 50.0 * task.steps
            losses = np.full(WORK.items, 0.01 + lost * (8 - task.steps) * 0.2)[items]
        else:
            vector = GENOME.effective(GENOME.from_bytes(task.bits))
            run = GENOME.run(vector)
            bits, orders = GENOME.parts(vector)
            harm = ~bits * np.where(orders > 0, 0.5, 1.0)
            harm = harm + bits * (run.ratio < 1) * 0.5
            spent = 10.0 * bits.sum() * (1.0 if run.ratio == 1 else 0.6)
            losses = 0.01 + (HARM[items] * harm).sum(axis=(1, 2)) * (
                0.1 if run.solver == "recommended" else 1.0
            )
        return {"costs": {"macs": spent, "true-macs": spent}, "losses": losses.tolist()}


def search(folder, settings=SETTINGS, work=WORK):
    found, ledger = evolve(folder, work, settings, (), FakeRuns())
    ledger.close()
    return found


def test_the_search_finds_the_better_solver_and_resumes(tmp_path):
    found = search(tmp_path / "whole")
    assert found.gain > 0
    assert {found.genome.run(c.vector).solver for c in found.front} == {"recommended"}
    whole = [(c.key, c.values) for c in found.front]
    search(tmp_path / "cut", Settings(**{**vars(SETTINGS), "generations": 2}))
    assert [(c.key, c.values) for c in search(tmp_path / "cut").front] == whole


def test_a_ledger_of_other_knobs_is_refused(tmp_path):
    search(tmp_path, Settings(0, 24))
    other = Knobs((8, 6, 4), (1.0, 0.25), ("own", "recommended"))
    with pytest.raises(SearchError, match="knobs differ"):
        search(tmp_path, Settings(0, 24), Work(**{**vars(WORK), "knobs": other}))


def test_files_say_how_their_run_is_made(tmp_path):
    found = ecad(None, tmp_path, WORK, SETTINGS, workers=FakeRuns())
    summary = json.loads((tmp_path / "search.json").read_text())
    for candidate, point in zip(found.front, summary["front"], strict=True):
        run = found.genome.run(candidate.vector)
        said = json.loads((tmp_path / f"front/{point['name']}.json").read_text())["provenance"]
        assert said["num_inference_steps"] == point["steps"] == run.steps
        assert said["scheduler"] == {"own": "A", "recommended": "B"}[run.solver]
        ras = None if run.ras is None else {"ratio": 0.5, "metric": "change", "align": 8}
        assert said.get("ras") == ras
    groups = {baseline["group"] for baseline in summary["baselines"]}
    assert "fewer steps, recommended" in groups


def test_the_surrogate_knows_what_knobs_cost_and_harm():
    workers = FakeRuns()

    def worth(vectors):
        tasks = [Task("any", "losses", GENOME.to_bytes(v), 8, 0, WORK.items) for v in vectors]
        found = [workers.measure(task) for task in tasks]
        rows = [(average("truth", each["losses"]), each["costs"]["macs"]) for each in found]
        return on_axes(rows, (400.0,), True)

    def features(vectors):
        stacked = np.stack([GENOME.effective(v) for v in vectors])
        bits, orders = GENOME.parts(stacked)
        return bits, np.where(bits, 0, orders), KNOBS.columns(stacked[:, GENOME.table :])

    known, unseen = ([random_vector(s) for s in range(*span)] for span in ((0, 200), (500, 650)))
    truth, parts = worth(unseen), features(known)
    errors = {}
    for name, count in (("with", 3), ("without", 2)):
        made = Surrogate(parts[0], worth(known), False, *parts[1:count])
        errors[name] = np.sqrt(((made(*features(unseen)[:count]) - truth) ** 2).mean(axis=0))
    assert (errors["with"] < 0.5 * errors["without"]).all()
    assert errors["with"][1] < 0.03


def test_pictures_that_flip_do_not_rule_a_distance_to_the_solution():
    losses = [0.01, 0.01, 1.0]
    assert average("truth", losses) == pytest.approx(10 ** (-4 / 3))
    assert average("paired", losses) == pytest.approx(0.34)


# ---- real pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(autouse=True)
def solution_of_few_steps(monkeypatch):
    monkeypatch.setattr("fastdit.search.solution.STEPS", 30)


def evaluator_of(folder, **settings) -> Evaluator:
    # RAS begins at the fifth step
    coarse = settings.pop("coarse", (0.0,))
    steps = (8, 6) if len(coarse) == 1 else (8,)
    knobs = Knobs(steps, (1.0, 0.5), ("own", "recommended"), coarse)
    given = {"steps": 8, "orders": (0, 1), "quality": "truth", "knobs": knobs, **settings}
    work = Work(("a red circle", "a blue square"), batch=2, backend="reference", **given)
    return Evaluator(functools.partial(load_pipeline, folder, "float32"), work)


def draw(pipeline, steps):
    return pipeline(
        ["a red circle", "a blue square"],
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    "run",
    [
        Run(8, 0.5, "own"),
        Run(6, 1.0, "recommended"),
        Run(6, 0.5, "recommended"),
        Run(8, 0.5, "own", 0.25),
    ],
)
def test_a_candidate_is_what_its_methods_draw_under_its_solver(folder, run):
    evaluator = evaluator_of(folder, coarse=(0.0, 0.25) if run.coarse else (0.0,), steps=8)
    genome = evaluator.genome
    alone = genome.alone(run)
    vector = genome.embed(seeds.whole_steps(alone, range(0, run.steps, 2), 1), run)
    found = evaluator.measure(Task("any", "losses", genome.to_bytes(vector), 8, 0, 2))
    plain = evaluator.measure(Task("plain", "losses", None, run.steps, 0, 2, run.solver))

    pipeline = load_pipeline(folder, "float32")
    pipeline.scheduler = AB2Scheduler.from_config(pipeline.scheduler.config, shift=1.0)
    solved = draw(pipeline, 30)
    pipeline = load_pipeline(folder, "float32")
    if run.solver != "own":
        swap_scheduler(pipeline, run.solver, run.steps)
    fewer = draw(pipeline, run.steps)
    methods = [fastdit.Cached(fastdit.Schedule.every(2), order=1)]
    if run.ratio < 1:
        methods.append(fastdit.RAS(ratio=run.ratio, metric="change", align=8))
    if run.coarse:
        methods.append(fastdit.RALU.preset("late", steps=(2, 0, 6)))
    handle = fastdit.patch(pipeline, *methods, backend="reference")
    drawn = draw(pipeline, run.steps)
    for images, losses in ((drawn, found["losses"]), (fewer, plain["losses"])):
        expected = [
            relative_l2(*map(np.asarray, pair)) for pair in zip(images, solved, strict=True)
        ]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    cost = handle.explain(steps=run.steps)
    assert found["costs"] == {"macs": cost.linear_macs, "true-macs": cost.macs}
    assert plain["costs"]["macs"] == pytest.approx(
        evaluator.facts()["costs"]["macs"] * run.steps / 8
    )


def test_a_paired_distance_is_to_the_uncached_run_whatever_the_solver(folder):
    evaluator = evaluator_of(folder, quality="paired")
    genome, run = evaluator.genome, Run(8, 1.0, "recommended")
    vector = genome.embed(seeds.uncached(genome.alone(run)), run)
    found = evaluator.measure(Task("any", "losses", genome.to_bytes(vector), 8, 0, 2))
    own = evaluator.measure(Task("own", "losses", genome.to_bytes(seeds.uncached(genome)), 8, 0, 2))
    assert min(found["losses"]) > 1e-3
    assert max(own["losses"]) < 1e-5


def test_a_search_over_runs_refuses_what_it_cannot_vary(folder):
    with pytest.raises(ArgumentError, match="call the model once a step"):
        evaluator_of(
            folder,
            scheduler="FlowMatchHeunDiscreteScheduler",
            knobs=Knobs(solvers=("FlowMatchHeunDiscreteScheduler", "own")),
        )
    with pytest.raises(ScheduleError, match="RAS start=4 leaves no sparse step in a run of 4"):
        evaluator_of(folder, steps=4, knobs=Knobs(ratios=(1.0, 0.5)))


def test_the_command_searches_a_space(folder, tmp_path):
    from typer.testing import CliRunner

    from fastdit.cli import commands

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square")
    arguments = ["search", "--model", folder, "--prompts", prompts, "--out", tmp_path / "out"]
    arguments += ["--steps", 10, "--population", 30, "--generations", 0, "--quality", "truth"]
    arguments += ["--unit", "step", "--space", "schedule,order,ras,steps,solver"]
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    found = runner.invoke(commands.app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    settings = json.loads((tmp_path / "out/search.json").read_text())["settings"]
    assert settings["orders"] == [0, 1, 2]
    assert settings["knobs"] == {
        "steps": [10, 7, 5],
        "ratios": [1.0, 0.75, 0.5, 0.25],
        "solvers": ["own", "recommended"],
    }
    for wrong in ("order", "schedule,beauty", "schedule,ras,ras"):
        refused = runner.invoke(commands.app, [str(a) for a in [*arguments[:-1], wrong]])
        assert refused.exit_code == 2
        assert "--space must have schedule and may have order, ras" in " ".join(
            refused.output.split()
        )


def test_a_search_leaves_a_book_and_begins_with_one(folder, tmp_path, monkeypatch):
    """Own steps and solver become candidates of the book, beside whole steps; the others are its advice."""
    monkeypatch.setattr("fastdit.search.solution.STEPS", 30)
    monkeypatch.setattr("fastdit.search.trial.REPEATS", 1)
    monkeypatch.setattr("fastdit.search.calibrate.QUANTILES", (0.5,))
    monkeypatch.setattr(
        "fastdit.search.found.calibrate", functools.partial(calibrate, shares=(0.5,))
    )
    knobs = Knobs((8, 6), (1.0, 0.5), ("own", "recommended"))
    given = {"steps": 8, "orders": (0, 1, 2), "quality": "truth", "knobs": knobs, "batch": 2}
    work = Work(("a red circle", "a blue square"), **given)
    factory = functools.partial(load_pipeline, folder, "float32")
    found = ecad(factory, tmp_path / "out", work, Settings(0, 12, costs=("true-macs",)))
    pipeline, seen = factory(), []
    book_of(found, pipeline, lambda done, total: seen.append((done, total))).save(tmp_path / "b")
    book = fastdit.PlanBook.load(tmp_path / "b")
    own = [found.genome.run(c.vector) for c in found.front]
    apart = [run for run in own if (run.steps, run.solver) != (8, "own")]
    assert len(book.provenance["advice"]) == len(apart) > 0
    assert all(point["loss"] > 0 for point in book.provenance["advice"])
    assert seen[-1][0] == seen[-1][1]
    assert book.plans[0].computed == tuple(range(8))
    fastest = max(1.0, book.speedup_of(book.plans[-1]))  # the machine may be busy
    handle = fastdit.patch(pipeline, speedup=fastest, book=book)
    draw(pipeline, 8)
    assert "error" in handle.explain(steps=8).budget
    schedules = seeds.seeds_of(book, found.genome)
    assert [schedule.steps for schedule in schedules] == [8] * (len(book.plans) - 1)
    again = ecad(
        factory, tmp_path / "again", work, Settings(0, 12, costs=("true-macs",)), book=book
    )
    keys = {found.genome.key(found.genome.vector(schedule)) for schedule in schedules}
    assert keys <= set(again.archive.seen)
