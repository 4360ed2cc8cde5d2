"""A plan book: what plans were measured to take and to err, for one model under one sampler. JSON, a plan a line.

A plan computes some of a run's steps and draws the model's output at the others. It may reuse components beside, leave
out tokens, or begin at a lower resolution: as a schedule, and as arguments of RAS and RALU. Its error is the distance
of a run's latents to those of many steps from the same noise, over that of the unpatched run: paired, the geometric
mean over prompts, with its 95 % interval. `fastdit calibrate` and `fastdit search` make books; reading one executes
nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastdit import files
from fastdit.checks import is_whole
from fastdit.errors import ScheduleError
from fastdit.schedules.forecast import MAX_ORDER, Fitted
from fastdit.schedules.schedule import Schedule

FORMAT = "fastdit.plan_book"
VERSION = 1
#: a line is drawn through so many computed steps
NODES = 2
GUIDANCE = {"guidance", "true_guidance"}
#: weights sum to 1 within this
SUM = 1e-5
#: a book per model
PACKAGED = Path(__file__).parents[1] / "books"
MAX_FILE_BYTES = 4 << 20
#: of the methods that a plan may have beside its schedule
ARGUMENTS = {
    "ras": {"ratio", "start", "resets", "metric", "high_ratio", "starvation", "align", "max_age"},
    "ralu": {
        "steps",
        "ends",
        "shifts",
        "noise",
        "split",
        "selector",
        "lift",
        "align",
        "base_shift",
    },
}


@dataclass(frozen=True)
class Plan:
    """These steps of a run compute.

    Attributes:
        computed: Their numbers, rising from 0.
        order: By which the others are drawn: one for all, or one for each step of the run.
        ratio: The error over that of the unpatched run.
        low, high: Its 95 % interval.
        bounds: The most that the forecast at a computed step was off when this was measured, half as much again, for
            those from the third on.
        weights: Drawn step -> those of the computed outputs, latest first, that its output is a sum of, in place of
            what the order says; fitted at the book's sigmas (`fastdit/search/fitting.py`). None where there are none.
        seconds: What the steps of a run took per picture; None where it follows from the steps that compute.
        arithmetic: Their multiply-accumulates over those of the unpatched run; None where nobody counted.
        schedule: Which components compute at which step, where that is not all or nothing.
        ras, ralu: Arguments of the method of that name, where tokens are left out or the resolution changes.
    """

    computed: tuple[int, ...]
    order: int | tuple[int, ...]
    ratio: float
    low: float
    high: float
    bounds: tuple[float, ...] = ()
    weights: Mapping[int, tuple[float, ...]] | None = None
    seconds: float | None = None
    arithmetic: float | None = None
    schedule: Schedule | None = None
    ras: Mapping[str, Any] | None = None
    ralu: Mapping[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """It leaves out whole steps and nothing else."""
        return self.schedule is None and self.ras is None and self.ralu is None

    def document(self) -> dict[str, Any]:
        """JSON data of it, without what it has not."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.schedule is not None:
            found["schedule"] = self.schedule.document()
        needed = ("computed", "order", "ratio", "low", "high", "bounds")
        return {n: value for n, value in found.items() if n in needed or value is not None}

    @property
    def weights_by_nodes(self) -> Fitted:
        """As runs look for them."""
        return {
            (step, tuple(node for node in reversed(self.computed) if node < step)[: len(own)]): own
            for step, own in (self.weights or {}).items()
        }

    @property
    def bounds_by_step(self) -> dict[int, float]:
        """Computed step -> its bound."""
        return dict(zip(self.computed[NODES:], self.bounds, strict=False))


@dataclass(frozen=True, eq=False)
class PlanBook:
    """Plans of one model, under one sampler, of one number of steps.

    Attributes:
        model: Class of the transformer, and :func:`config_hash`.
        scheduler: Class of the scheduler.
        steps: Steps of a run.
        image_tokens: Those of a picture when the times were taken.
        unpatched_seconds: What a step of the unpatched pipeline takes per picture.
        step_seconds: The same of a patched step that computes, and of one that is drawn.
        other_seconds: What the pipeline's call takes per picture beside its steps.
        plans: From the slowest to the fastest; the first computes all, and its ratio is 1.
        provenance: Free JSON data: machine, versions, prompts, sizes, solution.
        sigmas: Of each step; empty where no plan has weights.
        guidance: The scales it was measured under, as fields of :class:`~fastdit.schedules.conditions.Conditions`;
            empty where nobody said.
    """

    model: tuple[str, str]
    scheduler: str
    steps: int
    image_tokens: int
    unpatched_seconds: float
    step_seconds: tuple[float, float]
    other_seconds: float
    plans: tuple[Plan, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = ()
    guidance: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, computed: int, steps: int) -> float:
        """The steps of a run take so long per picture where so many compute."""
        full, drawn = self.step_seconds
        return computed * full + (steps - computed) * drawn

    def speedup(self, computed: int, steps: int) -> float:
        """How much faster the steps of a run are than those of the unpatched one, where so many compute."""
        return steps * self.unpatched_seconds / self.seconds(computed, steps)

    def seconds_of(self, plan: Plan) -> float:
        """The steps of a run by one of the plans take so long per picture."""
        if plan.seconds is not None:
            return plan.seconds
        return self.seconds(len(plan.computed), self.steps)

    def speedup_of(self, plan: Plan) -> float:
        """How much faster the steps of a run by one of the plans are than those of the unpatched one."""
        return self.steps * self.unpatched_seconds / self.seconds_of(plan)

    def without_plans(self) -> PlanBook:
        """Its times alone, by which steps are spread evenly."""
        return replace(self, steps=0, plans=(), sigmas=(), guidance={})

    def check_model(self, transformer: Any) -> None:
        """It must be of this model.

        Raises:
            ScheduleError: Naming both.
        """
        found = type(transformer).__name__, config_hash(transformer)
        if found != self.model:
            raise ScheduleError(
                f"the plan book is of a {' with the configuration '.join(self.model)}, the model is a "
                f"{' with the configuration '.join(found)}; `fastdit calibrate` makes one"
            )

    # ---- file

    @classmethod
    def packaged(cls, transformer: Any) -> PlanBook | None:
        """The package's book of a model; None for one that is not in the package."""
        for path in sorted(PACKAGED.glob("*.json")):
            book = cls.load(path)
            if book.model == (type(transformer).__name__, config_hash(transformer)):
                return book
        return None

    def to_json(self) -> str:
        """The book as JSON text, a plan a line."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": list(self.model),
            "scheduler": self.scheduler,
            "steps": self.steps,
            "image_tokens": self.image_tokens,
            "unpatched_seconds": self.unpatched_seconds,
            "step_seconds": list(self.step_seconds),
            "other_seconds": self.other_seconds,
            "sigmas": list(self.sigmas),
            "guidance": dict(self.guidance),
            "provenance": dict(self.provenance),
        }
        try:
            head = json.dumps(content, indent=1, allow_nan=False)
            lines = [json.dumps(plan.document(), allow_nan=False) for plan in self.plans]
        except (TypeError, ValueError, RecursionError) as error:
            raise ScheduleError(f"a plan book must be plain JSON data: {error}") from error
        plans = ",\n".join(f"  {line}" for line in lines)
        return f'{head[:-2]},\n "plans": [\n{plans}\n ]\n}}\n'

    def save(self, path: str | os.PathLike[str]) -> None:
        """This writes :meth:`to_json` to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanBook:
        """This reads a book.

        Raises:
            ScheduleError: The file cannot be read, or is not a valid book; names the file and what is wrong.
        """
        try:
            return cls.from_json(files.read_text(path, MAX_FILE_BYTES))
        except (OSError, UnicodeError) as error:
            raise ScheduleError(f"{path}: not a readable plan book: {error}") from error
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> PlanBook:
        """This reads JSON text of :meth:`to_json`.

        Raises:
            ScheduleError: It is anything else.
        """
        try:
            document = files.parse(text)
        except ValueError as error:
            raise ScheduleError(f"not valid JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ScheduleError(f'not a plan book: its format must be "{FORMAT}"')
        if document.get("version") != VERSION:
            raise ScheduleError(f"version must be {VERSION}, got {document.get('version')!r}")
        try:
            return _read(document)
        except (KeyError, TypeError) as error:
            raise ScheduleError(f"a field is missing or of the wrong type: {error!r}") from error


def config_hash(transformer: Any) -> str:
    """Eight digits over a model's configuration."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(document: Mapping[str, Any]) -> PlanBook:
    steps, model = document["steps"], document["model"]
    for name in ("steps", "image_tokens"):
        given = document[name]
        _require(is_whole(given) and given >= 1, name, "an int of at least 1", given)
    _require(len(model) == 2 and _texts(model), "model", "a class and a hash", model)
    _require(_texts([document["scheduler"]]), "scheduler", "a class", document["scheduler"])
    seconds = [document["unpatched_seconds"], *document["step_seconds"], document["other_seconds"]]
    _require(
        len(seconds) == 4 and all(map(_is_number, seconds)) and seconds[0] > 0 and seconds[1] > 0,
        "unpatched_seconds, step_seconds, other_seconds",
        "a number, two and one, of at least 0, the first two more",
        seconds,
    )
    plans = tuple(_plan(each, steps) for each in document["plans"])
    counts = [len(plan.computed) for plan in plans]
    _require(
        bool(plans) and counts[0] == steps and plans[0].whole,
        "plans",
        f"at least one, the first of all {steps} steps and nothing else",
        counts[:1],
    )
    provenance = document["provenance"]
    _require(isinstance(provenance, dict), "provenance", "an object", provenance)
    sigmas = document.get("sigmas", [])
    fitted = any(plan.weights for plan in plans)
    _require(
        all(map(_is_number, sigmas)) and len(sigmas) in ((steps,) if fitted else (0, steps)),
        "sigmas",
        "a number for each step, where a plan has weights",
        sigmas,
    )
    guidance = document.get("guidance", {})
    _require(
        isinstance(guidance, dict)
        and set(guidance) <= GUIDANCE
        and all(map(_is_number, guidance.values())),
        "guidance",
        f"numbers by {' and '.join(sorted(GUIDANCE))}",
        guidance,
    )
    advice = provenance.get("advice", [])
    _require(
        isinstance(advice, list) and all(map(_is_advice, advice)),
        "provenance.advice",
        "objects of steps, solver and loss",
        advice,
    )
    book = PlanBook(
        tuple(model),
        document["scheduler"],
        steps,
        document["image_tokens"],
        seconds[0],
        tuple(seconds[1:3]),
        seconds[3],
        plans,
        provenance,
        tuple(sigmas),
        guidance,
    )
    times = [book.seconds_of(plan) for plan in plans]
    _require(sorted(set(times), reverse=True) == times, "plans", "ever faster", times)
    return book


def _plan(given: Mapping[str, Any], steps: int) -> Plan:
    computed, order = given["computed"], given["order"]
    rising = all(is_whole(step) for step in computed) and sorted(set(computed)) == list(computed)
    _require(
        bool(computed) and rising and computed[0] == 0 and computed[-1] < steps,
        "computed",
        f"rising numbers from 0 to at most {steps - 1}",
        computed,
    )
    orders = order if isinstance(order, list) else [order] * steps
    _require(
        len(orders) == steps and all(is_whole(each) and 0 <= each <= MAX_ORDER for each in orders),
        "order",
        "0, 1 or 2, or a list of these for each step",
        order,
    )
    numbers = [given[name] for name in ("ratio", "low", "high")]
    _require(
        all(map(_is_number, numbers)) and 0 < numbers[1] <= numbers[0] <= numbers[2],
        "ratio, low, high",
        "a number above 0 within its interval",
        numbers,
    )
    bounds = given["bounds"]
    _require(
        all(map(_is_number, bounds)) and len(bounds) in (0, max(0, len(computed) - NODES)),
        "bounds",
        f"none, or a number for each computed step but the first {NODES}",
        bounds,
    )
    _require(
        set(given) <= set(Plan.__dataclass_fields__), "a plan", "of known fields", sorted(given)
    )
    spent = {name: given.get(name) for name in ("seconds", "arithmetic")}
    for name, value in spent.items():
        _require(value is None or (_is_number(value) and value > 0), name, "above 0", value)
    return Plan(
        tuple(computed),
        tuple(order) if isinstance(order, list) else order,
        *map(float, numbers),
        tuple(bounds),
        _weights(given.get("weights"), computed, orders),
        **spent,
        schedule=_schedule(given.get("schedule"), computed, steps),
        **{name: _arguments(name, given.get(name)) for name in ARGUMENTS},
    )


def _weights(
    given: Any, computed: Sequence[int], orders: Sequence[int]
) -> Mapping[int, tuple[float, ...]] | None:
    """Of every drawn step, which all are drawn as a whole."""
    if given is None:
        return None
    drawn = [step for step in range(len(orders)) if step not in computed]
    before = [sum(node < step for node in computed) for step in drawn]
    _require(
        isinstance(given, dict)
        and list(given) == list(map(str, drawn))
        and all(map(_are_weights, given.values(), before))
        and all(orders[step] for step in drawn),
        "weights",
        f"for each drawn step, whose order is above 0, a number for each of the last {NODES} to {MAX_ORDER + 1} steps "
        "that computed, which sum to 1",
        given,
    )
    return {int(step): tuple(each) for step, each in given.items()}


def _are_weights(given: Any, before: int) -> bool:
    """Of a step before which so many computed."""
    return (
        isinstance(given, list)
        and min(before, NODES) <= len(given) <= min(before, MAX_ORDER + 1)
        and all(isinstance(each, float) and math.isfinite(each) for each in given)
        and abs(sum(given) - 1) < SUM
    )


def _schedule(given: Any, computed: Sequence[int], steps: int) -> Schedule | None:
    if given is None:
        return None
    found = Schedule.of_document(given)
    layers = found.layers.values()
    runs = [step for step in range(found.steps) if any(layer.bits[step].any() for layer in layers)]
    _require(found.steps == steps, "schedule", f"of {steps} steps", found.steps)
    _require(runs == list(computed), "schedule", f"one that computes at {list(computed)}", runs)
    return found


def _arguments(name: str, given: Any) -> Mapping[str, Any] | None:
    """Arguments of a method as plain values; which of them it takes the method says."""
    if given is None:
        return None
    known = isinstance(given, dict) and set(given) <= ARGUMENTS[name]
    _require(known, name, f"an object of {', '.join(sorted(ARGUMENTS[name]))}", given)
    for key, value in given.items():
        plain = (int, float, str, bool, type(None))
        several = isinstance(value, list) and all(isinstance(each, (int, float)) for each in value)
        _require(several or isinstance(value, plain), f"{name}.{key}", "a value or numbers", value)
    return given


def _is_advice(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and is_whole(given.get("steps"))
        and _texts([given.get("solver")])
        and _is_number(given.get("loss"))
    )


def _require(holds: bool, name: str, accepted: str, given: Any) -> None:
    if not holds:
        raise ScheduleError(f"{name} must be {accepted}, got {given!r}")


def _texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and value >= 0
