"""A plan book in minutes: plans are foreseen from the unpatched runs, and what looks best is measured.

For each number of computed steps there are evenly spread ones, drawn as lines, and others of whole steps. They begin
dense early, or where the output changes by equal amounts (as InvarDiff, arXiv 2512.05134, places them), and are moved
about while `foresight.py` sees them come nearer to the solution. Where the sampler takes Euler's steps along a flow,
the outputs of drawn steps are sums with weights that are fitted (`fitting.py`), to the unpatched runs for some places,
and once more to the runs by the best of them. Elsewhere one plan is drawn by one order, and one by an order for each
step. Evenly spread ones stay unless another is nearer to the solution by the interval of the paired ratio. Schedules of
components (`quantiles.py`, and those given) enter where they are nearer than every plan of whole steps that is as fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastdit.checks import whole
from fastdit.errors import ArgumentError
from fastdit.schedules.book import NODES, Plan, PlanBook
from fastdit.schedules.plan import whole_forecasts
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.spread import changing_steps, early_steps, even_steps
from fastdit.search.evaluator import Work
from fastdit.search.fitting import Fit, Way, fit, improved
from fastdit.search.foresight import Foresight
from fastdit.search.quantiles import quantile_schedule
from fastdit.search.trial import ORDER, Interval, Measured, Trial, interval, plan_at
from fastdit.spec import ModelSpec

#: of all steps: so many compute
SHARES = (0.75, 0.68, 0.54, 0.5, 0.43, 0.36, 0.32, 0.25, 0.21, 0.18, 0.15)
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
    plans: Sequence[Schedule | Plan] = (),
    shares: Sequence[float] = SHARES,
    tries: int = 2,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> PlanBook:
    """This measures plans on a pipeline, and makes a book of the best.

    Args:
        pipeline: With its own scheduler, which draws no noise at each step. It must not be patched.
        prompts: At least two, a picture of each.
        steps: Of a run, at least 8.
        batch, seed, threads, backend, arguments: As in :class:`~fastdit.search.Work`.
        plans: Further candidates, of as many steps: presets, those of another book, or what a search found.
        shares: So many of the steps compute.
        tries: Of plans with fitted weights so many are measured for each of them, at least 1.
        watch: Is told the number of measured plans, and of all.

    Raises:
        ArgumentError: The sampler draws noise or calls the model several times a step, the pipeline gives no latents
            or is patched, or an argument is not accepted.
        ScheduleError: A schedule is of another model or number of steps.
    """
    from fastdit.patch import find_adapter

    whole("tries", tries, 1)
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
    spec = find_adapter(pipeline.transformer).spec(pipeline.transformer)
    given = [plan_of(each, spec, steps) for each in plans]
    trial = Trial(pipeline, work, given)
    counts = sorted({max(NODES, round(share * steps)) for share in shares} - {steps}, reverse=True)
    done = itertools.count(1)

    try:
        trial.solve()
        stock, foresight = trial.look()
        places = [plan for plan in given if plan.whole]
        candidates = {
            count: _candidates(foresight, stock.way, count, trial.moved, places, tries)
            for count in counts
        }
        apart = [plan for plan in given if not plan.whole]
        for share in QUANTILES if trial.changes else ():
            apart.append(plan_of(quantile_schedule(trial.changes, spec, steps, share), spec, steps))
        again = len(counts) * (1 + (stock.way is not None))
        total = again + sum(map(len, candidates.values())) + len(apart)

        def measured(plan: Plan) -> Measured:
            found = trial.measured(plan)
            watch(next(done), total)
            return found

        chosen, over_even = [stock], {}
        for count, others in candidates.items():
            even = measured(plan_at((tuple(even_steps(steps, count)), ORDER)))
            best = min(map(measured, others), key=_loss)
            if best.way is not None:
                best = min(best, measured(_fitted(fit(best.way, best.plan.computed))), key=_loss)
            over_even[count] = interval(best.losses - even.losses)
            chosen.append(even if over_even[count][2] >= 1 else best)
        facts = {"best_other_over_even": over_even}
        book = trial.book([each.as_plan(stock.losses) for each in chosen], facts)
        found = []
        for each in map(measured, apart):
            book, ratio = _with_components(book, chosen, each, stock.losses, trial.timed)
            found.append([each.plan.arithmetic, *ratio])
        facts = {**book.provenance, "components_over_whole_steps": found}
        return replace(book, provenance=facts)
    finally:
        trial.handle.unpatch()


def _with_components(
    book: PlanBook,
    steps_only: Sequence[Measured],
    other: Measured,
    unpatched: np.ndarray,
    timed: Callable[[Plan], Plan],
) -> tuple[PlanBook, Interval]:
    """The book with a plan of components, where that is nearer than the best of whole steps which is as fast.

    It is timed only where it is nearer than what has no more arithmetic: a step of which a part is computed takes no
    less than its arithmetic says, a step that is drawn takes next to nothing.

    Returns:
        The book, and the error over that plan's, with its interval.
    """

    def over(rivals: Sequence[Measured]) -> Interval:
        best = min(rivals or steps_only[-1:], key=lambda each: each.losses.mean())
        return interval(other.losses - best.losses)

    least = other.plan.arithmetic
    ratio = over([each for each in steps_only if each.plan.arithmetic <= least])
    if ratio[2] >= 1:
        return book, ratio
    plan = timed(other.as_plan(unpatched))
    ratio = over([each for each in steps_only if book.seconds_of(each.plan) <= plan.seconds])
    times = [book.seconds_of(each) for each in book.plans]
    if ratio[2] >= 1 or plan.seconds >= times[0] or plan.seconds in times:
        return book, ratio
    plans = sorted((*book.plans, plan), key=lambda each: -book.seconds_of(each))
    return replace(book, plans=tuple(plans)), ratio


def plan_of(given: Schedule | Plan, spec: ModelSpec, steps: int) -> Plan:
    """A candidate as a plan: of whole steps where its schedule separates nothing.

    Raises:
        ScheduleError: It is of another model or number of steps.
    """
    if isinstance(given, Plan):
        if given.schedule is not None:
            given.schedule.bind(spec, steps)
        return given
    bound = given.bind(spec, steps)
    whole = whole_forecasts(bound, spec) if bound.forecasts else (0,) * steps
    computes = np.array(
        [[layer.bits[step].all() for layer in bound.layers.values()] for step in range(steps)]
    ).all(axis=1)
    runs = [step for step in range(steps) if computes[step] or not whole[step]]
    if computes[runs].all():
        return plan_at((tuple(runs), tuple(whole)))
    layers = bound.layers.values()
    runs = [step for step in range(steps) if any(layer.bits[step].any() for layer in layers)]
    return replace(plan_at((tuple(runs), ORDER)), schedule=replace(bound, provenance={}))


def _loss(measured: Measured) -> float:
    return float(measured.losses.mean())


def _fitted(found: Fit) -> Plan:
    return replace(plan_at((found.computed, ORDER)), weights=found.weights)


def _candidates(
    foresight: Foresight,
    way: Way | None,
    count: int,
    moved: Sequence[float],
    given: Sequence[Plan],
    tries: int,
) -> list[Plan]:
    """So many steps compute: the best fits, or the best that is drawn by one order, and by one for each step.

    Fits that are `given` are candidates as they are.
    """
    steps = foresight.steps
    even = tuple(even_steps(steps, count))
    places = even, early_steps(steps, count), changing_steps(moved, count)
    starts = [_filled(place, count) for place in places]
    lines = [foresight.improved((place, ORDER)) for place in starts]
    given = [plan for plan in given if len(plan.computed) == count]
    each = {(plan.computed, plan.order) for plan in given}
    if way is not None:
        # Places that are best for lines, too: what a fit leaves is foreseen too low where few steps compute.
        begun = {*starts, *(place for place, _ in (*lines, *each))}
        fits = {improved(way, place).computed for place in begun}, {place for place, _ in lines}
        ranked = [sorted((fit(way, p) for p in places), key=lambda f: f.left) for places in fits]
        mixed = itertools.chain(*itertools.zip_longest(*ranked))
        distinct = {found.computed: found for found in mixed if found is not None}
        fitted = [_fitted(found) for found in itertools.islice(distinct.values(), tries)]
        return [*fitted, *(replace(plan, bounds=()) for plan in given if plan.weights)]
    alike = {*lines, *((place, order) for place in starts for order in ORDERS[1:])}
    nearest = sorted(lines, key=lambda place: foresight.losses(place).mean())[:CLIMBED]
    each |= {foresight.improved((place, (ORDER,) * steps), ORDERS) for place, _ in nearest}
    return [
        plan_at(min(places, key=lambda place: foresight.losses(place).mean()))
        for places in (alike - {(even, ORDER)}, each)
    ]


def _filled(place: Sequence[int], count: int) -> tuple[int, ...]:
    """A place of so many steps, of which the first that are missing are added, or the last are left out."""
    steps = [*place, *(step for step in range(count) if step not in place)]
    return tuple(sorted(steps[:count]))
