"""The arguments of the commands: their types, bounds and help, one name each.

Declarations only; what they mean is in `cli.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastdit.cli.launch import MAX_WORKERS
from fastdit.schedules.schedule_file import MAX_COUNT

MAX_SIZE = 1 << 16  # of what is made in memory before anything is drawn


def _real(accepted: str, holds: Callable[[float], bool]) -> Callable[[float | None], float | None]:
    """A check for what typer's own bounds cannot say: they are closed, and let NaN through."""

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise typer.BadParameter(f"{value} is not {accepted}.")
        return value

    return check


_finite = _real("a finite number", lambda x: True)
_at_least_0 = _real("a finite number of at least 0", lambda x: x >= 0)

Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", help="A row each; four that suit the model if left out."),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="A diffusers pipeline saved on this disk; the embedded model if left out.",
    ),
]
Schedule = Annotated[
    Path | None,
    typer.Option("--schedule", metavar="FILE", help="A schedule file, in place of --every."),
]
Every = Annotated[
    int | None, typer.Option(min=1, help="Compute at every n-th step. [dim]default: 2[/dim]")
]
SeveralEvery = Annotated[
    list[int] | None,
    typer.Option(
        "--every",
        min=1,
        help="Compute at every n-th step; may be given again. [dim]default: 2 and 3[/dim]",
    ),
]
Ralu = Annotated[
    list[str] | None,
    typer.Option(
        "--ralu",
        metavar="PRESET",
        help="Draw in stages by this preset of RALU, such as sd3-2x, and show its stages; may be given again.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_COUNT, help="Steps; the schedule's, else the pipeline's default."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of every picture.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls per picture.")]
Pixels = Annotated[int | None, typer.Option(min=1, max=MAX_SIZE, help="Pixels.")]
Batch = Annotated[int, typer.Option(min=1, max=MAX_SIZE, help="Images per run.")]
Guidance = Annotated[
    bool | None,
    typer.Option(
        "--cfg/--no-cfg",
        help="Whether guidance doubles the rows; what is usual for the family if left out.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="For all ops; see [bold]fastdit backends[/bold]."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16. [dim]default: float32, on a GPU bfloat16[/dim]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_WORKERS, help="CPU threads; torch's default if left out."),
]
Picture = Annotated[Path, typer.Option("--out", metavar="FILE.png", help="Where the pictures go.")]
ScheduleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A schedule file.")]
Raster = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE.png", help="Draw every block, step and component here."),
]
Side = Annotated[
    int,
    typer.Option("--pixels", min=16, max=MAX_SIZE, help="Side of the image whose cost is counted."),
]
NewFile = Annotated[Path, typer.Argument(metavar="OUT", help="Where the schedule goes.")]
Layout = Annotated[str, typer.Option(metavar="NAME", help="ecad or fastdit.")]

# ---- search

Folder = Annotated[
    Path,
    typer.Option("--out", metavar="FOLDER", help="Of the result; a search in it is resumed."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="One prompt a line; scenes of its training for the embedded model if left out.",
    ),
]
SearchSteps = Annotated[int, typer.Option("--steps", min=2, max=MAX_COUNT, help="Inference steps.")]
Generations = Annotated[int, typer.Option(min=0, help="Generations after the seeds.")]
Population = Annotated[
    int | None,
    typer.Option(
        min=2, max=MAX_SIZE, help="Schedules per generation. [dim]default: the paper's[/dim]"
    ),
]
Costs = Annotated[
    list[str] | None,
    typer.Option(
        "--cost",
        metavar="NAME",
        help="macs, true-macs or latency; may be given again. [dim]default: true-macs[/dim]",
    ),
]
Quality = Annotated[str, typer.Option(metavar="NAME", help="paired, task, clip or image-reward.")]
QualityPath = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Weights of clip or image-reward; nothing is downloaded."),
]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, max=MAX_SIZE, help="Pictures per prompt.")]
Race = Annotated[
    int, typer.Option(min=0, help="Judge on so many pictures first, and stop with losers; 0: all.")
]
Unit = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What children inherit and change: bit, as in the paper, or whole steps: step.",
    ),
]
Seeds = Annotated[
    list[Path] | None,
    typer.Option(
        "--seed-schedule", metavar="FILE", help="A schedule to begin with; may be given again."
    ),
]
EvenSteps = Annotated[
    bool,
    typer.Option("--even-steps", help="Begin with whole steps, evenly spread, beside the paper's."),
]
Surrogate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Generations bred on predictions between two that are measured; 0, as in the paper: none.",
    ),
]
SearchSeed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the search.")]
ImageSeed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the first picture.")]
SearchBatch = Annotated[
    int, typer.Option("--batch", min=1, max=MAX_SIZE, help="Pictures per pipeline call.")
]
Workers = Annotated[
    int,
    typer.Option(min=1, max=MAX_WORKERS, help="Processes that draw; the result is the same."),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Draw on this Ray cluster, or on a 'local' one."),
]
WorkerThreads = Annotated[
    int, typer.Option("--threads", min=1, max=MAX_WORKERS, help="CPU threads per worker.")
]

# ---- train-router

RouterFile = Annotated[
    Path, typer.Option("--out", metavar="FILE.safetensors", help="Where the router goes.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints", metavar="FOLDER", help="Save here, and go on with what is found here."
    ),
]
RouterSteps = Annotated[
    int, typer.Option("--steps", min=2, max=MAX_COUNT, help="Steps of the sampler.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Trajectories.")]
TrainingBatch = Annotated[
    int, typer.Option(min=1, max=MAX_SIZE, help="Images of a trajectory, all processes.")
]
Beta = Annotated[
    float, typer.Option(callback=_at_least_0, help="Weight of the compute penalty, at least 0.")
]
Target = Annotated[
    float | None,
    typer.Option(
        callback=_real("a number in (0, 1)", lambda x: 0 < x < 1),
        help="Share of the arithmetic to spare, in (0, 1); beta is steered to it, not fixed.",
    ),
]
Pairs = Annotated[
    bool, typer.Option("--pairs", help="Every second step computes: as Learning-to-Cache trains.")
]
WholeSteps = Annotated[
    bool, typer.Option("--whole-steps", help="One logit for all components of a step.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS", help="A scheduler of diffusers to train for, in place of the pipeline's."
    ),
]
Rate = Annotated[
    float,
    typer.Option("--lr", callback=_at_least_0, help="How far a logit moves in a trajectory."),
]
LambdaForm = Annotated[
    str,
    typer.Option(metavar="NAME", help="released, published, sensitivity, or none for lambda = 1."),
]
LambdaEvery = Annotated[int, typer.Option(min=1, help="Trajectories between two estimates.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Do not divide lambda by its mean, as the published code.")
]
Tau = Annotated[
    float,
    typer.Option(
        callback=_real("a number in [0, 1)", lambda x: 0 <= x < 1),
        help="Components above it compute; in [0, 1).",
    ),
]
Keep = Annotated[
    str, typer.Option(metavar="NAME", help="What slots are renewed with: fresh or blended.")
]
Spread = Annotated[float, typer.Option(callback=_at_least_0, help="Deviation of the first logits.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Spare memory: run blocks again going backward.")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance", callback=_finite, help="Guidance scale; the pipeline's if left out."
    ),
]
