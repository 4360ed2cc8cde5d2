"""A plan book in minutes: whole steps, left out at several places, each measured.

For each number of computed steps there are candidates: evenly spread, dense early, and where the output changes by
equal amounts (as InvarDiff, arXiv 2512.05134, places them by quantiles of a few runs); the others are drawn as lines.
Evenly spread ones stay unless another is nearer to the solution by the interval of the paired ratio, so that what is
chosen on a few prompts holds on others.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import scipy.stats
import torch

from fastdit.blocks.nodes import Weights
from fastdit.errors import ArgumentError
from fastdit.methods.budget import Budget
from fastdit.patch import patch
from fastdit.runtime.forecasts import Outputs
from fastdit.runtime.guard import deviations
from fastdit.runtime.install import LINK
from fastdit.schedules.book import NODES, Plan, PlanBook, config_hash
from fastdit.schedules.spread import changing_steps, early_steps, even_steps
from fastdit.search import solution
from fastdit.search.evaluator import Evaluator, Work, fingerprint

#: of all steps: so many compute
SHARES = (0.75, 0.68, 0.6, 0.54, 0.5, 0.43, 0.39, 0.36, 0.32, 0.29, 0.25, 0.21, 0.18, 0.15)
ORDER = 1
LEAST_STEPS = 8
#: pictures of which the output's changes are taken
SEEN = 2
CONFIDENCE = 0.95
#: a guard's bound over the most that was measured
MARGIN = 1.5
REPEATS = 3
#: steps of the solution: many more than any run that is measured
SOLUTION = 100

#: steps that compute, and the order by which the others are drawn
Place = tuple[tuple[int, ...], int]


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    steps: int = 28,
    *,
    batch: int = 2,
    seed: int = 0,
    threads: int | None = None,
    backend: str | None = None,
    arguments: dict[str, Any] | None = None,
    shares: Sequence[float] = SHARES,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> PlanBook:
    """This measures plans of whole steps on a pipeline, and makes a book of the best.

    Args:
        pipeline: With its own scheduler, which draws no noise at each step. It must not be patched.
        prompts: At least two, a picture of each.
        steps: Of a run, at least 8.
        batch, seed, threads, backend, arguments: As in :class:`~fastdit.search.Work`.
        shares: So many of the steps compute.
        watch: Is told the number of measured plans, and of all.

    Raises:
        ArgumentError: The sampler draws noise or calls the model several times a step, the pipeline gives no latents
            or is patched, or an argument is not accepted.
    """
    if steps < LEAST_STEPS or len(prompts) < 2:
        raise ArgumentError(
            f"steps must be at least {LEAST_STEPS} and prompts at least 2, got {steps} and {len(prompts)}"
        )
    work = Work(
        tuple(prompts),
        steps,
        seed=seed,
        batch=batch,
        threads=threads or torch.get_num_threads(),
        quality="truth",
        backend=backend,
        arguments=arguments or {},
    )
    trial = _Trial(pipeline, work)
    counts = sorted({max(NODES, round(share * steps)) for share in shares} - {steps}, reverse=True)
    done = itertools.count(1)
    everything = tuple(range(steps)), ORDER

    try:
        trial.solve()
        changes = trial.changes()
        candidates = {count: _candidates(steps, count, changes) for count in counts}
        total = 1 + sum(map(len, candidates.values()))

        def losses(place: Place) -> np.ndarray:
            found = trial.losses(place)
            watch(next(done), total)
            return found

        unpatched = losses(everything)
        plans = {steps: Plan(*everything, 1.0, 1.0, 1.0)}
        for places in candidates.values():
            even, *others = places
            measured = {place: losses(place) for place in places}
            best = min(others, key=lambda place: measured[place].mean(), default=even)
            if interval(measured[best] - measured[even])[2] >= 1:
                best = even
            bounds = tuple(MARGIN * each for each in trial.deviations(best))
            plans[len(best[0])] = Plan(*best, *interval(measured[best] - unpatched), bounds)
        return trial.book([plans[count] for count in sorted(plans, reverse=True)])
    finally:
        trial.handle.unpatch()


def interval(logarithms: np.ndarray) -> tuple[float, float, float]:
    """The geometric mean of ratios whose logarithms are given, and its 95 % interval (Student's t)."""
    mean, error = logarithms.mean(), scipy.stats.sem(logarithms)
    half = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(logarithms) - 1)
    return tuple(float(np.exp(mean + each)) for each in (0.0, -half, half))


def _candidates(steps: int, count: int, changes: Sequence[float]) -> list[Place]:
    """At most `count` steps compute; the evenly spread line comes first."""
    places = even_steps(steps, count), early_steps(steps, count), changing_steps(changes, count)
    found = [(tuple(place), ORDER) for place in places if len(place) <= count]
    return list(dict.fromkeys(found))


class _Trial:
    """A patched pipeline draws the pictures of some work by any plan."""

    def __init__(self, pipeline: Any, work: Work) -> None:
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
        self.handle = patch(pipeline, Budget(speedup=1), backend=work.backend)

    def solve(self) -> None:
        """Draw the pictures that the others are compared with."""
        with solution.solving(self.pipeline, SOLUTION) as steps:
            self._truth = self._drawn(steps)

    def losses(self, place: Place) -> np.ndarray:
        """The logarithm of each picture's distance to the solution."""
        with self._planned(place):
            found = self._drawn(self.work.steps)
        prompts = self.work.prompts
        return np.log(self.judge.quality.losses(found, prompts, self._truth))

    def changes(self) -> list[float]:
        """How far the model's output is from that of the step before, relatively, at each step of some runs."""
        with self.handle.disabled():
            steps = self._outputs(0, min(SEEN, self.work.items))
        return [0.0] + [
            sum(float((a - b).norm() / b.norm()) for a, b in zip(now, before, strict=True))
            for before, now in itertools.pairwise(steps)
        ]

    def deviations(self, place: Place) -> list[float]:
        """The most that forecasts were off, over all pictures, at each of the computed steps from the third on."""
        computed, order = place
        most = dict.fromkeys(computed, 0.0)
        for first, last in self._chunks():
            with self._planned(place):
                steps = self._outputs(first, last)
            weights = Weights(self.handle.last_run().sigmas)
            for branch in zip(*steps, strict=True):
                held = Outputs()
                for step in computed:
                    if held.nodes.moves(step, weights):
                        drawn = held.nodes.drawn(step, order, weights)[0].gathered()
                        off = float(deviations(drawn, branch[step]).max())
                        most[step] = max(most[step], off)
                    held.add(step, (branch[step],), weights, order)
        return [most[step] for step in computed[NODES:]]

    def book(self, plans: Sequence[Plan]) -> PlanBook:
        """The plans with what their steps take."""
        steps, loops, others = self.work.steps, {}, []
        few = len(plans[-1].computed)
        for count in (steps, few):
            turns = [self._times((tuple(even_steps(steps, count)), 1)) for _ in range(1 + REPEATS)]
            loops[count] = statistics.median(loop for loop, _ in turns[1:])
            others += [whole - loop for loop, whole in turns[1:]]
        other, full = max(0.0, statistics.median(others)), loops[steps] / steps
        tokens = self.handle.last_run().image_tokens
        with self.handle.disabled():
            turns = [self._whole() for _ in range(1 + REPEATS)]
        unpatched = max(full / 2, (statistics.median(turns[1:]) - other) / steps)
        drawn = max(0.0, (loops[few] - few * full) / (steps - few))
        return PlanBook(
            (type(self.pipeline.transformer).__name__, config_hash(self.pipeline.transformer)),
            type(self.pipeline.scheduler).__name__,
            steps,
            tokens,
            unpatched,
            (full, drawn),
            other,
            tuple(plans),
            self._provenance(),
        )

    def _times(self, place: Place) -> tuple[float, float]:
        """Seconds per picture of the denoising steps, and of the whole call."""
        with self._planned(place):
            whole = self._whole()
        run = self.handle.last_run()
        return run.seconds / self._chunks()[0][1], whole

    def _whole(self) -> float:
        """Seconds per picture of a call."""
        first, last = self._chunks()[0]
        start = time.perf_counter()
        self.judge.draw(first, last, self.work.steps)
        return (time.perf_counter() - start) / last

    def _planned(self, place: Place) -> Any:
        """Inside, runs are by this plan."""
        steps = self.work.steps
        if len(place[0]) == steps:
            return nullcontext()
        plans = tuple(Plan(*each, 1.0, 1.0, 1.0) for each in ((tuple(range(steps)), 1), place))
        scheduler = type(self.pipeline.scheduler).__name__
        book = PlanBook(("", ""), scheduler, steps, 1, 1.0, (1.0, 0.0), 0.0, plans)
        return self.handle.budget(speedup=steps / len(place[0]), book=book)

    def _chunks(self) -> list[tuple[int, int]]:
        items, batch = self.work.items, self.work.batch
        return [(first, min(first + batch, items)) for first in range(0, items, batch)]

    def _drawn(self, steps: int) -> np.ndarray:
        """The latents of all pictures."""
        return np.concatenate([self.judge.draw(*chunk, steps) for chunk in self._chunks()])

    def _outputs(self, first: int, last: int) -> list[list[torch.Tensor]]:
        """What the model gives, or what is drawn in its place, at each step: of each of its calls."""
        found: list[torch.Tensor] = []
        hook = self.pipeline.transformer.register_forward_hook(
            lambda module, given, output: found.append(output[0].detach().clone())
        )
        try:
            self.judge.draw(first, last, self.work.steps)
        finally:
            hook.remove()
        calls = len(found) // self.work.steps
        return [found[i : i + calls] for i in range(0, len(found), calls)]

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
            "solution": f"{SOLUTION} steps",
        }
