"""A patched pipeline draws the pictures of some work by any plan, and tells how far off they are and what they take."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
import torch

from fastdit.blocks.nodes import Weights
from fastdit.errors import ArgumentError
from fastdit.methods.budget import Budget
from fastdit.runtime.forecasts import Outputs
from fastdit.runtime.guard import deviations
from fastdit.runtime.install import LINK
from fastdit.schedules.book import NODES, Plan, PlanBook, config_hash
from fastdit.schedules.solvers import step_sigmas
from fastdit.schedules.spread import even_steps
from fastdit.search import solution
from fastdit.search.evaluator import Evaluator, Work, fingerprint
from fastdit.search.fitting import Way
from fastdit.search.foresight import Foresight, Place
from fastdit.search.quantiles import Watched
from fastdit.search.told import Told, told_of_steps

ORDER = 1
#: pictures of which the components' changes are taken
SEEN = 2
CONFIDENCE = 0.95
#: a guard's bound over the most that was measured
MARGIN = 1.5
REPEATS = 5


#: a ratio, and its 95 % interval
Interval = tuple[float, float, float]


def interval(logarithms: np.ndarray) -> Interval:
    """The geometric mean of ratios whose logarithms are given, and its 95 % interval (Student's t)."""
    mean, error = logarithms.mean(), scipy.stats.sem(logarithms)
    half = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(logarithms) - 1)
    return tuple(float(np.exp(mean + each)) for each in (0.0, -half, half))


@dataclass(frozen=True, eq=False)
class Measured:
    """A plan was measured.

    Attributes:
        losses: The logarithm of each picture's distance to the solution.
        off: The most that forecasts were off, over all pictures, at the computed steps from the third on.
        way: The runs beside the solution's; None where steps are no sums of outputs.
    """

    plan: Plan
    losses: np.ndarray
    off: tuple[float, ...] = ()
    way: Way | None = None

    def as_plan(self, unpatched: np.ndarray) -> Plan:
        """The plan with its error over that of the unpatched runs, whose losses are given."""
        ratio, low, high = interval(self.losses - unpatched)
        bounds = tuple(MARGIN * each for each in self.off)
        return replace(self.plan, ratio=ratio, low=low, high=high, bounds=bounds)


def plan_at(place: Place) -> Plan:
    """A plan of which nothing was measured."""
    return Plan(*place, 1.0, 1.0, 1.0)


def _sum(ways: Sequence[Way | None]) -> Way | None:
    """Of all pictures, where each has one."""
    return None if None in ways else sum(ways[1:], ways[0])


class Trial:
    """A patched pipeline draws the pictures of some work by any plan."""

    def __init__(self, pipeline: Any, work: Work, plans: Sequence[Plan] = ()) -> None:
        """Of `plans` those that are not of whole steps must be known when the pipeline is patched."""
        from fastdit.patch import find_adapter, patch

        self.work = work
        self.judge = Evaluator(lambda: pipeline, work)
        self.pipeline = pipeline
        if (calls := self.judge.genome.steps) != work.steps:
            raise ArgumentError(
                "a plan book needs a sampler that calls the model once a step, "
                f"{type(pipeline.scheduler).__name__} makes {calls} calls of {work.steps}"
            )
        if LINK in pipeline.transformer.__dict__:
            raise ArgumentError("pipeline must not be patched, got one that is; unpatch it first")
        #: of each step of the unpatched run, and the last one's end
        self.sigmas: tuple[float, ...] = ()
        self.everything = replace(plan_at((tuple(range(work.steps)), ORDER)), arithmetic=1.0)
        apart = [plan for plan in plans if not plan.whole]
        known = Budget(speedup=1, book=self._book(apart) if apart else None)
        self.handle = patch(pipeline, known, backend=work.backend)
        transformer = pipeline.transformer
        adapter = find_adapter(transformer)
        self.spec = adapter.spec(transformer)
        self._watched = Watched(self.spec, adapter.blocks(transformer))
        #: how far the outputs of steps, and of components, are from those of the step before
        self.moved: list[float] = []
        self.changes = self._watched.changes

    def solve(self) -> None:
        """Draw the pictures that the others are compared with."""
        self._truth, self._moved = [], []
        with self.handle.disabled():  # a size of its own may shift the sigmas
            self.judge.draw(0, 1, self.work.steps)
        self.sigmas = (*step_sigmas(self.pipeline.scheduler), 0.0)
        with self.handle.disabled(), solution.solving(self.pipeline) as steps:
            scheduler = self.pipeline.scheduler
            for chunk in self._chunks():
                told = Told(outputs=False)
                with told_of_steps(scheduler, told):
                    self._truth.append(self.judge.draw(*chunk, steps))
                self._moved.append(told.way([*step_sigmas(scheduler), 0.0], self.sigmas))

    def look(self) -> tuple[Measured, Foresight]:
        """The unpatched runs, and what they tell of others."""
        scheduler, losses, grams, ways = self.pipeline.scheduler, [], [], []
        for index, (first, last) in enumerate(self._chunks()):
            told, truth = Told(), self._truth[index]
            watched = self._watched.running(scheduler) if first < SEEN else nullcontext()
            with self.handle.disabled(), watched, told_of_steps(scheduler, told):
                found = self.judge.draw(first, last, self.work.steps)
            losses.append(self._losses(found, truth))
            foresight = Foresight.of(self.sigmas, np.stack(told.outputs), found - truth)
            grams.append(foresight.gram)
            ways.append(self._way(index, told) if told.adds(self.sigmas) else None)
        foresight = replace(foresight, gram=np.concatenate(grams))
        self.moved = foresight.moved()
        return Measured(self.everything, np.concatenate(losses), (), _sum(ways)), foresight

    def _way(self, index: int, told: Told) -> Way:
        """The run of a chunk of the pictures beside the solution's."""
        return Way.of(self.sigmas, np.stack(told.outputs), self._moved[index])

    def measured(self, plan: Plan) -> Measured:
        """The pictures by a plan."""
        losses, ways, arithmetic = [], [], 1.0
        nodes = plan.computed if plan.whole else ()
        most = dict.fromkeys(nodes, 0.0)
        for index, (first, last) in enumerate(self._chunks()):
            told = Told()
            with self._planned(plan), told_of_steps(self.pipeline.scheduler, told):
                found, outputs = self._outputs(first, last)
            losses.append(self._losses(found, self._truth[index]))
            ways.append(self._way(index, told) if told.adds(self.sigmas) else None)
            arithmetic = 1 / self.handle.report().flop_speedup
            weights = Weights(self.handle.last_run().sigmas)
            for branch in zip(*outputs, strict=True):
                held = Outputs()
                for step in nodes:
                    if held.nodes.moves(step, weights):
                        drawn = held.nodes.drawn(step, ORDER, weights)[0].gathered()
                        off = float(deviations(drawn, branch[step]).max())
                        most[step] = max(most[step], off)
                    held.add(step, (branch[step],), weights, ORDER)
        off = tuple(most[step] for step in nodes[NODES:])
        plan = replace(plan, arithmetic=arithmetic)
        return Measured(plan, np.concatenate(losses), off, _sum(ways))

    def timed(self, plan: Plan) -> Plan:
        """The plan with what its steps take."""
        turns = [self._times(plan)[0] for _ in range(1 + REPEATS)]
        return replace(plan, seconds=min(turns[1:]))

    def book(self, plans: Sequence[Plan], facts: Mapping[str, Any]) -> PlanBook:
        """The plans with what their steps take; the provenance has these facts as well."""
        steps, few = self.work.steps, len(plans[-1].computed)
        some = plan_at((tuple(even_steps(steps, few)), ORDER))
        turns = []
        for _ in range(
            1 + REPEATS
        ):  # in turns, so that a machine that slows down slows all of them
            patched = self._times(self.everything), self._times(some)
            run = self.handle.last_run()
            with self.handle.disabled():
                turns.append((*patched, self._whole()))
        dense, fewer, stock = zip(*turns[1:], strict=True)
        other = max(0.0, statistics.median(whole - loop for loop, whole in (*dense, *fewer)))
        # Whatever else runs on the machine makes a turn slower, and none faster.
        full, least = (min(loop for loop, _ in found) for found in (dense, fewer))
        full, unpatched = full / steps, (min(stock) - other) / steps
        unpatched = max(full / 2, unpatched)
        drawn = max(0.0, (least - few * full) / (steps - few))
        return PlanBook(
            (type(self.pipeline.transformer).__name__, config_hash(self.pipeline.transformer)),
            type(self.pipeline.scheduler).__name__,
            steps,
            run.image_tokens,
            unpatched,
            (full, drawn),
            other,
            tuple(plans),
            {**self._provenance(), **facts},
            self.sigmas[:-1],
            {name: scale for name, scale in run.guidance.items() if scale is not None},
        )

    def _times(self, plan: Plan) -> tuple[float, float]:
        """Seconds per picture of the denoising steps, and of the whole call."""
        with self._planned(plan):
            whole = self._whole()
        run = self.handle.last_run()
        return run.seconds / self._chunks()[0][1], whole

    def _whole(self) -> float:
        """Seconds per picture of a call."""
        first, last = self._chunks()[0]
        start = time.perf_counter()
        self.judge.draw(first, last, self.work.steps)
        return (time.perf_counter() - start) / last

    def _planned(self, plan: Plan) -> Any:
        """Inside, runs are by this plan."""
        return self.handle.budget(speedup=2, book=self._book([plan]))

    def _book(self, plans: Sequence[Plan]) -> PlanBook:
        """A book of these plans, each said to be twice as fast as all steps."""
        steps, transformer = self.work.steps, self.pipeline.transformer
        given = self.everything, *(replace(plan, seconds=steps / 2) for plan in plans)
        return PlanBook(
            (type(transformer).__name__, config_hash(transformer)),
            type(self.pipeline.scheduler).__name__,
            steps,
            1,
            1.0,
            (1.0, 0.0),
            0.0,
            given,
            sigmas=self.sigmas[:-1],
        )

    def _losses(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return np.log(self.judge.quality.losses(found, [""] * len(found), truth))

    def _chunks(self) -> list[tuple[int, int]]:
        items, batch = self.work.items, self.work.batch
        return [(first, min(first + batch, items)) for first in range(0, items, batch)]

    def _outputs(self, first: int, last: int) -> tuple[np.ndarray, list[list[torch.Tensor]]]:
        """The latents, and what the model gives, or what is drawn in its place, at each step: of each of its calls."""
        found: list[torch.Tensor] = []
        hook = self.pipeline.transformer.register_forward_hook(
            lambda module, given, output: found.append(output[0].detach().clone())
        )
        try:
            latents = self.judge.draw(first, last, self.work.steps)
        finally:
            hook.remove()
        calls = len(found) // self.work.steps
        return latents, [found[i : i + calls] for i in range(0, len(found), calls)]

    def _provenance(self) -> dict[str, Any]:
        weight = next(self.pipeline.transformer.parameters())
        on_gpu = weight.device.type == "cuda"
        name = torch.cuda.get_device_name(weight.device) if on_gpu else platform.processor()
        return {
            "made": time.strftime("%Y-%m-%d"),
            "machine": name or platform.machine(),
            "threads": self.work.threads,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "weights": fingerprint(self.pipeline.transformer),
            "versions": {each: importlib.metadata.version(each) for each in ("torch", "diffusers")},
            "prompts": list(self.work.prompts),
            "seed": self.work.seed,
            "batch": self.work.batch,
            "arguments": dict(self.work.arguments),
            "solution": f"{solution.STEPS} steps of {type(solution.solver(self.pipeline, solution.STEPS)).__name__}",
        }
