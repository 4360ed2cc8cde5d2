"""Whole runs and single steps under evolved schedules: wall clock, arithmetic, bytes, launches, caches.

    python benchmarks/bench_ecad.py [--out FILE] [--depth 2] [--pairs 7] ...

Schedules of the reuse shares that ECAD's published ones have (ECAD spec section 7): fast, faster and
fastest, with as many idle steps, the other bits drawn at random. Three tables:

* runs at PixArt-XL/2's width and reduced depth, unpatched, with plain hooks and with fastdit in turns:
  wall speed-up, true-MAC speed-up, their quotient; most bytes in caches, counted and predicted;
* one fully reused step of the block stack, alone and followed by another: times, and kernels and
  bytes by trace against the floor;
* runs of the embedded model, where overheads weigh: unpatched, plain hooks, fastdit, and cache-dit
  where it is installed, which can only reuse whole steps and keeps a block computing.

Medians over interleaved turns with their range, written to a JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdit
from bench_step import COMPONENTS, TEXT_TOKENS, Bench, measure_reused_step, measure_traffic
from fastdit import ECAD, Schedule
from fastdit.blocks.nodes import HeldSums
from hooks import HookCache
from machine import describe_machine

STEPS = 20
#: published schedule -> (reuse share, steps at which nothing computes)
PUBLISHED = {
    "fast": (0.643, (3, 5, 7, 8, 11, 13)),
    "faster": (0.758, (3, 4, 7, 8, 11, 13, 15)),
    "fastest": (0.806, (3, 4, 5, 7, 8, 11, 13, 14, 15, 19)),
}


def schedule_like(name: str, depth: int, components: tuple[str, ...]) -> Schedule:
    """A schedule with the share and the idle steps of a published one; its other bits are drawn, seeded."""
    share, idle = PUBLISHED[name]
    bits = np.zeros((STEPS, depth, len(components)), dtype=bool)
    busy = [step for step in range(1, STEPS) if step not in idle]
    entries = depth * len(components)
    computing = round((1 - share) * STEPS * entries) - entries
    chosen = np.random.default_rng(0).permutation(len(busy) * entries)[:computing]
    flat = np.zeros(len(busy) * entries, dtype=bool)
    flat[chosen] = True
    bits[busy] = flat.reshape(len(busy), depth, len(components))
    return Schedule.from_bits(bits, components)


def turns(arms: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Seconds of each arm, in turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(count + 1):
        for name, arm in arms.items():
            seconds[name].append(arm())
    return {name: values[1:] for name, values in seconds.items()}


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median and range of the turns' ratios."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def measure_run(bench: Bench, name: str, count: int) -> dict[str, Any]:
    """A run at PixArt's width: unpatched, plain hooks, fastdit."""
    depth = len(bench.blocks)
    schedule = schedule_like(name, depth, COMPONENTS)

    def stock() -> float:
        return bench.run_seconds(STEPS, lambda step: None)

    def hooked() -> float:
        with bench.hooks(schedule) as tick:
            return bench.run_seconds(STEPS, tick)

    def patched() -> float:
        with bench.fastdit(schedule) as tick:
            return bench.run_seconds(STEPS, tick)

    seconds = turns({"unpatched": stock, "hooks": hooked, "fastdit": patched}, count)
    handle = fastdit.patch(bench.model, ECAD(schedule))
    said = handle.explain(steps=STEPS, text_tokens=TEXT_TOKENS)
    with handle.run(torch.linspace(999, 0, STEPS)):
        held = []
        for t in torch.linspace(999, 0, STEPS):
            bench.call(t)
            held.append(reachable_bytes(handle))
    handle.unpatch()
    wall = ratio(seconds["unpatched"], seconds["fastdit"])
    found = {
        "reused": schedule.reuse_share,
        "seconds": {arm: statistics.median(values) for arm, values in seconds.items()},
        "wall_speedup": wall,
        "mac_speedup": said.flop_speedup,
        "realised": wall["median"] / said.flop_speedup,
        "over_hooks": ratio(seconds["hooks"], seconds["fastdit"]),
        "cache_bytes": {"counted": max(held), "predicted": said.cache_bytes},
    }
    print(
        f"{name:8} reused {found['reused']:5.1%}  wall {wall['median']:.2f}x, MACs {said.flop_speedup:.2f}x, "
        f"realised {found['realised']:.3f}; over hooks {found['over_hooks']['median']:.3f}x; caches "
        f"{max(held)} bytes, predicted {said.cache_bytes}",
        flush=True,
    )
    return found


def reachable_bytes(handle: Any) -> int:
    """Bytes of all storages that the caches hold on to, found by walking, each counted once."""
    found: dict[int, int] = {}
    stack: list[Any] = []
    for branch in handle._patched.runs.last().branches.values():
        stack += branch.slots, branch.prompts
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, HeldSums):
            stack += value.sums, value.shared
        elif isinstance(value, (tuple, list)):
            stack += value
    return sum(found.values())


# ---- the embedded model


def measure_embedded(name: str, count: int) -> dict[str, Any]:
    """Latents of the embedded model by several ways, in turns; text is encoded before."""
    from diffusers import StableDiffusion3Pipeline

    from fastdit import tiny

    loaded = tiny.load_pipeline()
    given = embeddings(loaded)
    pipe = StableDiffusion3Pipeline(**loaded.components)  # the class that cache-dit knows
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    parts = ("attn", "ff", "ff_context")
    schedule = schedule_like(name, len(model.transformer_blocks), parts)

    def seconds() -> float:
        start = time.perf_counter()
        pipe(**given, num_inference_steps=STEPS, output_type="latent")
        return time.perf_counter() - start

    def patched() -> float:
        handle = fastdit.patch(pipe, ECAD(schedule))
        try:
            return seconds()
        finally:
            handle.unpatch()

    def hooked() -> float:
        with hooks(model, parts, schedule):
            return seconds()

    arms = {"unpatched": seconds, "hooks": hooked, "fastdit": patched}
    if importlib.util.find_spec("cache_dit") is not None:
        arms["cache-dit"] = lambda: with_cache_dit(pipe, name, seconds)
    found = turns(arms, count)
    handle = fastdit.patch(pipe, ECAD(schedule))
    said = handle.explain(steps=STEPS)
    handle.unpatch()
    rivals = {
        arm: statistics.median(found[arm]) for arm in arms if arm not in ("fastdit", "unpatched")
    }
    best = min(rivals, key=rivals.get)
    result = {
        "reused": schedule.reuse_share,
        "seconds": {arm: statistics.median(values) for arm, values in found.items()},
        "wall_speedup": ratio(found["unpatched"], found["fastdit"]),
        "mac_speedup": said.flop_speedup,
        "over": {arm: ratio(found[arm], found["fastdit"]) for arm in rivals},
        "best_rival": best,
    }
    print(
        f"embedded {name:8} wall {result['wall_speedup']['median']:.2f}x, MACs {said.flop_speedup:.2f}x; "
        + ", ".join(f"over {arm} {value['median']:.3f}x" for arm, value in result["over"].items()),
        flush=True,
    )
    return result


def embeddings(pipe: Any) -> dict[str, Tensor]:
    """The text of one prompt, encoded with guidance."""
    prompt = "a large red circle at the left on a white background"
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    return dict(zip(names, pipe.encode_prompt(prompt, None, None), strict=True))


@contextmanager
def hooks(model: Any, parts: tuple[str, ...], schedule: Schedule) -> Any:
    """Plain hooks, told the step by the transformer's calls."""
    cache = HookCache(list(model.transformer_blocks), parts, schedule)
    steps = iter(range(STEPS))
    handle = model.register_forward_pre_hook(lambda *_: cache.start_step(next(steps)))
    try:
        yield
    finally:
        handle.remove()
        cache.remove()


def with_cache_dit(pipe: Any, name: str, run: Callable[[], float]) -> float:
    """cache-dit at the idle steps of the schedule: it has one bit per step, and its first block always computes."""
    import cache_dit

    mask = [int(step not in PUBLISHED[name][1]) for step in range(STEPS)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=STEPS,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        return run()
    finally:
        cache_dit.disable_cache(pipe)


@torch.no_grad()
def main() -> None:
    """Measure all three and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ecad-cpu.json"))
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--reused-depth", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=("runs", "step", "embedded"), action="append")
    parser.add_argument("--schedule", choices=PUBLISHED, action="append")
    options = parser.parse_args()
    parts = options.only or ("runs", "step", "embedded")
    names = options.schedule or PUBLISHED
    results = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    results |= {
        "what": f"PixArt-XL/2 width, {options.tokens} image and {TEXT_TOKENS} text tokens, CFG batch 2, fp32, "
        "random weights",
        "steps": STEPS,
        "machine": describe_machine(),
        "pairs": options.pairs,
    }
    if "step" in parts:
        deep = Bench(options.reused_depth, options.tokens)
        results["reused_depth"] = options.reused_depth
        results["reused_step"] = measure_reused_step(deep, 2 * options.pairs)
        results["traffic"] = measure_traffic(deep)
        print("the same where the next step is fully reused too: outputs kept as three sums")
        results["collapsed_step"] = measure_reused_step(deep, 2 * options.pairs, 3)
        results["collapsed_traffic"] = measure_traffic(deep, 3)
        del deep
    if "runs" in parts:
        bench = Bench(options.depth, options.tokens)
        results["depth"] = options.depth
        for name in names:
            results.setdefault("runs", {})[name] = measure_run(bench, name, options.pairs)
    if "embedded" in parts:
        for name in names:
            results.setdefault("embedded", {})[name] = measure_embedded(name, options.pairs)
    for part in {"runs", "embedded"} & set(results):  # in order, whatever was measured last
        results[part] = {name: results[part][name] for name in PUBLISHED if name in results[part]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
