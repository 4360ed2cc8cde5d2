"""Whole steps at PixArt-XL/2's width: static schedules against the unpatched model and plain hooks.

    python benchmarks/bench_step.py [--out FILE] [--depth 4] [--reused-depth 12] ...

Random weights, reduced depth, a CFG batch of 2, fp32, no text encoder and no VAE. Three tables:

* runs, unpatched and patched in turns: wall speed-up, FLOP speed-up, and the share realised;
* one fully reused step, its block stack and the whole call, fastdit and plain hooks in turns;
* the block stack of that step traced: kernels and bytes, against the floor of (n + 2 runs) X.

Medians over interleaved pairs with their range, written to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdit
from dispatch_trace import Trace
from fastdit import Schedule
from hooks import HookCache
from machine import describe_machine

COMPONENTS = ("attn1", "attn2", "ff")
TEXT_TOKENS = 120
DEPTH = 28

#: told the step about to run
Tick = Callable[[int], None]


class Bench:
    """One model with its inputs, and the ways to run it."""

    def __init__(self, depth: int, tokens: int) -> None:
        from diffusers import PixArtTransformer2DModel

        torch.manual_seed(0)
        size = 2 * int(tokens**0.5)
        model = PixArtTransformer2DModel(
            sample_size=size,
            num_layers=depth,
            caption_channels=4096,
            use_additional_conditions=False,
        )
        self.model = model.eval().requires_grad_(False)
        self.blocks = list(model.transformer_blocks)
        self.x_bytes = 2 * tokens * model.inner_dim * 4
        self.inputs = {
            "hidden_states": torch.randn(2, 4, size, size),
            "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def call(self, t: Tensor) -> None:
        """One transformer call at timestep `t`."""
        self.model(**self.inputs, timestep=t.expand(2), return_dict=False)

    @contextmanager
    def fastdit(self, schedule: Schedule) -> Iterator[Tick]:
        """Patched, inside a run."""
        handle = fastdit.patch(self.model, fastdit.Cached(schedule))
        with handle.run(timesteps(schedule.steps)):
            yield lambda step: handle.advance() if step else None
        handle.unpatch()

    @contextmanager
    def hooks(self, schedule: Schedule) -> Iterator[Tick]:
        """With plain hooks."""
        cache = HookCache(self.blocks, COMPONENTS, schedule)
        yield cache.start_step
        cache.remove()

    @contextmanager
    def around_stack(self, start: Callable[[], Any], stop: Callable[[], Any]) -> Iterator[None]:
        """Call `start` before and `stop` after the block stack of each call.

        By hooks on the modules that run right before and right after the stack: hooks on the blocks
        themselves would make fastdit settle its residuals for them.
        """
        before = self.model.caption_projection.register_forward_hook(lambda *_: start() and None)
        after = self.model.norm_out.register_forward_pre_hook(lambda *_: stop() and None)
        yield
        before.remove()
        after.remove()

    def run_seconds(self, steps: int, tick: Tick) -> float:
        """Seconds of a run."""
        start = time.perf_counter()
        for step, t in enumerate(timesteps(steps)):
            tick(step)
            self.call(t)
        return time.perf_counter() - start

    def second_step_seconds(self, tick: Tick, part: str) -> float:
        """Seconds of the second step: of its block "stack", or of the whole "call".

        Not both at once: fastdit projects the captions once a run, but for somebody's hook at every step.
        """
        marks: list[float] = []

        def mark() -> None:
            marks.append(time.perf_counter())

        with self.around_stack(mark, mark) if part == "stack" else nullcontext():
            for step, t in enumerate(timesteps(2)):
                tick(step)
                start = time.perf_counter()
                self.call(t)
                call = time.perf_counter() - start
        return marks[-1] - marks[-2] if part == "stack" else call

    def second_step_trace(self, tick: Tick) -> Trace:
        """The second step's block stack, traced."""
        trace = Trace(large=self.x_bytes // 2)
        first, second = timesteps(2)
        tick(0)
        self.call(first)
        tick(1)
        with self.around_stack(trace.__enter__, lambda: trace.__exit__(None, None, None)):
            self.call(second)
        return trace


def timesteps(steps: int) -> Tensor:
    """Equally spaced timesteps from 999 down."""
    return torch.linspace(999, 0, steps)


def schedules(steps: int, depth: int) -> dict[str, Schedule]:
    """The schedules measured; `random 80 %` reuses single components, seeded."""
    shape = (steps, depth, len(COMPONENTS))
    random = np.random.default_rng(0).random(shape) >= 0.8 * steps / (steps - 1)
    bits = {
        f"every({n})": np.broadcast_to((np.arange(steps) % n == 0)[:, None, None], shape)
        for n in (2, 3, 5)
    }
    bits["random 80 %"] = random
    return {name: Schedule.from_bits(value, COMPONENTS) for name, value in bits.items()}


def all_reused(depth: int, steps: int) -> Schedule:
    """The first step computes, the others are fully reused; from three steps on fastdit keeps three sums."""
    return Schedule.from_bits(np.zeros((steps, depth, len(COMPONENTS)), dtype=bool), COMPONENTS)


def measure_run(bench: Bench, name: str, schedule: Schedule, pairs: int) -> dict[str, Any]:
    """Wall and FLOP speed-up of a schedule over the unpatched model."""
    steps = schedule.steps
    seconds = []
    for _ in range(pairs + 1):
        base = bench.run_seconds(steps, lambda step: None)
        with bench.fastdit(schedule) as tick:
            seconds.append((base, bench.run_seconds(steps, tick)))
            explanation = fastdit.explain(bench.model, steps=steps, text_tokens=TEXT_TOKENS)
    seconds = seconds[1:]  # the first pair warms up
    ratios = [base / fast for base, fast in seconds]
    speedup, flops = statistics.median(ratios), explanation.flop_speedup
    print(
        f"{name:12} reused {schedule.reuse_share:5.1%}  wall {speedup:5.2f}x "
        f"[{min(ratios):.2f}, {max(ratios):.2f}]  FLOP {flops:5.2f}x, share {speedup / flops:.3f}",
        flush=True,
    )
    return {
        "schedule": name,
        "reused": schedule.reuse_share,
        "unpatched_s": statistics.median(base for base, _ in seconds),
        "fastdit_s": statistics.median(fast for _, fast in seconds),
        "wall_speedup": speedup,
        "wall_speedup_range": [min(ratios), max(ratios)],
        "flop_speedup": flops,
        "realised": speedup / flops,
    }


def measure_reused_step(bench: Bench, pairs: int, steps: int = 2) -> dict[str, Any]:
    """Seconds of the second step, fully reused like all up to `steps`, fastdit against hooks."""
    schedule = all_reused(len(bench.blocks), steps)
    arms = {"fastdit": bench.fastdit, "hooks": bench.hooks}
    parts: dict[str, Any] = {}
    for part in ("stack", "call"):
        found: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(pairs + 1):
            for name, arm in arms.items():
                with arm(schedule) as tick:
                    found[name].append(bench.second_step_seconds(tick, part))
        fast, slow = (found[name][1:] for name in arms)
        ratios = [a / b for a, b in zip(fast, slow, strict=True)]
        parts[part] = {
            "fastdit_s": statistics.median(fast),
            "hooks_s": statistics.median(slow),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        print(
            f"fully reused step, {part:5}: fastdit {1e3 * parts[part]['fastdit_s']:7.2f} ms, "
            f"hooks {1e3 * parts[part]['hooks_s']:7.2f} ms, ratio {parts[part]['ratio']:.3f}"
        )
    return parts


def measure_traffic(bench: Bench, steps: int = 2) -> dict[str, Any]:
    """Kernels and bytes of such a step's block stack, against the floor."""
    schedule = all_reused(len(bench.blocks), steps)
    n, runs, x = len(bench.blocks) * len(COMPONENTS), 1, bench.x_bytes
    floor = (n if steps == 2 else 3) + 2 * runs
    result: dict[str, Any] = {
        "X_bytes": x,
        "reused_components": n,
        "runs": runs,
        "floor_X": floor,
        "kernel_limit": runs + 10,
    }
    for name, arm in (("fastdit", bench.fastdit), ("hooks", bench.hooks)):
        with arm(schedule) as tick:
            trace = bench.second_step_trace(tick)
        result[name] = {
            "kernels": len(trace.kernels),
            "token_X": trace.large_bytes / x,
            "all_X": trace.bytes / x,
        }
        print(
            f"fully reused step, {name:7}: {len(trace.kernels):4d} kernels (limit {runs + 10}), "
            f"{trace.large_bytes / x:7.2f} X in token tensors (floor {floor}), "
            f"{trace.bytes / x:7.2f} X with gates"
        )
    return result


@torch.no_grad()
def main() -> None:
    """Measure all three and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step-cpu.json"))
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--reused-depth", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    what = (
        f"PixArt-XL/2 width, {options.tokens} image and {TEXT_TOKENS} text tokens, CFG batch 2, "
        "fp32, random weights"
    )
    print(f"{what}; runs at depth {options.depth}, the reused step at depth {options.reused_depth}")
    deep = Bench(options.reused_depth, options.tokens)
    reused = {
        "reused_depth": options.reused_depth,
        "reused_step": measure_reused_step(deep, 2 * options.pairs),
        "traffic": measure_traffic(deep),
    }
    del deep
    bench = Bench(options.depth, options.tokens)
    results = {
        "what": what,
        "depth": options.depth,
        "full_depth": DEPTH,
        "steps": options.steps,
        "machine": describe_machine(),
        "pairs": options.pairs,
        **reused,
        "runs": [
            measure_run(bench, name, schedule, options.pairs)
            for name, schedule in schedules(options.steps, options.depth).items()
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
