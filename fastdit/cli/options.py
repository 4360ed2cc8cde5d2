"""The arguments of the commands: their types, bounds and help, one name each.

These are declarations; what is done with them is in `commands.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastdit.cli.launch import MAX_WORKERS
from fastdit.schedules.forecast import MAX_ORDER
from fastdit.schedules.layer import AUTO
from fastdit.schedules.schedule_file import MAX_COUNT

MAX_SIZE = 1 << 16  # of what is made in memory before anything is drawn


def real(accepted: str, holds: Callable[[float], bool]) -> Callable[[float | None], float | None]:
    """This checks what typer's own bounds cannot say: they are closed, and let NaN through."""

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise typer.BadParameter(f"{value} is not {accepted}.")
        return value

    return check


_finite = real("a finite number", lambda x: True)
_at_least_0 = real("a finite number of at least 0", lambda x: x >= 0)

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Prompts, a line of pictures for each; four that suit the model if left out.",
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="Folder of a saved diffusers pipeline; the model in the package if left out.",
    ),
]
Schedule = Annotated[
    Path | None,
    typer.Option("--schedule", metavar="FILE", help="Schedule file to run, in place of --every."),
]
Every = Annotated[
    int | None,
    typer.Option(
        min=1, help="Compute at every N-th step and reuse between. [dim]\\[default: 2][/dim]"
    ),
]
SPEEDUPS = (2, 3, 4)
Speedups = Annotated[
    list[float] | None,
    typer.Option(
        min=1,
        help="Leave out what makes the denoising loop so many times as fast; may be given again. "
        "[dim]\\[default: 2, 3 and 4][/dim]",
    ),
]
SeveralEvery = Annotated[
    list[int] | None,
    typer.Option(
        "--every",
        min=1,
        help="Compute at every N-th step and reuse between; may be given again.",
    ),
]


class OneOrder(str, Enum):
    """What `--order` takes."""

    repeat, line, parabola, auto = "0", "1", "2", AUTO


Order = Annotated[
    OneOrder | None,
    typer.Option(
        help="How a reused output is drawn: 0 repeats the last computed one, 1 is the line through two, 2 the "
        "parabola through three, auto the line while it is nearer; 0, or what the schedule says, if left out.",
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
OneRalu = Annotated[
    str | None,
    typer.Option(
        "--ralu", metavar="PRESET", help="In stages by this preset of RALU, such as sd3-2x."
    ),
]
Ras = Annotated[
    float | None,
    typer.Option("--ras", metavar="RATIO", help="RAS computes this share of the tokens."),
]
Plan = Annotated[
    Path | None,
    typer.Option(
        "--png",
        metavar="FILE.png",
        help="Picture of the plan to write: every block, step and component, and the tokens.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_COUNT,
        help="Inference steps; the schedule's, else the pipeline's default, if left out.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random numbers.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed pipeline calls per picture.")]
Pixels = Annotated[
    int | None, typer.Option(min=1, max=MAX_SIZE, help="In pixels; the pipeline's if left out.")
]
Batch = Annotated[int, typer.Option(min=1, max=MAX_SIZE, help="Images per run.")]
Guidance = Annotated[
    bool | None,
    typer.Option(
        "--cfg/--no-cfg",
        help="Whether guidance doubles the batch; what is usual for the family if left out.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Backend of all ops; the fastest of each if left out. See [bold]fastdit backends[/bold].",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16. [dim]\\[default: float32, on a GPU bfloat16][/dim]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_WORKERS, help="CPU threads; torch's default if left out."),
]
Picture = Annotated[Path, typer.Option("--out", metavar="FILE.png", help="Picture file to write.")]
ScheduleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A schedule file.")]
Raster = Annotated[
    Path | None,
    typer.Option(
        "--png",
        metavar="FILE.png",
        help="Picture of every block, step and component to write.",
    ),
]
Side = Annotated[
    int,
    typer.Option(
        "--pixels",
        min=16,
        max=MAX_SIZE,
        help="Side, in pixels, of the square image whose cost is counted.",
    ),
]
NewFile = Annotated[Path, typer.Argument(metavar="OUT", help="Schedule file to write.")]
Layout = Annotated[
    str, typer.Option(metavar="NAME", help="ecad, the layout of ECAD's released files, or fastdit.")
]

# ---- search

Folder = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FOLDER", help="Folder of the result; a search in it is resumed."
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="A text file with one prompt a line; for the model in the package, scenes of its training if left out.",
    ),
]
SearchSteps = Annotated[int, typer.Option("--steps", min=2, max=MAX_COUNT, help="Inference steps.")]
Generations = Annotated[int, typer.Option(min=0, help="Generations after the seeds.")]
Population = Annotated[
    int | None,
    typer.Option(
        min=2, max=MAX_SIZE, help="Schedules per generation; the paper's number if left out."
    ),
]
Costs = Annotated[
    list[str] | None,
    typer.Option(
        "--cost",
        metavar="NAME",
        help="What to spare: macs, of linear layers, as published; true-macs, with attention's products; or latency. "
        "May be given again. [dim]\\[default: macs][/dim]",
    ),
]
Quality = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How to judge: paired, by the unpatched run; truth, by what many steps come to; "
        "task, clip or image-reward.",
    ),
]
QualityPath = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder with the weights of clip or image-reward; nothing is downloaded.",
    ),
]
SearchScheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="CLASS",
        help="Scheduler class of diffusers to search for, or recommended for what suits few steps; the pipeline's if "
        "left out.",
    ),
]
Space = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="What one search varies: schedule, and beside it order, ras, ralu, steps and solver.",
    ),
]
Orders = Annotated[
    str | None,
    typer.Option(
        metavar="N,N",
        help="Orders by which a reused output may be drawn: 0 repeats it; with 0,1 or 0,1,2 the search chooses. "
        "[dim]\\[default: 0; 0,1,2 where --space has order][/dim]",
    ),
]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, max=MAX_SIZE, help="Pictures per prompt.")]
Race = Annotated[
    int,
    typer.Option(
        min=0,
        help="Pictures to judge on before losers are given up; 0 judges on all.",
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What children inherit and change: a bit, as in the paper, or a whole step.",
    ),
]
Tries = Annotated[
    int, typer.Option(metavar="N", help="Fits measured for each number of steps.", min=1)
]
Seeds = Annotated[
    list[Path] | None,
    typer.Option(
        "--seed-schedule", metavar="FILE", help="Schedule file to begin with; may be given again."
    ),
]
EvenSteps = Annotated[
    bool,
    typer.Option(
        "--even-steps",
        help="Begin with schedules of evenly spread whole steps too, beside the paper's.",
    ),
]
Surrogate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Generations bred on predictions between two that are measured; the paper has 0.",
    ),
]
SeedBook = Annotated[
    Path | None,
    typer.Option("--seed-book", metavar="FILE", help="Plan book whose plans are tried, too."),
]
SearchSeed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the search.")
]
ImageSeed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first picture.")]
SearchBatch = Annotated[
    int, typer.Option("--batch", min=1, max=MAX_SIZE, help="Pictures per pipeline call.")
]
Workers = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_WORKERS, help="Processes that draw; their number does not change the result."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to draw on, or local for one on this machine; none if left out.",
    ),
]
WorkerThreads = Annotated[
    int, typer.Option("--threads", min=1, max=MAX_WORKERS, help="CPU threads per worker.")
]

# ---- calibrate


class Package(str, Enum):
    """The models in the package."""

    tiny = "tiny"
    emoji = "emoji"


Embedded = Annotated[
    Package,
    typer.Option("--embedded", help="Which model in the package, where --model is left out."),
]
BookFile = Annotated[Path, typer.Option("--out", metavar="FILE.json", help="Plan book to write.")]
BookSteps = Annotated[
    int, typer.Option("--steps", min=8, max=MAX_COUNT, help="Inference steps of the runs.")
]

# ---- train-router

RouterFile = Annotated[
    Path, typer.Option("--out", metavar="FILE.safetensors", help="Router file to write.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        metavar="FOLDER",
        help="Folder of checkpoints; a training in it is resumed.",
    ),
]
RouterSteps = Annotated[
    int, typer.Option("--steps", min=2, max=MAX_COUNT, help="Inference steps to train for.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Trajectories to train on.")]
TrainingBatch = Annotated[
    int, typer.Option(min=1, max=MAX_SIZE, help="Images of a trajectory, over all processes.")
]
Beta = Annotated[
    float, typer.Option(callback=_at_least_0, help="Weight of the compute penalty, at least 0.")
]
Target = Annotated[
    float | None,
    typer.Option(
        callback=real("a number in (0, 1)", lambda x: 0 < x < 1),
        help="Share of the arithmetic to spare, in (0, 1), to which beta is steered; beta stays as it is if left out.",
    ),
]
Pairs = Annotated[
    bool, typer.Option("--pairs", help="Compute every second step, as Learning-to-Cache trains.")
]
WholeSteps = Annotated[
    bool, typer.Option("--whole-steps", help="Learn one logit for all components of a step.")
]
RouterOrder = Annotated[
    int,
    typer.Option(
        min=0,
        max=MAX_ORDER,
        help="Train for reused outputs that are extrapolated: 1 on a line, 2 on a parabola; 0 repeats.",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="Scheduler class of diffusers to train for; the pipeline's if left out.",
    ),
]
Rate = Annotated[
    float,
    typer.Option(
        "--lr",
        callback=_at_least_0,
        help="Learning rate: about how far a logit moves in a trajectory.",
    ),
]
Loss = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What teacher and student are compared by: guided, what the scheduler gets, "
        "or released, all output channels.",
    ),
]
LambdaForm = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Estimate of lambda, the weight of a step's error: "
        "released, published, sensitivity, or none for 1.",
    ),
]
LambdaEvery = Annotated[
    int, typer.Option(min=1, help="Trajectories between two estimates of lambda.")
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Take lambda as it is, as the published code does, not divided by its mean."
    ),
]
Tau = Annotated[
    float,
    typer.Option(
        callback=real("a number in [0, 1)", lambda x: 0 <= x < 1),
        help="Threshold in [0, 1); components whose ratio is above it compute.",
    ),
]
Keep = Annotated[
    str, typer.Option(metavar="NAME", help="Which output is kept for reuse: fresh or blended.")
]
Spread = Annotated[
    float, typer.Option(callback=_at_least_0, help="Standard deviation of the first logits.")
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing", help="Spare memory: run each block again in the backward pass."
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance", callback=_finite, help="Guidance scale; the pipeline's default if left out."
    ),
]
