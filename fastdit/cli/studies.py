"""The commands `fastdit eval` and `fastdit compare`, and their own arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdit.cli import arguments, options
from fastdit.cli.app import app
from fastdit.files import check_folder
from fastdit.schedules.schedule_file import MAX_COUNT

_at_least_1 = options.real("a finite number of at least 1", lambda x: x >= 1)
_finite = options.real("a finite number", lambda x: True)

AnyModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="Folder of a saved diffusers pipeline, or tiny or emoji for a model in the package; tiny if left out.",
    ),
]
EvalPrompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="A text file with one prompt a line; for a model in the package, held-out scenes if left out.",
    ),
]
Study = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder of the result; what was drawn in it is not drawn again.",
    ),
]
Pictures = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=options.MAX_SIZE,
        help="The first prompts, so many. [dim]\\[default: all; 24][/dim]",
    ),
]
Speeds = Annotated[
    list[float] | None,
    typer.Option(
        "--speedup",
        callback=lambda values: [_at_least_1(value) for value in values or ()],
        help="A budget, times as fast as the unpatched loop; may be given again.",
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        metavar="X,Y,...", help="Speed-ups between commas at which the composed plans are judged."
    ),
]
Book = Annotated[
    Path | None,
    typer.Option(
        "--book",
        metavar="FILE",
        help="Plan book of the budgets; the package's own of the model if left out.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="NAME=FOLDER",
        help="Also judge by lpips, fid, kid, cmmd, clip, image-reward or hps, by weights in the folder; may be "
        "given again. Nothing is downloaded.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Timed calls of each arm, which take turns.")]
StudyBatch = Annotated[
    int, typer.Option("--batch", min=1, max=options.MAX_SIZE, help="Pictures per pipeline call.")
]
StudySteps = Annotated[
    int,
    typer.Option("--steps", min=2, max=MAX_COUNT, help="Inference steps of the unpatched runs."),
]


Frames = Annotated[
    int | None,
    typer.Option(
        min=1, max=options.MAX_SIZE, help="Frames of a video; the pipeline's default if left out."
    ),
]
TrueCfg = Annotated[
    float | None,
    typer.Option(
        "--true-cfg",
        callback=_finite,
        help="Scale of guidance by a run with an empty prompt, where the pipeline takes true_cfg_scale.",
    ),
]


def _given(*values: float | None) -> dict[str, float | None]:
    """Option -> its value."""
    names = "--height", "--width", "--frames", "--guidance", "--true-cfg"
    return dict(zip(names, values, strict=True))


@app.command("eval")
def evaluate(
    model: AnyModel = None,
    prompts: EvalPrompts = None,
    out: Study = Path("fastdit-eval"),
    speedup: Speeds = None,
    book: Book = None,
    every: options.SeveralEvery = None,
    schedule: options.Schedule = None,
    order: options.Order = None,
    ralu: options.Ralu = None,
    judge: Judges = None,
    pictures: Pictures = None,
    steps: StudySteps = 28,
    guidance: options.GuidanceScale = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    frames: Frames = None,
    true_cfg: TrueCfg = None,
    seed: options.SearchSeed = 0,
    batch: StudyBatch = 4,
    rounds: Rounds = 3,
    threads: options.Threads = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Say how near methods come to a many-step solution and to the unpatched pictures, and what they cost.

    Fewer steps of every solver that fits stand beside. By default a budget of twice the speed is evaluated.
    """
    from fastdit.cli import evaluation as view

    check_folder(out, "--out")
    methods = arguments.methods(schedule, every, order, default=())
    methods |= arguments.ralu(ralu or ())
    speeds = list(speedup or ()) or ([] if methods else [2.0])
    view.conduct(
        lambda loaded, studio, plans: view.chosen(studio, steps, methods, speeds, plans),
        model,
        prompts,
        out,
        arguments=_given(height, width, frames, guidance, true_cfg),
        book=book,
        judges=judge or (),
        pictures=pictures,
        rounds=rounds,
        threads=threads,
        dtype=dtype,
        seed=seed,
        batch=batch,
        backend=backend,
    )


@app.command()
def compare(
    model: AnyModel = None,
    prompts: EvalPrompts = None,
    out: Study = Path("fastdit-compare"),
    budgets: Budgets = "1.5,2,3,4,5",
    book: Book = None,
    judge: Judges = None,
    pictures: Pictures = None,
    steps: StudySteps = 28,
    guidance: options.GuidanceScale = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    frames: Frames = None,
    true_cfg: TrueCfg = None,
    seed: options.SearchSeed = 0,
    batch: StudyBatch = 4,
    rounds: Rounds = 3,
    threads: options.Threads = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Set everything that makes a model faster beside each other: this package's ways, plain steps, other projects.

    It writes JSON, a plot and one page to flip through, which needs nothing else. Peers are the caches of
    diffusers and, where they are installed, cache-dit and microsoft/RAS; what a model cannot run is told.
    """
    from fastdit.cli import evaluation as view

    check_folder(out, "--out")
    speeds = view.speeds_of(budgets)
    view.conduct(
        lambda loaded, studio, plans: view.everything(loaded, studio, steps, speeds, plans),
        model,
        prompts,
        out,
        arguments=_given(height, width, frames, guidance, true_cfg),
        book=book,
        judges=judge or (),
        pictures=pictures,
        rounds=rounds,
        threads=threads,
        dtype=dtype,
        seed=seed,
        batch=batch,
        backend=backend,
    )
