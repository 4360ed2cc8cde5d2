"""What `fastdit calibrate` shows: a bar while plans are measured, and the book as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastdit.methods.budget import QUALITIES, Budget
from fastdit.methods.ecad import PRESETS
from fastdit.schedules.schedule import Schedule

if TYPE_CHECKING:
    from fastdit.cli.loading import Model
    from fastdit.schedules.book import Plan, PlanBook

EMBEDDED_PROMPTS = 6  # of scenes with one object, and with two


def run(
    console: Console, loaded: Model, out: Path, prompts: Sequence[str], steps: int, **given: Any
) -> None:
    """This calibrates with a bar, writes the book and shows it."""
    from fastdit.search.calibrate import calibrate

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(
            f"plans of {steps} steps, {len(prompts)} pictures each", total=None
        )
        book = calibrate(
            loaded.pipeline,
            prompts,
            steps,
            watch=lambda done, total: progress.update(task, completed=done, total=total),
            **given,
        )
    book.save(out)
    console.print(table(book))
    console.print(f"plan book: {out}", highlight=False, soft_wrap=True)


def presets(package: str, steps: int) -> list[Schedule]:
    """The shipped schedules of a model in the package, of so many steps."""
    found = [Schedule.load(path) for path in sorted(PRESETS.glob(f"{package}/*.json"))]
    return [schedule for schedule in found if schedule.steps == steps]


def table(book: PlanBook) -> Table:
    """A row for each plan: its speed, its error over the unpatched run's, and which qualities choose it."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("computed", "speed-up", "error", "95 %", "order", "quality"):
        found.add_column(name, justify="left" if name == "quality" else "right", no_wrap=True)
    chosen = {q: Budget(quality=q, book=book).plan_of(book.steps) for q in QUALITIES}
    for plan in book.plans:
        names = [name for name, each in chosen.items() if each is plan]
        found.add_row(
            f"{len(plan.computed)} of {book.steps}",
            f"{book.speedup_of(plan):.2f}",
            f"{plan.ratio:.2f}",
            f"{plan.low:.2f} to {plan.high:.2f}",
            ", ".join(map(str, sorted(_orders(plan)))),
            ", ".join(names),
        )
    return found


def _orders(plan: Plan) -> set[int]:
    """The orders by which something is drawn."""
    if plan.schedule is not None:
        layers = plan.schedule.layers.values()
        return {int(order) for layer in layers for order in layer.orders[~layer.bits]}
    if isinstance(plan.order, int):
        return {plan.order}
    return {order for step, order in enumerate(plan.order) if step not in plan.computed}
