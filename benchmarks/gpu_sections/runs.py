"""Whole runs: seconds beside both baselines, how long the device had nothing to do, and what was realised.

Arms take turns. A visit patches, warms up, times one run, and at the first time one more in which the stream is held
before each call, so that the device's own time is seen. `realised` is the speed-up over the unpatched pipeline,
`realised_over_graphs` that over dense with graphs, of the same call, each divided by what the arithmetic alone gives.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_sections.clocks import CallClock, idle_share, seconds_of
from gpu_sections.place import Place
from gpu_sections.run_arms import (
    CACHE_DIT,
    COMPILED,
    DENSE,
    FIRST_BLOCK_CACHE,
    GRAPHS,
    RIVALS,
    UNPATCHED,
    Absent,
    Arm,
    arms_of,
    tune,
)
from real_models import MODELS, RealModel
from real_runs import Runs

ROUNDS = 3
#: of a quick rehearsal: each way to enter and to time an arm once
QUICK = (UNPATCHED, DENSE, "RAS 0.25", "every(2)", "every(2)" + GRAPHS, *RIVALS)
#: what rows are compared with
BASELINES = (UNPATCHED, COMPILED, DENSE + GRAPHS)
FLUX, SD3, PIXART = (
    next(m for m in MODELS if m.name.startswith(name)) for name in ("FLUX", "SD3 medium", "PixArt")
)
#: of steps that are all alike: enough to warm up, and to see what the device takes
WARM_STEPS, STEADY_STEPS = 3, 8
#: the device is held for so much longer than the host took to launch a call
MARGIN, MARGIN_MS = 1.3, 0.3


def flux(place: Place) -> None:
    """The targets first: what is lost when the time is up is the least."""
    fastest = (UNPATCHED, DENSE, DENSE + GRAPHS, "every(2)" + GRAPHS, "RAS 0.25" + GRAPHS)
    measure(place, FLUX, (*fastest, COMPILED, "every(2)", "RAS 0.25", CACHE_DIT))


def sd3(place: Place) -> None:
    """RAS."""
    sparse = "RAS 0.25"
    measure(place, SD3, (UNPATCHED, DENSE, DENSE + GRAPHS, sparse + GRAPHS, COMPILED, sparse))


def pixart(place: Place) -> None:
    """Every second step."""
    reused = "every(2)"
    measure(place, PIXART, (UNPATCHED, DENSE, DENSE + GRAPHS, reused + GRAPHS, COMPILED, reused))


def chosen(place: Place) -> None:
    """The rows named, with the baselines of their model."""
    wanted: dict[str, list[str]] = {}
    for row in place.order.chosen:
        model, _, arm = row.partition(":")
        wanted.setdefault(model, []).append(arm.strip())
    for prefix, names in wanted.items():
        (real,) = (m for m in (FLUX, SD3, PIXART) if m.name.lower().startswith(prefix.lower()))
        first, *others = BASELINES
        measure(place, real, tuple(dict.fromkeys((first, *names, *others[::-1]))))
    if not wanted:
        place.answer.why = "no rows were named by --rows MODEL:ARM"


def remaining(place: Place) -> None:
    """Arms that decide nothing, as far as the time goes."""
    own = ("RALU flux-7x", "every(2), order 1", "RAS 0.25 + every(2)" + GRAPHS, "random 75 %")
    measure(place, FLUX, (UNPATCHED, FIRST_BLOCK_CACHE, *own), rounds=1)


def host(place: Place) -> None:
    """Real depth and no width: what a call takes is what the host takes."""
    models = ((SD3, "RAS 0.25"), (FLUX, "every(2)"), (PIXART, "every(2)"))
    for real, method in models[: 1 if place.order.quick else None]:
        arms = (UNPATCHED, DENSE, method, DENSE + GRAPHS, method + GRAPHS)
        measure(place, real, arms, tiny=True)


@dataclass
class Measured:
    """What is known of an arm: seconds of its runs, milliseconds of the last one's calls, what it said of itself."""

    seconds: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    flops: float = 1.0
    steps: int = 0
    cost: float = 0.0
    said: dict[str, Any] = field(default_factory=dict)


def measure(
    place: Place,
    real: RealModel,
    names: Sequence[str],
    tiny: bool | None = None,
    rounds: int = ROUNDS,
) -> None:
    """Rows MODEL: ARM, rewritten after each visit, since each is compared with what came later too."""
    tiny = place.rehearsal if tiny is None else tiny
    if place.order.quick:
        once = COMPILED if real is FLUX else DENSE + GRAPHS if real is PIXART else None
        names = [name for name in names if name in (*QUICK, once)]
    model = f"{real.name}{', no width' if tiny else ''}"
    place.promise([f"{model}: {name}" for name in names])
    try:
        runs = Runs(real, place.device, place.dtype, tiny, shallow=place.order.quick)
    except ImportError as error:
        for name in names:
            place.lack(f"{model}: {name}", f"diffusers is not installed: {error}")
        return
    arms = arms_of(runs)
    if any(arms[name].kind == "fastdit" for name in names):
        tune(runs, place)
    found: dict[str, Measured] = {}
    for turn in range(1 if place.order.quick else min(rounds, 2) if place.rehearsal else rounds):
        for name in names:
            row = f"{model}: {name}"
            if turn and name not in found:
                continue
            if name != UNPATCHED and UNPATCHED not in found:
                raise RuntimeError(f"{model}: nothing to compare with, no unpatched run was made")
            if place.left() < _cost(arms[name], found):
                if not turn:
                    place.skip(row, f"it takes some {_cost(arms[name], found):.0f} s")
                continue
            start = time.monotonic()
            try:
                _visit(place, runs, arms[name], found.setdefault(name, Measured()))
            except Absent as error:
                found.pop(name)
                place.lack(row, str(error))
                continue
            except Exception:
                found.pop(name)
                place.fail(row)
                continue
            found[name].cost = time.monotonic() - start
            for other, measured in found.items():
                place.add(f"{model}: {other}", **_row(model, arms[other], measured, found))
            _show(place.answer.rows, row)
    del runs, arms
    gc.collect()
    if not place.rehearsal:
        torch.cuda.empty_cache()


def _cost(arm: Arm, found: dict[str, Measured]) -> float:
    """Seconds that a visit is to take."""
    if arm.name in found:
        return found[arm.name].cost
    if UNPATCHED not in found:
        return 0.0
    runs, seconds = arm.guess
    return runs * found[UNPATCHED].seconds[-1] + (seconds if len(found) > 1 else 0.0)


@torch.no_grad()
def _visit(place: Place, runs: Runs, arm: Arm, found: Measured) -> None:
    """One timed run, after what warms up; at the first visit the device's own time too."""
    steps = found.steps = arm.steps or runs.steps
    clock = CallClock(runs.transformer, place.device)
    with arm.enter(runs, place) as handle:
        if arm.graphs:
            eager, _ = runs.draw(steps), runs.draw(steps)
        else:
            runs.draw(min(WARM_STEPS, steps) if arm.steady else steps)
        with clock.running():
            seconds, latents = seconds_of(lambda: runs.draw(steps), place.device)
            call_ms, host_ms = clock.call_ms(), clock.host_ms
        if not latents.isfinite().all():
            raise FloatingPointError("the latents are not finite")
        if handle is not None:
            report = handle.report()
            found.flops = report.flop_speedup
            if arm.graphs:
                away = (latents.double() - eager.double()).norm() / eager.double().norm()
                found.said = {"mode": report.graphs, "to_eager": float(away)}
        if not found.device_ms:
            hold = [MARGIN * ms + MARGIN_MS for ms in host_ms]
            with clock.running(hold):
                runs.draw(min(STEADY_STEPS, steps) if arm.steady else steps)
                found.device_ms = clock.call_ms()
            if place.rehearsal:
                place.stands_in("the host's clock stands for the device's: no stream is held")
    found.seconds.append(seconds)
    found.call_ms, found.host_ms = call_ms, host_ms


def _row(model: str, arm: Arm, own: Measured, all_: dict[str, Measured]) -> dict[str, Any]:
    seconds = statistics.median(own.seconds)
    medians = {name: statistics.median(other.seconds) for name, other in all_.items()}
    stock = all_[UNPATCHED]
    # Fewer steps are less arithmetic, too.
    predicted = own.flops * stock.steps / own.steps
    ratios = [a / b for a, b in zip(stock.seconds, own.seconds, strict=False)]
    over = {name: medians[name] / seconds if name in medians else None for name in BASELINES}
    row = {
        "model": model,
        "method": arm.name,
        "kind": arm.kind,
        "steps": own.steps,
        "seconds": seconds,
        "rounds": len(own.seconds),
        "speedup": over[UNPATCHED],
        "speedup_range": [min(ratios), max(ratios)],
        **_of_the_arithmetic(arm, over, predicted, all_),
        "over": over,
        "call_ms": own.call_ms,
        "host_ms": own.host_ms,
        "device_ms": own.device_ms,
        "idle": idle_share(own.call_ms[: len(own.device_ms)], own.device_ms),
        "between_ms": (1e3 * own.seconds[-1] - sum(own.call_ms)) / len(own.call_ms),
    }
    return row | own.said


def _of_the_arithmetic(
    arm: Arm, over: dict[str, float | None], predicted: float, all_: dict[str, Measured]
) -> dict[str, float | None]:
    """What a rival's arithmetic is nobody counts; what graphs add to a baseline nobody asks."""
    names = ("flop_speedup", "realised", "realised_over_graphs")
    if arm.kind == "rival":
        return dict.fromkeys(names)
    replayed, dense = None, over[DENSE + GRAPHS]
    if dense is not None and arm.kind == "fastdit":
        replayed = dense / (predicted / all_[DENSE + GRAPHS].flops)
    return dict(zip(names, (predicted, over[UNPATCHED] / predicted, replayed), strict=True))


def _show(rows: list[dict[str, Any]], name: str) -> None:
    (row,) = (row for row in rows if row["name"] == name)
    over = row["over"][COMPILED]
    print(
        f"  {name:45} {row['seconds']:7.3f} s, {row['speedup']:5.2f}x, over compiled "
        f"{'-' if over is None else f'{over:.2f}x'}, arithmetic {row['flop_speedup'] or 0:.2f}x, "
        f"idle {row['idle']:.1%}, {row.get('mode', 'eager')}",
        flush=True,
    )
