"""Whole steps of a PixArt-XL/2-wide transformer: static schedules against the unpatched model and against plain hooks.

    python benchmarks/bench_step.py [--out FILE] [--depth 4] [--tokens 256] [--steps 20] [--pairs 7]

Random weights, depth reduced (labelled so), CFG batch of 2, no text encoder and no VAE. Three tables:

* runs of `--steps` steps, unpatched and patched in turns: wall speed-up, FLOP speed-up, and their quotient, the share realised;
* one fully reused step, its block stack and the whole call, fastdit and plain hooks in turns;
* the block stack of that step traced: kernels and bytes, against the floor of (n + 2 runs) X bytes.

Medians over interleaved pairs, with their spread. Results go to a JSON file from which the README's table is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from hooks import HookCache
from machine import describe_machine
from torch import Tensor, nn
from trace import Trace

import fastdit
from fastdit import Schedule

COMPONENTS = ("attn1", "attn2", "ff")
TEXT_TOKENS = 120


def build(depth: int, tokens: int) -> nn.Module:
    """PixArt-XL/2 at reduced depth, random weights."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=2 * int(tokens**0.5),
        num_layers=depth,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """One CFG pair of latents and captions."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.sample_size
    return {
        "hidden_states": torch.randn(2, 4, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(
            2, TEXT_TOKENS, model.config.caption_channels, generator=generator
        ),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def timesteps(steps: int) -> Tensor:
    """Equally spaced timesteps from 999 down."""
    return torch.linspace(999, 0, steps)


@torch.no_grad()
def run(
    model: nn.Module, arguments: dict[str, Any], steps: int, tick: Callable[[int], None]
) -> float:
    """Seconds of `steps` calls; `tick(step)` is called before each."""
    start = time.perf_counter()
    for step, t in enumerate(timesteps(steps)):
        tick(step)
        model(**arguments, timestep=t.expand(2), return_dict=False)
    return time.perf_counter() - start


def schedules(steps: int, depth: int) -> dict[str, Schedule]:
    """The schedules measured; `random 80 %` reuses single components, seeded."""
    bits = np.random.default_rng(0).random((steps, depth, len(COMPONENTS))) >= 0.8 * steps / (
        steps - 1
    )
    kinds = {"every(2)": 2, "every(3)": 3, "every(5)": 5}
    named = {
        name: Schedule.from_bits(
            np.broadcast_to((np.arange(steps) % n == 0)[:, None, None], bits.shape), COMPONENTS
        )
        for name, n in kinds.items()
    }
    return {**named, "random 80 %": Schedule.from_bits(bits, COMPONENTS)}


def measure_runs(model: nn.Module, steps: int, pairs: int) -> list[dict[str, Any]]:
    """Wall and FLOP speed-up of each schedule over the unpatched model."""
    arguments = inputs(model)
    rows = []
    for name, schedule in schedules(steps, len(model.transformer_blocks)).items():
        ratios, ours, theirs = [], [], []
        for _ in range(pairs + 1):
            base = run(model, arguments, steps, lambda step: None)
            handle = fastdit.patch(model, fastdit.Cached(schedule))
            with handle.run(timesteps(steps)):
                fast = run(model, arguments, steps, lambda step: step and handle.advance())
            flop_speedup = handle.explain(
                batch=1, steps=steps, text_tokens=TEXT_TOKENS
            ).flop_speedup
            handle.unpatch()
            ratios.append(base / fast)
            theirs.append(base)
            ours.append(fast)
        ratios, ours, theirs = ratios[1:], ours[1:], theirs[1:]  # the first pair warms up
        speedup = statistics.median(ratios)
        rows.append(
            {
                "schedule": name,
                "reused": schedule.reuse_share,
                "unpatched_s": statistics.median(theirs),
                "fastdit_s": statistics.median(ours),
                "wall_speedup": speedup,
                "wall_speedup_range": [min(ratios), max(ratios)],
                "flop_speedup": flop_speedup,
                "realised": speedup / flop_speedup,
            }
        )
        print(
            f"{name:12} reused {schedule.reuse_share:5.1%}  wall {speedup:5.2f}x "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]  FLOP {flop_speedup:5.2f}x  realised {speedup / flop_speedup:.3f}",
            flush=True,
        )
    return rows


class StackTimer:
    """Seconds of the block stack, by native hooks on the modules that run right before and right after it.

    Hooks on the blocks themselves would make fastdit settle its residuals for them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._handles = [
            model.caption_projection.register_forward_hook(self._start),
            model.norm_out.register_forward_pre_hook(self._stop),
        ]

    def _start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._begin

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def reused_step(model: nn.Module, pairs: int) -> dict[str, Any]:
    """One fully reused step: seconds of the block stack and of the whole call, fastdit against hooks."""
    depth = len(model.transformer_blocks)
    bits = np.zeros((2, depth, len(COMPONENTS)), dtype=bool)
    schedule = Schedule.from_bits(bits, COMPONENTS)
    arguments = inputs(model)
    found: dict[str, dict[str, list[float]]] = {
        a: {"stack": [], "call": []} for a in ("fastdit", "hooks")
    }

    def second_step(tick: Callable[[int], None]) -> tuple[float, float]:
        timer = StackTimer(model)
        run_step(model, arguments, 0, tick)
        start = time.perf_counter()
        run_step(model, arguments, 1, tick)
        call = time.perf_counter() - start
        timer.remove()
        return timer.seconds, call

    for _ in range(pairs + 1):
        handle = fastdit.patch(model, fastdit.Cached(schedule))
        with handle.run(timesteps(2)):
            stack, call = second_step(lambda step: step and handle.advance())
        handle.unpatch()
        found["fastdit"]["stack"].append(stack)
        found["fastdit"]["call"].append(call)
        cache = HookCache(list(model.transformer_blocks), COMPONENTS, schedule)
        stack, call = second_step(lambda step: setattr(cache, "step", step))
        cache.remove()
        found["hooks"]["stack"].append(stack)
        found["hooks"]["call"].append(call)
    median = {
        arm: {what: statistics.median(values[1:]) for what, values in row.items()}
        for arm, row in found.items()
    }
    ratio = {what: median["fastdit"][what] / median["hooks"][what] for what in ("stack", "call")}
    for what in ("stack", "call"):
        print(
            f"fully reused step, {what:5}: fastdit {1e3 * median['fastdit'][what]:7.2f} ms, "
            f"hooks {1e3 * median['hooks'][what]:7.2f} ms, ratio {ratio[what]:.3f}"
        )
    return {"seconds": median, "ratio": ratio}


def run_step(
    model: nn.Module, arguments: dict[str, Any], step: int, tick: Callable[[int], None]
) -> None:
    """One call at step `step` of two."""
    tick(step)
    model(**arguments, timestep=timesteps(2)[step].expand(2), return_dict=False)


@torch.no_grad()
def traced_step(model: nn.Module) -> dict[str, Any]:
    """Kernels and bytes of a fully reused step's block stack, against the floor."""
    depth = len(model.transformer_blocks)
    schedule = Schedule.from_bits(np.zeros((2, depth, len(COMPONENTS)), dtype=bool), COMPONENTS)
    arguments = inputs(model)
    handle = fastdit.patch(model, fastdit.Cached(schedule))
    x = 4 * 2 * (model.config.sample_size // 2) ** 2 * model.inner_dim
    with handle.run(timesteps(2)):
        run_step(model, arguments, 0, lambda step: None)
        handle.advance()
        fast = trace_stack(model, arguments, x)
    handle.unpatch()
    cache = HookCache(list(model.transformer_blocks), COMPONENTS, schedule)
    run_step(model, arguments, 0, lambda step: None)
    cache.step = 1
    eager = trace_stack(model, arguments, x)
    cache.remove()
    n, runs = depth * len(COMPONENTS), 1
    result = {
        "X_bytes": x,
        "reused_components": n,
        "runs": runs,
        "floor_X": n + 2 * runs,
        "fastdit": {
            "kernels": len(fast.kernels),
            "token_X": fast.large_bytes / x,
            "all_X": fast.bytes / x,
        },
        "hooks": {
            "kernels": len(eager.kernels),
            "token_X": eager.large_bytes / x,
            "all_X": eager.bytes / x,
        },
        "fastdit_kernels": [kernel.name for kernel in fast.kernels],
    }
    for arm in ("fastdit", "hooks"):
        print(
            f"fully reused step traced, {arm:7}: {result[arm]['kernels']:4d} kernels, {result[arm]['token_X']:7.2f} X in "
            f"token tensors, {result[arm]['all_X']:7.2f} X in all; floor {n + 2 * runs} X, {runs + 10} kernels"
        )
    return result


def trace_stack(model: nn.Module, arguments: dict[str, Any], x: int) -> Trace:
    """Trace the second step's block stack; see :class:`StackTimer` for the hooks."""
    trace = Trace(large=x // 2)
    handles = [
        model.caption_projection.register_forward_hook(lambda *_: trace.__enter__() and None),
        model.norm_out.register_forward_pre_hook(lambda *_: trace.__exit__(None, None, None)),
    ]
    model(**arguments, timestep=timesteps(2)[1].expand(2), return_dict=False)
    for handle in handles:
        handle.remove()
    return trace


def main() -> None:
    """Run all three and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step-cpu.json"))
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    model = build(options.depth, options.tokens)
    print(
        f"PixArt-XL/2 width 1152, depth {options.depth} of 28, {options.tokens} tokens, batch 2 (CFG), fp32, random weights"
    )
    results = {
        "what": f"PixArt-XL/2 width, depth {options.depth} of 28, {options.tokens} image and {TEXT_TOKENS} text tokens, "
        f"CFG batch 2, fp32, {options.steps} steps, random weights",
        "machine": describe_machine(),
        "reused_step": reused_step(model, 4 * options.pairs),
        "trace": traced_step(model),
        "runs": measure_runs(model, options.steps, options.pairs),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
