"""Latents of the packaged model, fp32: how far a device's are from the CPU's, and a replay's from an eager run's."""

from __future__ import annotations

from typing import Any

import torch

import fastdit
from fastdit import Schedule
from fastdit.tiny import load_pipeline
from gpu_sections.place import Place
from gpu_sections.stand_ins import captures

STEPS = 10
PROMPTS = ["a small red cross in the bottom right on a gray background"] * 2


def graphs(place: Place) -> None:
    """Relative L2: `to_cpu` from plain torch on the CPU, `rounding` between kernels and plain torch on the device,
    `graphs` between a replayed run and an eager one.
    """
    length = 5 if place.rehearsal else STEPS
    every = fastdit.Cached(Schedule.every(2))
    methods: dict[str, tuple[int, list[Any]]] = {
        "dense": (length, [fastdit.Dense()]),
        "every(2)": (length, [every]),
        "every(2), order 1": (length, [fastdit.Cached(Schedule.every(2), order=1)]),
        "RAS 0.5": (length, [fastdit.RAS(ratio=0.5)]),
        "RAS 0.5 + every(2)": (length, [fastdit.RAS(ratio=0.5), every]),
        "ECAD faster": (28, [fastdit.ECAD.preset("tiny", "faster")]),
        "RALU sd3-2x": (20, [fastdit.RALU.preset("sd3-2x", selector="gradient")]),
    }
    if place.order.quick:
        methods = {name: methods[name] for name in ("dense", "RAS 0.5 + every(2)")}
    place.promise(list(methods))
    here, there = load_pipeline(), load_pipeline()
    there.to(place.device)
    for name, (steps, chosen) in methods.items():
        place.attempt(
            name, lambda steps=steps, chosen=chosen: _row(place, here, there, steps, chosen)
        )


def _row(place: Place, here: Any, there: Any, steps: int, chosen: list[Any]) -> dict[str, Any]:
    truth = _drawn(here, steps, chosen, backend="reference")
    kernels = _drawn(there, steps, chosen)
    plain = _drawn(there, steps, chosen, backend="reference")
    row: dict[str, Any] = {
        "to_cpu": float((kernels - truth).norm() / truth.norm()),
        "rounding": float((kernels - plain).norm() / truth.norm()),
    }
    with captures(place):
        replayed = _drawn(there, steps, chosen, runs=3, graphs=True)
        row["mode"] = fastdit.report(there).graphs
    row["graphs"] = float((replayed - kernels).norm() / truth.norm())
    fastdit.unpatch(there)
    fastdit.unpatch(here)
    print(f"  {row}", flush=True)
    return row


def _drawn(pipe: Any, steps: int, chosen: list[Any], runs: int = 1, **options: Any) -> torch.Tensor:
    """Latents of the last of some equal runs, which stays patched."""
    fastdit.patch(pipe, *chosen, **options)
    for _ in range(runs):
        latents = pipe(
            PROMPTS,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
            output_type="latent",
        ).images
    return latents.double().cpu()
