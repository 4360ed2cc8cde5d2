"""What commands make of their arguments, or refuse before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastdit.cli.options import OneOrder
from fastdit.errors import ArgumentError, ScheduleError

if TYPE_CHECKING:
    from fastdit.cli.loading import Model
    from fastdit.methods.base import Method
    from fastdit.schedules.book import Plan
    from fastdit.schedules.schedule import Schedule


def methods(
    schedule: Path | None,
    every: list[int] | None,
    given: OneOrder | None,
    default: tuple[int, ...] = (),
) -> dict[str, Method]:
    """--schedule or --every, and --order, become methods by name."""
    if schedule is not None and every:
        raise ArgumentError("--schedule and --every exclude each other: give one of them")
    from fastdit import Cached, Schedule

    order = None if given is None else given.value if given is OneOrder.auto else int(given.value)
    said = f", order {order}" if order else ""
    if schedule is not None:
        found = read_schedule(schedule, "--schedule")
        return {f"{schedule.stem}{said}": Cached(found, order=order)}
    return {f"every({n}){said}": Cached(Schedule.every(n), order=order) for n in every or default}


def budgets(speedups: Sequence[float], pipeline: Any) -> dict[str, Method]:
    """--speedup becomes methods by name, by the package's plan book of the pipeline's model where there is one."""
    from fastdit import Budget, PlanBook

    transformer = getattr(pipeline, "transformer", None)
    book = PlanBook.packaged(transformer) if speedups and transformer is not None else None
    return {f"speedup={speedup:g}": Budget(speedup=speedup, book=book) for speedup in speedups}


def ralu(presets: Sequence[str]) -> dict[str, Method]:
    """--ralu becomes methods by name."""
    from fastdit import RALU

    return {f"RALU {name}": RALU.preset(name) for name in presets}


def ras(ratio: float | None) -> dict[str, Method]:
    """--ras becomes a method by its name."""
    from fastdit import RAS

    return {} if ratio is None else {f"RAS {ratio:g}": RAS(ratio)}


def read_schedule(path: Path, argument: str) -> Schedule:
    from fastdit.schedules.schedule import Schedule

    try:
        return Schedule.load(path)
    except ScheduleError as error:
        raise ScheduleError(f"{argument} {error}") from error


def plans_of(path: Path | None, loaded: Model, steps: int) -> Sequence[Plan]:
    """--seed-book becomes its plans but the first, which computes all."""
    from fastdit import PlanBook

    if path is None:
        return ()
    book = PlanBook.load(path)
    book.check_model(loaded.pipeline.transformer)
    if book.steps != steps:
        raise ArgumentError(f"--seed-book must be of {steps} steps, {path} is of {book.steps}")
    return book.plans[1:]


def check_output(path: Path, argument: str, suffix: str = ".png") -> None:
    """This refuses before the work what could not be written after it."""
    if path.suffix.lower() != suffix:
        raise ArgumentError(f"{argument} must end in {suffix}, got {path}")
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir():
        raise ArgumentError(f"{argument} {path} cannot be written: its folder does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ArgumentError(f"{argument} {path} cannot be written: permission denied")


def load(folder: Path | None, dtype: str | None, package: str = "tiny") -> Model:
    from fastdit.cli.loading import load_model

    name = "the embedded model" if folder is None else str(folder)
    with Console(stderr=True).status(f"loading {name}"):
        return load_model(folder, dtype, package)
