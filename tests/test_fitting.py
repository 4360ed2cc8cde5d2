"""Fitted weights: against least squares over the pixels, in runs against a loop by hand, and in a book's file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler

import fastdit
import tiny_models
from contract import distance
from fastdit import Budget, PlanBook, ScheduleError
from fastdit.schedules.book import Plan, config_hash
from fastdit.schedules.solvers import step_sigmas
from fastdit.search import fitting
from fastdit.search.fitting import Way, fit, improved
from fastdit.search.told import Told, told_of_steps
from tiny_models import generate

STEPS = 8
SIGMAS = (1.0, 0.93, 0.85, 0.74, 0.6, 0.45, 0.28, 0.1, 0.0)
LENGTHS = np.diff(SIGMAS)
COMPUTED = (0, 2, 3, 6)


def runs(pictures=3, size=40):
    """Outputs that bend, [steps, pictures, size], and a solution's way that ends elsewhere."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 1, pictures, size))
    at = np.array(SIGMAS[:-1])[:, None, None]
    outputs = a + b * np.sin(3 * at) + c * at**3
    moved = np.cumsum(LENGTHS[:, None, None] * outputs, axis=0)
    return outputs, moved + 0.05 * rng.normal(size=moved.shape)


def moved_by(outputs, computed, weights):
    """How far a run has come after each step, by a loop."""
    at, found = np.zeros_like(outputs[0]), []
    for step, length in enumerate(LENGTHS):
        if step in computed:
            velocity = outputs[step]
        else:
            nodes = [node for node in reversed(computed) if node < step]
            velocity = sum(w * outputs[n] for n, w in zip(nodes, weights[step], strict=False))
        at = at + length * velocity
        found.append(at)
    return np.stack(found)


# ---- the fit


def test_a_fit_is_least_squares_from_one_computed_step_to_the_next(monkeypatch):
    """Over all pixels of all pictures, each over the length of its way; the sum of the weights stays 1."""
    monkeypatch.setattr(fitting, "RIDGE", 0.0)
    outputs, moved = runs()
    found = fit(Way.of(SIGMAS, outputs, moved), COMPUTED)
    assert found.weights.keys() == {1, 4, 5, 7}
    assert found.weights[1] == (1.0,)
    assert found.weights[4] == found.weights[5]
    length = np.linalg.norm(moved[-1], axis=-1)[:, None]
    made = moved_by(outputs, COMPUTED, found.weights)
    for first, last in ((4, 5), (7, 7)):
        nodes = [node for node in reversed(COMPUTED) if node < first][:3]
        span = LENGTHS[first : last + 1].sum()
        goal = (moved[last] - made[first - 1]) / span - outputs[nodes[0]]
        columns = [(outputs[node] - outputs[nodes[0]]) / length for node in nodes[1:]]
        matrix = np.stack([each.ravel() for each in columns], axis=1)
        best = np.linalg.lstsq(matrix, (goal / length).ravel(), rcond=None)[0]
        assert found.weights[first] == pytest.approx([1 - best.sum(), *best], rel=1e-6)
    left = ((moved[-1] - made[-1]) / length) ** 2
    assert found.left == pytest.approx(left.sum(), rel=1e-9)


def test_weights_stay_near_the_line_where_nothing_is_won(monkeypatch):
    """A solution that the line comes to exactly asks for no other weights; a large ridge allows none."""
    outputs, moved = runs()
    line = {1: (1.0,), **dict.fromkeys((4, 5, 7), ())}
    for step in (4, 5, 7):
        last, before = [node for node in reversed(COMPUTED) if node < step][:2]
        share = (SIGMAS[step] - SIGMAS[last]) / (SIGMAS[last] - SIGMAS[before])
        line[step] = (1 + share, -share)
    exact = moved_by(outputs, COMPUTED, line)
    found = fit(Way.of(SIGMAS, outputs, exact), COMPUTED)
    assert found.left < 1e-12
    monkeypatch.setattr(fitting, "RIDGE", 1e9)
    held = fit(Way.of(SIGMAS, outputs, moved), COMPUTED)
    for weights in (found.weights, held.weights):
        np.testing.assert_allclose(
            moved_by(outputs, COMPUTED, weights)[-1], exact[-1], rtol=1e-5, atol=1e-7
        )


def test_where_a_run_stays_its_last_output_is_repeated():
    """A gap between two steps at one sigma has no length to fit to."""
    sigmas = (1.0, 0.8, 0.6, 0.3, 0.3, 0.0)
    outputs = runs()[0][:5]
    moved = np.cumsum(np.diff(sigmas)[:, None, None] * outputs, axis=0)
    assert fit(Way.of(sigmas, outputs, moved), (0, 1, 2, 4)).weights == {3: (1.0, 0.0, 0.0)}


def test_steps_are_moved_while_less_is_left():
    outputs, moved = runs()
    way = Way.of(SIGMAS, outputs, moved)
    best = improved(way, (0, 1, 2, 3))
    assert best.left < fit(way, (0, 1, 2, 3)).left
    assert len(best.computed) == 4
    assert best.computed[0] == 0
    assert best.left == fit(way, best.computed).left


def test_pictures_add_up():
    outputs, moved = runs()
    whole = Way.of(SIGMAS, outputs, moved)
    parts = [Way.of(SIGMAS, outputs[:, i], moved[:, i]) for i in (slice(0, 2), slice(2, 3))]
    np.testing.assert_allclose((parts[0] + parts[1]).gram, whole.gram, rtol=1e-12)


# ---- what a scheduler is told


@pytest.mark.parametrize("unipc", [False, True])
def test_what_a_run_was_told(unipc):
    """Euler adds its outputs up, UniPC does not; a way is read between the run's own steps."""
    pipe = tiny_models.pipeline("sd3")
    if unipc:
        pipe.scheduler = fastdit.recommend(pipe, STEPS).scheduler
    told, seen = Told(), []
    with told_of_steps(pipe.scheduler, told):
        generate(
            pipe,
            "sd3",
            steps=STEPS,
            callback_on_step_end=lambda p, i, t, given: seen.append(given["latents"]) or given,
        )
    sigmas = [*step_sigmas(pipe.scheduler), 0.0]
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) is unipc
    assert told.adds(sigmas) is not unipc
    way = told.way(sigmas, sigmas)
    np.testing.assert_allclose(way[-1] - way[0], (seen[-1] - seen[0]).numpy(), atol=1e-5)
    middle = [sigmas[0], (sigmas[3] + sigmas[4]) / 2, 0.0]
    np.testing.assert_allclose(told.way(sigmas, middle)[0], (way[2] + way[3]) / 2, atol=1e-5)


# ---- runs


PLAN = Plan((0, 2, 5), 1, 0.9, 0.8, 0.99)
DRAWN = {1: (1.0,), 3: (1.7, -0.7), 4: (1.5, -0.5), 6: (2.5, -1.9, 0.4), 7: (0.6, 0.4)}


def book_of(pipe, sigmas=None):
    if sigmas is None:
        generate(pipe, "sd3", steps=STEPS)
        sigmas = step_sigmas(pipe.scheduler)
    transformer = pipe.transformer
    plans = (
        Plan(tuple(range(STEPS)), 1, 1.0, 1.0, 1.0),
        dataclasses.replace(PLAN, weights=DRAWN),
    )
    model = type(transformer).__name__, config_hash(transformer)
    scheduler = "FlowMatchEulerDiscreteScheduler"
    return PlanBook(
        model, scheduler, STEPS, 32, 1.0, (1.0, 0.0), 0.0, plans, {}, tuple(map(float, sigmas))
    )


def by_hand(monkeypatch, weights):
    """A stock pipeline whose model gives sums of its earlier outputs at the drawn steps."""
    pipe = tiny_models.pipeline("sd3")
    stock, outputs, step = pipe.transformer.forward, {}, iter(range(STEPS))

    def forward(*args, **kwargs):
        here = next(step)
        if here in PLAN.computed:
            outputs[here] = stock(*args, **kwargs)[0].double()
            return (outputs[here].float(),)
        nodes = sorted((node for node in outputs if node < here), reverse=True)
        total = sum(w * outputs[n] for n, w in zip(nodes, weights[here], strict=False))
        return (total.float(),)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    return generate(pipe, "sd3", steps=STEPS)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_run_draws_by_the_book_s_weights(monkeypatch, guard, backend):
    pipe = tiny_models.pipeline("sd3")
    book = book_of(pipe)
    if guard:
        calm = dataclasses.replace(book.plans[1], bounds=(1e9,))
        book = dataclasses.replace(book, plans=(book.plans[0], calm))
    expected = by_hand(monkeypatch, DRAWN)
    pipe.scheduler.set_timesteps(2 * STEPS)  # what comes is told all the same
    handle = fastdit.patch(pipe, speedup=2.5, book=book, guard=guard, backend=backend)
    foreseen = handle.explain(steps=STEPS).cache_bytes
    for _ in range(2):
        assert distance(generate(pipe, "sd3", steps=STEPS), expected) < 1e-5
    assert (handle.last_run().programs > 0) is (backend is None)
    assert handle.last_run().plan.forecasts == (0, 1, 0, 1, 1, 0, 2, 1)
    assert handle.explain(steps=STEPS).cache_bytes == foreseen
    plain = dataclasses.replace(book.plans[1], weights=None)
    plain = dataclasses.replace(book, plans=(book.plans[0], plain))
    lines = fastdit.patch(pipe, speedup=2.5, book=plain, guard=guard, backend="reference")
    assert lines.explain(steps=STEPS).cache_bytes < foreseen  # of two outputs, not three


def line():
    """The plan without weights."""
    pipe = tiny_models.pipeline("sd3")
    book = book_of(pipe)
    plain = dataclasses.replace(book.plans[1], weights=None)
    return dataclasses.replace(book, plans=(book.plans[0], plain))


@pytest.mark.parametrize("other", ["scheduler", "sigmas"])
@pytest.mark.filterwarnings("ignore:the plan book")
def test_elsewhere_steps_are_evenly_spread(other):
    """Under another scheduler and at other sigmas, which is said; a quality is refused."""
    pipe = tiny_models.pipeline("sd3")
    book = book_of(pipe)
    if other == "scheduler":
        pipe.scheduler = fastdit.recommend(pipe, STEPS).scheduler
    else:
        book = dataclasses.replace(book, sigmas=tuple(each + 1e-3 for each in book.sigmas))
    handle = fastdit.patch(pipe, speedup=2.5, book=book)
    with pytest.warns(UserWarning, match="its sampler or sigmas are others; steps are evenly"):
        generate(pipe, "sd3", steps=STEPS)
    run = handle.last_run()
    assert [step for step, each in run.records.items() if each.tokens] == [0, 2, 5]
    assert run.plan.forecasts == (0, 1, 0, 1, 1, 0, 1, 1)
    assert not run.plan.weights
    handle = fastdit.patch(pipe, quality="high", book=book)
    with pytest.raises(ScheduleError, match=r"of another|needs the sampler"):
        generate(pipe, "sd3", steps=STEPS)


@pytest.mark.parametrize("other", ["late", "RAS"])
def test_elsewhere_lines_are_drawn(other):
    """Where a run begins later than the plan, and where other tokens compute."""
    plain = line()
    three = {**DRAWN, 7: (2.0, -1.3, 0.3)}  # a late run has but two of these outputs
    fitted = dataclasses.replace(plain.plans[1], weights=three)
    fitted = dataclasses.replace(plain, plans=(plain.plans[0], fitted))
    family = "sd3-img2img" if other == "late" else "sd3"

    def draw(book):
        pipe = tiny_models.pipeline(family)
        beside = [fastdit.RAS(ratio=0.5, start=1, resets=())] if other == "RAS" else []
        fastdit.patch(pipe, Budget(speedup=2.5, book=book), *beside, backend="reference")
        return generate(pipe, family, steps=STEPS, **({"strength": 0.8} if family != "sd3" else {}))

    assert distance(draw(fitted), draw(plain)) < 1e-6


# ---- the file


def test_a_book_with_weights_is_read_as_it_was_written(tmp_path):
    book = book_of(tiny_models.pipeline("sd3"))
    book.save(tmp_path / "book.json")
    found = PlanBook.load(tmp_path / "book.json")
    assert found.plans == book.plans
    assert found.sigmas == book.sigmas
    assert found.plans[1].weights_by_nodes[6, (5, 2, 0)] == DRAWN[6]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"1": [1.0]}, "for each drawn step"),
        ({**DRAWN, 3: (1.0,)}, "a number for each of the last 2 to 3 steps"),
        ({**DRAWN, 3: (0.5, 0.3, 0.2)}, "a number for each of the last 2 to 3 steps"),
        ({**DRAWN, 8: (1.0,)}, "for each drawn step"),
        ({**DRAWN, 3: (1.7, -0.6)}, "sum to 1"),
        ({**DRAWN, 3: (0.5, 0.25, 0.2, 0.05)}, "a number for each"),
        ({**DRAWN, 3: (1e400, -1e400)}, "not a number that is accepted"),
        ({**DRAWN, 3: "1"}, "a number for each"),
    ],
)
def test_what_are_no_weights_is_refused(weights, said):
    document = json.loads(book_of(tiny_models.pipeline("sd3")).to_json())
    document["plans"][1]["weights"] = {str(step): list(each) for step, each in weights.items()}
    with pytest.raises(ScheduleError, match=said):
        PlanBook.from_json(json.dumps(document))


def test_weights_need_the_sigmas_that_they_were_fitted_at():
    document = json.loads(book_of(tiny_models.pipeline("sd3")).to_json())
    document["sigmas"] = []
    with pytest.raises(ScheduleError, match="sigmas must be a number for each step"):
        PlanBook.from_json(json.dumps(document))
