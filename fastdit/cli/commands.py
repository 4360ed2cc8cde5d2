"""The command line: `fastdit demo`, `explain`, `search`, `schedule`, `calibrate`, `train-router`, `backends`.

A command reads its arguments, calls the library and prints. It imports what is heavy (torch, diffusers) by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from fastdit.cli import (
    arguments,
    options,
    studies,  # noqa: F401 (its commands)
)
from fastdit.cli.app import INTERRUPTED, app, schedules
from fastdit.errors import ArgumentError
from fastdit.files import check_folder


@app.command()
def demo(
    prompts: options.Prompts = None,
    model: options.Model = None,
    out: options.Picture = Path("fastdit-demo.png"),
    speedup: options.Speedups = None,
    every: options.SeveralEvery = None,
    schedule: options.Schedule = None,
    order: options.Order = None,
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
    """Draw the same seeds unpatched, at several speeds, and by fewer steps of the best solver in the same time.

    It writes a grid of the pictures and prints seconds, speed-ups and distances to the unpatched.

    With --ralu a second grid, FILE-stages.png, shows the picture and its tokens at the end of each stage.

    For a DiT pipeline the prompts are class numbers.
    """
    arguments.check_output(out, "--out")
    others = arguments.methods(schedule, every, order) | arguments.ralu(ralu or ())
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded = arguments.load(model, dtype, "emoji")
    speedups = speedup or (() if others else options.SPEEDUPS)
    methods = arguments.budgets(speedups, loaded.pipeline) | others
    from fastdit.cli.demo import Settings, resolve_steps
    from fastdit.cli.demonstrate import run

    steps = resolve_steps(loaded.pipeline, list(methods.values()), steps, backend)
    settings = Settings(steps, seed, repeats, height, width, backend, recommended=True)
    run(loaded, list(prompts or ()), methods, settings, out)


@app.command()
def explain(
    model: options.Model = None,
    schedule: options.Schedule = None,
    every: options.Every = None,
    order: options.Order = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    batch: options.Batch = 1,
    steps: options.Steps = None,
    cfg: options.Guidance = None,
    ralu: options.OneRalu = None,
    ras: options.Ras = None,
    png: options.Plan = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Say what a patched model will do, without running it: plan, compute, bytes, caches."""
    if png is not None:
        arguments.check_output(png, "--png")
    default = (2,) if ralu is None and ras is None else ()
    methods = arguments.methods(schedule, None if every is None else [every], order, default)
    methods |= arguments.ralu([] if ralu is None else [ralu]) | arguments.ras(ras)
    loaded = arguments.load(model, dtype)
    from fastdit import patch
    from fastdit.cli.console import explanation_text

    handle = patch(loaded.pipeline, *methods.values(), backend=backend)
    found = handle.explain(height, width, batch, steps, cfg)
    Console().print(explanation_text(found), soft_wrap=True)
    if png is not None:
        from fastdit.cli.raster import save_raster

        save_raster(found.plan, png, " + ".join(methods))
        Console().print(f"picture: {png}", highlight=False, soft_wrap=True)


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
    scheduler: options.SearchScheduler = None,
    space: options.Space = "schedule",
    orders: options.Orders = None,
    guidance: options.GuidanceScale = None,
    images_per_prompt: options.ImagesPerPrompt = 1,
    race: options.Race = 0,
    unit: options.Unit = "bit",
    even_steps: options.EvenSteps = False,
    surrogate: options.Surrogate = 0,
    seed_schedule: options.Seeds = None,
    seed_book: options.SeedBook = None,
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
    """Search schedules that trade quality for time, as ECAD does (NSGA-II); the extra "search" must be installed.

    With --quality truth the front is measured once more for a plan book, OUT/book.json.

    The same command takes up a search that was killed; with more --generations it continues one that has ended.

    Under torchrun, every rank draws and the first one leads.
    """
    from functools import partial

    from fastdit.cli import search as view
    from fastdit.schedules.book import PlanBook
    from fastdit.search import Operators, Settings, Work
    from fastdit.search.nsga2 import require_pymoo

    require_pymoo()
    check_folder(out, "--out")
    given = {"height": height, "width": width, "guidance_scale": guidance}
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
        arguments={name: value for name, value in given.items() if value is not None},
        scheduler=scheduler,
        orders=view.orders_of(orders, space),
        knobs=view.knobs_of(space, steps, scheduler),
    )
    costs = tuple(cost) if cost else Settings.costs
    operators = Operators.of(unit, seed)
    settings = Settings(generations, population, costs, race, operators, even_steps, surrogate)
    seeds = [arguments.read_schedule(path, "--seed-schedule") for path in seed_schedule or ()]
    factory = partial(view.load_pipeline, model, dtype)
    book = None if seed_book is None else PlanBook.load(seed_book)
    view.run(Console(), out, factory, work, settings, seeds, workers, ray, book)


@schedules.command("show")
def show(file: options.ScheduleFile, png: options.Raster = None) -> None:
    """Print a schedule's facts, and which share of the blocks computes at each step."""
    if png is not None:
        arguments.check_output(png, "--png")
    from fastdit.cli.console import schedule_facts

    found = arguments.read_schedule(file, "FILE")
    Console().print(schedule_facts(found, str(file)), soft_wrap=True)
    if png is not None:
        from fastdit.account.raster import Raster
        from fastdit.cli.raster import save_raster

        save_raster(Raster.of_schedule(found), png, file.stem)
        Console().print(f"picture: {png}", highlight=False, soft_wrap=True)


@schedules.command("stats")
def stats(file: options.ScheduleFile, pixels: options.Side = 256) -> None:
    """Count what a schedule says: reuse, ages, runs, dead work, and its cost on the model it was published for."""
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


@app.command()
def calibrate(
    model: options.Model = None,
    embedded: options.Embedded = options.Package.tiny,
    out: options.BookFile = Path("book.json"),
    prompts: options.PromptFile = None,
    steps: options.BookSteps = 28,
    guidance: options.GuidanceScale = None,
    seed_schedule: options.Seeds = None,
    seed_book: options.SeedBook = None,
    tries: options.Tries = 2,
    seed: options.SearchSeed = 0,
    batch: options.SearchBatch = 2,
    height: options.Pixels = None,
    width: options.Pixels = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure a plan book, by which `fastdit.patch(pipe, speedup=3, book=FILE)` knows what to leave out.

    It holds for the model, its sampler and this number of steps; its times are of this machine and this size.
    """
    arguments.check_output(out, "--out", ".json")
    from fastdit.cli import calibration
    from fastdit.cli.search import prompts_of

    seeds = [arguments.read_schedule(path, "--seed-schedule") for path in seed_schedule or ()]
    loaded = arguments.load(model, dtype, embedded.value)
    of_book = arguments.plans_of(seed_book, loaded, steps)
    shipped = calibration.presets(embedded.value, steps) if model is None else ()
    given = {"height": height, "width": width, "guidance_scale": guidance}
    calibration.run(
        Console(),
        loaded,
        out,
        prompts_of(prompts, model is None, calibration.EMBEDDED_PROMPTS, embedded.value),
        steps,
        plans=[*(seeds or shipped), *of_book],
        tries=tries,
        seed=seed,
        batch=batch,
        threads=threads,
        backend=backend,
        arguments={name: value for name, value in given.items() if value is not None},
    )


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
    loss: options.Loss = "guided",
    lambda_form: options.LambdaForm = "sensitivity",
    lambda_every: options.LambdaEvery = 25,
    raw: options.Raw = False,
    pairs: options.Pairs = False,
    whole_steps: options.WholeSteps = False,
    order: options.RouterOrder = 0,
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

    Training needs no pictures. Under torchrun or accelerate launch, each process takes a part of a batch.

    The router in the package was trained by the defaults with
    --whole-steps --target 0.5 --scheduler FlowMatchHeunDiscreteScheduler.

    The published run on DiT is
    --raw --loss released --lambda-form released --keep blended --spread 1 --lr 0.01 --beta 7e-8 --batch 32
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
    from fastdit.cli.sampler import swap_scheduler
    from fastdit.cli.training import training_prompts
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
        loss=loss,
        lambda_form=None if lambda_form == "none" else lambda_form,
        lambda_every=lambda_every,
        normalise=not raw,
        pairs=pairs,
        whole_steps=whole_steps,
        order=order,
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
    """The console script `fastdit` runs this."""
    # The name of a file may be no text, or not of this locale.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
