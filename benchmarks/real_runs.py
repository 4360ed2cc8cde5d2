"""Whole runs of stock pipelines with transformers of the published sizes, each method against the unpatched pipeline.

Random weights (`real_models.py`), so the pictures mean nothing and the seconds everything. Prompts come as embeddings
and latents go out: neither a text encoder nor the last decoding is timed. Methods take turns; a time is the median of
the rounds after one that compiles and warms up. With "graphs" in its name a method was patched in with `cuda_graphs`,
and what is timed is a replay.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastdit
from fastdit import Schedule
from fastdit.adapters import find_adapter
from real_models import RealModel, build_vae

SIDE, REHEARSED_SIDE = 1024, 256  # pixels
REHEARSED_STEPS = 6
UNPATCHED = "unpatched"
GRAPHS = ", graphs"
RALU_PRESETS = {
    "FluxTransformer2DModel": ("flux-4x", "flux-7x"),
    "SD3Transformer2DModel": ("sd3-2x", "sd3-3x"),
}


def _pipeline(real: RealModel, transformer: nn.Module, rehearsal: bool) -> Any:
    """The model's stock pipeline around `transformer`, with a VAE where RALU looks for edges."""
    import diffusers

    if real.cls == "PixArtTransformer2DModel":
        return diffusers.PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    weight = next(transformer.parameters())
    vae = build_vae((32,) * 4) if rehearsal else build_vae()
    parts = {
        "vae": vae.to(weight.device, weight.dtype),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    } | dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if real.cls == "FluxTransformer2DModel":
        return diffusers.FluxPipeline(**parts)
    return diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def _prompt(real: RealModel, model: nn.Module, text: int) -> dict[str, Any]:
    """Embeddings of a prompt, and of a negative one where the model is guided by it."""
    weight = next(model.parameters())

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=weight.device, dtype=weight.dtype)

    config = model.config
    if real.cls == "PixArtTransformer2DModel":
        mask = torch.ones(1, text, device=weight.device)
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": new(1, text, config.caption_channels),
            "negative_prompt_embeds": new(1, text, config.caption_channels),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "use_resolution_binning": False,
        }
    given = {
        "prompt_embeds": new(1, text, config.joint_attention_dim),
        "pooled_prompt_embeds": new(1, config.pooled_projection_dim),
    }
    if real.batch > 1:
        given |= {f"negative_{name}": torch.randn_like(value) for name, value in given.items()}
    return given


def _random(pipe: Any, steps: int, reused: float) -> Any:
    """Single components reused at random: no searched schedule is less regular."""
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    random, kept = np.random.default_rng(0), 1 - reused * steps / (steps - 1)
    bits = {
        kind.name: random.random((steps, kind.count, len(kind.components))) < kept
        for kind in spec.kinds
    }
    components = {kind.name: kind.components for kind in spec.kinds}
    return fastdit.Cached(Schedule.from_bits(bits, components))


def _methods(real: RealModel, steps: int) -> dict[str, tuple[int, Callable[[Any], list[Any]]]]:
    """Name -> (steps, what is patched in), for all that the model's family can."""

    def every(n: int) -> Any:
        return fastdit.Cached(Schedule.every(n))

    found: dict[str, tuple[int, Callable[[Any], list[Any]]]] = {
        "dense": (steps, lambda pipe: []),
        "every(2)": (steps, lambda pipe: [every(2)]),
        "every(3)": (steps, lambda pipe: [every(3)]),
        "random 50 %": (steps, lambda pipe: [_random(pipe, steps, 0.5)]),
        "random 75 %": (steps, lambda pipe: [_random(pipe, steps, 0.75)]),
        "RAS 0.5": (steps, lambda pipe: [fastdit.RAS(ratio=0.5)]),
        "RAS 0.25": (steps, lambda pipe: [fastdit.RAS(ratio=0.25)]),
        "RAS 0.25 + every(2)": (steps, lambda pipe: [fastdit.RAS(ratio=0.25), every(2)]),
    }
    for preset in RALU_PRESETS.get(real.cls, ()):
        ralu = fastdit.RALU.preset(preset)
        found[f"RALU {preset}"] = ralu.run_steps, lambda pipe, ralu=ralu: [ralu]
        found[f"RALU {preset} + every(2)"] = (
            ralu.run_steps,
            lambda pipe, ralu=ralu: [ralu, every(2)],
        )
    replayed = {
        name + GRAPHS: found[name]
        for name in ("dense", "every(2)", "random 75 %", "RAS 0.25", "RAS 0.25 + every(2)")
    }
    return found | (replayed if torch.cuda.is_available() else {})


class Runs:
    """One model's pipeline and what draws with it.

    Args:
        real: The model.
        rehearsal: Few blocks, tokens and steps.
    """

    def __init__(
        self, real: RealModel, device: torch.device, dtype: torch.dtype, rehearsal: bool
    ) -> None:
        torch.manual_seed(0)
        self.steps = REHEARSED_STEPS if rehearsal else real.steps
        self.pipe = _pipeline(real, real.build(device, dtype, rehearsal), rehearsal)
        self.pipe.set_progress_bar_config(disable=True)
        side = REHEARSED_SIDE if rehearsal else SIDE
        self.prompt = _prompt(real, self.pipe.transformer, 8 if rehearsal else real.text)
        self.prompt |= {"height": side, "width": side, "output_type": "latent"}
        if real.cls == "FluxTransformer2DModel":
            self.prompt["guidance_scale"] = 3.5
        self.methods = _methods(real, self.steps)

    def draw(self, steps: int) -> Tensor:
        """Latents."""
        generator = torch.Generator(self.pipe.transformer.device).manual_seed(0)
        return self.pipe(**self.prompt, num_inference_steps=steps, generator=generator).images

    def seconds(self, steps: int, methods: list[Any] | None, graphs: bool = False) -> Timed:
        """Time a run, until the device is done; with `graphs` the third, which is a replay."""
        handle = None
        if methods is not None:
            handle = fastdit.patch(self.pipe, *methods, cuda_graphs=graphs)
        try:
            earlier = [self.draw(steps) for _ in range(2 * graphs)]
            _wait(self.pipe.transformer.device)
            start = time.perf_counter()
            latents = self.draw(steps)
            _wait(latents.device)
            seconds = time.perf_counter() - start
            if not latents.isfinite().all():
                print("  the latents are not finite: these seconds are of no use", flush=True)
            found = Timed(seconds, handle.report().flop_speedup if handle else 1.0)
            if graphs:
                eager = earlier[0].double()
                found.mode = handle.report().graphs
                found.to_eager = float((latents.double() - eager).norm() / eager.norm())
            return found
        finally:
            if handle:
                handle.unpatch()


@dataclass
class Timed:
    """A run's seconds; how many times less arithmetic it took than as many stock steps; of a replay also how far its
    latents are from the eager run's, relative L2, and whether it was one.
    """

    seconds: float
    flops: float
    mode: str = ""
    to_eager: float | None = None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_runs(
    runs: Runs, rounds: int, warm_up: int, left: Callable[[], float]
) -> dict[str, Any]:
    """Seconds of whole runs, in turns, after rounds of `warm_up`; `left` are the seconds that may still be spent.

    `speedup` is over the unpatched pipeline at the model's usual number of steps, `realised` over what the arithmetic
    alone would give.
    """
    arms = {UNPATCHED: (runs.steps, lambda pipe: None), **runs.methods}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    last: dict[str, Timed] = {}
    failed: dict[str, str] = {}
    for turn in range(warm_up + rounds):
        for name, (steps, method) in arms.items():
            if name in failed or left() < 0:
                continue
            try:
                last[name] = runs.seconds(steps, method(runs.pipe), name.endswith(GRAPHS))
            except Exception as error:  # the others are worth having
                failed[name] = traceback.format_exc()[-1500:]
                print(f"  {name}: {type(error).__name__}: {error}", flush=True)
                continue
            if turn >= warm_up:
                seconds[name].append(last[name].seconds)
    usual = statistics.median(seconds[UNPATCHED])
    rows = []
    for name, (steps, _) in arms.items():
        if not seconds[name]:
            continue
        ratios = [a / b for a, b in zip(seconds[UNPATCHED], seconds[name], strict=False)]
        predicted = last[name].flops * runs.steps / steps
        rows.append(
            {
                "method": name,
                "steps": steps,
                "seconds": statistics.median(seconds[name]),
                "speedup": usual / statistics.median(seconds[name]),
                "speedup_range": [min(ratios), max(ratios)],
                "flop_speedup": predicted,
                "realised": usual / statistics.median(seconds[name]) / predicted,
            }
        )
        if name.endswith(GRAPHS):
            rows[-1] |= {"mode": last[name].mode, "to_eager": last[name].to_eager}
            print(
                f"    {last[name].mode}, {last[name].to_eager:.1e} from the eager run", flush=True
            )
        print(
            f"  {name:28} {steps:3} steps {rows[-1]['seconds']:7.3f} s, {rows[-1]['speedup']:5.2f}x, "
            f"arithmetic {predicted:5.2f}x, realised {rows[-1]['realised']:.3f}",
            flush=True,
        )
    return {"steps": runs.steps, "rounds": rounds, "rows": rows, "failed": failed}
