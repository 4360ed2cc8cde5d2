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

if TYPE_CHECKING:
    from fastdit.cli.loading import Model
    from fastdit.schedules.book import PlanBook

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


def table(book: PlanBook) -> Table:
    """A row for each plan: its speed, its error over the unpatched run's, and which qualities choose it."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("computed", "speed-up", "error", "95 %", "order", "quality"):
        found.add_column(name, justify="left" if name == "quality" else "right", no_wrap=True)
    chosen = {
        quality: Budget(quality=quality, book=book).chosen(book.steps) for quality in QUALITIES
    }
    for plan in book.plans:
        names = [name for name, (computed, _) in chosen.items() if computed == plan.computed]
        found.add_row(
            f"{len(plan.computed)} of {book.steps}",
            f"{book.speedup(len(plan.computed), book.steps):.2f}",
            f"{plan.ratio:.2f}",
            f"{plan.low:.2f} to {plan.high:.2f}",
            str(plan.order),
            ", ".join(names),
        )
    return found
