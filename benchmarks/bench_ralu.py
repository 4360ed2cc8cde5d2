"""RALU at the widths of FLUX and SD3-medium: wall clock of the steps and of what lies between them.

    python benchmarks/bench_ralu.py [--out FILE] [--family sd3|flux] [--side 512]

Random weights, reduced depth, one image, fp32, no guidance, through the stock pipelines; latents come out. Dense runs
of the unpatched model and RALU's take turns. `realised` is the speed-up of the transformer's calls over that of their
arithmetic, attention included. What lies outside of them, RALU's choice, noise and layouts, is timed by itself, and so
are the decoding that edges need and the published way of drawing correlated noise, by a Cholesky factor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdit
from fastdit import ops
from fastdit.layout import Layout
from machine import describe_machine

TEXT = {"sd3": 333, "flux": 512}
WIDTH = {"sd3": 4096, "flux": 4096}
POOLED = {"sd3": 2048, "flux": 768}
PRESET = {"sd3": "sd3-3x", "flux": "flux-7x"}
CALIBRATED = {"sd3": 28, "flux": 50}  # dense steps that the published speed-ups are over


def build(family: str, depth: int) -> Any:
    """A stock pipeline of the family's width."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if family == "flux":
        model = FluxTransformer2DModel(num_layers=depth, num_single_layers=2 * depth)
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
    for part in (pipe.transformer, pipe.vae):
        part.eval().requires_grad_(False)
    return pipe


class Clock:
    """Seconds within the transformer, and of whole runs."""

    def __init__(self, pipe: Any, family: str, side: int) -> None:
        self.pipe = pipe
        self.given = {
            "prompt_embeds": torch.randn(1, TEXT[family], WIDTH[family]),
            "pooled_prompt_embeds": torch.randn(1, POOLED[family]),
            "height": side,
            "width": side,
            "guidance_scale": 1.0,
            "output_type": "latent",
        }

    def run(self, steps: int, method: Any = None) -> tuple[float, float]:
        """(seconds within the transformer, seconds without it) of one run."""
        spent = 0.0
        handle = fastdit.patch(self.pipe, method) if method else None
        model = self.pipe.transformer
        forward = model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            spent += time.perf_counter() - start
            return result

        model.forward = timed
        try:
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(0)
            self.pipe(**self.given, num_inference_steps=steps, generator=generator)
            whole = time.perf_counter() - start
        finally:
            del model.forward
            if handle:
                handle.unpatch()
        return spent, whole - spent


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median over some calls, after one more."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def transitions(method: Any, side: int) -> dict[str, float]:
    """Seconds of a second transition, and of drawing its noise by the covariance matrix as published."""
    cells, noise = (side // 16,) * 2, method.noise
    layout = Layout.uniform(cells, 1, torch.device("cpu"))
    x, rows = torch.randn(1, layout.tokens, 64), torch.arange(layout.tokens)[None]

    def ours() -> None:
        eps = torch.randn(1, 4 * layout.tokens, 64)
        ops.resolution_transition(
            x,
            layout.table,
            rows,
            eps,
            scale=0.2,
            deviation=0.9,
            correlation=noise,
            raster=cells[1],
        )

    count = 4 * layout.tokens
    block = torch.eye(4) - noise + 1e-6 * (1 - torch.eye(4))
    covariance = torch.block_diag(*[block] * layout.tokens)

    def published_channel() -> None:
        factor = torch.linalg.cholesky(covariance)
        _ = factor @ torch.randn(count)

    return {
        "ours_s": median_seconds(ours),
        "published_s": 64 * median_seconds(published_channel, 3),  # one factorisation a channel
    }


@torch.no_grad()
def main() -> None:
    """Measure one family and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=PRESET, default="sd3")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    family, side = options.family, options.side
    pipe = build(family, options.depth)
    clock = Clock(pipe, family, side)
    method = fastdit.RALU.preset(PRESET[family], selector="gradient")
    steps = method.run_steps
    handle = fastdit.patch(pipe, method)
    said = handle.explain(height=side, width=side, cfg=False, text_tokens=TEXT[family])
    handle.unpatch()
    pairs = []
    for _ in range(options.pairs + 1):
        pairs.append((*clock.run(steps), *clock.run(steps, method)))
    pairs = pairs[1:]  # the first warms up
    ratios = [dense / ralu for dense, _, ralu, _ in pairs]
    outside = [extra / (ralu + extra) for _, _, ralu, extra in pairs]
    speedup = statistics.median(ratios)
    latents = torch.randn(1, 16, side // 16, side // 16)
    decode_s = median_seconds(lambda: pipe.vae.decode(latents), 3)
    run_s = statistics.median(ralu + extra for _, _, ralu, extra in pairs)
    result = {
        "what": f"{family} width, {side} x {side} pixels, {TEXT[family]} text tokens, one image, no guidance, "
        "fp32, random weights",
        "depth": options.depth,
        "preset": PRESET[family],
        "machine": describe_machine(),
        "pairs": options.pairs,
        "tokens_per_step": said.tokens_per_step,
        "same_steps": {
            "speedup": speedup,
            "speedup_range": [min(ratios), max(ratios)],
            "flop_speedup": said.flop_speedup,
            "realised": speedup / said.flop_speedup,
        },
        "over_published_steps": speedup * CALIBRATED[family] / steps,
        "outside_share": statistics.median(outside),
        "run_s": run_s,
        "decode_s": decode_s,
        "transition": transitions(method, side),
    }
    same = result["same_steps"]
    print(
        f"{family}, {steps} steps: transformer {same['speedup']:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] "
        f"over as many dense steps, arithmetic {said.flop_speedup:.2f}x, realised {same['realised']:.3f}; "
        f"{result['over_published_steps']:.2f}x over {CALIBRATED[family]} dense steps"
    )
    print(
        f"outside of the transformer {100 * result['outside_share']:.2f} % of {run_s:.2f} s; "
        f"a half-size decoding for edges {decode_s:.2f} s; transition {1e3 * result['transition']['ours_s']:.2f} ms, "
        f"its noise as published {result['transition']['published_s']:.1f} s"
    )
    out = options.out or Path(__file__).parent / "results" / f"ralu-{family}-cpu.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
