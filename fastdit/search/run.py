"""A whole search: workers, evolution, baselines, result folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastdit import files
from fastdit.cli import launch
from fastdit.errors import ArgumentError
from fastdit.schedules.book import PlanBook
from fastdit.schedules.schedule import Schedule
from fastdit.search.baselines import measure_baselines
from fastdit.search.evaluator import Work
from fastdit.search.evolve import Search, Settings, State, Watch, evolve
from fastdit.search.nsga2 import require_pymoo
from fastdit.search.workers import InProcess, Processes, Workers


def ecad(
    pipe_or_factory: Any,
    out: str | os.PathLike[str],
    work: Work,
    settings: Settings | None = None,
    *,
    seeds: Sequence[Schedule | str | os.PathLike[str]] = (),
    workers: int | Workers = 1,
    watch: Watch = lambda state: None,
    book: PlanBook | None = None,
) -> Search:
    """This searches caching schedules of a pipeline by NSGA-II; the result is a folder.

    A search that ended, was stopped or was killed is resumed by calling this again with the same arguments, or with
    more generations: it replays its ledger, `out/ledger.jsonl`, and ends with the front it would have had.

    Args:
        pipe_or_factory: A pipeline, or a function without arguments that makes one; worker processes need the function,
            at the top level of a module.
        out: Folder of the result, see `result.py`.
        work: Prompts, steps, quality: how candidates are judged.
        settings: Population, generations, costs, operators; the paper's if left out.
        seeds: Schedules, or their files, to begin with beside the paper's, e.g. from a trained router.
        workers: 1 measures in this process, more in as many processes; or any :class:`Workers`, which the caller
            closes.
        watch: Called with a :class:`State` whenever something was measured.
        book: A plan book, whose schedules it begins with as well, as far as the population has room.

    Raises:
        DependencyError: pymoo is not installed: pip install fastdit[search].
        ArgumentError, ScheduleError: An argument is not accepted; nothing was written.
        SearchError: The ledger is damaged, in use or of another search; a worker was lost.

    Example:
        >>> work = fastdit.search.Work(prompts=("a red circle", "a small blue square"), steps=20)
        >>> found = fastdit.search.ecad(fastdit.tiny.load_pipeline, "search", work)
    """
    require_pymoo()
    files.check_folder(out, "out")
    settings = settings or Settings()
    given = [s if isinstance(s, Schedule) else Schedule.load(s) for s in seeds]
    factory = pipe_or_factory
    if not callable(factory) or hasattr(factory, "transformer"):
        if isinstance(workers, int) and workers > 1:
            raise ArgumentError(
                f"workers={workers} needs a function that makes the pipeline: a pipeline stays in its process"
            )

        def factory() -> Any:
            return pipe_or_factory

    if not isinstance(workers, int):
        return _run(Path(out), work, settings, given, workers, watch, book)
    if not 1 <= workers <= launch.MAX_WORKERS:
        raise ArgumentError(f"workers must be from 1 to {launch.MAX_WORKERS}, got {workers}")
    made = InProcess(factory, work) if workers == 1 else Processes(factory, work, workers)
    with closing(made):
        return _run(Path(out), work, settings, given, made, watch, book)


def _run(
    out: Path,
    work: Work,
    settings: Settings,
    seeds: Sequence[Schedule],
    workers: Workers,
    watch: Watch,
    book: PlanBook | None,
) -> Search:
    from fastdit.search.result import write_result  # matplotlib, which workers do not need

    search, ledger = evolve(out, work, settings, seeds, workers, watch, book)

    def progress(done: int, total: int) -> None:
        last, seen = settings.generations, len(search.archive.seen)
        watch(State(last + 1, last, done, total, seen, search.front, search.gain))

    with closing(ledger):
        write_result(out, search, measure_baselines(search.archive, progress), ledger.identity)
    return search
