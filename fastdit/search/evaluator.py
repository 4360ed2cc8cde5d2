"""Draws pictures by a schedule and judges them: what a worker does, with a model that it loads once.

An item is a prompt with a seed; item i is prompt i mod P with seed `seed + i`, so the first items span the prompts.
Items are drawn in fixed chunks and by a fixed number of threads, so a loss does not depend on which worker finds it or
when.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdit.cli import launch
from fastdit.errors import ArgumentError
from fastdit.search import cost
from fastdit.search.genome import Genome
from fastdit.search.quality import Quality, make_quality
from fastdit.spec import BlockKind, ModelSpec

LATENCY_WARMUP = 1


@dataclass(frozen=True)
class Work:
    """Every candidate is drawn and judged so; it is part of a ledger's identity.

    Attributes:
        prompts: Texts, or class numbers for a class-conditional model.
        steps: Inference steps.
        images_per_prompt: Pictures of each prompt, each with a seed of its own.
        seed: Of the first item.
        batch: Pictures per pipeline call.
        threads: CPU threads of a worker; a part of the work, since sums depend on it.
        quality, quality_path: See `quality.py`; or an object of one's own in place of the name.
        backend: As in :func:`fastdit.patch`.
        arguments: Further arguments of the pipeline's call, e.g. height and guidance_scale.
        latency_repeats: Timed calls per schedule where latency is an objective.
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
        return {**found, "quality": quality, "arguments": arguments, "prompts": list(self.prompts)}


@dataclass(frozen=True)
class Task:
    """This is one piece of work.

    Attributes:
        key: The candidate's name in the ledger.
        what: "losses", or "latency" in seconds per picture.
        bits: The vector as bytes; None runs the unpatched model.
        steps: Inference steps; other than the work's only for the unpatched model.
        first, last: The items to draw, from `first` to before `last`.
    """

    key: str
    what: str
    bits: bytes | None
    steps: int
    first: int = 0
    last: int = 0


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
        transformer = self.pipeline.transformer
        self.genome = Genome(find_adapter(transformer).spec(transformer), work.steps)
        named = isinstance(work.quality, str)
        self.quality = make_quality(work.quality, work.quality_path) if named else work.quality
        self._references: dict[tuple[int, int], np.ndarray] = {}

    def facts(self) -> dict[str, Any]:
        """Plain data describe the model: its identity, its block kinds, and what the uncached run costs."""
        with self._patched(np.ones(self.genome.size, dtype=bool)) as handle:
            costs = cost.counted(handle, self.work.steps, self.work.arguments)
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
        }

    def measure(self, task: Task) -> dict[str, Any]:
        """A task gives {"costs", "losses"} or {"costs", "latency"}."""
        if task.bits is None:
            with self._patched(np.ones(self.genome.size, dtype=bool)) as handle:
                dense = cost.counted(handle, self.work.steps, self.work.arguments)
            share = task.steps / self.work.steps
            return {"costs": {k: v * share for k, v in dense.items()}, **self._result(task)}
        # A bit that nobody reads costs nothing, so that equal keys have equal costs.
        with self._patched(self.genome.effective(self.genome.from_bytes(task.bits))) as handle:
            costs = cost.counted(handle, self.work.steps, self.work.arguments)
            return {"costs": costs, **self._result(task, handle)}

    def _result(self, task: Task, handle: Any = None) -> dict[str, Any]:
        if task.what == "latency":
            return {"latency": self._latency(task)}
        losses: list[float] = []
        for first in range(task.first, task.last, self.work.batch):
            chunk = (first, min(first + self.work.batch, task.last))
            references = None
            if self.quality.needs_reference:
                references = self._reference(chunk, handle)
            images = self._draw(*chunk, task.steps)
            losses += self.quality.losses(images, self._prompts(*chunk), references)
        return {"losses": [float(loss) for loss in losses]}

    def _reference(self, chunk: tuple[int, int], handle: Any) -> np.ndarray:
        if chunk not in self._references:
            if handle is None:
                self._references[chunk] = self._draw(*chunk, self.work.steps)
            else:
                with handle.disabled():
                    self._references[chunk] = self._draw(*chunk, self.work.steps)
        return self._references[chunk]

    def _latency(self, task: Task) -> float:
        """These are median seconds per picture of whole pipeline calls, after a warm-up."""
        count = min(self.work.batch, self.work.items)
        seconds = []
        for _ in range(LATENCY_WARMUP + self.work.latency_repeats):
            start = time.perf_counter()
            self._draw(0, count, task.steps)
            seconds.append((time.perf_counter() - start) / count)
        return statistics.median(seconds[LATENCY_WARMUP:])

    def _prompts(self, first: int, last: int) -> list[str]:
        prompts = self.work.prompts
        return [prompts[item % len(prompts)] for item in range(first, last)]

    def _draw(self, first: int, last: int, steps: int) -> np.ndarray:
        """This draws the items' pictures, [n, H, W, 3] in [0, 1]."""
        import torch

        from fastdit.cli.loading import calls

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
            output_type="np",
        )
        return np.asarray(output.images, dtype=np.float32)

    def _patched(self, vector: np.ndarray) -> Any:
        return _Patched(self.pipeline, self.genome.schedule(vector), self.work.backend)


class _Patched:
    """The pipeline is under a schedule for the length of a `with`."""

    def __init__(self, pipeline: Any, schedule: Any, backend: str | None) -> None:
        self._pipeline, self._schedule, self._backend = pipeline, schedule, backend

    def __enter__(self) -> Any:
        from fastdit import Cached, patch

        self._handle = patch(self._pipeline, Cached(self._schedule), backend=self._backend)
        return self._handle

    def __exit__(self, *error: Any) -> None:
        self._handle.unpatch()


def genome_of(facts: Mapping[str, Any], steps: int) -> Genome:
    """The model that `facts` describe has this genome."""
    kinds = [
        BlockKind(name, count, tuple(names), frozenset(map(tuple, absent)), consumers)
        for name, count, names, absent, consumers in facts["kinds"]
    ]
    return Genome(ModelSpec(facts["family"], tuple(kinds)), steps)


def fingerprint(transformer: Any) -> str:
    """This hash is over the model's class, configuration and a few weights of every tensor."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    digest = hashlib.sha256(type(transformer).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in transformer.state_dict().items():
        sample = tensor.flatten()[:8].double().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]
