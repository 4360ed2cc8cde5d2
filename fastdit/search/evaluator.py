"""Draws pictures by a schedule and judges them: what a worker does, with a model that it loads once.

An item is a prompt with a seed; item i is prompt i mod P with seed `seed + i`, so the first items span the prompts.
Items are drawn in fixed chunks and by a fixed number of threads, so a loss does not depend on which worker finds it or
when.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdit.cli import launch
from fastdit.cli.sampler import swap_scheduler
from fastdit.errors import ArgumentError
from fastdit.runtime.timesteps import Timesteps, check_flow, predicted_timesteps
from fastdit.search import cost
from fastdit.search.genome import Genome
from fastdit.search.knobs import OWN, Knobs
from fastdit.search.quality import Quality, is_of_latents, losses_of, make_quality
from fastdit.search.solution import check_solvable, solving
from fastdit.spec import BlockKind, ModelSpec

LATENCY_WARMUP = 1
ORDERS = ((0,), (0, 1), (0, 2), (0, 1, 2))


@dataclass(frozen=True)
class Work:
    """Every candidate is drawn and judged so; it is part of a ledger's identity.

    Attributes:
        prompts: Texts, or class numbers for a class-conditional model.
        steps: Inference steps, as the pipeline is asked for; Heun's sampler makes more calls than that.
        images_per_prompt: Pictures of each prompt, each with a seed of its own.
        seed: Of the first item.
        batch: Pictures per pipeline call.
        threads: CPU threads of a worker; a part of the work, since sums depend on it.
        quality, quality_path: See `quality.py`; or an object of one's own in place of the name.
        backend: As in :func:`fastdit.patch`.
        arguments: Further arguments of the pipeline's call, e.g. height and guidance_scale.
        latency_repeats: Timed calls per schedule where latency is an objective.
        scheduler: The sampler of all runs: a class of diffusers, or "recommended" for what :func:`fastdit.recommend`
            gives; None for the pipeline's own.
        orders: By which a reused output may be drawn, rising from 0, which repeats it.
        knobs: What is searched beside the schedule.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    images_per_prompt: int = 1
    seed: int = 0
    batch: int = 8
    threads: int = 1
    quality: str | Quality = "paired"
    quality_path: str | None = None
    backend: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    latency_repeats: int = 3
    scheduler: str | None = None
    orders: tuple[int, ...] = (0,)
    knobs: Knobs = field(default_factory=Knobs)

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ArgumentError(f"prompts must hold at least one prompt, got {self.prompts!r}")
        for name in ("steps", "images_per_prompt", "batch", "threads", "latency_repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be a positive int, got {value!r}")
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 2**63
        ):
            raise ArgumentError(f"seed must be an int from 0 to {2**63 - 1}, got {self.seed!r}")
        orders = tuple(self.orders)
        if orders not in ORDERS:
            raise ArgumentError(f"orders must be 0, or 0 with 1, 2 or both, got {self.orders!r}")
        object.__setattr__(self, "orders", orders)
        uncached = self.steps, self.scheduler or OWN
        for values, own in zip((self.knobs.steps, self.knobs.solvers), uncached, strict=True):
            if values and values[0] != own:
                raise ArgumentError(
                    f"knobs must begin with the uncached run's steps and scheduler, {own!r}, got {values!r}"
                )
        if self.threads > launch.MAX_WORKERS:
            raise ArgumentError(f"threads must be at most {launch.MAX_WORKERS}, got {self.threads}")

    @property
    def items(self) -> int:
        """So many pictures judge a candidate."""
        return len(self.prompts) * self.images_per_prompt

    def described(self) -> dict[str, Any]:
        """JSON data describe it so."""
        names = [name for name in self.__dataclass_fields__ if name != "quality"]
        quality = self.quality if isinstance(self.quality, str) else self.quality.name
        found = {name: getattr(self, name) for name in names}
        arguments = {name: self.arguments[name] for name in sorted(self.arguments)}
        lists = {"prompts": list(self.prompts), "orders": list(self.orders)}
        knobs = self.knobs.described()
        return {**found, **lists, "quality": quality, "arguments": arguments, "knobs": knobs}


@dataclass(frozen=True)
class Task:
    """This is one piece of work.

    Attributes:
        key: The candidate's name in the ledger.
        what: "losses", or "latency" in seconds per picture.
        bits: The vector as bytes; None runs the unpatched model.
        steps: Inference steps of the unpatched model; those of a vector are its run's.
        first, last: The items to draw, from `first` to before `last`.
        solver: Of the unpatched model; None for the uncached run's.
    """

    key: str
    what: str
    bits: bytes | None
    steps: int
    first: int = 0
    last: int = 0
    solver: str | None = None


class Evaluator:
    """A loaded model measures tasks.

    Args:
        factory: Makes the pipeline.
        work: How to draw and judge.
    """

    def __init__(self, factory: Callable[[], Any], work: Work) -> None:
        import torch

        from fastdit.patch import find_adapter

        torch.set_num_threads(work.threads)
        self.pipeline, self.work = factory(), work
        self.pipeline.set_progress_bar_config(disable=True)
        self._schedulers = schedulers_of(self.pipeline, work)
        self.pipeline.scheduler = scheduler = self._schedulers[None]
        transformer = self.pipeline.transformer
        spec = find_adapter(transformer).spec(transformer)
        timesteps = set_timesteps(scheduler, work.steps)
        calls = len(scheduler.timesteps)
        self.genome = Genome(spec, calls, work.orders, timesteps.repeat, work.knobs)
        named = isinstance(work.quality, str)
        self.quality = make_quality(work.quality, work.quality_path) if named else work.quality
        self._of_latents = is_of_latents(self.quality)
        if self._of_latents:
            check_solvable(self.pipeline)
        self._references: dict[tuple[int, int], np.ndarray] = {}

    def facts(self) -> dict[str, Any]:
        """Plain data describe the model: its identity, its block kinds, and what the uncached run costs."""
        costs = self._uncached()
        spec = self.genome.spec
        kinds = [
            (kind.name, kind.count, kind.components, sorted(kind.absent), dict(kind.consumers))
            for kind in spec.kinds
        ]
        return {
            "family": spec.family,
            "kinds": kinds,
            "costs": costs,
            "model": fingerprint(self.pipeline.transformer),
            "calls": self.genome.steps,
            "repeats": self.genome.repeats,
            "schedulers": {
                str(name): type(scheduler).__name__ for name, scheduler in self._schedulers.items()
            },
            "samplers": {
                str(name): sampler_of(scheduler) for name, scheduler in self._schedulers.items()
            },
        }

    def measure(self, task: Task) -> dict[str, Any]:
        """A task gives {"costs", "losses"} or {"costs", "latency"}."""
        if self.quality.needs_reference and task.what == "losses":
            self._refer(task)
        if task.bits is None:
            with self._under(task.solver):
                scheduler = copy.deepcopy(self.pipeline.scheduler)
                set_timesteps(scheduler, task.steps)
                share = len(scheduler.timesteps) / self.genome.steps
                costs = {name: value * share for name, value in self._uncached().items()}
                return {"costs": costs, **self._result(task, task.steps)}
        # A bit that nobody reads costs nothing, so that equal keys have equal costs.
        vector = self.genome.effective(self.genome.from_bytes(task.bits))
        run = self.genome.run(vector)
        with self._under(run.solver), self._patched(vector) as handle:
            costs = cost.counted(handle, run.steps or self.genome.steps, self.work.arguments)
            return {"costs": costs, **self._result(task, run.steps or self.work.steps)}

    def _uncached(self) -> dict[str, int]:
        everything = np.ones((self.genome.steps, len(self.genome.components)), dtype=bool)
        with self._under(None), self._patched(self.genome.join(everything)) as handle:
            return cost.counted(handle, self.genome.steps, self.work.arguments)

    @contextmanager
    def _under(self, solver: str | None) -> Iterator[None]:
        """Inside, runs are by one of the solvers that are searched; afterwards by what it was before."""
        before, self.pipeline.scheduler = self.pipeline.scheduler, self._schedulers[solver]
        try:
            yield
        finally:
            self.pipeline.scheduler = before

    def _result(self, task: Task, steps: int) -> dict[str, Any]:
        if task.what == "latency":
            return {"latency": self._latency(steps)}
        losses: list[float] = []
        for chunk in self._chunks(task):
            images, references = self.draw(*chunk, steps), self._references.get(chunk)
            losses += losses_of(self.quality, images, self._prompts(*chunk), references)
        return {"losses": [float(loss) for loss in losses]}

    def _chunks(self, task: Task) -> list[tuple[int, int]]:
        batch = self.work.batch
        return [(at, min(at + batch, task.last)) for at in range(task.first, task.last, batch)]

    def _refer(self, task: Task) -> None:
        """What a task is compared with is drawn once, of the unpatched model."""
        for chunk in self._chunks(task):
            if chunk in self._references:
                continue
            if self._of_latents:
                with solving(self.pipeline) as steps:
                    self._references[chunk] = self.draw(*chunk, steps)
            else:
                self._references[chunk] = self.draw(*chunk, self.work.steps)

    def _latency(self, steps: int) -> float:
        """These are median seconds per picture of whole pipeline calls, after a warm-up."""
        count = min(self.work.batch, self.work.items)
        seconds = []
        for _ in range(LATENCY_WARMUP + self.work.latency_repeats):
            start = time.perf_counter()
            self.draw(0, count, steps)
            seconds.append((time.perf_counter() - start) / count)
        return statistics.median(seconds[LATENCY_WARMUP:])

    def _prompts(self, first: int, last: int) -> list[str]:
        prompts = self.work.prompts
        return [prompts[item % len(prompts)] for item in range(first, last)]

    def draw(self, first: int, last: int, steps: int) -> np.ndarray:
        """This draws the items' pictures, [n, H, W, 3] in [0, 1], or videos, [n, F, H, W, 3]; or their latents where
        those are judged.
        """
        import torch

        from fastdit.cli.loading import calls, pictures_of

        asked: dict[str, list[Any]] = {}
        for call in calls(self.pipeline, self._prompts(first, last)):
            for name, value in call.items():
                asked.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        output = self.pipeline(
            **asked,
            **self.work.arguments,
            num_inference_steps=steps,
            generator=[
                torch.Generator("cpu").manual_seed(self.work.seed + item)
                for item in range(first, last)
            ],
            output_type="latent" if self._of_latents else "np",
        )
        drawn = pictures_of(output)
        if self._of_latents:
            return drawn.float().cpu().numpy()
        return np.asarray(drawn, dtype=np.float32)

    @contextmanager
    def _patched(self, vector: np.ndarray) -> Iterator[Any]:
        """The pipeline is under a vector's methods for the length of a `with`."""
        from fastdit import Cached, patch

        run = self.genome.run(vector)
        others = run.ras, run.ralu(run.steps or self.genome.steps)
        methods = [Cached(self.genome.schedule(vector)), *(m for m in others if m is not None)]
        handle = patch(self.pipeline, *methods, backend=self.work.backend)
        try:
            yield handle
        finally:
            handle.unpatch()


def set_timesteps(scheduler: Any, steps: int) -> Timesteps:
    """A scheduler is set as a pipeline sets it for so many steps, which says how many calls those are."""
    timesteps = predicted_timesteps(scheduler, steps, tokens=1)  # the tokens move no call
    given = {name: value for name, value in timesteps.arguments.items() if name == "mu"}
    scheduler.set_timesteps(num_inference_steps=steps, **given)
    return timesteps


def schedulers_of(pipeline: Any, work: Work) -> dict[str | None, Any]:
    """Each solver that is searched has this scheduler, made of the pipeline's own; None is the uncached run's.

    Raises:
        ArgumentError: One makes other calls than steps, where several are searched, or their number.
        ScheduleError: RAS leaves no sparse step in a run that is searched.
        UnsupportedModelError: RALU cannot lead the sampler of one.
    """
    own, found, knobs = pipeline.scheduler, {}, work.knobs
    for name in (None, *knobs.solvers):
        asked = work.scheduler if name is None else name
        if asked not in (None, OWN):
            swap_scheduler(pipeline, asked, work.steps)
        found[name], pipeline.scheduler = pipeline.scheduler, own
        calls = copy.deepcopy(found[name])
        timesteps = set_timesteps(calls, work.steps)
        several = knobs.solvers or knobs.steps
        if several and (timesteps.repeat or len(calls.timesteps) != work.steps):
            raise ArgumentError(
                "a search over solvers or numbers of steps needs samplers that call the model once a step, "
                f"{type(calls).__name__} makes {len(calls.timesteps)} calls of {work.steps}"
            )
    for run in knobs.runs():
        steps = run.steps or work.steps
        if run.ras is not None:
            run.ras.check_steps(steps - run.coarse_steps(steps))
        if run.coarse:
            check_flow(found[run.solver])
    return found


def genome_of(
    facts: Mapping[str, Any],
    orders: tuple[int, ...] = (0,),
    knobs: Knobs = Knobs(),  # noqa: B008 (frozen)
) -> Genome:
    """The model that `facts` describe has this genome."""
    kinds = [
        BlockKind(name, count, tuple(names), frozenset(map(tuple, absent)), consumers)
        for name, count, names, absent, consumers in facts["kinds"]
    ]
    spec = ModelSpec(facts["family"], tuple(kinds))
    return Genome(spec, facts["calls"], orders, facts["repeats"], knobs)


def sampler_of(scheduler: Any) -> str:
    """A scheduler's class, and a hash of its settings."""
    settings = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{type(scheduler).__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def fingerprint(transformer: Any) -> str:
    """This hash is over the model's class, configuration and a few weights of every tensor."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    digest = hashlib.sha256(type(transformer).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in transformer.state_dict().items():
        sample = tensor.flatten()[:8].double().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
