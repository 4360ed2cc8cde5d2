"""Ways of drawing that the testbed sets beside each other, as data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

import fastdit
from fastdit import Schedule
from fastdit.evaluate.arms import SOLVERS, Arm, plain
from fastdit.methods.ras import PUBLISHED_RESETS, RASRun
from fastdit.tokens import resolution
from fastdit.tokens.layout import Layout

EVALUATIONS = (5, 7, 10, 14)


def dense(steps: int) -> tuple[str, Arm]:
    """These are Euler's plain steps on the ops that every other arm runs on, for the time they take."""
    name, arm = plain("euler", steps)
    return name, replace(arm, method=lambda pipe, steps: fastdit.Dense())


def halves(pipe: Any, steps: int) -> Any:
    """Each half of the depth computes at every other step, the other one is drawn by order 1."""
    spec = fastdit.patch(pipe.transformer)
    fastdit.unpatch(pipe.transformer)
    bits, names = {}, {}
    for name, (count, components) in spec.explain(steps=steps).blocks.items():
        depth = np.arange(count) < count // 2
        own = (np.arange(steps)[:, None] % 2 == 0) == depth
        own[:2] = True
        bits[name] = np.repeat(own[:, :, None], len(components), axis=2)
        names[name] = components
    return fastdit.Cached(Schedule.from_bits(bits, names, orders=1))


def every(solver: str, steps: int, n: int, order: int | str) -> Arm:
    """Every n-th step is computed as a whole, the others are drawn."""
    return Arm(
        solver,
        steps,
        lambda pipe, steps: fastdit.Cached(Schedule.every(n), order=order),
        nodes=tuple(range(0, steps, n)),
    )


def composed(ratio: float) -> list[Any]:
    """Every other step is drawn as a whole, and most others compute the tokens whose velocity changed most."""
    return [
        fastdit.Cached(Schedule.every(2), order=1),
        fastdit.RAS(ratio=ratio, metric="change", align=8, resets=()),
    ]


def fixed(method: Any, steps: int | None = None, **more: Any) -> Arm:
    """A method on the pipeline as it was loaded."""
    return Arm("stock", steps or method.run_steps, lambda pipe, steps: method, **more)


@contextlib.contextmanager
def random_tokens() -> Iterator[None]:
    """RAS with active tokens drawn at random, everything else as it is."""
    generator = torch.Generator().manual_seed(0)

    def choose(self: Any, velocity: torch.Tensor, delta: Any, coming: Any) -> torch.Tensor | None:
        if coming is None:
            return None
        order = torch.rand(velocity.shape[0], self.tokens, generator=generator).argsort(1)
        return order[:, : coming.keep].sort(1).values.to(torch.int32)

    with mock.patch.object(RASRun, "choose", choose):
        yield


def corners() -> Any:
    """RALU whose coarse tokens keep their published places among fine ones, everything else as it is."""

    def make(grid: Any, table: Any, coarse: int, centred: bool, *rest: Any) -> Layout:
        return Layout(grid, table, coarse, False, *rest)

    make.uniform = Layout.uniform
    return mock.patch.object(resolution, "Layout", make)


def caches() -> Iterator[tuple[str, Arm]]:
    """Whole steps and halves of the depth, repeated and drawn, and one arm or two of each other method."""
    for count in EVALUATIONS:
        for solver in SOLVERS[:2]:
            for name, order in (("repeated", 0), ("V", 1), ("auto", "auto")):
                yield f"{solver} {2 * count}, every 2, {name}", every(solver, 2 * count, 2, order)
        yield f"unipc {2 * count}, halves, order 1", Arm("unipc", 2 * count, halves)
    for metric in ("std", "change"):
        for ratio in (0.5, 0.25):
            method = fastdit.RAS(ratio, metric=metric, align=8, resets=PUBLISHED_RESETS[28])
            yield f"RAS {ratio} {metric}", fixed(method, 28)
    for solver in SOLVERS[:2]:
        name = f"{solver} 28, every 2, V and RAS 0.5 change"
        yield name, Arm(solver, 28, lambda pipe, steps: composed(0.5))


def ras() -> Iterator[tuple[str, Arm]]:
    """RAS by each metric, the published one from both ends, the published arithmetic, random tokens as a control.

    Resets are the published ones but where a name says otherwise.
    """
    for ratio in (0.75, 0.5, 0.25):
        change, std = (
            functools.partial(fastdit.RAS, ratio, metric=metric, align=8)
            for metric in ("change", "std")
        )
        yield f"RAS {ratio} change", fixed(change(resets=PUBLISHED_RESETS[28]), 28)
        yield f"RAS {ratio} std", fixed(std(), 28)
        yield f"RAS {ratio} std, the smallest dropped", fixed(std(high_ratio=0.0), 28)
        yield f"RAS {ratio} change, every fourth step dense", fixed(change(), 28)
        yield (
            f"RAS {ratio} std, parity",
            fixed(fastdit.RAS(ratio=ratio, mode="parity"), 28, alone=True),
        )
        yield f"RAS {ratio}, random tokens", fixed(std(), 28, around=random_tokens)


def ralu() -> Iterator[tuple[str, Arm]]:
    """RALU's published settings and one of their parts after the other mended, all beside the same model's own noise.

    The two stages of the last rows cost less than any published setting; all ways between the stages have equal steps.
    """
    published = functools.partial(fastdit.RALU.preset, "sd3-3x")
    alike = functools.partial(published, weigh_keys=False)
    yield "RALU 3x, parity", fixed(published(mode="parity"))
    yield "RALU 3x, corners, keys alike", fixed(alike(), around=corners)
    yield "RALU 3x, keys alike", fixed(alike())
    yield "RALU 3x, keys alike, split by change", fixed(alike(selector="change"))
    yield "RALU 3x", fixed(published())
    yield "RALU 3x, split by change", fixed(published(selector="change"))
    yield "RALU 3x, no mixed stage", fixed(published(steps=(3, 0, 6)))
    for lift in ("pixels", "spectrum", "picture"):
        yield f"RALU late, {lift}", fixed(fastdit.RALU.preset("late", lift=lift))
    early = fastdit.RALU.preset("late", steps=(3, 0, 7), ends=(0.2, 0.75, 1.0))
    yield "RALU 3 + 7 steps to 0.2, picture", fixed(early)
    yield "unipc 8, other noise", Arm("unipc", 8, seed=1_000_000)


class Condition(NamedTuple):
    """Under which pictures are drawn, and how many."""

    captions: str
    guidance: float
    pictures: int


class Study(NamedTuple):
    """What is set beside each other.

    Attributes:
        arms: Makes them.
        conditions: Under which all are drawn.
        size: Pixels.
        solvers: Of the plain arms.
        truth: Heun steps of the truth.
        sides: What plain arms are equal in, see `testbed.baselines`.
    """

    arms: Callable[[], Iterator[tuple[str, Arm]]]
    conditions: tuple[Condition, ...]
    size: int
    solvers: tuple[str, ...] = SOLVERS
    truth: int = 60
    sides: tuple[str, ...] = ("arithmetic", "time", "more time")


def both(guidance: float, pictures: int) -> tuple[Condition, Condition]:
    """These are so many pictures of either captions."""
    return Condition("full", guidance, pictures), Condition("open", guidance, pictures)


STUDIES = {
    "caches": Study(caches, (*both(2.5, 96), *both(7.0, 48)), 64),
    # The study of caches has RAS beside steps that take as long.
    "ras": Study(ras, both(2.5, 48), 64, sides=("arithmetic",)),
    # Pictures that are not the truth's are judged by Fréchet distance alone, for which 20 steps are enough.
    "ralu": Study(ralu, both(2.5, 256), 128, ("unipc",), 20, ("arithmetic", "time")),
}
