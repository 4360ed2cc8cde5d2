"""Routers that were trained for forecasts, beside fixed intervals and plain solvers of the same arithmetic.

`router_study.py` runs this for a router of an order above 0. Forecasts may come nearer to the solution than the
sampler itself does in as many steps, so the truth is that of the testbed: Heun's method with 60 steps. Prompts and
noise are the testbed's too (`bed.py`), none of which a router saw; errors are relative L2 distances of latents,
verdicts paired ratios (`paired.py`), below 1 where the arm is nearer to the solution.

The router meets the interval at equal arithmetic: its entries with the least logits are reused, as many as that takes.
At its own threshold it may cost more or less, which is told.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import fastdit
from arms import COARSER, TRUTH, Arm, every, plain
from bed import BATCH, Bed
from fastdit.account.cost import Cost
from fastdit.adapters import find_adapter
from machine import describe_machine
from paired import ratio
from testbed import away

RESULTS = Path(__file__).parent / "results"
INTERVAL = 2
#: how the testbed, whose pictures can be taken over, calls forecasts of an order
NAMES = ("repeated", "V", "V of order 2")


def cached(steps: int, schedule: fastdit.Schedule) -> Arm:
    """A schedule under UniPC."""
    return Arm("unipc", steps, lambda pipe, steps: fastdit.Cached(schedule))


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
        arms[name] = cached(steps, schedule)
        arms[f"{name}, repeated"] = cached(steps, schedule.with_order(0))
        arms[f"{name}, at its threshold"] = cached(steps, router.schedule())
    return arms, beside


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
    steps, guidance = told["steps"], router.conditions.guidance
    size = round(router.conditions.image_tokens**0.5) * 2 * pipe.vae_scale_factor
    bed = Bed(pipe, "full", guidance, size, options.folder)
    routers = {"a logit a step" if told["whole_steps"] else "a logit a component": router}
    if components is not None:
        routers["a logit a component"] = components
    arms, beside = arms_of(routers, macs_of(pipe, size), steps)
    truth = bed.latents("truth", TRUTH, options.prompts)
    off = {}
    for name, arm in {**arms, **beside}.items():
        own = name if name in beside else f"{name} {router.sha256[:8]}"
        off[name] = away(bed.latents(own, arm, options.prompts), truth)
    rows = [
        {"arm": name, "evaluations": bed.arithmetic(arm), "median": float(np.median(off[name]))}
        | ({"against": {b: ratio(off[name], off[b]) for b in beside}} if name in arms else {})
        for name, arm in {**arms, **beside}.items()
    ]
    coarser = bed.latents("truth, half the steps", COARSER, options.prompts)
    result = {
        "prompts": options.prompts,
        "size": size,
        "guidance": guidance,
        "steps": steps,
        "calls": router.steps,
        "scheduler": router.conditions.scheduler,
        "order": router.order,
        "tau": router.tau,
        "truth": float(np.median(away(coarser, truth))) / 3,  # Heun's error falls by 4
        "routers": {
            name: {"sha256": one.sha256, "epochs": one.provenance["epochs"], "batch": batch_of(one)}
            for name, one in routers.items()
        },
        "machine": describe_machine(),
        "rows": rows,
    }
    out = options.out or RESULTS / "router-unipc.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['arm']:>40}  {row['evaluations']:6.2f}  {row['median']:.4f}")
        for name, one in row.get("against", {}).items():
            print(f"{name:>56}  {one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]")


def batch_of(router: fastdit.Router) -> int:
    """Pictures of one of its trajectories."""
    return router.provenance["training"]["batch"]
