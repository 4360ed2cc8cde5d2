"""How the results of the commands look: tables for the terminal, and the labels of the demo's
pictures.

Only wording and layout: what is shown was computed elsewhere. Tables fit a terminal of 80 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image

    from fastdit.account.cost import Cost
    from fastdit.account.explain import Explanation
    from fastdit.cli.demo import Arm, Comparison, Picture, Progress, Stage
    from fastdit.cli.loading import Model
    from fastdit.schedules.schedule import Schedule

MEANING = (
    "Seconds are those of whole pipeline calls (text encoding, all steps, decoding): {timed}. "
    "PSNR (in dB) and relative L2 are distances to the unpatched picture of the same seed, in "
    "floating point over [0, 1]."
)


STAGES = (
    "What the picture was going to be at the end of each stage, its tokens outlined: first at half the size, then with "
    "the tokens of most edges split into four, then with all of them split."
)

STEADY = 1.5
BUSY = "This machine was busy, calls that do the same differed"
ADVICE = "read the speed-ups with care, or try again with more --repeats"


@dataclass(frozen=True)
class Fact:
    """This is one line of a list of facts."""

    name: str
    value: str


def facts(lines: Sequence[Fact]) -> Table:
    """Names and values stand in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(Text(printable(line.name)), Text(printable(line.value)))
    return table


def printable(text: str) -> str:
    """In a file's text, characters that a terminal would obey, or cannot show, are spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---- demo


def comparison_table(comparison: Comparison) -> RenderableType:
    """Each arm gets a line of medians over all prompts and repeats."""
    judged = comparison.right(0) is not None
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("")
    for name in ("steps", "seconds", "min-max", "speed-up", "compute", "PSNR", "rel. L2"):
        table.add_column(name, justify="right", no_wrap=True)
    if judged:
        table.add_column("right", justify="right", no_wrap=True)
    for index, arm in enumerate(comparison.arms):
        seconds = comparison.seconds(index)
        column = [row[index] for row in comparison.pictures]
        entries = [
            arm.name,
            str(arm.steps),
            _short(median(seconds)),
            f"{_short(min(seconds))}-{_short(max(seconds))}",
            f"{comparison.speedup(index):.2f}x",
            f"{1 / arm.compute_ratio:.0%}",
            _decibels(median(picture.psnr for picture in column)) if index else "-",
            f"{median(picture.relative_l2 for picture in column):.2g}" if index else "-",
        ]
        if judged:
            entries.append(_of(comparison.right(index)))
        table.add_row(*entries)
    notes = [Text(_meaning(comparison, judged), style="dim")]
    if (spread := _unsteadiness(comparison)) > STEADY:
        notes.append(Text(f"{BUSY} by up to {spread:.1f}x: {ADVICE}", style="yellow"))
    return Group(table, *notes)


def _unsteadiness(comparison: Comparison) -> float:
    """This is the largest ratio between two timed calls that draw the same picture in the same way."""
    return max(
        max(picture.seconds) / min(picture.seconds)
        for row in comparison.pictures
        for picture in row
    )


def _meaning(comparison: Comparison, judged: bool) -> str:
    calls = comparison.settings.repeats * len(comparison.prompts)
    text = MEANING.format(timed=_timed(calls, "each"))
    text += " Compute is the share of the transformer's multiply-accumulates."
    if solvers := sorted({arm.solver for arm in comparison.arms if arm.solver}):
        text += f" Fewer steps are by {' and '.join(solvers)}."
    if judged:
        text += " Right: how many of the objects named are there as named."
    return text


def _timed(calls: int, each: str) -> str:
    if calls == 1:
        return f"one call {each}. Speed-up is over the unpatched model's call beside it"
    return (
        f"medians of {calls} interleaved calls {each}. Speed-up is the median over the interleaved "
        "pairs with the unpatched model"
    )


def comparison_picture(comparison: Comparison, model: Model, where: str) -> Image.Image:
    """The labelled grid has one row per prompt, one column per arm."""
    from fastdit.cli.grid import Row, Tile, draw_grid

    settings = comparison.settings
    headers = [(arm.name, _detail(arm)) for arm in comparison.arms]
    rows = []
    for index, prompt in enumerate(comparison.prompts):
        tiles = [
            Tile(picture.image, _labels(picture, comparison.speedup(arm, index), arm == 0))
            for arm, picture in enumerate(comparison.pictures[index])
        ]
        rows.append(Row(prompt, tuple(tiles)))
    height, width = comparison.pictures[0][0].image.shape[:2]
    title = f"fastdit demo: {model.name}, {width} x {height}, {where}, seed {settings.seed}"
    footer = MEANING.format(timed=_timed(settings.repeats, "per picture"))
    return draw_grid(title, headers, rows, footer)


def stages_picture(comparison: Comparison, model: Model) -> Image.Image | None:
    """This shows the ends of stages, a row for each prompt and arm; None where no run had stages."""
    from fastdit.cli.grid import Row, Tile, draw_grid

    rows = []
    for prompt, pictures in zip(comparison.prompts, comparison.pictures, strict=True):
        for arm, picture in zip(comparison.arms, pictures, strict=True):
            tiles = [Tile(stage.image / 255, (_stage(stage),)) for stage in picture.stages]
            if tiles:
                rows.append(
                    Row(f"{arm.name}: {prompt}", (*tiles, Tile(picture.image, ("result",))))
                )
    if not rows:
        return None
    count = max(len(row.tiles) for row in rows)
    headers = [(f"stage {index + 1}", "") for index in range(count - 1)] + [("picture", "")]
    title = f"Stages: {model.name}, seed {comparison.settings.seed}"
    return draw_grid(title, headers, rows, STAGES)


def _stage(stage: Stage) -> str:
    return f"{stage.layout}: {_count(stage.steps, 'step')} of {stage.tokens} tokens"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _detail(arm: Arm) -> str:
    steps = f"{arm.steps} steps" + (f" of {arm.solver}" if arm.solver else "")
    return steps + ("" if arm.rival is None else f", the time of {arm.rival}")


def _labels(picture: Picture, speedup: float, is_reference: bool) -> tuple[str, ...]:
    seconds = f"{_short(median(picture.seconds))} s"
    judged = "" if picture.right is None else f"objects right {_of(picture.right)}"
    if is_reference:
        lines = (f"{seconds} · reference", judged)
    else:
        lines = (
            f"{seconds} · {speedup:.2f}x",
            f"PSNR {_decibels(picture.psnr, ' dB')} · rel. L2 {picture.relative_l2:.2g}",
            judged,
        )
    return tuple(line for line in lines if line)


def _short(seconds: float) -> str:
    """Three digits are said, as far as they are worth it."""
    return f"{seconds:.{max(0, 2 - len(str(int(seconds))) + 1)}f}"


def _decibels(value: float, unit: str = "") -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}{unit}"


def _of(right: tuple[int, int] | None) -> str:
    return "-" if right is None else f"{right[0]}/{right[1]}"


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar says what is being drawn; it goes when the work is done."""
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield advance


# ---- explain, schedule, backends


def explanation_text(explanation: Explanation) -> Text:
    """The explanation's own words have their labels coloured."""
    text = Text(str(explanation))
    text.highlight_regex(r"\A[^\n]+", "bold")
    text.highlight_regex(r"(?m)^  [a-z]+(?=  )", "cyan")
    return text


def schedule_facts(schedule: Schedule, name: str) -> RenderableType:
    """A schedule's facts stand over its raster: a line per component, a character per step."""
    lines = [Fact("file", name), Fact("steps", str(schedule.steps))]
    lines += [
        Fact("blocks", f"{layer.bits.shape[1]} x {kind} ({', '.join(layer.components)})")
        for kind, layer in schedule.layers.items()
    ]
    lines.append(Fact("reused", f"{schedule.reuse_share:.1%} of all (step, block, component)"))
    lines.append(Fact("sha256", schedule.sha256))
    lines += [Fact(f"from {key}", str(value)) for key, value in schedule.provenance.items()]
    return Group(facts(lines), Text(), schedule_raster(schedule))


def schedule_statistics(schedule: Schedule, cost: tuple[str, Cost] | None) -> RenderableType:
    """This says what a schedule's bits say, and its cost on a model named with it."""
    from fastdit.cli.statistics import statistics
    from fastdit.schedules.plan import RunPlan, lower

    found = statistics(schedule, cost[1].spec if cost is not None else None)
    eager, each, runs = found.traffic
    lines = [
        Fact("steps", f"{found.steps} of {found.components} components"),
        Fact("reused", f"{found.reused} ({found.reuse_share:.1%}), in {found.runs} runs"),
        Fact("idle steps", ", ".join(map(str, found.idle_steps)) or "none"),
        Fact("ages", f"{found.mean_age:.2f} steps in the mean, {found.longest_reuse} at most"),
        Fact(
            "never renewed",
            ", ".join(f"{kind}[{block}].{name}" for kind, block, name in found.never_renewed)
            or "none",
        ),
        Fact(
            "whole blocks",
            ", ".join(f"{share:.1%} of {kind}" for kind, share in found.whole_blocks.items()),
        ),
        Fact("dead", _named(found.dead) + f"; {found.stale_outputs} outputs of stale inputs"),
        Fact("reuse moves", f"{eager} X eager, {each} X one by one, {runs} X run by run"),
    ]
    for name, counts in found.blocks_per_step.items():
        per_step = " ".join(map(str, counts))
        lines.append(Fact(name, f"computes {found.computed[name]} times, per step {per_step}"))
    if cost is not None:
        model, count = cost
        macs = count.linear_macs(schedule.bind(count.spec, schedule.steps), schedule.steps)
        dense = count.linear_macs(None, schedule.steps)
        plan = RunPlan(schedule.steps, schedule, lower(schedule, count.spec))
        true, true_dense = count.macs(plan), count.macs(RunPlan(schedule.steps, None, ()))
        lines += [
            Fact(
                "counted on",
                f"{model}, a transformer batch of {count.transformer_batch} with {count.size.image} image tokens",
            ),
            Fact("linear MACs", f"{macs} of {dense}: {dense / macs:.2f}x fewer"),
            Fact("with attention", f"{true} of {true_dense}: {true_dense / true:.2f}x fewer"),
            Fact(
                "caches",
                f"at most {count.cache_bytes(plan) / count.itemsize * 2 / 2**20:.1f} MiB in 16 bits",
            ),
        ]
    return facts(lines)


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def schedule_raster(schedule: Schedule) -> Text:
    """Text shows the share of the blocks that compute, at each step and component."""
    from fastdit.account.raster import LEGEND, Raster

    parts = []
    found = Raster.of_schedule(schedule)
    for kind, names in found.components.items():
        parts += [kind, str(Raster({kind: found.cells[kind]}, {kind: names}))]
    parts.append(f"one column per step: {LEGEND}")
    return Text("\n".join(parts))


def backend_table(rows: Sequence[tuple[str, str, Sequence[str]]], dtypes: Sequence[str]) -> Table:
    """A table shows (backend, device, one entry per dtype)."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("backend", "device", *dtypes):
        table.add_column(name)
    for backend, device, entries in rows:
        table.add_row(backend, device, *entries)
    return table
