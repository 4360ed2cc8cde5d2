"""Steps of a part of the tokens at SD3-medium's width: seconds over the active tokens K, against arithmetic.

    python benchmarks/bench_ras.py [--out FILE] [--depth 4] [--tokens 1024] ...

Random weights, reduced depth, one row, fp32. Dense steps of the unpatched model and sparse steps take turns. The
medians are fitted by t = a + b K; what a exceeds the arithmetic that does not depend on K (text, embeddings,
modulation) is overhead. `realised` is the speed-up of a sparse step over that of its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastdit
from machine import describe_machine

RATIOS = (0.5, 0.25, 0.125)
TEXT_TOKENS = 154
STEPS = 3  # dense, sparse, sparse: the last is timed


def build(depth: int, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """A transformer of SD3-medium's width with its inputs."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    side = 2 * int(tokens**0.5)
    model = SD3Transformer2DModel(
        sample_size=side,
        num_layers=depth,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, side, side),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096),
        "pooled_projections": torch.randn(1, 2048),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


def last_step_seconds(model: nn.Module, inputs: dict[str, Any], ratio: float | None) -> float:
    """Seconds of the last of `STEPS` steps; `ratio` None for the unpatched model."""
    timesteps = torch.linspace(999, 0, STEPS)
    handle = None
    if ratio is not None:
        handle = fastdit.patch(model, fastdit.RAS(ratio=ratio, start=1, resets=()))
        run = handle.run(timesteps)
        run.__enter__()
    for t in timesteps if handle else timesteps[-1:]:
        start = time.perf_counter()
        model(**inputs, timestep=t.expand(1))
        seconds = time.perf_counter() - start
        if handle:
            handle.advance()
    if handle:
        run.__exit__(None, None, None)
        handle.unpatch()
    return seconds


def macs(model: nn.Module, ratio: float, tokens: int) -> tuple[int, int]:
    """(active tokens, multiply-accumulates) of a sparse step."""
    side = 16 * int(tokens**0.5)
    handle = fastdit.patch(model, fastdit.RAS(ratio=ratio, start=1, resets=()))
    size = {"height": side, "width": side, "cfg": False, "text_tokens": TEXT_TOKENS}
    said = [handle.explain(**size, steps=steps) for steps in (2, 3)]
    handle.unpatch()
    return said[1].tokens_per_step[-1], said[1].macs - said[0].macs


@torch.no_grad()
def main() -> None:
    """Measure, fit, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ras-cpu.json"))
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    model, inputs = build(options.depth, options.tokens)
    arms = (None, *RATIOS)
    times: dict[float | None, list[float]] = {arm: [] for arm in arms}
    for _ in range(options.pairs + 1):
        for arm in arms:
            times[arm].append(last_step_seconds(model, inputs, arm))
    times = {arm: values[1:] for arm, values in times.items()}  # the first round warms up
    dense_s = statistics.median(times[None])
    counted = {ratio: macs(model, ratio, options.tokens) for ratio in RATIOS}
    (k0, m0), (k1, m1) = counted[RATIOS[0]], counted[RATIOS[-1]]
    slope = (m0 - m1) / (k0 - k1)  # exact: arithmetic is linear in K
    dense_macs = round(m0 + slope * (options.tokens - k0))
    rows = []
    for ratio in RATIOS:
        active, count = counted[ratio]
        seconds = statistics.median(times[ratio])
        ratios = [a / b for a, b in zip(times[None], times[ratio], strict=True)]
        speedup, bound = statistics.median(ratios), dense_macs / count
        rows.append(
            {
                "ratio": ratio,
                "active": active,
                "seconds": seconds,
                "speedup": speedup,
                "speedup_range": [min(ratios), max(ratios)],
                "flop_speedup": bound,
                "realised": speedup / bound,
            }
        )
        print(
            f"K {active:5}: {1e3 * seconds:8.1f} ms, {speedup:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}], "
            f"arithmetic {bound:.2f}x, realised {speedup / bound:.3f}"
        )
    b, a = np.polyfit([row["active"] for row in rows], [row["seconds"] for row in rows], 1)
    fixed = (m1 - slope * k1) / dense_macs
    overhead = a / dense_s - fixed
    print(
        f"dense {1e3 * dense_s:.1f} ms; t = {1e3 * a:.1f} ms + {1e6 * b:.1f} us K; "
        f"a is {a / dense_s:.1%} of a dense step, arithmetic without K {fixed:.1%}, overhead {overhead:+.1%}"
    )
    result = {
        "what": f"SD3-medium width, {options.tokens} image and {TEXT_TOKENS} text tokens, "
        "one row, fp32, random weights",
        "depth": options.depth,
        "full_depth": 24,
        "machine": describe_machine(),
        "pairs": options.pairs,
        "dense_s": dense_s,
        "fit": {"a_s": a, "b_s_per_token": b, "fixed_share": fixed, "overhead_share": overhead},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
