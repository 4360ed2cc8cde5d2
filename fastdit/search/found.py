"""A plan book of what a search found: its front's schedules, with RAS and RALU, are measured beside whole steps.

A book keeps the user's steps and sampler, so points of the front with others do not enter: they are its advice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastdit.cli.sampler import swap_scheduler
from fastdit.schedules.book import PlanBook
from fastdit.search.calibrate import calibrate, plan_of
from fastdit.search.evolve import Search
from fastdit.search.knobs import OWN, Run

BOOK = "book.json"
#: plans with fitted weights that are measured for each number of computed steps
TRIES = 6


def book_of(
    search: Search, pipeline: Any, watch: Callable[[int, int], None] = lambda done, total: None
) -> PlanBook:
    """This measures the front of a search that judged by the solution, as `calibrate` does, and gives the book.

    Its provenance has under "advice" the points of other steps or solvers: what they are, their loss, and their costs.

    Raises:
        ArgumentError: As for :func:`~fastdit.search.calibrate.calibrate`.
    """
    work, genome = search.archive.work, search.genome
    if work.scheduler not in (None, OWN):
        swap_scheduler(pipeline, work.scheduler, work.steps)
    plans, advice = [], []
    for candidate in search.front:
        run = genome.run(candidate.vector)
        if is_own(run, work.steps, next(genome.knobs.runs()).solver):
            schedule = genome.schedule(genome.effective(candidate.vector))
            found = plan_of(schedule, genome.spec, work.steps)
            plans.append(replace(found, **run.arguments(work.steps)))
        else:
            costs = dict(zip(("loss", *search.archive.costs), candidate.values, strict=True))
            sampler = search.schedulers[str(run.solver)]
            advice.append({"steps": run.steps or work.steps, "solver": sampler, **costs})
    book = calibrate(
        pipeline,
        work.prompts,
        work.steps,
        batch=work.batch,
        seed=work.seed,
        threads=work.threads,
        backend=work.backend,
        arguments=dict(work.arguments),
        plans=plans,
        tries=TRIES,
        watch=watch,
    )
    return replace(book, provenance={**book.provenance, "advice": advice})


def is_own(run: Run, steps: int, solver: str | None) -> bool:
    """A run has the steps and the solver of the uncached one."""
    return run.steps in (None, steps) and run.solver == solver
