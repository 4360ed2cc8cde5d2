"""A plan book in minutes: plans are foreseen from the unpatched runs, and what looks best is measured.

For each number of computed steps there are evenly spread ones, drawn as lines, and two of many other plans of whole
steps that `foresight.py` says are nearest to the solution: one drawn by one order, dense early, or where the output
changes by equal amounts (as InvarDiff, arXiv 2512.05134, places them), or moved about from there; and one drawn by an
order for each step, or a schedule that is given. Evenly spread ones stay unless another is nearer to the solution by
the interval of the paired ratio, so that what is chosen on a few prompts holds on others. Schedules of components
(`quantiles.py`, and those given) enter where they are nearer than every plan of whole steps that is as fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastdit.errors import ArgumentError
from fastdit.schedules.book import NODES, Plan, PlanBook
from fastdit.schedules.plan import whole_forecasts
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.spread import changing_steps, early_steps, even_steps
from fastdit.search.evaluator import Work
from fastdit.search.foresight import Foresight, Place
from fastdit.search.quantiles import quantile_schedule
from fastdit.search.trial import ORDER, Measured, Trial, interval, plan_at

#: of all steps: so many compute
SHARES = (0.75, 0.68, 0.6, 0.54, 0.5, 0.43, 0.39, 0.36, 0.32, 0.29, 0.25, 0.21, 0.18, 0.15)
ORDERS = (0, 1, 2)
LEAST_STEPS = 8
#: of the outputs of components: so many are reused
QUANTILES = (0.3, 0.5, 0.7)
#: places from which an order is sought for each step
CLIMBED = 2


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    steps: int = 28,
    *,
    batch: int = 2,
    seed: int = 0,
    threads: int | None = None,
    backend: str | None = None,
    arguments: dict[str, Any] | None = None,
    schedules: Sequence[Schedule] = (),
    shares: Sequence[float] = SHARES,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> PlanBook:
    """This measures plans on a pipeline, and makes a book of the best.

    Args:
        pipeline: With its own scheduler, which draws no noise at each step. It must not be patched.
        prompts: At least two, a picture of each.
        steps: Of a run, at least 8.
        batch, seed, threads, backend, arguments: As in :class:`~fastdit.search.Work`.
        schedules: Further candidates, of as many steps: presets, or what a search found.
        shares: So many of the steps compute.
        watch: Is told the number of measured plans, and of all.

    Raises:
        ArgumentError: The sampler draws noise or calls the model several times a step, the pipeline gives no latents
            or is patched, or an argument is not accepted.
        ScheduleError: A schedule is of another model or number of steps.
    """
    if steps < LEAST_STEPS or len(prompts) < 2:
        raise ArgumentError(
            f"steps must be at least {LEAST_STEPS} and prompts at least 2, got {steps} and {len(prompts)}"
        )
    work = Work(
        tuple(prompts),
        steps,
        seed=seed,
        batch=batch,
        threads=threads or torch.get_num_threads(),
        quality="truth",
        backend=backend,
        arguments=arguments or {},
    )
    trial = Trial(pipeline, work)
    counts = sorted({max(NODES, round(share * steps)) for share in shares} - {steps}, reverse=True)
    done = itertools.count(1)

    try:
        bound = [schedule.bind(trial.spec, steps) for schedule in schedules]
        given = [_place_of(schedule, trial.spec) for schedule in bound]
        trial.solve()
        unpatched, foresight = trial.look()
        places = [place for place in given if place is not None]
        candidates = {count: _candidates(foresight, count, trial.moved, places) for count in counts}
        apart = [each for each, place in zip(bound, given, strict=True) if place is None]
        if trial.changes:
            apart += [quantile_schedule(trial.changes, trial.spec, steps, q) for q in QUANTILES]
        total = sum(map(len, candidates.values())) + len(apart)

        def measured(plan: Plan) -> Measured:
            found = trial.measured(plan)
            watch(next(done), total)
            return found

        chosen, over_even = [Measured(trial.everything, unpatched, ())], {}
        for count, places in candidates.items():
            even, *rest = (measured(plan_at(place)) for place in places)
            best = min(rest, key=lambda each: each.losses.mean(), default=even)
            over_even[count] = interval(best.losses - even.losses)
            chosen.append(even if over_even[count][2] >= 1 else best)
        components = [measured(trial.timed(_plan_of(schedule))) for schedule in apart]
        facts = {"best_other_over_even": over_even}
        book = trial.book([each.as_plan(unpatched) for each in chosen], facts)
        return _with_components(book, chosen, components, unpatched)
    finally:
        trial.handle.unpatch()


def _with_components(
    book: PlanBook, whole: Sequence[Measured], others: Sequence[Measured], unpatched: np.ndarray
) -> PlanBook:
    """The book with those plans of components that are nearer than the best of whole steps which is as fast.

    Its provenance has for each of them its speed-up, its error over that one's, and the interval.
    """
    plans, found = list(book.plans), []
    for other in sorted(others, key=lambda each: -each.plan.seconds):
        as_fast = [
            each for each in whole if book.seconds_of(each.plan) <= other.plan.seconds
        ] or whole[-1:]
        rival = min(as_fast, key=lambda each: each.losses.mean())
        ratio = interval(other.losses - rival.losses)
        found.append([book.speedup_of(other.plan), *ratio])
        times = [book.seconds_of(plan) for plan in plans]
        if ratio[2] < 1 and other.plan.seconds < times[0] and other.plan.seconds not in times:
            plans.append(other.as_plan(unpatched))
    plans.sort(key=lambda plan: -book.seconds_of(plan))
    facts = {**book.provenance, "components_over_whole_steps": found}
    return replace(book, plans=tuple(plans), provenance=facts)


def _plan_of(schedule: Schedule) -> Plan:
    """A plan of a schedule of components."""
    layers = schedule.layers.values()
    runs = [step for step in range(schedule.steps) if any(la.bits[step].any() for la in layers)]
    return replace(plan_at((tuple(runs), ORDER)), schedule=replace(schedule, provenance={}))


def _place_of(schedule: Schedule, spec: Any) -> Place | None:
    """Where a schedule of whole steps computes; None of one that separates the parts of a step."""
    whole = whole_forecasts(schedule, spec) if schedule.forecasts else ()
    runs = [step for step, order in enumerate(whole) if not order]
    entries = [layer.bits[runs] for layer in schedule.layers.values()]
    if not whole or not all(bits.all() for bits in entries):
        return None
    return tuple(runs), tuple(whole)


def _candidates(
    foresight: Foresight, count: int, moved: Sequence[float], given: Sequence[Place]
) -> list[Place]:
    """So many steps compute: the evenly spread line, the best drawn by one order, the best by one for each step."""
    steps = foresight.steps
    even = tuple(even_steps(steps, count))
    places = even, early_steps(steps, count), changing_steps(moved, count)
    starts = [_filled(place, count) for place in places]
    lines = [foresight.improved((place, ORDER)) for place in starts]
    alike = {*lines, *((place, order) for place in starts for order in ORDERS[1:])}
    each = {place for place in given if len(place[0]) == count}
    nearest = sorted(lines, key=lambda place: foresight.losses(place).mean())[:CLIMBED]
    each |= {foresight.improved((place, (ORDER,) * steps), ORDERS) for place, _ in nearest}
    best = (
        min(places, key=lambda place: foresight.losses(place).mean())
        for places in (alike - {(even, ORDER)}, each)
    )
    return [(even, ORDER), *best]


def _filled(place: Sequence[int], count: int) -> tuple[int, ...]:
    """A place of so many steps, of which the first that are missing are added, or the last are left out."""
    steps = [*place, *(step for step in range(count) if step not in place)]
    return tuple(sorted(steps[:count]))
