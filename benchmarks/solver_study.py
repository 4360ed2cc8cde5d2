"""Routers that were trained for forecasts, beside fixed intervals and plain solvers of the same arithmetic.

`router_study.py` runs this for a router of an order above 0. Forecasts may come nearer to the solution than the
sampler itself does in as many steps, so the truth is that of the testbed: Heun's method with 60 steps. Prompts and
noise are the testbed's too (`bed.py`), none of which a router saw; errors are relative L2 distances of latents.

A router meets the interval at equal arithmetic: its entries with the least logits are reused, as many as that takes;
verdicts are paired ratios (`paired.py`), below 1 where the arm is nearer to the solution. At its own threshold it may
cost more or less, which is told. Its whole sweep is judged by the area (`areas.py`) beside evenly spread whole steps
and plain ones, of which those that `search_composed.py` drew in the same folder are taken over.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import areas
import fastdit
from arms import every
from bed import BATCH, Bed
from fastdit.account.cost import Cost
from fastdit.adapters import find_adapter
from fastdit.evaluate.arms import COARSER, TRUTH, Arm, plain
from fastdit.evaluate.paired import ratio
from machine import describe_machine
from testbed import away

RESULTS = Path(__file__).parent / "results"
INTERVAL = 2
#: how the testbed, whose pictures can be taken over, calls forecasts of an order
NAMES = ("repeated", "V", "V of order 2")


def macs_of(pipe: Any, size: int) -> dict[str, np.ndarray]:
    """Multiply-accumulates of each component in one step, for pictures of so many pixels a side."""
    side = size // pipe.vae_scale_factor
    adapter = find_adapter(pipe.transformer)
    tokens = adapter.tokens(pipe.transformer, (1, 1, side, side))
    return Cost.of(pipe.transformer, tokens, adapter.text_tokens_of(pipe)).component_macs()


def arms_of(
    routers: dict[str, fastdit.Router], macs: dict[str, np.ndarray], steps: int
) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """Name -> arm: those of the routers, and what stands beside them."""
    order = next(iter(routers.values())).order
    kept = len(range(0, steps, INTERVAL))
    beside = {
        f"unipc {steps}, every {INTERVAL}, {NAMES[each]}": every("unipc", steps, INTERVAL, each)
        for each in (order, 0)
    }
    beside |= dict(plain(solver, kept) for solver in ("unipc", "ab2"))
    arms = {}
    for name, router in routers.items():
        (schedule,) = router.sweep([1 - kept / steps], macs)
        arms[name] = areas.scheduled("unipc", steps, schedule)
        arms[f"{name}, repeated"] = areas.scheduled("unipc", steps, schedule.with_order(0))
        arms[f"{name}, at its threshold"] = areas.scheduled("unipc", steps, router.schedule())
    return arms, beside


def sweep_of(
    name: str, router: fastdit.Router, macs: dict[str, np.ndarray], steps: int
) -> dict[str, Arm]:
    """A router at many shares of the arithmetic."""
    counts = [count for count in areas.COUNTS if count < steps]
    schedules = router.sweep([1 - count / steps for count in counts], macs)
    return {
        f"{name}, {count} of {steps} {router.sha256[:8]}": areas.scheduled("unipc", steps, schedule)
        for count, schedule in zip(counts, schedules, strict=True)
    }


def judged(
    bed: Bed, routers: dict[str, fastdit.Router], macs: dict[str, np.ndarray], count: int
) -> dict[str, Any]:
    """Everything under one captions."""
    router = next(iter(routers.values()))
    steps = router.provenance["training"]["steps"]
    arms, beside = arms_of(routers, macs, steps)
    truth = bed.latents("truth", TRUTH, count)
    off = {}
    for name, arm in {**arms, **beside}.items():
        own = name if name in beside else f"{name} {router.sha256[:8]}"
        off[name] = away(bed.latents(own, arm, count), truth)
    rows = [
        {"arm": name, "evaluations": bed.arithmetic(arm), "median": float(np.median(off[name]))}
        | ({"against": {b: ratio(off[name], off[b]) for b in beside}} if name in arms else {})
        for name, arm in {**arms, **beside}.items()
    ]
    spec = find_adapter(bed.pipe.transformer).spec(bed.pipe.transformer)
    plainly = {
        areas.EVEN: areas.measured(bed, areas.evenly_spread(spec, steps), truth, steps),
        areas.PLAIN: areas.measured(bed, areas.plain_steps(steps), truth, steps),
    }
    coarser = bed.latents("truth, half the steps", COARSER, count)
    return {
        "truth": float(np.median(away(coarser, truth))) / 3,  # Heun's error falls by 4
        "rows": rows,
        "areas": {
            name: areas.summed_up(
                {name: areas.measured(bed, sweep_of(name, one, macs, steps), truth, steps)}
                | plainly
            )
            for name, one in routers.items()
        },
    }


def study(
    router: fastdit.Router,
    components: fastdit.Router | None,
    pipe: Any,
    options: argparse.Namespace,
) -> None:
    """Draw, judge, write the results."""
    if options.prompts % BATCH:
        raise SystemExit(f"--prompts must be a multiple of {BATCH}, got {options.prompts}")
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    told = router.provenance["training"]
    size = round(router.conditions.image_tokens**0.5) * 2 * pipe.vae_scale_factor
    routers = {"a logit a step" if told["whole_steps"] else "a logit a component": router}
    if components is not None:
        routers["a logit a component"] = components
    guidance, macs = router.conditions.guidance, macs_of(pipe, size)
    result = {
        "prompts": options.prompts,
        "size": size,
        "guidance": guidance,
        "steps": told["steps"],
        "calls": router.steps,
        "scheduler": router.conditions.scheduler,
        "order": router.order,
        "tau": router.tau,
        "routers": {
            name: {"sha256": one.sha256, "epochs": one.provenance["epochs"], "batch": batch_of(one)}
            for name, one in routers.items()
        },
        "machine": describe_machine(),
        "captions": {
            captions: judged(
                Bed(pipe, captions, guidance, size, options.folder), routers, macs, options.prompts
            )
            for captions in areas.CAPTIONS
        },
    }
    out = options.out or RESULTS / "router-unipc.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    for captions, found in result["captions"].items():
        for row in found["rows"]:
            print(f"{captions} {row['arm']:>40}  {row['evaluations']:6.2f}  {row['median']:.4f}")
            for name, one in row.get("against", {}).items():
                print(f"{name:>56}  {one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]")
        for name, area in found["areas"].items():
            for other, gain in area["gain"].items():
                low, high = gain["interval"]
                print(
                    f"{captions}, {name} over {other}: {gain['value']:+.1%} [{low:+.1%}, {high:+.1%}]"
                )


def batch_of(router: fastdit.Router) -> int:
    """Pictures of one of its trajectories."""
    return router.provenance["training"]["batch"]
