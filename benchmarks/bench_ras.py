"""Steps of a part of the tokens at SD3-medium's width: seconds over the active tokens K, against arithmetic.

    python benchmarks/bench_ras.py [--out FILE] [--depth 2] [--tokens 1024] [--rows 2 4] [--peer CHECKOUT/src] ...

Random weights, reduced depth, fp32, two rows as guidance runs an image and four as it runs two. Dense steps of the
unpatched model and sparse steps take turns, these with `pack_weights` and without. The medians are fitted by
t = a + b K. What a exceeds the arithmetic that does not depend on K (text, embeddings) is overhead, of which a part is
torch's: a product with few rows reads and lays out all weights too, which `pack_weights` spares. A profiled step tells
what is spent outside torch's matrix products and attention, fitted alike. `realised` is the speed-up of a sparse step
over that of its arithmetic. Modulations, the projected prompt and packed weights are there from the steps before, as in
any run but at its first steps. Choosing the tokens belongs to the scheduler's step and is timed in neither contender.

--peer sets the same steps of the authors' own code beside: a checkout of microsoft/RAS, in the way that runs without
CUDA (its index-fused kernels are off).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastdit
from machine import describe_machine
from memory import keep_freed_memory

RATIOS = (0.5, 0.25, 0.125)
TEXT_TOKENS = 154
ROWS = (2, 4)
LIBRARY = (
    "aten::addmm",
    "aten::bmm",
    "aten::mm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "mkl::_mkl_linear",
)
STEPS = 4  # one dense, three sparse: the last is timed, by when weights are packed


def build(depth: int, tokens: int, rows: int, heads: int) -> tuple[nn.Module, dict[str, Any]]:
    """A transformer of SD3-medium's form with its inputs; of its width with 24 heads."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    side = 2 * int(tokens**0.5)
    model = SD3Transformer2DModel(
        sample_size=side,
        num_layers=depth,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=192,
    )
    inputs = {
        "hidden_states": torch.randn(rows, 16, side, side),
        "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, 4096),
        "pooled_projections": torch.randn(rows, 2048),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


def last_step_seconds(
    model: nn.Module,
    inputs: dict[str, Any],
    ratio: float | None,
    packed: bool = True,
    around: Any = nullcontext,
) -> float:
    """Seconds of the last of `STEPS` steps, run in `around`; `ratio` None for the unpatched model."""
    timesteps = torch.linspace(999, 0, STEPS)
    rows, handle = len(inputs["hidden_states"]), None
    if ratio is not None:
        method = fastdit.RAS(ratio=ratio, metric="std", start=1, resets=())
        handle = fastdit.patch(model, method, pack_weights=packed)
        run = handle.run(timesteps)
        run.__enter__()
    for t in timesteps if handle else timesteps[-1:]:
        with around() if t == timesteps[-1] else nullcontext():
            start = time.perf_counter()
            model(**inputs, timestep=t.expand(rows))
            seconds = time.perf_counter() - start
        if handle:
            handle.advance()
    if handle:
        run.__exit__(None, None, None)
        handle.unpatch()
    return seconds


class Peer:
    """Sparse steps of the authors' code, on a copy of the model."""

    def __init__(self, source: Path, model: nn.Module) -> None:
        sys.path.insert(0, str(source))
        from ras.modules.attention_processor import RASJointAttnProcessor2_0
        from ras.modules.stable_diffusion_3.transformer_forward import ras_forward
        from ras.utils import ras_manager

        self._manager = ras_manager.MANAGER
        self._model = copy.deepcopy(model)
        self._model.forward = ras_forward.__get__(self._model)
        for block in self._model.transformer_blocks:
            block.attn.set_processor(RASJointAttnProcessor2_0())

    def last_step_seconds(self, inputs: dict[str, Any], ratio: float, active: int) -> float:
        """Seconds of the last of `STEPS` steps of `active` tokens."""
        manager = self._manager
        manager.sample_ratio, manager.num_steps = ratio, STEPS
        manager.scheduler_start_step, manager.scheduler_end_step = 1, STEPS
        manager.error_reset_steps = []
        manager.reset_cache()
        side = inputs["hidden_states"].shape[-1] // 2
        for t in torch.linspace(999, 0, STEPS):
            manager.other_patchified_index = torch.randperm(side * side)[:active]
            start = time.perf_counter()
            self._model(**inputs, timestep=t.expand(len(inputs["hidden_states"])))
            seconds = time.perf_counter() - start
            manager.increase_step()
        return seconds


def outside_library(model: nn.Module, inputs: dict[str, Any], ratio: float, packed: bool) -> float:
    """Share of a sparse step that is spent outside torch's matrix products and attention."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    last_step_seconds(model, inputs, ratio, packed, around=lambda: profiler)
    events = profiler.key_averages()
    library = sum(event.self_cpu_time_total for event in events if event.key in LIBRARY)
    return 1 - library / sum(event.self_cpu_time_total for event in events)


def macs(model: nn.Module, ratio: float, tokens: int, rows: int) -> tuple[int, int, int]:
    """(active tokens, multiply-accumulates) of a sparse step, and those of a step of the unpatched model."""
    side = 16 * int(tokens**0.5)
    handle = fastdit.patch(model, fastdit.RAS(ratio=ratio, metric="std", start=1, resets=()))
    size = {"height": side, "width": side, "batch": rows, "cfg": False, "text_tokens": TEXT_TOKENS}
    said = [handle.explain(**size, steps=steps) for steps in (2, 3)]
    handle.unpatch()
    return said[1].tokens_per_step[-1], said[1].macs - said[0].macs, said[1].dense_macs // 3


@torch.no_grad()
def measure(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of steps of so many rows, with weights packed and not, fitted."""
    model, inputs = build(options.depth, options.tokens, rows, options.heads)
    counted = {ratio: macs(model, ratio, options.tokens, rows) for ratio in RATIOS}
    peer = Peer(options.peer, model) if options.peer else None
    dense: list[float] = []
    ours: dict[tuple[bool, float], list[float]] = {
        (packed, ratio): [] for ratio in RATIOS for packed in (True, False)
    }
    theirs: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    for _ in range(options.pairs + 1):
        dense.append(last_step_seconds(model, inputs, None))
        for (packed, ratio), seconds in ours.items():
            seconds.append(last_step_seconds(model, inputs, ratio, packed))
            if peer and packed:
                theirs[ratio].append(peer.last_step_seconds(inputs, ratio, counted[ratio][0]))
    for seconds in (dense, *ours.values(), *theirs.values()):
        del seconds[:1]  # the first round warms up
    found = {"rows": rows, "dense_s": statistics.median(dense)}
    for packed, name in ((True, "packed"), (False, "as they are")):
        steps = []
        for ratio in RATIOS:
            row = compare(dense, ours[packed, ratio], *counted[ratio])
            outside = outside_library(model, inputs, ratio, packed) * row["seconds"]
            steps.append({"ratio": ratio, **row, "outside_share": outside / found["dense_s"]})
            low, high = row["speedup_range"]
            print(
                f"{rows} rows, weights {name}, K {row['active']:5}: {1e3 * row['seconds']:8.1f} ms, "
                f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}], arithmetic {row['flop_speedup']:.2f}x, "
                f"realised {row['realised']:.3f}, outside products and attention "
                f"{steps[-1]['outside_share']:.1%} of a dense step"
            )
        found[name] = {"fit": fit(steps, found["dense_s"], counted), "steps": steps}
    if peer:
        found["peer"] = [
            {
                "ratio": ratio,
                "seconds": statistics.median(theirs[ratio]),
                **{
                    name: spread(theirs[ratio], ours[packed, ratio])
                    for packed, name in ((True, "packed"), (False, "as they are"))
                },
            }
            for ratio in RATIOS
        ]
        for row in found["peer"]:
            print(f"{rows} rows, ratio {row['ratio']}, over microsoft/RAS: {row}")
    return found


def spread(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """How many times as fast, round by round: the median with the extremes."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}


def compare(
    dense: list[float], sparse: list[float], active: int, count: int, dense_macs: int
) -> dict[str, Any]:
    """A sparse step beside the dense one, in time and in arithmetic."""
    found, bound = spread(dense, sparse), dense_macs / count
    return {
        "active": active,
        "seconds": statistics.median(sparse),
        **found,
        "flop_speedup": bound,
        "realised": found["speedup"] / bound,
    }


def fit(
    steps: list[dict[str, Any]], dense_s: float, counted: dict[float, tuple[int, int, int]]
) -> dict[str, float]:
    """t = a + b K, with what a exceeds the arithmetic without K as a share of a dense step."""
    (k0, m0, dense_macs), (k1, m1, _) = counted[RATIOS[0]], counted[RATIOS[-1]]
    slope = (m0 - m1) / (k0 - k1)  # exact: arithmetic is linear in K
    active = [row["active"] for row in steps]
    b, a = np.polyfit(active, [row["seconds"] for row in steps], 1)
    _, outside = np.polyfit(active, [row["outside_share"] for row in steps], 1)
    fixed = (m1 - slope * k1) / dense_macs
    overhead = a / dense_s - fixed
    print(
        f"dense {1e3 * dense_s:.1f} ms; t = {1e3 * a:.1f} ms + {1e6 * b:.1f} us K; "
        f"a is {a / dense_s:.1%} of a dense step, arithmetic without K {fixed:.1%}, "
        f"overhead {overhead:+.1%}, {outside:.1%} outside products and attention"
    )
    return {
        "a_s": a,
        "b_s_per_token": b,
        "fixed_share": fixed,
        "overhead_share": overhead,
        "outside_share": outside,
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ras-cpu.json"))
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--peer", type=Path, help="src of a checkout of microsoft/RAS")
    options = parser.parse_args()
    kept = keep_freed_memory()
    result = {
        "what": f"SD3-medium width, {options.tokens} image and {TEXT_TOKENS} text tokens, fp32, random weights",
        "depth": options.depth,
        "full_depth": 24,
        "machine": describe_machine(),
        "keeps_freed_memory": kept,
        "pairs": options.pairs,
        "batches": [measure(rows, options) for rows in options.rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
