"""A plan book in minutes: whole steps, left out at several places and drawn by several orders, each measured.

For each number of computed steps there are candidates: evenly spread, dense early, and where the output changes by
equal amounts (as InvarDiff, arXiv 2512.05134, places them by quantiles of a few runs), each drawn as a line and as a
parabola. The evenly spread line stays unless another is nearer to the solution by the interval of the paired ratio, so
that what is chosen on a few prompts holds on others.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch

from fastdit.errors import ArgumentError
from fastdit.schedules.book import Plan, PlanBook, config_hash
from fastdit.schedules.spread import changing_steps, early_steps, even_steps
from fastdit.search import seeds, solution
from fastdit.search.evaluator import Evaluator, Task, Work, fingerprint

#: of all steps: so many compute
SHARES = (0.75, 0.65, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.21, 0.18, 0.15)
ORDERS = (1, 2)
LEAST_STEPS = 8
#: prompts of which the output's changes are taken
SEEN = 2
CONFIDENCE = 0.95
#: a guard's bound over the most that was measured
MARGIN = 1.5
REPEATS = 3


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
        pipeline: With its own scheduler, which draws no noise at each step.
        prompts: At least two, a picture of each.
        steps: Of a run, at least 8.
        batch, seed, threads, backend, arguments: As in :class:`~fastdit.search.Work`.
        shares: So many of the steps compute.
        watch: Is told the number of measured plans, and of all.

    Raises:
        ArgumentError: The sampler draws noise, the pipeline gives no latents, or an argument is not accepted.
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
        orders=(0, *ORDERS),
    )
    judge = Evaluator(lambda: pipeline, work)
    calls = judge.genome.steps
    if calls != steps:
        raise ArgumentError(
            f"a plan book needs a sampler that calls the model once a step, "
            f"{type(pipeline.scheduler).__name__} makes {calls} calls of {steps}"
        )
    counts = sorted({max(2, round(share * steps)) for share in shares} - {steps}, reverse=True)
    changes = judge.changes(min(SEEN, len(prompts)))
    candidates = {count: _candidates(steps, count, changes) for count in counts}
    total = 1 + sum(map(len, candidates.values()))
    done = itertools.count(1)

    def losses(computed: Sequence[int], order: int) -> np.ndarray:
        vector = seeds.whole_steps(judge.genome, computed, order)
        task = Task("", "losses", judge.genome.to_bytes(vector), steps, 0, work.items)
        found = np.log(judge.measure(task)["losses"])
        watch(next(done), total)
        return found

    unpatched = losses(range(steps), 1)
    plans = [Plan(tuple(range(steps)), 1, 1.0, 1.0, 1.0)]
    for asked, places in candidates.items():
        measured = {place: losses(*place) for place in places}
        even = tuple(even_steps(steps, asked)), 1
        best = min(measured, key=lambda place: measured[place].mean())
        if interval(measured[best] - measured[even])[2] >= 1:
            best = even
        off = judge.deviations(seeds.whole_steps(judge.genome, *best), *best)
        bounds = tuple(MARGIN * each for each in off)
        plans.append(Plan(*best, *interval(measured[best] - unpatched), bounds))
    step_seconds, other, tokens = _times(judge, steps, counts[-1])
    return PlanBook(
        (type(pipeline.transformer).__name__, config_hash(pipeline.transformer)),
        type(pipeline.scheduler).__name__,
        steps,
        tokens,
        step_seconds,
        other,
        tuple({len(plan.computed): plan for plan in plans}.values()),
        _provenance(judge),
    )


def interval(logarithms: np.ndarray) -> tuple[float, float, float]:
    """The geometric mean of ratios whose logarithms are given, and its 95 % interval (Student's t)."""
    mean, error = logarithms.mean(), scipy.stats.sem(logarithms)
    half = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(logarithms) - 1)
    return tuple(float(np.exp(mean + each)) for each in (0.0, -half, half))


def _candidates(
    steps: int, count: int, changes: Sequence[float]
) -> list[tuple[tuple[int, ...], int]]:
    """Steps that compute, about `count` of them, and an order; the evenly spread line first."""
    places = (even_steps(steps, count), early_steps(steps, count), changing_steps(changes, count))
    found = [(tuple(place), order) for place in places for order in ORDERS]
    return [each for each in dict.fromkeys(found) if len(each[0]) <= count]


def _times(judge: Evaluator, steps: int, few: int) -> tuple[tuple[float, float], float, int]:
    """Seconds per picture of a step that computes and of one that is drawn, and of the call beside its steps.

    The third is how many image tokens a picture has.
    """
    loops: dict[int, float] = {}
    others = []
    for count in (steps, few):
        vector = seeds.whole_steps(judge.genome, even_steps(steps, count), 1)
        turns = [judge.seconds(vector) for _ in range(1 + REPEATS)][1:]
        loops[count] = statistics.median(loop for loop, *_ in turns)
        others += [whole - loop for loop, whole, _ in turns]
    full = loops[steps] / steps
    drawn = max(0.0, (loops[few] - few * full) / (steps - few))
    return (full, drawn), max(0.0, statistics.median(others)), turns[-1][2]


def _provenance(judge: Evaluator) -> dict[str, Any]:
    import importlib.metadata
    import platform

    weight = next(judge.pipeline.transformer.parameters())
    device = weight.device
    on_gpu = device.type == "cuda"
    return {
        "made": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "threads": judge.work.threads,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "weights": fingerprint(judge.pipeline.transformer),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "prompts": list(judge.work.prompts),
        "seed": judge.work.seed,
        "batch": judge.work.batch,
        "arguments": dict(judge.work.arguments),
        "solution": f"{solution.STEPS} steps",
    }
