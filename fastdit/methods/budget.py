"""A run is given a speed, a quality or a time, and what it leaves out follows from that.

Whole steps are left out, and the model's output is drawn through its last computed ones. With a plan book
(`schedules/book.py`) they are those that were measured to be the best, and a plan of it may reuse components, leave out
tokens or begin at a lower resolution as well, by the methods that do so; without one they are evenly spread, and how
far the pictures then are from the solution is not known. Neither the user's number of steps nor the sampler changes.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np

from fastdit.checks import one_of, real, whole
from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods import methods as known
from fastdit.methods.base import Method, check_noise
from fastdit.schedules.book import ARGUMENTS, NODES, Plan, PlanBook
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.forecast import Fitted
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.spread import even_steps
from fastdit.spec import ModelSpec

#: quality -> the most that the error's interval may reach, over the unpatched run's; None for a knee of the book
QUALITIES = {"matched": 1.0, "high": 2.0, "balanced": None, "fast": None}
BUDGETS = ("speedup", "quality", "latency")
SECONDS = {"s": 1.0, "ms": 1e-3}
BYTES = {"MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
#: a speed is met where it is missed by no more
MISS = 0.1
#: sigmas are the same where they differ by no more
SAME = 1e-4


@dataclass(frozen=True)
class Budget(Method):
    """This method leaves out as many steps as a budget asks for. Exactly one of three is given.

    Attributes:
        speedup: Of the denoising steps' time, at least 1: over the unpatched pipeline by a book, without one over a run
            that computes all steps.
        quality: "matched": no further from the solution than the unpatched run is. "high": at most twice as far.
            "balanced" and "fast": where the book's plans begin to lose more for each step that they leave out.
        latency: Seconds of a picture, the pipeline's call included.
        book: What was measured; a quality and a latency need one.
        guard: At each step that computes, see how far the forecast would have been; a picture that is further off, in
            any branch of guidance, than the book's plan was when it was measured is computed at every later step. Only
            plans of whole steps are chosen then.
        max_cache_bytes: Most bytes that caches may hold at once; a run that needs more is refused.

    Example:
        >>> fastdit.patch(pipe, fastdit.Budget(speedup=3))
    """

    speedup: float | None = None
    quality: str | None = None
    latency: float | None = None
    book: PlanBook | None = None
    guard: bool = False
    max_cache_bytes: int | None = None

    name = "Budget"
    writes = frozenset({"reuse"})
    forecasts = True
    otherwise = "a speedup fits any"
    asks_guidance = True

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS}
        told = [name for name, value in given.items() if value is not None]
        if len(told) != 1:
            raise ArgumentError(
                f"exactly one of {', '.join(given)} must be given, got {' and '.join(told) or 'none'}"
            )
        if self.book is not None and not isinstance(self.book, PlanBook):
            raise ArgumentError(
                f"book must be a PlanBook or None, got {type(self.book).__name__}; PlanBook.load(path) reads one"
            )
        if self.quality is not None:
            one_of("quality", self.quality, QUALITIES)
        if self.speedup is not None:
            real("speedup", self.speedup, "of at least 1", lambda value: value >= 1)
        if self.latency is not None:
            real("latency", self.latency, "of seconds, above 0", lambda value: value > 0)
        if self.max_cache_bytes is not None:
            whole("max_cache_bytes", self.max_cache_bytes, 0)
        if type(self.guard) is not bool or (self.guard and self.book is None):
            raise ArgumentError(
                f"guard must be True or False, and True needs a plan book, whose bounds it goes by; got {self.guard!r}"
            )
        if self.speedup is None and self.book is None:
            raise ArgumentError(
                f"{told[0]} needs a plan book of this model: `fastdit calibrate` makes one, book=PlanBook.load(path) "
                "reads it"
            )
        self.beside()  # what a book says beside a schedule is refused here

    @property
    def skips_steps(self) -> bool:
        """Whether it leaves out whole steps and nothing else, by any of its plans."""
        return all(plan.whole for plan in self.plans)

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of its book that it may choose."""
        plans = () if self.book is None else self.book.plans
        return tuple(plan for plan in plans if plan.whole or not self.guard)

    def beside(self, steps: int | None = None) -> tuple[Method, ...]:
        """The methods of the plan for a run of `steps` steps beside its schedule, or of all plans.

        Raises:
            ScheduleError: A plan's arguments are none of its method.
        """
        if steps is None:
            return tuple(each for made in self._beside.values() for each in made)
        plan = self.plan_of(steps)
        return () if plan is None else self._beside[id(plan)]

    @cached_property
    def _beside(self) -> dict[int, tuple[Method, ...]]:
        """Of each plan, by its id."""
        return {id(plan): _beside(plan) for plan in self.plans}

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        for plan in self.plans:
            if plan.schedule is not None:
                plan.schedule.check(spec)
        for method in self.beside():
            method.check(spec)

    @property
    def bars(self) -> Mapping[str, str]:
        """A guard looks at outputs of all tokens, and what a book promises was measured of all of them."""
        if self.guard:
            why = "guard=True compares outputs of all tokens, and {other} computes others; give one of them"
        elif self.speedup is None:
            why = f"{self} is what a plan book measured with all tokens, and {{other}} computes others; give a speedup"
        else:
            return {}
        return dict.fromkeys(("rows", "resolution"), why)

    @property
    def made_for(self) -> Conditions | None:
        """A time is one of pictures of the book's size."""
        return None if self.latency is None else Conditions(image_tokens=self.book.image_tokens)

    def instead(self, run: Conditions, timesteps: Any) -> Budget | None:
        """In a run of another guidance or other sigmas than the book's a speed or a time spreads the steps evenly.

        Raises:
            ScheduleError: A quality, or a guard's bounds, were not measured on such a run.
        """
        plan = None if timesteps is None else self.plan_of(len(timesteps.scheduler.timesteps))
        if plan is None:
            return None
        said = Conditions(**self.book.guidance).differing(run)
        if self.book.sigmas and not self._has_sigmas(timesteps):
            said.append("its sampler or sigmas are others")
        if not said:
            return None
        if self.quality is not None or self.guard:
            raise ScheduleError(
                f"{self}{', guard=True' if self.guard else ''} does not fit this run, the plan book is of another: "
                f"{'; '.join(said)}. {self.otherwise}"
            )
        spread = not self._beside[id(plan)]
        warnings.warn(
            f"the plan book is of another run: {'; '.join(said)}; "
            + ("steps are evenly spread, and " if spread else "")
            + "how far the pictures are from the solution is not known",
            stacklevel=2,
        )
        if not spread:
            return None
        speed = self.speedup or max(1.0, self.book.speedup_of(plan))
        return replace(self, latency=None, speedup=speed, book=self.book.without_plans())

    def asked(self, **budget: Any) -> Budget:
        """The same under another budget, and by another book where one is given."""
        if unknown := set(budget) - {*BUDGETS, "book"}:
            raise ArgumentError(f"a budget is one of {', '.join(BUDGETS)}, got {sorted(unknown)}")
        budget = {**dict.fromkeys(BUDGETS), **budget}
        budget["latency"] = parsed("latency", budget["latency"], SECONDS)
        found = replace(self, **budget)
        told = {method.name for method in found.beside()} - {m.name for m in self.beside()}
        if told:
            raise ArgumentError(
                f"the plan book has plans of {' and '.join(sorted(told))}, that of the patch has none; patch with this "
                "book"
            )
        return found

    def check_sampler(self, noise: str, scheduler: str = "") -> None:
        """Outputs of unlike noise lie on no line; a book knows its sampler."""
        check_noise(self, noise)
        if self.book is None or scheduler in ("", self.book.scheduler):
            return
        if self.speedup is None:
            raise ScheduleError(
                f"{self} needs the sampler that the plan book was made under, {self.book.scheduler}, this run has "
                f"{scheduler}; a speedup runs all the same"
            )
        warnings.warn(
            f"the plan book was made under {self.book.scheduler}, this run has {scheduler}: how far its pictures are "
            "from the solution is not known",
            stacklevel=2,
        )

    def schedule(self, spec: ModelSpec, steps: int, timesteps: Any = None) -> Schedule:
        plan = self.plan_of(steps)
        if plan is not None and plan.schedule is not None:
            return plan.schedule.bind(spec, steps)
        computed, order = self.chosen(steps)
        return Schedule.of_steps(spec, steps, computed, order, {"budget": str(self)})

    def plan_of(self, steps: int) -> Plan | None:
        """The plan of a run of `steps` steps; None where the book has none of so many, or there is no book."""
        book = self.book
        return self._plan(book) if book is not None and book.steps == steps else None

    def chosen(self, steps: int) -> tuple[Sequence[int], int | Sequence[int]]:
        """The steps that compute in a run of `steps`, and the order by which the others are drawn, or that of each.

        Raises:
            ScheduleError: No plan of so many steps meets the budget.
        """
        plan = self.plan_of(steps)
        if plan is not None:
            return plan.computed, plan.order
        if self.speedup is None:
            raise ScheduleError(
                f"{self} needs a plan book of {steps} steps, this one is of {self.book.steps}; a speedup fits "
                "any number"
            )
        counts = range(steps, min(NODES, steps) - 1, -1)
        return even_steps(steps, self._nearest(counts, partial(self._speed, steps), steps)), 1

    def weights(self, steps: int, timesteps: Any = None) -> Fitted:
        """Those of the book's plan hold under its sampler, at its sigmas; elsewhere there are none."""
        plan = self.plan_of(steps)
        if plan is None or not plan.weights or timesteps is None:
            return {}
        return plan.weights_by_nodes if self._has_sigmas(timesteps) else {}

    def _has_sigmas(self, timesteps: Any) -> bool:
        """Whether a run's sampler and sigmas are the book's."""
        return type(timesteps.scheduler).__name__ == self.book.scheduler and np.allclose(
            timesteps.sigmas_of(self.book.steps), self.book.sigmas, atol=SAME
        )

    def bounds(self, steps: int) -> Mapping[int, float] | None:
        if not self.guard:
            return None
        if self.book.steps != steps:
            raise ScheduleError(
                f"guard=True needs a plan book of {steps} steps, this one is of {self.book.steps}"
            )
        return self._plan(self.book).bounds_by_step

    def told(self, steps: int, others: Sequence[str] = ()) -> str:
        if others:
            return f"{self}: beside {' and '.join(others)}, so neither its speed nor its error is known"
        count, plan = len(self.chosen(steps)[0]), self.plan_of(steps)
        speed = self._speed(steps, count) if plan is None else self.book.speedup_of(plan)
        found = f"{self}: {count} of {steps} steps compute, {speed:.2f} times as fast"
        if self.book is None:
            return f"{found}; evenly spread without a plan book, so the error is not known"
        if plan is None:
            other = f"of {self.book.steps} steps" if self.book.steps else "of other runs"
            return f"{found}; the plan book is {other}, so the error is not known"
        if plan.schedule is not None:
            found += f", {plan.schedule.reuse_share:.0%} of the components' outputs reused"
        found += "".join(f", {method}" for method in self._beside[id(plan)])
        return f"{found}; error {plan.ratio:.2f} [{plan.low:.2f}, {plan.high:.2f}] of the unpatched run's"

    def advice(self, steps: int) -> str:
        """What a search found for runs of `steps` steps, of other solvers or steps than the book's; "" for nothing."""
        points = self.book.provenance.get("advice") if self.book is not None else None
        said = [each for each in points or () if each.get("steps") == steps]
        if not said:
            return ""
        best = min(said, key=lambda each: each["loss"])
        return f"; of the book's search, {best['solver']} was the nearest to the solution ({best['loss']:.3g})"

    def _plan(self, book: PlanBook) -> Plan:
        plans = self.plans
        if self.quality is not None:
            return _of_quality(book, plans, self.quality)
        if self.speedup is not None:
            return self._nearest(plans, book.speedup_of, book.steps)
        for plan in plans:
            if book.seconds_of(plan) + book.other_seconds <= self.latency:
                return plan
        least = book.seconds_of(plans[-1]) + book.other_seconds
        raise ScheduleError(
            f"no plan of the book takes {self.latency:g} s a picture; the fastest takes {least:.3g} s, "
            f"{book.other_seconds:.3g} s of them beside the steps"
        )

    def _nearest(self, choices: Sequence[Any], speed: Callable[[Any], float], steps: int) -> Any:
        """That of the choices, of which the last is the fastest, which comes nearest to the speed-up."""
        fastest = speed(choices[-1])
        if self.speedup > fastest * (1 + MISS):
            raise ScheduleError(
                f"speedup must be at most {fastest:.3g} for {steps} steps, got {self.speedup:g}: nothing faster is "
                f"{'in the plan book' if self.book is not None else 'left of a run'}"
            )
        return min(choices, key=lambda choice: abs(math.log(speed(choice) / self.speedup)))

    def _speed(self, steps: int, count: int) -> float:
        if self.book is None:  # what is drawn takes no time to speak of
            return steps / count
        return self.book.speedup(count, steps)

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"speedup={self.speedup:g}"
        return f"quality={self.quality!r}" if self.quality else f"latency={self.latency:g}"


_kinds = cache(known)


def _beside(plan: Plan) -> tuple[Method, ...]:
    """The methods that a plan has beside its schedule."""
    found = []
    for name in ARGUMENTS:
        arguments = getattr(plan, name)
        if arguments is None:
            continue
        try:
            found.append(_kinds()[name](**arguments))
        except (ArgumentError, ScheduleError, TypeError) as error:
            raise ScheduleError(f"a plan of the book: {name}: {error}") from error
    return tuple(found)


def _of_quality(book: PlanBook, plans: Sequence[Plan], quality: str) -> Plan:
    """The fastest plan of a quality; the unpatched run where none qualifies."""
    most = QUALITIES[quality]
    if most is not None:
        return [plans[0], *(plan for plan in plans[1:] if plan.high <= most)][-1]
    first = _knee(book, plans)
    return first if quality == "balanced" else _knee(book, plans[plans.index(first) :])


def _knee(book: PlanBook, plans: Sequence[Plan]) -> Plan:
    """The plan furthest below the line from the first to the last, in the logarithms of error and speed."""
    points = [(math.log(book.speedup_of(plan)), math.log(plan.ratio)) for plan in plans]
    (x0, y0), (x1, y1) = points[0], points[-1]
    below = [(y1 - y0) * (x - x0) - (y - y0) * (x1 - x0) for x, y in points]
    return plans[below.index(max(below))]


def budgeted(
    transformer: Any,
    methods: Sequence[Method],
    *,
    vram: int | str | None,
    book: PlanBook | str | os.PathLike[str] | None,
    guard: bool,
    **budget: Any,
) -> tuple[Method, ...]:
    """The methods of a patch, or the budget that is given in place of any.

    Raises:
        ArgumentError: Both are given, or the budget is no budget.
        ScheduleError: The book cannot be read, or is of another model.
    """
    told = [name for name, value in budget.items() if value is not None]
    if not told:
        for name, value in (("vram", vram), ("book", book), ("guard", guard or None)):
            if value is not None:
                raise ArgumentError(f"{name} belongs to a budget: {', '.join(budget)}; got none")
        return _of_model(transformer, methods)
    if methods:
        names = ", ".join(getattr(method, "name", repr(method)) for method in methods)
        raise ArgumentError(f"{told[0]} is in place of methods, got {names} beside it")
    if isinstance(book, (str, os.PathLike)):
        book = PlanBook.load(book)
    elif book is None:
        book = PlanBook.packaged(transformer)
    budget["latency"] = parsed("latency", budget["latency"], SECONDS)
    most = parsed("vram", vram, BYTES)
    made = Budget(
        **budget, book=book, guard=guard, max_cache_bytes=None if most is None else int(most)
    )
    return _of_model(transformer, (made,))


def _of_model(transformer: Any, methods: Sequence[Method]) -> tuple[Method, ...]:
    for method in methods:
        if isinstance(method, Budget) and method.book is not None:
            method.book.check_model(transformer)
    return tuple(methods)


def parsed(name: str, value: Any, units: Mapping[str, float]) -> Any:
    """A number as it is, or a text of a number and a unit as a number.

    Raises:
        ArgumentError: A text is neither.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\+?(\d+(?:\.\d+)?) ?([A-Za-z]+)", value)
    if found is None or found[2] not in units:
        raise ArgumentError(
            f"{name} must be a number or a text in {', '.join(units)}, got {value!r}"
        )
    return float(found[1]) * units[found[2]]


METHOD = Budget
