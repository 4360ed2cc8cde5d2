"""What `fastdit eval` and `fastdit compare` show: a bar, a table, and where the files are."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastdit.errors import ArgumentError, FastDiTError

if TYPE_CHECKING:
    from fastdit.cli.loading import Model
    from fastdit.evaluate.contenders import Field
    from fastdit.evaluate.studio import Studio
    from fastdit.evaluate.study import Study
    from fastdit.methods.base import Method

RESULT, PLOT, PAGE = "comparison.json", "comparison.png", "comparison.html"
EMBEDDED_PROMPTS = 24
PACKAGES = ("tiny", "emoji")
#: option -> argument of a pipeline's call
ARGUMENTS = {
    "--height": "height",
    "--width": "width",
    "--frames": "num_frames",
    "--guidance": "guidance_scale",
    "--true-cfg": "true_cfg_scale",
}
NEGATIVE = " "  # as Qwen-Image's own examples have it


def load(model: Path | None, dtype: str | None, threads: int | None) -> Model:
    """A saved pipeline, or a model in the package by its name."""
    from fastdit.cli import arguments

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    name = PACKAGES[0] if model is None else str(model)
    if name in PACKAGES and (model is None or not model.is_dir()):
        return arguments.load(None, dtype, name)
    return arguments.load(model, dtype)


def speeds_of(text: str) -> tuple[float, ...]:
    """Numbers between commas, each at least 1."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(1 <= each < math.inf for each in found):
        raise ArgumentError(f"--budgets must be numbers of at least 1 between commas, got {text!r}")
    return found


def check_judges(given: Sequence[str]) -> None:
    """This refuses before the work a judge that does not exist, or whose folder is none."""
    from fastdit.evaluate.judges import JUDGES

    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or name not in JUDGES or not Path(folder).is_dir():
            raise ArgumentError(
                f"--judge must be NAME=FOLDER, with a folder of weights and one of {', '.join(JUDGES)}, got {text!r}; "
                "nothing is downloaded"
            )


def prompts_of(file: Path | None, loaded: Model, count: int | None) -> list[str]:
    """Lines of a file, or of the model in the package prompts that are held out; the first `count`."""
    if file is None and loaded.package is not None:
        one, two = (
            loaded.package.prompts((count or EMBEDDED_PROMPTS) // 2 + 1, "test", n, seed=7)
            for n in (1, 2)
        )
        found = [text for pair in zip(one, two, strict=True) for text in pair]
        return found[: count or EMBEDDED_PROMPTS]
    from fastdit.cli.search import prompts_of as read

    found = list(read(file, embedded=False))
    if count is not None and count > len(found):
        raise ArgumentError(
            f"--pictures must be at most {len(found)}, the prompts of the file, got {count}"
        )
    return found[:count]


def judges_of(given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """--judge NAME=FOLDER becomes judges by name, and the hashes of their files."""
    from fastdit.evaluate.judges import hashes, make_judge

    judges, weights = {}, {}
    for text in given:
        name, _, folder = text.partition("=")
        judges[name], weights[name] = make_judge(name, Path(folder)), hashes(Path(folder))
    return judges, weights


def studio_of(
    loaded: Model, prompts: Sequence[str], out: Path, given: Mapping[str, Any], **settings: Any
) -> Studio:
    """Where pictures are drawn and kept."""
    from fastdit.evaluate.studio import Studio
    from fastdit.evaluate.study import identity

    arguments = arguments_of(loaded.pipeline, given)
    known = {**identity(loaded.pipeline), "prompts": list(prompts), "dtype": loaded.dtype}
    return Studio(
        loaded.pipeline, prompts, out / "drawn", arguments=arguments, identity=known, **settings
    )


def arguments_of(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline's call is given, from the values of options by their names; None is the pipeline's default.

    Raises:
        ArgumentError: The pipeline does not take it, or would not heed it; names the option.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    found = {}
    for option, value in given.items():
        argument = ARGUMENTS[option]
        if value is None:
            continue
        if argument not in taken:
            raise ArgumentError(f"{option}: {name} takes no {argument}")
        found[argument] = value
    # Such a pipeline asks for both, and tells its transformer the first alone.
    if "guidance_scale" in found and "true_cfg_scale" in taken:
        transformer = pipe.transformer
        if not transformer.config.get("guidance_embeds"):
            raise ArgumentError(
                f"--guidance: {type(transformer).__name__} is told no guidance scale; "
                f"--true-cfg is the scale of {name}"
            )
    if "true_cfg_scale" in found:  # it needs a prompt to lead away from
        found["negative_prompt"] = NEGATIVE
    return found


def check_draws(studio: Studio, judges: Mapping[str, Any]) -> None:
    """A picture is drawn and judged, before all of them are.

    Raises:
        ArgumentError: It cannot be, or is too small for the metrics.
    """
    from fastdit.evaluate.arms import Arm
    from fastdit.evaluate.metrics import scales
    from fastdit.evaluate.peers import said

    name = type(studio.pipe).__name__
    try:
        picture = studio.sketch(Arm("stock", 2)).picture
    except FastDiTError:
        raise
    except Exception as error:  # what a pipeline raises depends on what it cannot do
        raise ArgumentError(f"{name} does not draw {studio.prompts[0]!r}: {said(error)}") from error
    if picture.ndim not in (4, 5) or picture.shape[-1] != 3:
        raise ArgumentError(f"{name} must draw pictures or videos in RGB, it gives {picture.shape}")
    scales(picture.shape[-3:-1])
    pair = np.concatenate([picture, picture])
    for title, judge in judges.items():
        try:
            judge(pair, studio.prompts[:1] * 2, pair)
        except Exception as error:  # so does what a network cannot take
            size = " x ".join(map(str, picture.shape[-3:-1]))
            raise ArgumentError(
                f"judge {title!r} takes no picture of {size}: {said(error)}"
            ) from error


def book_of(path: Path | None, loaded: Model) -> Any:
    """A plan book from a file, or the package's own of a model, if there is one."""
    from fastdit.schedules.book import PlanBook

    if path is not None:
        return PlanBook.load(path)
    return PlanBook.packaged(loaded.pipeline.transformer)


def chosen(
    studio: Studio, steps: int, methods: Mapping[str, Method], speeds: Sequence[float], book: Any
) -> Field:
    """The arms of `fastdit eval`: the unpatched run, what was asked for, and fewer steps of every solver."""
    from fastdit.evaluate import contenders
    from fastdit.evaluate.arms import Arm

    found = contenders.Field()
    contenders.unpatched(found, steps)
    for name, method in methods.items():
        count = method.run_steps or steps
        arm = Arm(
            "stock", count, lambda pipe, _, method=method: method, key=contenders.key_of(method)
        )
        contenders.patched(found, studio, name, name, arm)
        found.judged[name] = None
    contenders.budgeted(found, studio, steps, speeds, book)
    if found.refused:
        name, why = next(iter(found.refused.items()))
        raise ArgumentError(f"{name}: {why}")
    counts = contenders.counts_of(steps, [*speeds, *contenders.BUDGETS])
    contenders.fewer_steps(found, studio, counts)
    return found


def everything(
    loaded: Model, studio: Studio, steps: int, speeds: Sequence[float], book: Any
) -> Field:
    """The arms of `fastdit compare`."""
    from fastdit.evaluate import contenders

    found = contenders.Field()
    contenders.unpatched(found, steps)
    contenders.fewer_steps(found, studio, contenders.counts_of(steps, speeds))
    contenders.budgeted(found, studio, steps, speeds, book)
    contenders.alone(found, studio, steps, loaded.package)
    contenders.others(found, studio, steps)
    return found


def conduct(
    arms: Callable[[Model, Studio, Any], Field],
    model: Any,
    prompts: Path | None,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    book: Path | None,
    judges: Sequence[str],
    pictures: int | None,
    rounds: int,
    threads: int | None,
    dtype: Any,
    **settings: Any,
) -> None:
    """This loads what the command line names, and runs the arms of it."""
    check_judges(judges)
    loaded = load(model, dtype, threads)
    texts = prompts_of(prompts, loaded, pictures)
    studio = studio_of(loaded, texts, out, arguments, **settings)
    plans = book_of(book, loaded)
    run(Console(), loaded, studio, lambda: arms(loaded, studio, plans), out, rounds, judges)


def run(
    console: Console,
    loaded: Model,
    studio: Studio,
    field: Callable[[], Field],
    out: Path,
    rounds: int,
    judges: Sequence[str] = (),
) -> None:
    """This draws and times with a bar, writes the result, the plot and the page, and shows a table."""
    from fastdit.cli.loading import judge_of
    from fastdit.evaluate import study
    from fastdit.evaluate.page import write
    from fastdit.evaluate.plot import plot

    made, weights = judges_of(judges)
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("what can run", total=None)
        check_draws(studio, made)
        found = study.conduct(
            studio,
            field(),
            rounds,
            lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
        )
        progress.update(task, description="metrics")
        result = study.result(found, judge_of(loaded), made)
    result["provenance"]["weights"] = weights
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, out / PLOT)
    pictures = {name: found.drawn[name].pictures for name in shown(found, result)}
    write(result, {**pictures, "the solution": found.truth.pictures}, out / PAGE)
    show(console, result)
    for name in (RESULT, PLOT, PAGE):
        console.print(f"written: {out / name}", highlight=False, soft_wrap=True)


def shown(found: Study, result: Mapping[str, Any]) -> list[str]:
    """The arms whose pictures stand in the page: what was measured, without plain steps that nothing is judged by."""
    from fastdit.evaluate.contenders import FEWER

    rivals = {
        one["arm"]
        for each in result["verdicts"]
        for one in each["against"].values()
        if "arm" in one
    }
    plain = found.field.groups.get(FEWER, {})
    return [name for name in found.field.arms if name not in plain or name in rivals]


def show(console: Console, result: Mapping[str, Any]) -> None:
    """Two tables, and in words where composed plans do not win."""
    console.print(rows_table(result))
    if result["verdicts"]:
        console.print(verdict_table(result))
    for sentence in result["where_not"]:
        console.print(Text(sentence, style="yellow"), soft_wrap=True)
    for name, why in result["refused"].items():
        console.print(Text(f"not run: {name}: {why}", style="dim"), soft_wrap=True)


def rows_table(result: Mapping[str, Any]) -> Table:
    """A line for each arm; of plain steps the nearest solver at each count alone."""
    from fastdit.evaluate.contenders import FEWER

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("")
    for name in ("loop", "call", "arith.", "error", "of unp.", "95 %", "PSNR", "SSIM"):
        table.add_column(name, justify="right", no_wrap=True)
    best: dict[int, float] = {}
    for row in result["rows"]:
        if row["group"] == FEWER:
            best[row["steps"]] = min(best.get(row["steps"], row["error"]), row["error"])
    for row in result["rows"]:
        if row["group"] == FEWER and row["error"] > best[row["steps"]]:
            continue
        over, near = row["over_unpatched"], row["to_truth"]
        table.add_row(
            Text(row["arm"]),
            f"{row['speedup']:.2f}x",
            f"{row['call_speedup']:.2f}x",
            f"{row['arithmetic']:.0%}",
            f"{row['error']:.3g}",
            f"{over['value']:.2f}",
            f" {over['low']:.2f}-{over['high']:.2f}",
            "equal" if near["psnr"] is None else f"{near['psnr']['mean']:.1f}",
            f" {near['ssim']['mean']:.3f}",
        )
    return table


def verdict_table(result: Mapping[str, Any]) -> Table:
    """A line for each budget and group."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("arm", "beside", "its best in that time", "error over its", ""):
        table.add_column(name)
    for each in result["verdicts"]:
        for group, one in each["against"].items():
            compared = one.get("ratio")
            table.add_row(
                Text(each["arm"]),
                Text(group),
                Text(one.get("arm") or f"fastest: {one['fastest']:.2f}x"),
                ""
                if compared is None
                else f"{compared['value']:.2f} [{compared['low']:.2f}, {compared['high']:.2f}]".replace(
                    "[", "\\["
                ),
                one["verdict"],
            )
    return table
