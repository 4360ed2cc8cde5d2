"""What `fastdit search` shows: a bar for the generation in progress, and the front so far.

The work is `fastdit.search`'s; this reads prompts, opens workers and draws the view.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastdit import files
from fastdit.cli.sampler import RECOMMENDED
from fastdit.errors import ArgumentError, FastDiTError
from fastdit.schedules.schedule_file import MAX_FILE_BYTES

if TYPE_CHECKING:
    from fastdit.schedules.book import PlanBook
    from fastdit.schedules.schedule import Schedule
    from fastdit.search import Knobs, Search, Settings, State, Work, Workers
    from fastdit.search.archive import Candidate

SPACE = ("schedule", "order", "ras", "ralu", "steps", "solver")
STEP_SHARES = (1.0, 0.7, 0.5)  # of --steps
SHOWN = 12  # points of the front in the table
EMBEDDED_PROMPTS = 3  # of scenes with one object, and with two


def prompts_of(
    file: Path | None, embedded: bool, each: int = EMBEDDED_PROMPTS, package: str = "tiny"
) -> tuple[str, ...]:
    """Prompts are lines of a file; without one, scenes an embedded model was trained on, of one or two objects."""
    if file is None:
        if not embedded:
            raise ArgumentError("--prompts FILE is needed with --model: the prompts to judge by")
        own = importlib.import_module(f"fastdit.{package}")
        scenes = [own.prompts(each, split="train", objects=count, seed=1) for count in (1, 2)]
        return tuple(prompt for pair in zip(*scenes, strict=True) for prompt in pair)
    try:
        lines = files.read_text(file, MAX_FILE_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--prompts {file} cannot be read: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ArgumentError(f"--prompts {file} holds no prompt")
    return found


def names_of(space: str) -> set[str]:
    """A space is names between commas, the schedule always one of them."""
    found = space.split(",")
    if not set(found) <= set(SPACE) or len(set(found)) < len(found) or SPACE[0] not in found:
        raise ArgumentError(
            f"--space must have {SPACE[0]} and may have {', '.join(SPACE[1:])} between commas, got {space!r}"
        )
    return set(found)


def knobs_of(space: str, steps: int, scheduler: str | None) -> Knobs:
    """What a search of at most `steps` steps varies beside schedules, the uncached run first."""
    from fastdit.search import Knobs
    from fastdit.search.knobs import COARSE, OWN, RATIOS

    names, own = names_of(space), scheduler or OWN
    counts = {max(2, round(share * steps)) for share in STEP_SHARES}
    both = [own, *(each for each in (OWN, RECOMMENDED) if each != own)]
    return Knobs(
        steps=tuple(sorted(counts, reverse=True)) if "steps" in names else (),
        ratios=RATIOS if "ras" in names else RATIOS[:1],
        solvers=tuple(both) if "solver" in names else (),
        coarse=COARSE if "ralu" in names else COARSE[:1],
    )


def orders_of(text: str | None, space: str = "schedule") -> tuple[int, ...]:
    """Orders are numbers between commas."""
    if text is None:
        return (0, 1, 2) if "order" in names_of(space) else (0,)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"--orders must be numbers between commas, got {text!r}") from error


def load_pipeline(folder: Path | None, dtype: str | None) -> Any:
    """A worker loads its pipeline by this; it is at the top level of a module, so that processes can be sent it."""
    from fastdit.cli.loading import load_model

    return load_model(folder, dtype).pipeline


def run(
    console: Console,
    out: Path,
    factory: Callable[[], Any],
    work: Work,
    settings: Settings,
    seeds: Sequence[Schedule],
    workers: int,
    ray: str | None = None,
    book: PlanBook | None = None,
) -> None:
    """This searches with a live view; see :func:`fastdit.search.ecad`.

    Under torchrun the first rank leads, and the others only draw. `ray` is a cluster's address, or "local".
    """
    from fastdit.search.torchrun import Ranks, launched

    if launched():
        with closing(Ranks(factory, work)) as ranks:
            if ranks.rank == 0:
                _watch(console, out, factory, work, settings, seeds, ranks, book)
            else:
                ranks.serve()
    elif ray is not None:
        from fastdit.search.ray_actors import RayActors

        address = None if ray == "local" else ray
        with closing(RayActors(factory, work, workers, address)) as actors:
            _watch(console, out, factory, work, settings, seeds, actors, book)
    else:
        _watch(console, out, factory, work, settings, seeds, workers, book)


def _watch(
    console: Console,
    out: Path,
    factory: Callable[[], Any],
    work: Work,
    settings: Settings,
    seeds: Sequence[Schedule],
    workers: int | Workers,
    book: PlanBook | None,
) -> None:
    from fastdit.search import ecad
    from fastdit.search.quality import is_of_latents

    console.print(
        f"[bold]fastdit search[/bold]: {work.items} pictures of {work.steps} steps per schedule, "
        f"loss: {work.described()['quality']}, costs: {', '.join(settings.costs)}",
        highlight=False,
    )
    with Live(Text("loading the model"), console=console, transient=True) as live:
        found = ecad(
            factory,
            out,
            work,
            settings,
            seeds=seeds,
            workers=workers,
            watch=lambda state: live.update(state_view(state, settings.costs)),
            book=book,
        )
        if is_of_latents(work.quality):
            from fastdit.search.found import BOOK, book_of

            tell = lambda *at: live.update(Text("plan book: {} of {} plans".format(*at)))  # noqa: E731
            try:
                book_of(found, factory(), tell).save(out / BOOK)
            except FastDiTError as error:  # the search is done, and its result is there
                console.print(f"no plan book: {error}", highlight=False, soft_wrap=True)
    console.print(front_table(found.front, settings.costs, found.uncached))
    console.print(summary_line(found), highlight=False)
    console.print(f"result: {out}", highlight=False, soft_wrap=True)


def state_view(state: State, costs: Sequence[str]) -> RenderableType:
    """The view has a line, a bar and the front so far."""
    last = state.generation > state.generations
    what = "baselines" if last else f"generation {state.generation} of {state.generations}"
    line = Text(f"{what}: {state.candidates} schedules known, hypervolume {state.gain:+.1%}")
    bar = ProgressBar(total=max(1, state.total), completed=state.done, width=40)
    return Group(line, bar, front_table(state.front, costs))


def front_table(
    front: Sequence[Candidate], costs: Sequence[str], uncached: dict[str, float] | None = None
) -> Table:
    """The table has loss and costs of the front, thinned to what fits; costs are shares of the uncached run's."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("point", "loss", *costs):
        table.add_column(name, justify="right", no_wrap=True)
    for index in _thinned(len(front)):
        loss, *spent = front[index].values
        entries = []
        for name, value in zip(costs, spent, strict=True):
            dense = (uncached or {}).get(name)
            entries.append(f"{value:.3g}" if dense is None else f"{value / dense:.1%}")
        table.add_row(f"{index + 1:02d}", f"{loss:.4g}", *entries)
    return table


def summary_line(found: Search) -> str:
    """One sentence says what was done."""
    seen = found.archive.seen.values()
    lost = sum(not candidate.complete for candidate in seen)
    return (
        f"{len(found.generations) - 1} generations, {len(seen)} schedules, {lost} of them stopped early; "
        f"hypervolume {found.gain:+.1%} over the seeds"
    )


def _thinned(count: int) -> list[int]:
    if count <= SHOWN:
        return list(range(count))
    return sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)})
