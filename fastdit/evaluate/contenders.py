"""What is set beside each other on a model: plain steps, this package's methods alone and composed, other projects'.

A group is one way of being faster, at several settings. What a model or a machine cannot run is refused by name.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdit.errors import FastDiTError
from fastdit.evaluate import authors_ras, peers
from fastdit.evaluate.arms import RIVALS, Arm, check_solver, prepared
from fastdit.evaluate.studio import UNPATCHED, Studio
from fastdit.methods.budget import Budget
from fastdit.methods.cached import Cached
from fastdit.methods.ralu import RALU
from fastdit.methods.ras import RAS
from fastdit.schedules.book import PlanBook
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.solvers import recommend

BUDGETS = (1.5, 2.0, 3.0, 4.0, 5.0)
FEWER = "fewer steps"
COMPOSED = "composed"
ADVISED = "composed, recommended solver"
INTERVALS = (2, 3, 4, 5)
RATIOS = (0.5, 0.25)
#: RALU's published settings by family, and those that any has
RESOLUTIONS = {
    "sd3": ("sd3-2x", "sd3-3x"),
    "flux": ("flux-4x", "flux-5x", "flux-7x"),
    None: ("late",),
}


@dataclass
class Field:
    """The arms, by group.

    Attributes:
        groups: Name of a group -> names of its arms -> arms.
        refused: What does not run -> why.
        judged: Arm that gets a verdict -> the speed-up it was asked for, if it was.
        peers: Groups that are other projects'.
    """

    groups: dict[str, dict[str, Arm]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    judged: dict[str, float | None] = field(default_factory=dict)
    peers: set[str] = field(default_factory=set)

    @property
    def arms(self) -> dict[str, Arm]:
        """All of them by name."""
        return {name: arm for group in self.groups.values() for name, arm in group.items()}

    def add(self, group: str, name: str, arm: Arm) -> None:
        """One more."""
        self.groups.setdefault(group, {})[name] = arm

    def drop(self, name: str, why: str) -> None:
        """An arm that did not run after all."""
        self.refused[name] = why
        self.groups = {
            group: kept
            for group, arms in self.groups.items()
            if (kept := {n: arm for n, arm in arms.items() if n != name})
        }


def fewer_steps(found: Field, studio: Studio, counts: Sequence[int]) -> None:
    """Plain steps of every solver that can stand for the pipeline's own, which is one of them."""
    for solver in ("stock", *RIVALS):
        if why := unfit(studio, solver):
            found.refused[f"{FEWER}, {solver}"] = why
            continue
        for count in sorted(set(counts)):
            found.add(FEWER, f"{solver} {count}", Arm(solver, count))


def unfit(studio: Studio, solver: str) -> str:
    """This says why a solver cannot stand for the pipeline's own, and is "" where it can: a picture was drawn."""
    try:
        check_solver(studio.pipe, solver)
        if solver != "stock":
            studio.sketch(Arm(solver, 2))
    except Exception as error:  # a pipeline may ask of its scheduler what that does not have
        return peers.said(error)
    return ""


def counts_of(steps: int, budgets: Sequence[float]) -> list[int]:
    """So many plain steps take no longer than a budget's run, and one more."""
    counts = {max(2, int(steps / budget)) for budget in budgets}
    return sorted({min(each, steps) for count in counts for each in (count, count + 1)})


def patched(found: Field, studio: Studio, group: str, name: str, arm: Arm) -> None:
    """An arm of the package's own, unless it does not fit the model, the size or the number of steps."""
    from fastdit.patch import patch

    pipe = studio.pipe
    try:
        with prepared(pipe, arm), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = arm.method(pipe, arm.steps)
            handle = patch(pipe, *(made if isinstance(made, (list, tuple)) else [made]))
            try:
                # Heun calls the model oftener than it steps; a schedule knows how often.
                steps = None if arm.solver == "heun" else arm.steps
                handle.explain(steps=steps, **studio.size)
            finally:
                handle.unpatch()
    except FastDiTError as error:
        found.refused[name] = str(error)
    else:
        found.add(group, name, arm)


def budgeted(
    found: Field, studio: Studio, steps: int, budgets: Sequence[float], book: PlanBook | None
) -> None:
    """Budgets under the pipeline's own solver, which are what is judged, and under the recommended one."""
    pipe = studio.pipe
    own = type(recommend(pipe, steps).scheduler) is type(pipe.scheduler)
    key = "" if book is None else hashlib.sha256(book.to_json().encode()).hexdigest()[:16]
    for budget in budgets:
        method = Budget(speedup=budget, book=book)
        arm = Arm("stock", steps, lambda pipe, _, method=method: method, key=key)
        name = f"speedup {budget:g}"
        patched(found, studio, COMPOSED, name, arm)
        if name in found.arms:
            found.judged[name] = budget
        if not own:
            patched(found, studio, ADVISED, f"{name}, unipc", replace(arm, solver="unipc"))


def alone(found: Field, studio: Studio, steps: int, package: Any) -> None:
    """This package's methods one by one, under the pipeline's own solver but for what was made for another."""

    def add(group: str, name: str, method: Any, solver: str = "stock", count: int = steps) -> None:
        patched(
            found,
            studio,
            group,
            name,
            Arm(solver, count, lambda pipe, _: method, key=key_of(method)),
        )

    for n in INTERVALS:
        add("Cached, repeated", f"every {n}, repeated", Cached(Schedule.every(n)))
        add("Cached, forecast", f"every {n}, order 1", Cached(Schedule.every(n), order=1))
    for ratio in RATIOS:
        add("RAS", f"RAS {ratio:g}", RAS(ratio=ratio, metric="change", align=8))
    for n, ratio in ((2, 0.5), (3, 0.5)):
        both = [
            Cached(Schedule.every(n), order=1),
            RAS(ratio=ratio, metric="change", align=8, resets=()),
        ]
        for solver in ("stock", "unipc"):
            name = f"every {n}, order 1, RAS {ratio:g}" + (", unipc" if solver == "unipc" else "")
            arm = Arm(solver, steps, lambda pipe, _, both=both: both)
            patched(found, studio, "forecasts and RAS", name, arm)
    for name in RESOLUTIONS.get(family_of(studio.pipe), RESOLUTIONS[None]):
        method = RALU.preset(name)
        add("RALU", f"RALU {name}", method, count=method.run_steps)
    if package is not None and package.__name__ == "fastdit.tiny":
        _shipped(found, add)


def _shipped(found: Field, add: Callable[..., None]) -> None:
    """What was searched and trained for the first model in the package."""
    from fastdit.methods.ecad import ECAD
    from fastdit.methods.harmonica import HarmoniCa

    for name in ("fast", "faster", "fastest"):
        method = ECAD.preset("tiny", name)
        solver = "unipc" if "UniPC" in method.source.provenance["scheduler"] else "stock"
        add("ECAD", f"ECAD {name}", method, solver, method.source.steps)
    method = HarmoniCa.preset("tiny")
    add("HarmoniCa", "HarmoniCa", method, "heun", method.source.provenance["training"]["steps"])


def family_of(pipe: Any) -> str | None:
    """The family of a pipeline's transformer; None without an adapter."""
    from fastdit.patch import find_adapter

    try:
        return find_adapter(pipe.transformer).family
    except FastDiTError:
        return None


def key_of(method: Any) -> str:
    """The hash of a method's schedule, if it has one: it tells pictures of methods of the same name apart."""
    return getattr(getattr(method, "source", None), "sha256", "")[:16]


def others(found: Field, studio: Studio, steps: int) -> None:
    """Other projects' caches under the pipeline's own solver, those that run."""
    pipe = studio.pipe
    if len(studio.transformers) > 1:
        found.refused["other projects"] = "two transformers take turns, and a cache is set for one"
        return
    plain = Arm("stock", steps)

    @functools.cache
    def ratios() -> tuple[float, ...]:
        return tuple(peers.mag_ratios(pipe, steps, lambda: studio.sketch(plain)))

    opened: dict[str, Callable[[Any], Any]] = {}
    last = len(studio.prompts) - 1
    seen, other = (studio.sketch(Arm("stock", 2), index) for index in (0, last))
    for project, made in (
        ("cache-dit", lambda: peers.of_cache_dit(pipe, steps)),
        (authors_ras.NAME, lambda: authors_ras.arms_of(pipe, steps, seen.picture.shape[-3:-1])),
    ):
        try:
            opened |= made()
        except FastDiTError as error:
            found.refused[project] = str(error)
    if seen.calls > 1 and not hasattr(pipe.transformer, "cache_context"):
        found.refused["diffusers' caches"] = (
            f"{type(pipe.transformer).__name__} has no cache contexts and is called {seen.calls} times a step"
        )
    else:
        of_diffusers, refused = peers.of_diffusers(
            pipe, steps, ratios, peers.Guided(seen.calls, seen.doubled, other.doubled, seen.listed)
        )
        opened |= of_diffusers
        found.refused |= refused
    for name, around in opened.items():
        group = _group_of(name)
        found.peers.add(group)
        arm = Arm("stock", steps, around=functools.partial(around, pipe))
        found.add(group, name, replace(arm, alone=group == authors_ras.NAME))


def _group_of(name: str) -> str:
    library, cache, *rest = name.split(" ")
    return f"{library} {cache}" + (" + TaylorSeer" if rest and rest[-1] == "TaylorSeer" else "")


def unpatched(found: Field, steps: int) -> None:
    """What all are measured against."""
    found.add(UNPATCHED, UNPATCHED, Arm("stock", steps))


def named(groups: Mapping[str, Mapping[str, Arm]]) -> dict[str, str]:
    """Arm -> its group."""
    return {name: group for group, arms in groups.items() for name in arms}
