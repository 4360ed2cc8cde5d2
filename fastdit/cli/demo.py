"""The work behind `fastdit demo`: the same seeds unpatched, by static schedules, and by fewer steps
at equal time.

A time is that of the whole pipeline call: text encoding, all steps, decoding. After a warm-up the
arms are timed interleaved (A B C, A B C, ...), so that a machine that slows down slows all of them.
Each schedule stands beside its honest rival: the unpatched model with as many steps as fit into
the schedule's time, by the solver that is recommended for few steps, timed again with the others.
Patching is not timed; nothing is printed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from fastdit.cli.distance import psnr, relative_l2
from fastdit.cli.loading import pictures_of
from fastdit.errors import ArgumentError, FastDiTError
from fastdit.methods.base import Method
from fastdit.methods.budget import Budget
from fastdit.methods.dense import Dense
from fastdit.patch import patch
from fastdit.schedules.solvers import recommend

PILOT_RUNS = 3

Judge = Callable[[Sequence[np.ndarray], Sequence[str]], Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """A comparison is made so.

    Attributes:
        steps: Steps of the unpatched runs, and of the patched ones but for methods with a number of their own.
        seed: Of every picture; drawn on the CPU, so that all devices start from the same noise.
        repeats: Timed calls per picture, >= 1.
        height, width: In pixels, to predict what is computed; the pipeline's default if None.
        backend: As in :func:`fastdit.patch`.
        recommended: Fewer steps are by the solver that :func:`fastdit.recommend` gives, not by the pipeline's own.
    """

    steps: int
    seed: int = 0
    repeats: int = 3
    height: int | None = None
    width: int | None = None
    backend: str | None = None
    recommended: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Arm:
    """This is one way of drawing, a column of the comparison.

    Attributes:
        name: How to call it.
        steps: Number of steps.
        method: What to patch in; None leaves the model alone.
        compute_ratio: Multiply-accumulates of the transformer, unpatched over this arm.
        rival: The arm in whose time it is meant to be done, for the arms with fewer steps.
        scheduler: Its sampler; None for the pipeline's own.
    """

    name: str
    steps: int
    method: Method | None
    compute_ratio: float
    rival: str | None = None
    scheduler: Any = None

    @property
    def solver(self) -> str:
        """Its sampler by a short name; "" for the pipeline's own."""
        name = "" if self.scheduler is None else type(self.scheduler).__name__
        return name.removesuffix("Scheduler").removesuffix("Multistep")


@dataclass(frozen=True)
class Picture:
    """This is one picture and what it cost.

    Attributes:
        image: [h, w, 3], float in [0, 1].
        seconds: Of each timed call.
        psnr, relative_l2: Against the unpatched picture; see `distance.py`.
        right: (objects that are there as named, objects named); None if nobody judged.
        stages: The picture at the end of each stage with its tokens outlined; none for a run in no stages.
    """

    image: np.ndarray
    seconds: tuple[float, ...]
    psnr: float
    relative_l2: float
    right: tuple[int, int] | None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of a run ends like this.

    Attributes:
        image: [h, w, 3] uint8, what the picture was going to be, the borders of tokens darkened.
        layout: "coarse", "mixed" or "full".
        steps, tokens: How many of them.
    """

    image: np.ndarray
    layout: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """:func:`compare` found this: ``pictures[prompt][arm]``, the first arm being unpatched."""

    prompts: tuple[str, ...]
    arms: tuple[Arm, ...]
    pictures: tuple[tuple[Picture, ...], ...]
    settings: Settings

    def seconds(self, arm: int) -> list[float]:
        """These are all timed calls of an arm, repeats of one prompt after the other."""
        return [value for row in self.pictures for value in row[arm].seconds]

    def speedup(self, arm: int, prompt: int | None = None) -> float:
        """This is the median over interleaved pairs of unpatched to the arm's seconds, of one prompt or all."""
        rows = self.pictures if prompt is None else [self.pictures[prompt]]
        return median(ratio for row in rows for ratio in _ratios(row[0].seconds, row[arm].seconds))

    def right(self, arm: int) -> tuple[int, int] | None:
        """The judged prompts have (objects right, objects named); None where nobody judged."""
        judged = [row[arm].right for row in self.pictures if row[arm].right is not None]
        return (sum(r for r, _ in judged), sum(n for _, n in judged)) if judged else None


def compare(
    pipeline: Any,
    calls: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    methods: Mapping[str, Method],
    settings: Settings,
    judge: Judge | None = None,
    progress: Progress = lambda text, done, total: None,
) -> Comparison:
    """This draws and times every prompt unpatched, by each method, and by fewer steps in its time.

    Args:
        pipeline: A diffusers pipeline without a patch; it has none afterwards, also after an error.
        calls: The pipeline's arguments for each prompt, without steps, seed and output type.
        prompts: Their names.
        methods: Name -> what to patch in.
        settings: Steps, seed, repeats, size, backend.
        judge: ``judge([image], [prompt])`` -> an object like :class:`fastdit.tiny.Score`; a
            ValueError means that it cannot judge the prompt.
        progress: Called as ``progress(what, calls done, calls in all)`` before every pipeline call.

    Raises:
        FastDiTError: A method does not fit the model, or the pipeline refuses the arguments.
    """
    total = total_calls(len(calls), len(methods), settings)
    runs = _Runs(pipeline, calls, settings, progress, total)
    patched = [_schedule_arm(pipeline, name, methods[name], settings) for name in methods]
    arms = [Arm("unpatched", settings.steps, None, 1.0)]
    with runs.patched_once(list(methods.values())):
        for arm, share in zip(patched, _time_shares(runs, [*arms, *patched]), strict=True):
            steps = equal_time_steps(settings.steps, share)
            arms += [_fewer_steps(pipeline, steps, arm, settings), arm]
        images, seconds, stages = _measure(runs, arms)
    pictures = tuple(
        tuple(
            _picture(image, spent, images[row][0], judge, prompt, ends)
            for image, spent, ends in zip(images[row], seconds[row], stages[row], strict=True)
        )
        for row, prompt in enumerate(prompts)
    )
    return Comparison(tuple(prompts), tuple(arms), pictures, settings)


def resolve_steps(
    pipeline: Any, methods: Sequence[Method], asked: int | None, backend: str | None = None
) -> int:
    """There are as many steps as asked, else as a schedule is made for, else by the pipeline's default.

    Raises:
        FastDiTError: The pipeline cannot be patched, or a method does not fit it or `asked`.
    """
    steps = asked
    for method in methods:
        if own_steps(method) is not None:
            continue
        with _patched(pipeline, method, backend) as handle:
            steps = handle.explain(steps=steps).steps
    if not methods:
        raise ArgumentError("methods must hold at least one method, got none")
    if steps is None:
        with _patched(pipeline, Dense(), backend) as handle:
            steps = handle.explain().steps
    return steps


def own_steps(method: Method) -> int | None:
    """A method that replaces the sampler's steps has its own, and stands beside other numbers of plain ones."""
    return method.run_steps if "resolution" in method.writes else None


def equal_time_steps(steps: int, time_share: float) -> int:
    """So many steps take `time_share` of the time of `steps`: at least 1, at most `steps`."""
    return min(steps, max(1, round(steps * time_share)))


def total_calls(prompts: int, methods: int, settings: Settings) -> int:
    """:func:`compare` makes so many pipeline calls."""
    return (1 + methods) * (1 + PILOT_RUNS) + settings.repeats * prompts * (1 + 2 * methods)


def _schedule_arm(pipeline: Any, name: str, method: Method, settings: Settings) -> Arm:
    steps = own_steps(method) or settings.steps
    with _patched(pipeline, method, settings.backend) as handle:
        facts = handle.explain(settings.height, settings.width, steps=steps)
    return Arm(name, steps, method, facts.flop_speedup * (settings.steps / steps))


def _fewer_steps(pipeline: Any, steps: int, rival: Arm, settings: Settings) -> Arm:
    scheduler = recommend(pipeline, steps).scheduler if settings.recommended else None
    return Arm("fewer steps", steps, None, settings.steps / steps, rival.name, scheduler)


def _time_shares(runs: _Runs, arms: Sequence[Arm]) -> list[float]:
    """This is the time of each later arm over the first's: a warm-up each, then interleaved pairs."""
    for arm in arms:
        runs.draw(0, arm, f"warming up: {arm.name}")
    seconds: list[list[float]] = [[] for _ in arms]
    for _ in range(PILOT_RUNS):
        for spent, arm in zip(seconds, arms, strict=True):
            spent.append(runs.draw(0, arm, f"looking for equal time: {arm.name}").seconds)
    return [median(_ratios(spent, seconds[0])) for spent in seconds[1:]]


def _measure(
    runs: _Runs, arms: Sequence[Arm]
) -> tuple[list[list[np.ndarray]], list[list[list[float]]], list[list[tuple[Stage, ...]]]]:
    """Pictures ``[prompt][arm]``, seconds ``[prompt][arm][repeat]``, stages ``[prompt][arm]``; the arms interleaved."""
    rows, repeats = len(runs.calls), runs.settings.repeats
    images: list[list[np.ndarray]] = [[] for _ in range(rows)]
    seconds: list[list[list[float]]] = [[[] for _ in arms] for _ in range(rows)]
    stages: list[list[tuple[Stage, ...]]] = [[] for _ in range(rows)]
    for repeat in range(repeats):
        for row in range(rows):
            for column, arm in enumerate(arms):
                where = f"prompt {row + 1} of {rows}, repeat {repeat + 1} of {repeats}"
                drawn = runs.draw(row, arm, f"timing: {arm.name}, {where}", stages=repeat == 0)
                seconds[row][column].append(drawn.seconds)
                if repeat == 0:
                    images[row].append(drawn.image)
                    stages[row].append(drawn.stages)
    return images, seconds, stages


def _ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, others, strict=True)]


def _picture(
    image: np.ndarray,
    seconds: Sequence[float],
    reference: np.ndarray,
    judge: Judge | None,
    prompt: str,
    stages: tuple[Stage, ...],
) -> Picture:
    return Picture(
        image,
        tuple(seconds),
        psnr(image, reference),
        relative_l2(image, reference),
        None if judge is None else _judged(judge, image, prompt),
        stages,
    )


def _judged(judge: Judge, image: np.ndarray, prompt: str) -> tuple[int, int] | None:
    try:
        objects = judge([image], [prompt]).objects
    except ValueError:  # a prompt in words of its own
        return None
    return sum(1 for verdict in objects if verdict.right), len(objects)


@dataclass(frozen=True)
class _Drawn:
    """One pipeline call gave this."""

    image: np.ndarray
    seconds: float
    stages: tuple[Stage, ...]


@dataclass
class _Runs:
    """Pipeline calls are counted and timed."""

    pipeline: Any
    calls: Sequence[Mapping[str, Any]]
    settings: Settings
    progress: Progress
    total: int
    done: int = 0
    handle: Any = None

    @contextmanager
    def patched_once(self, methods: Sequence[Method]) -> Iterator[None]:
        """Inside, where all methods are budgets, calls by them are requests of one patch, as a user makes them."""
        if not all(isinstance(method, Budget) for method in methods):
            yield
            return
        with _patched(self.pipeline, methods[0], self.settings.backend) as self.handle:
            yield
        self.handle = None

    def _by(self, arm: Arm) -> Any:
        """Inside, calls are an arm's; gives the handle of its patch, None where it is unpatched."""
        if self.handle is None:
            return _patched(self.pipeline, arm.method, self.settings.backend)
        if arm.method is None:
            return self.handle.disabled()
        return self.handle.budget(speedup=arm.method.speedup)

    def draw(self, row: int, arm: Arm, text: str, stages: bool = False) -> _Drawn:
        """One call is timed until the image [h, w, 3] is on the host; `stages` decodes those of the run afterwards."""
        self.progress(text, self.done, self.total)
        generator = torch.Generator("cpu").manual_seed(self.settings.seed)
        patched = self._by(arm)
        with _under(self.pipeline, arm.scheduler), patched as handle:
            start = time.perf_counter()
            try:
                output = self.pipeline(
                    **self.calls[row],
                    num_inference_steps=arm.steps,
                    generator=generator,
                    output_type="np",
                )
            except FastDiTError:
                raise
            except ValueError as error:  # how pipelines refuse arguments
                raise ArgumentError(f"{type(self.pipeline).__name__}: {error}") from error
            spent = time.perf_counter() - start
            ends = _stages(handle) if stages and handle is not None else ()
        self.done += 1
        drawn = np.asarray(pictures_of(output)[0])
        # The frame in the middle stands for a video.
        return _Drawn(drawn if drawn.ndim == 3 else drawn[len(drawn) // 2], spent, ends)


def _stages(handle: Any) -> tuple[Stage, ...]:
    """The last run's stages ended like this."""
    report = handle.report()
    if not report.stages:
        return ()
    drawn = report.resolution_map(handle.stage_pictures()[:, 0])
    return tuple(
        Stage(image, stage.layout, stage.steps, stage.tokens)
        for image, stage in zip(drawn, report.stages, strict=True)
    )


@contextmanager
def _under(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """Inside, runs are by this sampler; None leaves the pipeline its own."""
    own, pipeline.scheduler = pipeline.scheduler, scheduler or pipeline.scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextmanager
def _patched(pipeline: Any, method: Method | None, backend: str | None) -> Iterator[Any]:
    """The pipeline is patched for the length of the `with`; without a method it is left alone."""
    if method is None:
        yield None
        return
    handle = patch(pipeline, method, backend=backend)
    try:
        yield handle
    finally:
        handle.unpatch()
