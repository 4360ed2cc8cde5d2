"""Bytes, launches and caches of forecasts at PixArt-XL's depth, kept as sums and one by one.

    python benchmarks/bench_sums.py

Some blocks compute at every step, the others at every n-th, so that no step is left out as a whole: those are forecast
at the model's output, and no block is visited. Counted by trace, in bf16 and with a CFG batch of 2, at a small width:
in units of one output nothing depends on it. Nothing is timed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

import fastdit
from bench_step import COMPONENTS, DEPTH
from dispatch_trace import Trace
from machine import describe_machine

RESULT = Path(__file__).parent / "results" / "sums-cpu.json"
STEPS, LATENT, WIDTH, TEXT = 20, 16, 32, 5
X = 2 * (LATENT // 2) ** 2 * WIDTH * 2
ALWAYS = {
    "the first block": [0],
    "the first and the last block": [0, DEPTH - 1],
    "every seventh block": list(range(0, DEPTH, 7)),
}
OPS = ("fastdit::gated_residual", "fastdit::residual_norm_modulate", "fastdit::collapse")


def build() -> PixArtTransformer2DModel:
    """PixArt-XL's depth."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=LATENT,
        num_layers=DEPTH,
        attention_head_dim=8,
        num_attention_heads=WIDTH // 8,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    return model.eval().to(torch.bfloat16)


def schedule(n: int, order: int, always: list[int]) -> fastdit.Schedule:
    """These blocks compute always, the others at every n-th step."""
    bits = np.zeros((STEPS, DEPTH, len(COMPONENTS)), dtype=bool)
    bits[::n] = True
    bits[:, always] = True
    return fastdit.Schedule.from_bits(bits, COMPONENTS, orders=order)


def grid(sums: bool) -> list[float]:
    """Where two steps are at one sigma there are no sums."""
    sigmas = np.linspace(1.0, 0.05, STEPS).tolist()
    return sigmas if sums else [*sigmas[:-1], sigmas[-2]]


@torch.no_grad()
def measure(model: Any, n: int, order: int, always: list[int], sums: bool) -> dict[str, Any]:
    """In outputs' sizes: what the step behind the third computed one moves, and the run; and most in caches."""
    handle = fastdit.patch(model, fastdit.Cached(schedule(n, order, always)))
    given = {
        "hidden_states": torch.randn(2, 4, LATENT, LATENT, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, TEXT, TEXT, dtype=torch.bfloat16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    steps = []
    with handle.run(grid(sums)):
        for step in range(STEPS):
            with Trace(large=X // 2) as trace:
                model(**given, timestep=torch.full((2,), 900.0 - 10 * step))
            handle.advance()
            # Sums of several chunks are rounded once they are all there.
            steps.append(
                [
                    k.large_bytes
                    for k in trace.kernels
                    if k.name in OPS or (k.name == "aten::_to_copy" and k.large_bytes > 2 * X)
                ]
            )
    found = {
        "step_X": sum(steps[2 * n + 1]) / X,
        "launches": len(steps[2 * n + 1]),
        "run_X": sum(map(sum, steps)) / X,
        "caches_X": handle.report().peak_cache_bytes / X,
    }
    fastdit.unpatch(model)
    return found


def main() -> None:
    """Count and write the results."""
    model, rows = build(), []
    for n in (2, 4):
        for order in (1, 2):
            for name, always in ALWAYS.items():
                arms = {
                    arm: measure(model, n, order, always, arm == "sums")
                    for arm in ("one by one", "sums")
                }
                rows.append({"n": n, "order": order, "always": name, **arms})
                print(rows[-1], flush=True)
    result = {"depth": DEPTH, "steps": STEPS, "rows": rows, "machine": describe_machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
