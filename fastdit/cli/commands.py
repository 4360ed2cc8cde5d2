"""The command line: `fastdit demo`, `explain`, `search`, `schedule`, `train-router`, `backends`.

Reads arguments, calls the library, prints. Errors the library raises on purpose, and those of files
and disks, end as one red line and exit code 2, Ctrl-C as exit code 130. What is heavy (torch,
diffusers, drawing) is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fastdit.cli import arguments, options
from fastdit.errors import ArgumentError, FastDiTError
from fastdit.files import check_folder

if TYPE_CHECKING:
    from fastdit.cli.demo import Settings
    from fastdit.cli.loading import Model
    from fastdit.methods.base import Method

REFUSED, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """Commands whose expected failures end without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the module's description."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer's own business: whoever read the output has enough
        except (FastDiTError, OSError) as error:
            from fastdit.cli.console import printable

            line = printable(" ".join(str(error).split()))
            Console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="fastdit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
schedules = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at schedule files.")
app.add_typer(schedules, name="schedule")


def _version(wanted: bool) -> None:
    if wanted:
        from fastdit import __version__

        typer.echo(f"fastdit {__version__}")
        raise typer.Exit


@app.callback()
def fastdit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Faster diffusion transformers for Hugging Face diffusers.

    [bold]Examples[/bold]

      fastdit demo

      fastdit demo "a large red circle at the left on a white background" --every 3

      fastdit demo --ralu sd3-2x --every 2

      fastdit demo "a fox in the snow" --model ./PixArt-XL-2-512x512 --steps 20

      fastdit explain --model ./FLUX.1-dev --every 2 --height 1024 --width 1024

      fastdit search --model ./PixArt-XL-2-256x256 --prompts prompts.txt --out found

      fastdit schedule show ecad.json --png ecad.png

      fastdit schedule stats ecad.json
    """


@app.command()
def demo(
    prompts: options.Prompts = None,
    model: options.Model = None,
    out: options.Picture = Path("fastdit-demo.png"),
    every: options.SeveralEvery = None,
    schedule: options.Schedule = None,
    ralu: options.Ralu = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    repeats: options.Repeats = 3,
    height: options.Pixels = None,
    width: options.Pixels = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Draw the same seeds unpatched, by a schedule, and by fewer steps in the schedule's time.

    Writes a grid of the pictures and prints seconds, speed-ups and distances to the unpatched. With --ralu a second
    grid, FILE-stages.png, shows the picture and its tokens at the end of each stage.

    For a DiT pipeline the prompts are class numbers.
    """
    arguments.check_output(out, "--out")
    methods = arguments.methods(schedule, every, default=() if ralu else (2, 3))
    methods |= arguments.ralu(ralu or ())
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded = arguments.load(model, dtype)
    from fastdit.cli.demo import Settings, resolve_steps

    steps = resolve_steps(loaded.pipeline, list(methods.values()), steps, backend)
    settings = Settings(steps, seed, repeats, height, width, backend)
    _run_demo(loaded, list(prompts or ()), methods, settings, out)


def _run_demo(
    model: Model, prompts: list[str], methods: dict[str, Method], settings: Settings, out: Path
) -> None:
    from fastdit.cli import console as view
    from fastdit.cli.demo import compare, total_calls
    from fastdit.cli.loading import calls, default_prompts, judge_of, messages_once
    from fastdit.cli.machine import describe

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


@app.command()
def explain(
    model: options.Model = None,
    schedule: options.Schedule = None,
    every: options.Every = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    batch: options.Batch = 1,
    steps: options.Steps = None,
    cfg: options.Guidance = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Say what a patched model will do, without running it: plan, compute, bytes, caches."""
    (method,) = arguments.methods(
        schedule, None if every is None else [every], default=(2,)
    ).values()
    loaded = arguments.load(model, dtype)
    from fastdit import patch
    from fastdit.cli.console import explanation_text

    handle = patch(loaded.pipeline, method, backend=backend)
    text = explanation_text(handle.explain(height, width, batch, steps, cfg))
    Console().print(text, soft_wrap=True)


@app.command()
def search(
    out: options.Folder,
    model: options.Model = None,
    prompts: options.PromptFile = None,
    steps: options.SearchSteps = 20,
    generations: options.Generations = 50,
    population: options.Population = None,
    cost: options.Costs = None,
    quality: options.Quality = "paired",
    quality_path: options.QualityPath = None,
    images_per_prompt: options.ImagesPerPrompt = 1,
    race: options.Race = 0,
    unit: options.Unit = "bit",
    even_steps: options.EvenSteps = False,
    surrogate: options.Surrogate = 0,
    seed_schedule: options.Seeds = None,
    seed: options.SearchSeed = 0,
    image_seed: options.ImageSeed = 0,
    batch: options.SearchBatch = 8,
    height: options.Pixels = None,
    width: options.Pixels = None,
    workers: options.Workers = 1,
    ray: options.Ray = None,
    threads: options.WorkerThreads = 1,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Search schedules that trade quality for time (ECAD: NSGA-II). Needs the extra "search".

    Killed or ended, the same command goes on where it was; more --generations continue it.

    Under torchrun, every rank draws and the first one leads.
    """
    from functools import partial

    from fastdit.cli import search as view
    from fastdit.search import Operators, Settings, Work
    from fastdit.search.nsga2 import require_pymoo

    require_pymoo()
    check_folder(out, "--out")
    size = {name: value for name, value in (("height", height), ("width", width)) if value}
    work = Work(
        view.prompts_of(prompts, embedded=model is None),
        steps=steps,
        images_per_prompt=images_per_prompt,
        seed=image_seed,
        batch=batch,
        threads=threads,
        quality=quality,
        quality_path=None if quality_path is None else str(quality_path),
        backend=backend,
        arguments=size,
    )
    costs, operators = tuple(cost or ("true-macs",)), Operators.of(unit, seed)
    settings = Settings(generations, population, costs, race, operators, even_steps, surrogate)
    seeds = [arguments.read_schedule(path, "--seed-schedule") for path in seed_schedule or ()]
    factory = partial(view.load_pipeline, model, dtype)
    view.run(Console(), out, factory, work, settings, seeds, workers, ray)


@schedules.command("show")
def show(file: options.ScheduleFile, png: options.Raster = None) -> None:
    """Print a schedule's facts, and which share of the blocks computes at each step."""
    if png is not None:
        arguments.check_output(png, "--png")
    from fastdit.cli.console import schedule_facts

    found = arguments.read_schedule(file, "FILE")
    Console().print(schedule_facts(found, str(file)), soft_wrap=True)
    if png is not None:
        from fastdit.cli.raster import save_raster

        save_raster(found, png, file.stem)
        Console().print(f"picture: {png}", highlight=False, soft_wrap=True)


@schedules.command("stats")
def stats(file: options.ScheduleFile, pixels: options.Side = 256) -> None:
    """Count what the bits say: reuse, ages, runs, dead work; and the cost on the model it was published for."""
    from fastdit.cli.console import schedule_statistics
    from fastdit.cli.published import published_cost

    found = arguments.read_schedule(file, "FILE")
    cost = published_cost(found, pixels)
    Console().print(schedule_statistics(found, cost), soft_wrap=True)


@schedules.command("convert")
def convert(
    file: options.ScheduleFile, out: options.NewFile, layout: options.Layout = "ecad"
) -> None:
    """Write a schedule again in the layout of ECAD's released files, or in this package's."""
    found = arguments.read_schedule(file, "FILE")
    try:
        found.save(out, layout)
    except OSError as error:
        raise ArgumentError(f"OUT {out} cannot be written: {error.strerror}") from error
    Console().print(f"schedule: {out}", highlight=False, soft_wrap=True)


@app.command("train-router")
def train_router(
    model: options.Model = None,
    out: options.RouterFile = Path("router.safetensors"),
    prompts: options.PromptFile = None,
    steps: options.RouterSteps = 10,
    scheduler: options.Scheduler = None,
    epochs: options.Epochs = 75,
    batch: options.TrainingBatch = 1,
    beta: options.Beta = 2e-4,
    target: options.Target = None,
    lr: options.Rate = 0.1,
    lambda_form: options.LambdaForm = "sensitivity",
    lambda_every: options.LambdaEvery = 25,
    raw: options.Raw = False,
    pairs: options.Pairs = False,
    whole_steps: options.WholeSteps = False,
    tau: options.Tau = 0.1,
    keep: options.Keep = "fresh",
    spread: options.Spread = 0.0,
    seed: options.Seed = 0,
    guidance: options.GuidanceScale = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    checkpoints: options.Checkpoints = None,
    checkpointing: options.Checkpointing = False,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Learn which components to reuse at each step: a HarmoniCa router for `fastdit.HarmoniCa`.

    Needs no pictures. Under torchrun or accelerate launch, each process takes a part of a batch.

    The router in the package is the defaults' with --whole-steps --target 0.5
    --scheduler FlowMatchHeunDiscreteScheduler. The published run on DiT is
    --raw --lambda-form released --keep blended --spread 1 --lr 0.01 --beta 7e-8 --batch 32
    --epochs 2000 --lambda-every 50 --guidance 1.5.
    """
    arguments.check_output(out, "--out", ".safetensors")
    if checkpoints is not None:
        check_folder(checkpoints, "--checkpoints")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from fastdit.train.ranks import take_device

    take_device()
    loaded = arguments.load(model, dtype)
    from fastdit.cli.training import swap_scheduler, training_prompts
    from fastdit.train import HarmoniCa

    if scheduler is not None:
        swap_scheduler(loaded.pipeline, scheduler)
    given = {"guidance_scale": guidance, "height": height, "width": width}
    training = HarmoniCa(
        loaded.pipeline,
        steps=steps,
        prompts=training_prompts(loaded, prompts),
        beta=beta,
        target=target,
        lr=lr,
        epochs=epochs,
        batch=batch,
        lambda_form=None if lambda_form == "none" else lambda_form,
        lambda_every=lambda_every,
        normalise=not raw,
        pairs=pairs,
        whole_steps=whole_steps,
        tau=tau,
        keep=keep,
        spread=spread,
        seed=seed,
        checkpointing=checkpointing,
        arguments={name: value for name, value in given.items() if value is not None},
        folder=checkpoints,
        report=lambda progress: Console().print(str(progress), highlight=False, soft_wrap=True),
    )
    router = training.fit()
    if training.ranks.rank == 0:
        router.save(out)
        Console().print(f"router: {out}, {router}", highlight=False, soft_wrap=True)


@app.command()
def backends() -> None:
    """List the backends: what each serves on the devices here, and what was built."""
    from fastdit.cli import machine
    from fastdit.cli.console import Fact, backend_table, facts

    console = Console()
    console.print(backend_table(machine.backend_rows(), machine.DTYPES))
    lines = [Fact(f"{name} serves nothing", why) for name, why in machine.refusals()]
    lines += [Fact(name, what) for name, what in machine.built()]
    console.print(facts(lines))


def main() -> None:
    """The console script `fastdit`."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # the name of a file may be no text, or not of this locale
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
