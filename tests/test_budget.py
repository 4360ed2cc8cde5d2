"""Budgets: which steps a speed, a quality or a time leaves out, for one request too, and plan books."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import fastdit
import fastdit.tiny
import tiny_models
from contract import distance, same_bits
from fastdit import ArgumentError, Budget, Cached, PlanBook, Schedule, ScheduleError
from fastdit.cli.calibration import table
from fastdit.methods.budget import BYTES, SECONDS, parsed
from fastdit.patch import find_adapter
from fastdit.runtime import guard
from fastdit.runtime.guard import Guard
from fastdit.schedules.book import PACKAGED, Plan, config_hash
from fastdit.schedules.spread import changing_steps, early_steps, even_steps
from fastdit.search import solution
from fastdit.search.calibrate import calibrate
from fastdit.search.trial import MARGIN, interval
from fastdit.tiny.pipeline import GUIDANCE_SCALE
from snapshot import snapshot
from tiny_models import generate

pytestmark = pytest.mark.diffusers

STEPS = 8
TOKENS = 32
EVERYTHING = tuple(range(STEPS))


def book_of(transformer, **changes):
    """A book made by hand: a step that computes takes a second, one that is drawn a tenth."""
    plans = (
        Plan(EVERYTHING, 1, 1.0, 1.0, 1.0),
        Plan((0, 1, 2, 4, 6, 7), 2, 0.9, 0.8, 0.99),
        Plan((0, 1, 3, 5), 1, 1.5, 1.2, 1.9),
        Plan((0, 1, 4), 2, 2.5, 2.0, 3.0),
        Plan((0, 4), 1, 30.0, 20.0, 40.0),
    )
    given = {
        "model": (type(transformer).__name__, config_hash(transformer)),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "steps": STEPS,
        "image_tokens": TOKENS,
        "unpatched_seconds": 1.0,
        "step_seconds": (1.0, 0.1),
        "other_seconds": 0.5,
        "plans": plans,
        "provenance": {"machine": "none"},
    }
    return PlanBook(**given | changes)


@pytest.fixture
def pipe():
    return tiny_models.pipeline("sd3")


@pytest.fixture
def book(pipe):
    return book_of(pipe.transformer)


def computed(handle):
    """The steps of the last run whose tokens passed the transformer."""
    return tuple(step for step, record in handle.last_run().records.items() if record.tokens)


# ---- without a book


def test_half_of_the_steps_are_those_of_every_second(pipe):
    fastdit.patch(pipe, Cached(Schedule.every(2), order=1))
    expected = generate(pipe, "sd3", steps=STEPS)
    handle = fastdit.patch(pipe, speedup=2)
    same_bits(generate(pipe, "sd3", steps=STEPS), expected)
    assert computed(handle) == (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("speedup", "steps", "count"), [(1, 8, 8), (1.5, 9, 6), (3, 28, 9), (4, 28, 7), (2.2, 5, 2)]
)
def test_steps_are_evenly_spread_at_a_speed(pipe, speedup, steps, count):
    handle = fastdit.patch(pipe, speedup=speedup)
    generate(pipe, "sd3", steps=steps)
    assert computed(handle) == tuple(i * steps // count for i in range(count))


def test_a_speed_that_no_run_reaches_is_refused_with_the_patch_intact(pipe):
    handle = fastdit.patch(pipe, speedup=5)
    with pytest.raises(ScheduleError, match="speedup must be at most 4 for 8 steps, got 5"):
        generate(pipe, "sd3", steps=STEPS)
    generate(pipe, "sd3", steps=20)
    assert computed(handle) == (0, 5, 10, 15)
    assert not handle.live_runs()


# ---- with one


@pytest.mark.parametrize(
    ("budget", "count", "order"),
    [
        ({"quality": "matched"}, 6, 2),
        ({"quality": "high"}, 4, 1),
        ({"quality": "balanced"}, 3, 2),
        ({"quality": "fast"}, 3, 2),
        ({"speedup": 1.0}, 8, 1),
        ({"speedup": 1.8}, 4, 1),
        ({"speedup": 3.0}, 2, 1),
        ({"latency": 100.0}, 8, 1),
        ({"latency": 7.0}, 6, 2),
        ({"latency": 4.95}, 4, 1),
        ({"latency": "3100ms"}, 2, 1),
    ],
)
def test_a_book_says_which_plan(pipe, book, budget, count, order):
    """`matched` and `high` go by the upper end of an interval, the knees by the front."""
    plan = next(plan for plan in book.plans if len(plan.computed) == count)
    assert plan.order == order
    handle = fastdit.patch(pipe, **budget, book=book)
    generate(pipe, "sd3", steps=STEPS)
    assert computed(handle) == plan.computed
    assert {o for o in handle.last_run().plan.forecasts if o} in (set(), {order})


def test_a_speed_is_over_the_unpatched_pipeline(pipe, book):
    """Where the patched steps are quicker by themselves, fewer are left out."""
    quicker = dataclasses.replace(book, unpatched_seconds=1.5)
    handle = fastdit.patch(pipe, speedup=1.5, book=quicker)
    generate(pipe, "sd3", steps=STEPS)
    assert computed(handle) == EVERYTHING
    assert "1.50 times as fast" in handle.explain(steps=STEPS).budget


def test_what_no_plan_meets_is_refused(pipe, book):
    fastdit.patch(pipe, latency=1.0, book=book)
    with pytest.raises(ScheduleError, match="no plan of the book takes 1 s a picture; the fastest"):
        generate(pipe, "sd3", steps=STEPS)
    fastdit.patch(pipe, quality="matched", book=dataclasses.replace(book, plans=book.plans[:1]))
    generate(pipe, "sd3", steps=STEPS)  # dense where none qualifies


def test_a_time_is_of_one_size(pipe, book):
    handle = fastdit.patch(pipe, speedup=2, book=dataclasses.replace(book, image_tokens=999))
    refused = pytest.raises(ScheduleError, match="made for 999")
    with handle.budget(latency=100.0), refused:
        generate(pipe, "sd3", steps=STEPS)
    generate(pipe, "sd3", steps=STEPS)
    assert not handle.live_runs()


def test_another_number_of_steps(pipe, book):
    """A speed needs only the times; how far off the pictures are was not measured."""
    handle = fastdit.patch(pipe, speedup=2, book=book)
    generate(pipe, "sd3", steps=12)
    assert computed(handle) == even_steps_of(12, 5)  # 12 / (5 + .7) is 2.1
    assert "so the error is not known" in handle.explain(steps=12).budget
    refused = pytest.raises(ScheduleError, match="a plan book of 12 steps, this one is of 8")
    with handle.budget(quality="high"), refused:
        generate(pipe, "sd3", steps=12)


def even_steps_of(steps, count):
    return tuple(i * steps // count for i in range(count))


def test_another_sampler(book):
    def other():
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )

    pipe = tiny_models.pipeline("sd3", scheduler=other())
    handle = fastdit.patch(pipe, speedup=2, book=book)
    with pytest.warns(UserWarning, match="made under FlowMatchEulerDiscreteScheduler"):
        generate(pipe, "sd3", steps=STEPS)
    refused = pytest.raises(ScheduleError, match="the sampler that the plan book was made under")
    with handle.budget(quality="high"), refused:
        generate(pipe, "sd3", steps=STEPS)


# ---- a budget for one request


def test_a_request_has_its_own(pipe, book):
    handle = fastdit.patch(pipe, speedup=1.3, book=book)
    with handle.budget(quality="high"):
        with handle.budget(speedup=3):
            generate(pipe, "sd3", steps=STEPS)
            assert computed(handle) == (0, 4)
        generate(pipe, "sd3", steps=STEPS)
        assert computed(handle) == (0, 1, 3, 5)
    generate(pipe, "sd3", steps=STEPS)
    assert computed(handle) == (0, 1, 2, 4, 6, 7)


def test_a_request_equals_a_patch_of_its_own(pipe):
    fastdit.patch(pipe, speedup=4)
    expected = generate(pipe, "sd3", steps=STEPS)
    handle = fastdit.patch(pipe, speedup=2)
    with handle.budget(speedup=4):
        same_bits(generate(pipe, "sd3", steps=STEPS), expected)


def test_other_threads_keep_the_patch_s(pipe):
    handle = fastdit.patch(pipe, speedup=2)
    seen = []

    def draw():
        generate(pipe, "sd3", steps=STEPS)
        seen.append(computed(handle))

    with handle.budget(speedup=4):
        other = threading.Thread(target=draw)
        other.start()
        other.join()
        draw()
    assert seen == [(0, 2, 4, 6), (0, 4)]


def test_a_request_beside_sparse_steps(pipe):
    """What RAS plans anew at a run's first call is under the request's budget as well."""
    handle = fastdit.patch(pipe, Budget(speedup=1), fastdit.RAS(ratio=0.5, start=2, resets=()))
    with handle.budget(speedup=2):
        generate(pipe, "sd3", steps=STEPS)
    assert computed(handle) == (0, 2, 4, 6)


def test_a_patch_without_a_budget_has_none(pipe):
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)))
    with (
        pytest.raises(ArgumentError, match="patched with one, such as speedup=2"),
        handle.budget(speedup=2),
    ):
        pass


def test_advice_changes_nothing(pipe):
    own = pipe.scheduler
    advice = fastdit.patch(pipe, speedup=2).recommend(STEPS)
    assert type(advice.scheduler).__name__ == "UniPCMultistepScheduler"
    assert pipe.scheduler is own


def test_advice_of_a_search_is_told(pipe, book):
    advice = [{"steps": 8, "solver": s, "loss": x} for s, x in (("A", 0.2), ("B", 0.1))]
    found = dataclasses.replace(book, provenance={"advice": advice})
    handle = fastdit.patch(pipe, speedup=2, book=PlanBook.from_json(found.to_json()))
    assert "B was the nearest to the solution (0.1)" in handle.recommend(8).why
    assert "nearest" not in handle.recommend(9).why
    bad = dataclasses.replace(book, provenance={"advice": [{"steps": 8}]})
    with pytest.raises(ScheduleError, match="advice"):
        PlanBook.from_json(bad.to_json())


# ---- a guard


def latents(pipe, steps=STEPS, name="sd3"):
    """Of two pictures."""
    return generate(pipe, name, steps=steps, batch=2, prompt_per_image=True)


def guarded(pipe, book, bounds):
    """A plan that computes every second step under a guard with these bounds at the steps 4 and 6."""
    plan = Plan((0, 2, 4, 6), 1, 1.5, 1.2, 1.9, bounds)
    found = dataclasses.replace(book, plans=(book.plans[0], plan))
    return fastdit.patch(pipe, speedup=1.8, book=found, guard=True)


def test_a_guard_that_never_fires_changes_nothing(pipe, book):
    fastdit.patch(pipe, speedup=2)
    expected = latents(pipe)
    handle = guarded(pipe, book, (1e9, 1e9))
    same_bits(latents(pipe), expected)
    assert computed(handle) == (0, 2, 4, 6)


def test_a_guard_that_fires_computes_all_later_steps(pipe, book):
    handle = guarded(pipe, book, (0.0, 0.0))
    found = latents(pipe)
    assert computed(handle) == (0, 2, 4, 5, 6, 7)
    plan = Plan((0, 2, 4, 5, 6, 7), 1, 1.5, 1.2, 1.9)
    fastdit.patch(pipe, speedup=1.3, book=dataclasses.replace(book, plans=(book.plans[0], plan)))
    same_bits(found, latents(pipe))


@pytest.mark.parametrize(
    ("name", "rows", "passed"),
    [
        ("sd3", [[2e9, 0.0, 0.0, 0.0]], [4, 4, 4, 2, 4, 2]),
        ("flux", [[0.0, 0.0], [2e9, 0.0]], [2, 2, 2, 2, 2, 2, 1, 1, 2, 2, 1, 1]),
    ],
    ids=["one call a step", "two calls"],
)
def test_only_the_pictures_that_are_off_are_computed(name, rows, passed):
    """Each of a batch equals the same picture drawn alone: one is guarded, the other is not.

    Of that one a single branch of guidance was off. Both are computed: their difference is scaled. They pass the model
    in a batch of their own, whose sums may be rounded otherwise.
    """
    pipe = tiny_models.pipeline(name)
    book, alone = book_of(pipe.transformer), []
    for fires in (True, False):
        guarded(pipe, book, (0.0, 0.0) if fires else (1e9, 1e9))
        alone.append(latents(pipe, name=name))
    handle = guarded(pipe, book, (1e9, 1e9))
    calls, seen = itertools.cycle(rows), []
    first = pipe.transformer.pos_embed if name == "sd3" else pipe.transformer.x_embedder
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            "fastdit.runtime.guard.deviations", lambda *seen: torch.tensor(next(calls))
        )
        found = latents(pipe, name=name)
    hook.remove()
    assert computed(handle) == (0, 2, 4, 5, 6, 7)
    assert seen == passed
    assert distance(found[0], alone[0][0]) < 1e-6
    same_bits(found[1], alone[1][1])
    assert not torch.equal(alone[0], alone[1])


def test_rows_that_are_no_whole_number_of_pictures_fire_all():
    guard = Guard({2: 1e-3})
    guard.pictures = 2
    guard.watch(2, torch.zeros(3, 1), torch.tensor([[1.0], [0.0], [0.0]]))
    assert guard.fired(3) == (0, 1)
    assert guard.rows_of((0,), 3) == [0, 1, 2]
    assert guard.rows_of((0,), 4) == [0, 2]


def test_all_calls_of_a_step_hear_the_same_answer_and_wait_for_nothing():
    """On a device it may arrive between two of them."""
    guard = Guard({2: 0.0})
    guard.copied = SimpleNamespace(query=lambda: False)
    guard.watch(2, torch.zeros(1, 1), torch.ones(1, 1))
    assert not guard.fired(3)
    guard.copied.query = lambda: True
    assert not guard.fired(3)
    assert guard.fired(4) == (0,)


def test_what_is_no_number_is_off():
    guard = Guard({2: 1e9})
    guard.watch(1, torch.full((2, 3), math.nan), torch.ones(2, 3))
    assert not guard.fired(2)  # no bound there
    guard.watch(2, torch.tensor([[math.nan], [1.0]]), torch.ones(2, 1))
    assert guard.fired(3) == (0,)
    assert guard.rows.tolist() == [True, False]


@pytest.mark.parametrize(("family", "alone"), [("flux", True), ("lumina", False)])
def test_rows_pass_alone_where_a_call_s_arguments_are_known(family, alone, monkeypatch):
    """Of models whose calls have others the batch passes whole, with the same pictures."""
    pipe = tiny_models.pipeline(family)
    scheduler = type(pipe.scheduler).__name__
    book = book_of(pipe.transformer, scheduler=scheduler)

    def draw(bounds):
        handle = guarded(pipe, book, bounds)
        return handle, generate(pipe, family, steps=STEPS, batch=2, prompt_per_image=True)

    calm, fired = draw((1e9, 1e9))[1], draw((0.0, 0.0))[1]
    rows = lambda drawn, given: torch.tensor([2e9, 0.0, 2e9, 0.0])[: len(given)]  # noqa: E731
    monkeypatch.setattr("fastdit.runtime.guard.deviations", rows)
    passed, known = [], guard.rows_of_call
    monkeypatch.setattr(
        "fastdit.runtime.guard.rows_of_call",
        lambda *given: passed.append(known(*given)) or passed[-1],
    )
    handle, found = draw((1e9, 1e9))
    assert computed(handle) == (0, 2, 4, 5, 6, 7)
    assert [each is not None for each in passed] == [alone] * len(passed)
    assert len(passed) >= 2
    assert distance(found[0], fired[0]) < 1e-6
    assert distance(found[1], calm[1]) < 1e-6
    assert distance(calm[0], fired[0]) > 1e-5


def test_a_guard_catches_a_bad_plan_where_it_is_bad(pipe, book):
    """How far each picture's line is off is found by a hook on the model; the bound lies between two pictures."""
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda *given: outputs.append(given[2][0]))
    fastdit.patch(pipe, speedup=2)
    unguarded = latents(pipe)
    hook.remove()
    sigmas = pipe.scheduler.sigmas.double()
    at = (sigmas[4] - sigmas[0]) / (sigmas[2] - sigmas[0])
    drawn, given = torch.lerp(outputs[0].double(), outputs[2].double(), at), outputs[4].double()
    off = (drawn - given).flatten(1).norm(dim=1) / given.flatten(1).norm(dim=1)
    off = off.view(2, 2).amax(dim=0)  # of each picture there are two rows
    low, high = off.sort().values
    bad = int(off.argmax())
    handle = guarded(pipe, book, (float((low + high) / 2), 1e9))
    passed = []
    hook = pipe.transformer.pos_embed.register_forward_pre_hook(
        lambda module, given: passed.append(len(given[0]))
    )
    found = latents(pipe)
    hook.remove()
    assert passed == [4, 4, 4, 2, 4, 2]
    assert computed(handle) == (0, 2, 4, 5, 6, 7)
    same_bits(found[1 - bad], unguarded[1 - bad])
    assert distance(found[bad], unguarded[bad]) > 1e-4


@pytest.mark.parametrize("method", [fastdit.RAS(), fastdit.RALU.preset("sd3-2x")])
@pytest.mark.parametrize("budget", [{"quality": "high"}, {"latency": 1.0}])
def test_what_a_book_promises_is_refused_beside_a_part_of_the_tokens(pipe, book, budget, method):
    """When patching, and for a request."""
    ((name, _),) = budget.items()
    refused = pytest.raises(
        fastdit.CompositionError, match=f"Budget {name}=.* {method.name} computes others; give a sp"
    )
    before = snapshot(pipe.transformer)
    with refused:
        fastdit.patch(pipe, Budget(**budget, book=book), method)
    assert snapshot(pipe.transformer) == before
    handle = fastdit.patch(pipe, Budget(speedup=2, book=book), method)
    with refused, handle.budget(**budget):
        pass
    assert f"beside {method.name}, so neither" in handle.explain(32, 32).budget


def test_a_guard_in_a_stage_is_refused(book):
    with pytest.raises(ArgumentError, match=r"guard=True .* Budget in a stage"):
        fastdit.PerStage(Budget(speedup=2, book=book, guard=True))


def test_a_guard_needs_the_book_s_steps(pipe, book):
    guarded(pipe, book, (1.0, 1.0))
    with pytest.raises(ScheduleError, match="guard=True needs a plan book of 12 steps"):
        latents(pipe, steps=12)


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speedup": 2, "quality": "high"}, "exactly one of speedup, quality, latency"),
        ({"speedup": 0.5}, "speedup must be a number of at least 1, got 0.5"),
        ({"speedup": math.nan}, "speedup must be a number"),
        ({"speedup": True}, "speedup must be a number"),
        ({"quality": "best"}, "quality must be one of matched, high, balanced, fast, got 'best'"),
        ({"quality": "high"}, "quality needs a plan book"),
        ({"latency": 1.0}, "latency needs a plan book"),
        ({"latency": "1h"}, "latency must be a number or a text in s, ms, got '1h'"),
        ({"latency": 0}, "latency must be a number of seconds, above 0"),
        ({"vram": "+2GiB"}, "vram belongs to a budget"),
        ({"book": "book.json"}, "book belongs to a budget"),
        ({"guard": True}, "guard belongs to a budget"),
        ({"speedup": 2, "guard": True}, "True needs a plan book"),
        ({"speedup": 2, "vram": "much"}, "vram must be a number or a text in MB"),
        ({"speedup": 2, "vram": -1}, "max_cache_bytes must be a whole number"),
    ],
)
def test_refused_budgets_change_nothing(pipe, given, message):
    before = snapshot(pipe.transformer)
    with pytest.raises(ArgumentError, match=message):
        fastdit.patch(pipe, **given)
    assert snapshot(pipe.transformer) == before


def test_a_budget_is_in_place_of_methods(pipe):
    with pytest.raises(ArgumentError, match="in place of methods, got RAS beside it"):
        fastdit.patch(pipe, fastdit.RAS(), speedup=2)


def test_a_book_of_another_model_is_refused(pipe, book):
    before = snapshot(pipe.transformer)
    other = dataclasses.replace(book, model=("FluxTransformer2DModel", "00000000"))
    for given in ({"speedup": 2, "book": other}, {}):
        methods = () if given else (Budget(speedup=2, book=other),)
        with pytest.raises(ScheduleError, match="the plan book is of a FluxTransformer2DModel"):
            fastdit.patch(pipe, *methods, **given)
    assert snapshot(pipe.transformer) == before


def test_texts_of_seconds_and_bytes():
    assert parsed("latency", "0.8s", SECONDS) == 0.8
    assert parsed("latency", "800 ms", SECONDS) == pytest.approx(0.8)
    assert parsed("vram", "+2GiB", BYTES) == 2**31
    assert parsed("vram", 5, BYTES) == 5


def test_caches_over_the_bound_are_refused(pipe):
    fastdit.patch(pipe, speedup=2, vram=1)
    with pytest.raises(fastdit.FastDiTError, match="bytes"):
        generate(pipe, "sd3", steps=STEPS)


# ---- files


def test_a_book_is_read_as_it_was_written(book, tmp_path):
    book.save(tmp_path / "book.json")
    found = PlanBook.load(tmp_path / "book.json")
    assert found.to_json() == book.to_json()
    assert found.plans == book.plans
    assert sum('"computed"' in line for line in book.to_json().splitlines()) == len(book.plans)


FAULTS = {
    "format": ("format", "fastdit.schedule"),
    "version": ("version", 2),
    "model": ("model", ["SD3Transformer2DModel"]),
    "scheduler": ("scheduler", 3),
    "steps": ("steps", True),
    "image_tokens": ("image_tokens", 0),
    "step_seconds": ("step_seconds", [0.0, 0.0]),
    "unpatched_seconds": ("unpatched_seconds", 0.0),
    "other_seconds": ("other_seconds", None),
    "plans": ("plans", []),
    "provenance": ("provenance", []),
}
PLAN_FAULTS = {
    "computed": [1, 2],
    "order": 3,
    "ratio": -1.0,
    "low": 5.0,
    "bounds": [1.0],
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_books_are_refused_by_name(book, tmp_path, name):
    key, value = FAULTS[name]
    document = json.loads(book.to_json())
    (tmp_path / "book.json").write_text(json.dumps(document | {key: value}))
    with pytest.raises(ScheduleError, match=rf"book\.json: .*{name}"):
        PlanBook.load(tmp_path / "book.json")
    del document[key]
    with pytest.raises(ScheduleError):
        PlanBook.from_json(json.dumps(document))


@pytest.mark.parametrize("name", PLAN_FAULTS)
def test_faulty_plans_are_refused_by_name(book, name):
    document = json.loads(book.to_json())
    document["plans"][1][name] = PLAN_FAULTS[name]
    with pytest.raises(ScheduleError, match=name):
        PlanBook.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "[" * 100_000])
def test_other_texts_are_refused(text):
    with pytest.raises(ScheduleError):
        PlanBook.from_json(text)


# ---- calibration


def test_places_of_computed_steps():
    assert even_steps(10, 4) == [0, 2, 5, 7]
    assert early_steps(10, 4)[:2] == [0, 1]
    early = np.diff(early_steps(28, 9))
    assert early[0] == 1
    assert early[-1] > early[1]
    # All that changes does so between the steps 4 and 6.
    assert changing_steps([9, 0, 0, 0, 0, 1, 1, 0], 3) == [0, 1, 5, 6]


def test_the_interval_of_a_ratio():
    """Student's t of two values has 12.706 standard errors."""
    mean, low, high = interval(np.log([1.0, 4.0]))
    assert mean == pytest.approx(2)
    assert math.log(high / mean) == pytest.approx(12.7062 * math.log(2), rel=1e-4)
    assert mean / low == pytest.approx(high / mean)


@pytest.mark.slow
def test_a_calibrated_book_has_the_measured_errors(monkeypatch):
    """Each ratio is that of the latents' distances to the solution, which is drawn here anew."""
    monkeypatch.setattr("fastdit.search.solution.STEPS", 12)
    monkeypatch.setattr("fastdit.search.trial.REPEATS", 1)
    monkeypatch.setattr("fastdit.search.calibrate.QUANTILES", (0.5,))
    pipe = fastdit.tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "a blue square"]
    seen = []
    watch = lambda *at: seen.append(at)  # noqa: E731
    book = calibrate(pipe, prompts, 8, shares=(0.5,), watch=watch, threads=torch.get_num_threads())
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert [len(plan.computed) for plan in book.plans] == [8, 4]
    assert book.step_seconds[0] > book.step_seconds[1] >= 0
    assert book.unpatched_seconds > 0

    def draw(steps):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        given = {"generator": generators, "output_type": "latent"}
        return pipe(prompts, num_inference_steps=steps, **given).images

    with solution.solving(pipe, 12) as steps:
        truth = draw(steps)
    handle = fastdit.patch(pipe, speedup=book.speedup(4, 8), book=book)
    found = draw(8)
    assert computed(handle) == book.plans[1].computed
    handle.unpatch()
    off = [(each - truth).flatten(1).norm(dim=1) for each in (found, draw(8))]
    ratio = float((off[0] / off[1]).log().mean().exp())
    assert ratio == pytest.approx(book.plans[1].ratio, rel=1e-3)
    assert len(book.plans[1].bounds) == 2
    for margin, steps in (
        (1.001, 4),
        (0.999, 8),
    ):  # the bounds are tight but for half as much again
        plan = dataclasses.replace(
            book.plans[1], bounds=tuple(margin / MARGIN * each for each in book.plans[1].bounds)
        )
        tight = dataclasses.replace(book, plans=(book.plans[0], plan))
        handle = fastdit.patch(pipe, speedup=book.speedup(4, 8), book=tight, guard=True)
        draw(8)
        assert (len(computed(handle)) > 4) == (steps > 4)
        handle.unpatch()


def test_a_calibration_leaves_nothing_behind(pipe):
    """Not where it breaks off, and it takes no patch away."""
    before = snapshot(pipe.transformer)
    own = pipe.scheduler
    with pytest.raises(TypeError, match="not callable"):  # it has no tokenizer to draw by
        calibrate(pipe, ["a", "b"], 8)
    assert pipe.scheduler is own
    assert snapshot(pipe.transformer) == before
    handle = fastdit.patch(pipe, speedup=2)
    with pytest.raises(ArgumentError, match="must not be patched"):
        calibrate(pipe, ["a", "b"], 8)
    assert fastdit.report(pipe).methods == handle.report().methods


@pytest.mark.parametrize(("steps", "prompts"), [(4, ["a", "b"]), (8, ["a"])])
def test_too_little_to_calibrate_by_is_refused(pipe, steps, prompts):
    with pytest.raises(ArgumentError, match="steps must be at least 8 and prompts at least 2"):
        calibrate(pipe, prompts, steps)


def test_the_table_of_a_book_says_what_each_quality_chooses(book):
    rows = {count: names for *_, count, names in _rows(table(book))}
    assert rows["6 of 8"] == "matched"
    assert rows["4 of 8"] == "high"
    assert rows["3 of 8"] == "balanced, fast"


def _rows(shown):
    columns = [list(column.cells) for column in shown.columns]
    return zip(*columns[1:-1], columns[0], columns[-1], strict=True)


# ---- plans beyond whole steps


def component_schedule(transformer):
    """Attention alone is reused at odd steps, the steps 6 and 7 are drawn as a whole."""
    spec = find_adapter(transformer).spec(transformer)
    bits, orders, names = {}, {}, {}
    for kind in spec.kinds:
        bits[kind.name] = np.ones((STEPS, kind.count, len(kind.components)), dtype=bool)
        orders[kind.name] = np.zeros(bits[kind.name].shape, dtype=np.uint8)
        names[kind.name] = kind.components
        bits[kind.name][1::2, :, 0] = False
        bits[kind.name][6:] = False
        orders[kind.name][6:] = 1
    return Schedule.from_bits(bits, names, orders=orders)


RALU_ARGUMENTS = {"steps": [3, 0, 5], "ends": [0.3, 0.45, 1.0], "lift": "spectrum"}
RAS_ARGUMENTS = {"ratio": 0.5, "start": 2, "align": 1}


def composed_book(transformer):
    """Beside whole steps a schedule of components, one with a part of the tokens, and one with a lower resolution."""
    schedule = component_schedule(transformer)
    steps, own = tuple(range(6)), (0, 0, 2, 0, 1, 0, 1, 2)
    plans = (
        Plan(EVERYTHING, 1, 1.0, 1.0, 1.0),
        Plan(steps, 1, 1.1, 1.0, 1.2, seconds=5.0, arithmetic=0.7, schedule=schedule),
        Plan(steps, 1, 1.2, 1.1, 1.3, seconds=4.0, schedule=schedule, ras=RAS_ARGUMENTS),
        Plan((0, 1, 3, 5), own, 1.3, 1.2, 1.4, seconds=3.0),
        Plan((0, 1, 2, 3, 4, 6), 1, 1.4, 1.3, 1.5, seconds=2.0, ralu=RALU_ARGUMENTS),
    )
    return book_of(transformer, plans=plans)


def test_a_plan_runs_as_the_methods_that_it_says(pipe, tmp_path):
    """A request's plan has the pictures of a patch of those methods, from a book that was written and read."""
    composed_book(pipe.transformer).save(tmp_path / "book.json")
    book = PlanBook.load(tmp_path / "book.json")
    assert book.to_json() == composed_book(pipe.transformer).to_json()
    schedule = component_schedule(pipe.transformer)
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    own = Schedule.of_steps(spec, STEPS, (0, 1, 3, 5), (0, 0, 2, 0, 1, 0, 1, 2))
    six = Schedule.of_steps(spec, STEPS, (0, 1, 2, 3, 4, 6), 1)
    ras, ralu = fastdit.RAS(**RAS_ARGUMENTS), fastdit.RALU(**RALU_ARGUMENTS)
    alike = {
        8 / 5: [Cached(schedule)],
        2: [Cached(schedule), ras],
        8 / 3: [Cached(own)],
        4: [Cached(six), ralu],
    }
    expected = {}
    for speedup, methods in alike.items():
        fastdit.patch(pipe, *methods)
        expected[speedup] = generate(pipe, "sd3", steps=STEPS)
    assert len({each.numpy().tobytes() for each in expected.values()}) == len(alike)
    handle = fastdit.patch(pipe, speedup=1, book=book)
    for speedup, methods in alike.items():
        with handle.budget(speedup=speedup):
            same_bits(generate(pipe, "sd3", steps=STEPS), expected[speedup])
        beside = [method.name for method in methods[1:]]
        assert list(handle.report().methods) == ["Budget", *beside]
        own = fastdit.patch(pipe, speedup=speedup, book=book)
        told = own.explain(steps=STEPS)
        assert f"{speedup:.2f} times as fast" in told.budget
        assert all(name in told.budget for name in beside)
        assert list(told.methods) == ["Budget", *beside]
        handle = fastdit.patch(pipe, speedup=1, book=book)
    fastdit.unpatch(pipe)


def test_a_guard_chooses_whole_steps(pipe):
    book = composed_book(pipe.transformer)
    handle = fastdit.patch(pipe, speedup=2, book=book, guard=True)
    generate(pipe, "sd3", steps=STEPS)
    assert computed(handle) == (0, 1, 3, 5)


def test_a_request_s_book_is_of_the_model(pipe, book):
    handle = fastdit.patch(pipe, Budget(speedup=2, book=book))
    other = dataclasses.replace(book, model=("FluxTransformer2DModel", "0"))
    refused = pytest.raises(ScheduleError, match="plan book is of a FluxTransformer2DModel")
    with refused, handle.budget(speedup=2, book=other):
        pass


def test_a_request_has_no_plans_that_the_patch_was_not_made_for(pipe, book):
    handle = fastdit.patch(pipe, speedup=2, book=book)
    refused = pytest.raises(
        ArgumentError, match="plans of RALU and RAS, that of the patch has none"
    )
    with refused, handle.budget(speedup=2, book=composed_book(pipe.transformer)):
        pass


def test_a_plan_that_decides_tokens_is_refused_beside_a_method_that_does(pipe):
    before = snapshot(pipe.transformer)
    book = composed_book(pipe.transformer)
    with pytest.raises(fastdit.CompositionError, match="RAS and RAS both decide 'rows'"):
        fastdit.patch(pipe, Budget(speedup=2, book=book), fastdit.RAS())
    assert snapshot(pipe.transformer) == before


HOSTILE = {
    "seconds": (1, {"seconds": -1.0}, "seconds"),
    "slower": (1, {"seconds": 9.0}, "ever faster"),
    "order": (3, {"order": [1, 2]}, "order"),
    "unknown": (1, {"code": "print()"}, "known fields"),
    "code": (2, {"ras": {"ratio": 0.5, "__class__": "os"}}, "ras must be an object of"),
    "nested": (2, {"ras": {"ratio": {"a": 1}}}, r"ras\.ratio"),
    "other steps": (1, {"computed": [0, 1]}, "computes at"),
    "schedule": (1, {"schedule": {"format": "fastdit.schedule"}}, "schedule must have exactly"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plans_are_refused_when_read(pipe, name):
    index, change, message = HOSTILE[name]
    document = json.loads(composed_book(pipe.transformer).to_json())
    document["plans"][index] |= change
    with pytest.raises(ScheduleError, match=message):
        PlanBook.from_json(json.dumps(document))


def test_a_damaged_schedule_of_a_plan_is_refused(pipe):
    document = json.loads(composed_book(pipe.transformer).to_json())
    kind = next(iter(document["plans"][1]["schedule"]["blocks"].values()))
    kind["bits"][1] = kind["bits"][1][::-1]
    with pytest.raises(ScheduleError, match="sha256 does not match"):
        PlanBook.from_json(json.dumps(document))


def test_arguments_that_a_method_refuses_change_nothing(pipe):
    """A book may be well formed and ask for what there is not: of a method, or of another model."""
    before = snapshot(pipe.transformer)
    book = composed_book(pipe.transformer)
    plans = list(book.plans)
    plans[2] = dataclasses.replace(plans[2], ras={"ratio": 7})
    with pytest.raises(ScheduleError, match="a plan of the book: ras: ratio must be"):
        fastdit.patch(pipe, speedup=2, book=dataclasses.replace(book, plans=tuple(plans)))
    layers = {"blocks": next(iter(component_schedule(pipe.transformer).layers.values()))}
    plans[2] = dataclasses.replace(book.plans[1], schedule=Schedule(layers), seconds=4.0)
    with pytest.raises(ScheduleError, match="the schedule is for block kinds"):
        fastdit.patch(pipe, speedup=2, book=dataclasses.replace(book, plans=tuple(plans)))
    assert snapshot(pipe.transformer) == before


# ---- guidance


def guided(book, scale):
    return dataclasses.replace(book, guidance={"guidance": scale})


@pytest.mark.parametrize("budget", [{"speedup": 1.8}, {"latency": 4.95}])
def test_at_another_guidance_steps_are_evenly_spread(pipe, book, budget):
    """A book's plans were chosen at one; the pipeline's call says which it has, and so does its default."""
    book = guided(book, 5.0)
    handle = fastdit.patch(pipe, **budget, book=book)
    generate(pipe, "sd3", steps=STEPS, guidance_scale=5.0)
    assert computed(handle) == book.plans[2].computed
    with pytest.warns(UserWarning, match="of another run: guidance is 7, it was made for 5"):
        found = generate(pipe, "sd3", steps=STEPS, guidance_scale=7.0)
    assert computed(handle) == tuple(even_steps(STEPS, 4))
    handle.unpatch()
    fastdit.patch(pipe, speedup=2)
    same_bits(found, generate(pipe, "sd3", steps=STEPS, guidance_scale=7.0))


def test_other_guidance_keeps_the_book_s_times(pipe, book):
    """A patched step of this book takes less than the unpatched one: six steps are twice as fast, and six times is
    within reach."""
    book = dataclasses.replace(book, unpatched_seconds=1.5, step_seconds=(1.0, 0.0))
    handle = fastdit.patch(pipe, speedup=2, book=guided(book, 5.0))
    for speed, count in ((2, 6), (6, 2)):
        with handle.budget(speedup=speed), pytest.warns(UserWarning, match="of another run"):
            generate(pipe, "sd3", steps=STEPS, guidance_scale=7.0)
        assert computed(handle) == tuple(even_steps(STEPS, count))


@pytest.mark.parametrize("scale", [np.float32(7.0), torch.tensor(7.0)])
def test_a_guidance_may_be_a_scalar_of_any_kind(pipe, book, scale):
    fastdit.patch(pipe, speedup=1.8, book=guided(book, 5.0))
    with pytest.warns(UserWarning, match="guidance is 7"):
        generate(pipe, "sd3", steps=STEPS, guidance_scale=scale)


@pytest.mark.parametrize(
    "budget",
    [{"quality": "high"}, {"speedup": 1.8, "guard": True}, {"latency": 4.95, "guard": True}],
)
def test_what_a_book_promises_is_of_its_guidance(pipe, book, budget):
    handle = fastdit.patch(pipe, **budget, book=guided(book, 5.0))
    with pytest.raises(ScheduleError, match="guidance is 7, it was made for 5"):
        generate(pipe, "sd3", steps=STEPS, guidance_scale=7.0)
    assert not handle.live_runs()
    generate(pipe, "sd3", steps=STEPS, guidance_scale=5.0)


def test_a_request_s_book_has_a_guidance_too(pipe, book):
    handle = fastdit.patch(pipe, speedup=2)
    with (
        handle.budget(speedup=1.8, book=guided(book, 5.0)),
        pytest.warns(UserWarning, match="of another run"),
    ):
        generate(pipe, "sd3", steps=STEPS, guidance_scale=7.0)


def test_books_in_the_package_say_their_guidance():
    for path in PACKAGED.glob("*.json"):
        found = PlanBook.load(path)
        assert found.guidance == {"guidance": GUIDANCE_SCALE}
        assert len(found.sigmas) == found.steps


@pytest.mark.parametrize("guidance", [[7.0], {"scale": 7.0}, {"guidance": "7"}])
def test_what_is_no_guidance_is_refused(book, guidance):
    document = json.loads(book.to_json()) | {"guidance": guidance}
    with pytest.raises(ScheduleError, match="guidance must be numbers by guidance and true"):
        PlanBook.from_json(json.dumps(document))
