"""What `fastdit demo` shows: what it is about to do, the table, and the pictures it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fastdit.cli import console as view
from fastdit.cli.loading import Model, calls, default_prompts, judge_of, messages_once
from fastdit.cli.machine import describe

if TYPE_CHECKING:
    from fastdit.cli.demo import Settings
    from fastdit.methods.base import Method


def run(
    model: Model, prompts: list[str], methods: dict[str, Method], settings: Settings, out: Path
) -> None:
    """The methods are compared on the prompts, the figures printed, and the grid written to `out`."""
    from fastdit.cli.demo import compare, total_calls

    console = Console()
    where = f"{describe(model.device)}, {model.dtype}"
    prompts = prompts or default_prompts(model)
    asked = calls(model.pipeline, prompts, settings.height, settings.width)
    console.print(
        f"[bold]fastdit demo[/bold]: {model.name} on {where}\n"
        f"prompts: {len(prompts)}, steps: {settings.steps}, seed: {settings.seed}, "
        f"timed calls per picture: {settings.repeats}\n"
        f"{total_calls(len(prompts), len(methods), settings)} pipeline calls: warm-up, "
        "how many steps take equal time, then all arms in turn",
        highlight=False,
    )
    with messages_once(), view.progress_bar(console) as advance:
        found = compare(
            model.pipeline, asked, prompts, methods, settings, judge_of(model), progress=advance
        )
    console.print(view.comparison_table(found))
    view.comparison_picture(found, model, where).save(out, format="PNG")
    console.print(f"pictures: {out}", highlight=False, soft_wrap=True)
    if stages := view.stages_picture(found, model):
        path = out.with_name(f"{out.stem}-stages.png")
        stages.save(path, format="PNG")
        console.print(f"stages: {path}", highlight=False, soft_wrap=True)
