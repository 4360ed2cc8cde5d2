"""RALU at the widths of SD3-medium and FLUX: wall clock of a run, its arithmetic, and what lies between its steps.

    python benchmarks/bench_ralu.py [--family sd3 flux] [--side 1024] [--pairs 7] [--out FILE]

Random weights, reduced depth, one image, fp32, no guidance, through the stock pipelines; latents come out. All steps of
a stage do the same work, but for the first, which projects the prompt. So a round draws one dense step of the unpatched
model and the first step of each stage, and a preset's run is the sum of its steps, less the projections that it spares,
timed apart, and of all time outside the transformer's forward: hooks, layouts, choice, noise, the pipeline's own. For
SD3 one whole run of the preset says how well that sum tells it. `realised` is the speed-up of the run over as many
dense steps, divided by that of its arithmetic, attention included.

A CPU's fp32 products with few rows run below the speed of those with many. 1024 x 1024 pixels, what users run, have
4096 tokens, so the coarse stage still has products of 1024 rows and more; at `--side 256` this would be all one sees.

What edges need, the decoding of a half-size picture, is timed apart, and so is the published way between two stages:
64 draws, one a channel, from a normal distribution with a dense covariance, a Cholesky factor each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdit
from fastdit.tokens.resolution import ResolutionRun
from machine import describe_machine
from memory import keep_freed_memory
from real_models import build_vae

CHANNELS = 64  # of a token
WARM_UP = 256  # pixels


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline's width.

    Attributes:
        preset: Of RALU.
        text: Text tokens.
        dense_steps: Those that the published speed-up is over.
        depth: Blocks; of FLUX half of them double-stream.
        full_depth: Blocks of the real model.
        whole: Whether to run the preset whole, too.
    """

    preset: str
    text: int
    dense_steps: int
    depth: int
    full_depth: int
    whole: bool


FAMILIES = {
    "sd3": Family("sd3-3x", 333, 28, 2, 24, True),
    "flux": Family("flux-7x", 512, 50, 2, 57, False),
}


def build(name: str, depth: int) -> Any:
    """A stock pipeline of the family's width."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    vae = build_vae()
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if name == "flux":
        model = FluxTransformer2DModel(num_layers=depth // 2, num_single_layers=depth - depth // 2)
        make = FluxPipeline
    else:
        model = SD3Transformer2DModel(
            num_layers=depth,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        )
        make = StableDiffusion3Pipeline
        texts |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = make(vae=vae, transformer=model, scheduler=scheduler, **texts)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval().requires_grad_(False)
    return pipe


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a run: of each forward of the transformer, of all the rest, and of that between two stages."""

    forwards: list[float]
    outside: float
    between: float

    @property
    def whole(self) -> float:
        """Of the run."""
        return sum(self.forwards) + self.outside


def timed_run(pipe: Any, family: Family, side: int, method: Any = None) -> Times:
    """One run: of the method's steps, or of one dense step."""
    between = 0.0
    forwards: list[float] = []
    handle = fastdit.patch(pipe, method) if method else None
    model, stock, finish = pipe.transformer, pipe.transformer.forward, ResolutionRun.finish

    def forward(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = stock(*args, **kwargs)
        forwards.append(time.perf_counter() - start)
        return result

    def finish_stage(*args: Any) -> None:
        nonlocal between
        start = time.perf_counter()
        finish(*args)
        between += time.perf_counter() - start

    generator, widths = torch.Generator().manual_seed(0), model.config
    given = {
        "prompt_embeds": torch.randn(
            1, family.text, widths.joint_attention_dim, generator=generator
        ),
        "pooled_prompt_embeds": torch.randn(1, widths.pooled_projection_dim, generator=generator),
        "num_inference_steps": method.run_steps if method else 1,
    }
    model.forward = forward
    try:
        with mock.patch.object(ResolutionRun, "finish", finish_stage):
            start = time.perf_counter()
            pipe(
                **given,
                height=side,
                width=side,
                guidance_scale=1.0,
                output_type="latent",
                generator=generator,
            )
            whole = time.perf_counter() - start
    finally:
        del model.forward
        if handle:
            handle.unpatch()
    return Times(forwards, whole - sum(forwards), between)


def published_seconds(coarse: int, split: int, noise: float) -> list[float]:
    """Seconds of the published way from the first stage to the second, and from there to the third."""
    found = []
    for kept, parents in ((coarse - split, split), (4 * split, coarse - split)):
        x = torch.randn(kept + parents, CHANNELS)
        order = torch.randperm(kept + 4 * parents)
        start = time.perf_counter()
        x = torch.cat([x[:kept], x[kept:].repeat_interleave(4, 0)])[order]
        x = 0.2 * x + 0.9 * torch.randn_like(x)
        moved = time.perf_counter() - start
        start = time.perf_counter()
        _ = published_channel(kept, parents, noise)
        found.append(moved + CHANNELS * (time.perf_counter() - start))
    return found


def published_channel(kept: int, parents: int, noise: float) -> Tensor:
    """One channel's noise, [kept + 4 parents]: white for tokens that stay, I - c among the four copies of others."""
    block = torch.eye(4) + (1e-6 - noise)
    covariance = torch.block_diag(torch.eye(kept), *[block] * parents)
    return torch.linalg.cholesky(covariance) @ torch.randn(kept + 4 * parents)


def median_seconds(function: Callable[[], Any], repeats: int = 2) -> float:
    """Median over some calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(name: str, family: Family, side: int, pairs: int) -> dict[str, Any]:
    """One family's row of the results."""
    pipe = build(name, family.depth)
    method = fastdit.RALU.preset(family.preset, selector="gradient")
    few = dataclasses.replace(method, steps=(1, 1, 1))
    handle = fastdit.patch(pipe, method)
    said = handle.explain(height=side, width=side, cfg=False, text_tokens=family.text)
    handle.unpatch()
    steps = said.steps
    for warm_up in (None, few):
        timed_run(pipe, family, min(side, WARM_UP), warm_up)
    rounds = [
        (timed_run(pipe, family, side), timed_run(pipe, family, side, few)) for _ in range(pairs)
    ]
    text = torch.randn(1, family.text, pipe.transformer.config.joint_attention_dim)
    projection = median_seconds(lambda: pipe.transformer.context_embedder(text), 9)
    runs, ratios = [], []
    for dense, ralu in rounds:
        # A further step costs the pipeline at most what a dense run of one step does.
        outside = ralu.outside + (steps - few.run_steps) * dense.outside
        within = sum(n * s for n, s in zip(method.steps, ralu.forwards, strict=True))
        within -= (steps - few.run_steps) * projection
        runs.append((within, outside, ralu.between))
        ratios.append(steps * dense.whole / (within + outside))
    speedup = statistics.median(ratios)
    coarse = said.image_tokens // 4
    split = method.split_count(coarse, family.text)
    half = side // pipe.vae_scale_factor // 2
    latents = torch.randn(1, pipe.vae.config.latent_channels, half, half)
    pipe.vae.decode(latents[..., :8, :8])  # warm up
    result = {
        "family": name,
        "preset": family.preset,
        "text_tokens": family.text,
        "depth": family.depth,
        "full_depth": family.full_depth,
        "steps": steps,
        "tokens_per_step": said.tokens_per_step,
        "dense_step_s": statistics.median(dense.whole for dense, _ in rounds),
        "projection_s": projection,
        "stage_step_s": [
            statistics.median(ralu.forwards[i] for _, ralu in rounds) for i in range(3)
        ],
        "run_s": statistics.median(within + outside for within, outside, _ in runs),
        "speedup": speedup,
        "speedup_range": [min(ratios), max(ratios)],
        "flop_speedup": said.flop_speedup,
        "realised": speedup / said.flop_speedup,
        "dense_steps": family.dense_steps,
        "over_dense_steps": speedup * family.dense_steps / steps,
        "outside_share": statistics.median(out / (within + out) for within, out, _ in runs),
        "between_s": statistics.median(between for *_, between in runs),
        "published_between_s": sum(published_seconds(coarse, split, method.noise)),
        "decode_s": median_seconds(lambda: pipe.vae.decode(latents)),
    }
    if family.whole:
        result["whole_run_s"] = timed_run(pipe, family, side, method).whole
    return result


@torch.no_grad()
def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ralu-cpu.json"))
    options = parser.parse_args()
    kept = keep_freed_memory()
    rows = []
    for name in options.family:
        row = measure(name, FAMILIES[name], options.side, options.pairs)
        rows.append(row)
        low, high = row["speedup_range"]
        print(
            f"{name}, {row['steps']} steps: {row['speedup']:.2f}x [{low:.2f}, {high:.2f}] over as many dense steps, "
            f"arithmetic {row['flop_speedup']:.2f}x, realised {row['realised']:.3f}; "
            f"{row['over_dense_steps']:.2f}x over {row['dense_steps']} dense steps; a run {row['run_s']:.2f} s"
            + (f", measured whole {row['whole_run_s']:.2f} s" if "whole_run_s" in row else "")
        )
        print(
            f"  a dense step {row['dense_step_s']:.3f} s, of the stages "
            + ", ".join(f"{seconds:.3f}" for seconds in row["stage_step_s"])
            + f"; outside of the forwards {row['outside_share']:.2%}, of it between stages "
            f"{1e3 * row['between_s']:.1f} ms, the published way {row['published_between_s']:.1f} s; "
            f"a half-size decoding {row['decode_s']:.2f} s",
            flush=True,
        )
    result = {
        "side": options.side,
        "pairs": options.pairs,
        "machine": describe_machine(),
        "keeps_freed_memory": kept,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
