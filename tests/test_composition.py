"""What may be given together: each legal pair and triple equals the stock pipeline under plain hooks, all others are
refused by name.

The knobs are all that leaves work out of a run, watches it, or moves weights out of it. The oracles are
`ras_oracle.py`, `ralu_oracle.py` and `oracle.py`, which know nothing of fastdit's runtime.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdit
import oracle
import ralu_oracle
import tiny_models
from contract import RUN_FP64, distance, same_bits
from fastdit import (
    ECAD,
    RALU,
    RAS,
    Budget,
    Cached,
    CompositionError,
    HarmoniCa,
    PerStage,
    Router,
    Schedule,
    UnsupportedModelError,
)
from fastdit.account.raster import COMPUTED
from fastdit.schedules.book import Plan
from fastdit.schedules.conditions import Conditions
from ras_oracle import RowOracle, by_change
from snapshot import scheduler_snapshot, snapshot
from test_budget import book_of
from test_ralu import PACKED, SIZE, as_picture, start_of
from test_ras import calls_per_step
from test_shed import SHARED
from test_wan import BOUNDARY, two
from tiny_models import arguments, generate

pytestmark = pytest.mark.diffusers

FAMILIES = ("sd3", "flux", "pixart-sigma", "lumina", "qwen", "wan")
FAMILIES = tuple(name for name in FAMILIES if name in tiny_models.FAMILIES)
STEPS, BATCH = 8, 2
STAGES = (1, 2, 5)  # of RALU, in steps
RATIO, START, RESETS = 0.5, 1, (3,)  # of RAS, counted from the first step at full size


# ---- the knobs


class Reused:
    """What is reused when, in all steps: bits and orders as the oracles have them."""

    def __init__(self, model: Any, order: int) -> None:
        self.bits, self.names = oracle.random_bits(model, STEPS, order, compute=0.5)
        self.orders = {kind: np.full(part.shape, order) for kind, part in self.bits.items()}
        for part in self.bits.values():
            part[:, 0, 0] = True  # no step is drawn as a whole

    def draw(self, steps: Sequence[int]) -> None:
        """All that there is is drawn as a line at these steps."""
        for kind, part in self.bits.items():
            part[list(steps)] = False
            self.orders[kind][list(steps)] = 1

    @property
    def whole(self) -> dict[int, int]:
        """The steps that are drawn as a whole, and the order."""
        computes = np.concatenate([part.reshape(STEPS, -1) for part in self.bits.values()], axis=1)
        orders = next(iter(self.orders.values())).reshape(STEPS, -1)[:, 0]
        return {step: int(orders[step]) for step in np.flatnonzero(~computes.any(axis=1)).tolist()}

    def schedule(self, first: int = 0) -> Schedule:
        bits, orders = (
            {kind: part[first:] for kind, part in each.items()} for each in (self.bits, self.orders)
        )
        return Schedule.from_bits(bits, self.names, orders=orders)


def ecad(model: Any) -> tuple[Any, Reused]:
    """Components are repeated."""
    reused = Reused(model, 0)
    return ECAD(reused.schedule()), reused


def harmonica(model: Any) -> tuple[Any, Reused]:
    """Components are drawn as lines."""
    reused = Reused(model, 1)
    logits = {kind: np.where(part, 4.0, -4.0) for kind, part in reused.bits.items()}
    return HarmoniCa(Router(logits, reused.names), order=1, strict=False), reused


def cached(model: Any) -> tuple[Any, Reused]:
    """Components are drawn as parabolas."""
    reused = Reused(model, 2)
    return Cached(reused.schedule()), reused


def budget(model: Any) -> tuple[Any, Reused]:
    """Every second step is drawn as a whole."""
    reused = Reused(model, 1)
    for part in reused.bits.values():
        part[:] = True
    reused.draw([1, 3, 5, 7])
    return Budget(speedup=2), reused


def guarded(model: Any) -> tuple[Any, Reused]:
    """The same until a guard fires, at step 4."""
    _, reused = budget(model)
    for part in reused.bits.values():
        part[4:] = True
    book = book_of(model)
    plan = Plan((0, 2, 4, 6), 1, 1.5, 1.2, 1.9, (0.0, 0.0))
    book = book_of(model, plans=(book.plans[0], plan))
    return Budget(speedup=1.8, book=book, guard=True), reused


def per_stage(model: Any) -> tuple[Any, Reused]:
    """Nothing in the first stage, whole steps as lines in the second, components as parabolas in the third."""
    reused = Reused(model, 2)
    for part in reused.bits.values():
        part[:3] = True
    reused.draw([2])
    lines = Cached(Schedule.every(2), order=1)
    return PerStage(None, lines, Cached(reused.schedule(3))), reused


#: knob -> the field of the plan that it decides
FIELDS = {
    "RAS": "rows",
    "RALU": "resolution",
    **dict.fromkeys(("ECAD", "HarmoniCa", "Cached", "Budget", "guard", "PerStage"), "reuse"),
    "shed": "",
}
REUSES = {
    "ECAD": ecad,
    "HarmoniCa": harmonica,
    "Cached": cached,
    "Budget": budget,
    "guard": guarded,
    "PerStage": per_stage,
}
SETS = [*itertools.combinations(FIELDS, 2), *itertools.combinations(FIELDS, 3)]


def reasons(name: str, knobs: Sequence[str]) -> list[tuple[type, str]]:
    """Why the knobs are refused on a family, as error and words; each is one that may be told. Legal ones have none."""
    found: list[tuple[type, str]] = []
    called = {knob: "Budget" if knob == "guard" else knob for knob in knobs}
    for one, other in itertools.combinations(knobs, 2):
        if FIELDS[one] == FIELDS[other]:
            words = f"{called[one]} and {called[other]} both decide 'reuse' .* give one of them"
            found.append((CompositionError, words))
        if {one, other} in ({"guard", "RAS"}, {"guard", "RALU"}):
            words = f"Budget guard=True .* {one if other == 'guard' else other} computes others; g"
            found.append((CompositionError, words))
    if "PerStage" in knobs and "RALU" not in knobs:
        found.append((CompositionError, "PerStage .* no method beside it makes stages.* give RALU"))
    if "RALU" in knobs and not tiny_models.adapter_of(name).changes_resolution:
        found.append((UnsupportedModelError, "cannot change its resolution"))
    if "shed" in knobs and name.startswith(SHARED):
        found.append((UnsupportedModelError, "have none, so there is nothing to shed"))
    return found


def given(model: Any, knobs: Sequence[str]) -> tuple[list[Any], dict[str, Any], Reused | None]:
    """Methods and options of `patch`, and what is reused."""
    methods: list[Any] = []
    reused = None
    for knob in knobs:
        if knob == "RAS":
            methods.append(RAS(RATIO, start=START, resets=RESETS, align=1))
        elif knob == "RALU":
            methods.append(RALU(STAGES, (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient"))
        elif knob in REUSES:
            method, reused = REUSES[knob](model)
            methods.append(method)
    return methods, {"shed_modulations": "host"} if "shed" in knobs else {}, reused


# ---- the legal ones


@pytest.fixture(autouse=True)
def _exact(request):
    """Lumina turns its queries and keys in fp32, too."""
    named = getattr(request.node, "callspec", None)
    lifts = named is not None and named.params["name"] == "lumina"
    with tiny_models.fp64_throughout() if lifts else contextlib.nullcontext():
        yield


LEGAL = [(name, knobs) for name in FAMILIES for knobs in SETS if not reasons(name, knobs)]


@functools.cache
def pipeline(name: str) -> Any:
    return tiny_models.pipeline(name, torch.float64)


def drawing(name: str, staged: bool) -> tuple[Tensor, dict[str, Any]]:
    """Initial latents, and the arguments of a run that begins with them."""
    if not staged:
        return torch.empty(0), arguments(name, BATCH, STEPS, dtype=torch.float64)
    # Wan's pipeline begins in fp32 whatever the model's dtype.
    noise, latents = start_of(name, BATCH, torch.float32 if name == "wan" else torch.float64)
    return noise, arguments(name, BATCH, STEPS, dtype=torch.float64, latents=latents, **SIZE)


@functools.cache
def restated(name: str, knobs: frozenset[str]) -> Tensor:
    """The latents of the stock pipeline under plain hooks."""
    pipe = pipeline(name)
    methods, _, reused = given(pipe.transformer, sorted(knobs))
    bits, orders, whole = (
        (None, None, {}) if reused is None else (reused.bits, reused.orders, reused.whole)
    )
    stages = next((method for method in methods if isinstance(method, RALU)), None)
    noise, told = drawing(name, stages is not None)
    first = STEPS - STAGES[-1] if stages else 0
    fresh = set(itertools.accumulate(STAGES[:-1], initial=0)) if stages else {0}
    drawn = {step - first for step in whole if step not in fresh}
    rule = STEPS - first, START, RESETS

    def choice() -> Any:
        if "RAS" not in knobs:
            return lambda *_: None
        return by_change(RATIO, *rule, packed=name.startswith(PACKED), drawn=drawn)

    with torch.no_grad():
        if stages is None:
            calls = calls_per_step(name)
            with RowOracle(pipe, choice(), bits, calls, orders, whole).installed():
                return tiny_models.latents_of(pipe, told)
        rules = [choice() for _ in range(BATCH)]
        choose = (lambda b, *seen: rules[b](*seen)) if "RAS" in knobs else None
        return ralu_oracle.run(pipe, stages, noise, told, bits, choose, orders, whole)


@pytest.mark.slow  # each method alone is held to the oldest diffusers by tests of its own
@pytest.mark.parametrize(
    ("name", "knobs"), LEGAL, ids=[f"{name}-{'+'.join(knobs)}" for name, knobs in LEGAL]
)
def test_legal_sets_equal_the_restatement(name, knobs):
    expected = restated(name, frozenset(knobs) - {"shed"})
    pipe = pipeline(name)
    methods, options, _ = given(pipe.transformer, knobs)
    handle = fastdit.patch(pipe, *methods, **options)
    try:
        found = tiny_models.latents_of(pipe, drawing(name, "RALU" in knobs)[1])
        if len(knobs) == 2 and not {"guard", "shed"} & set(knobs):
            check_plan(handle, name, SIZE if "RALU" in knobs else {})
    finally:
        handle.unpatch()
    found = as_picture(name, found) if "RALU" in knobs else found
    assert distance(found, expected) <= RUN_FP64


@pytest.mark.parametrize("knobs", [("RAS", "HarmoniCa"), ("RAS", "Budget")], ids="+".join)
@pytest.mark.parametrize("name", ["wan"])
def test_two_transformers_have_each_their_own(name, knobs):
    """The second of Wan 2.2 begins with a step that computes all tokens, and counts from there."""
    pipe = two(torch.float64)
    methods, _, reused = given(pipe.transformer, knobs)

    def installed(model: Any, first: int, last: int) -> Any:
        part = copy.copy(pipe)
        part.transformer = model
        whole = {step: order for step, order in reused.whole.items() if step != first}
        drawn = {step - first for step in whole}
        rule = by_change(RATIO, STEPS - first, START, RESETS, drawn=drawn)

        def choose(step: int, velocity: Tensor, sigmas: Any) -> Tensor | None:
            of_model = first <= step < last - 1
            return rule(step - first, velocity, sigmas[first:]) if of_model else None

        return RowOracle(part, choose, reused.bits, 2, reused.orders, whole).installed()

    with (
        installed(pipe.transformer, 0, BOUNDARY),
        installed(pipe.transformer_2, BOUNDARY, STEPS),
    ):
        expected = generate(pipe, name, steps=STEPS, batch=BATCH)
    handle = fastdit.patch(pipe, *methods)
    found = generate(pipe, name, steps=STEPS, batch=BATCH)
    assert distance(found, expected) <= RUN_FP64
    assert min(handle.report().tokens_per_step) == (0 if "Budget" in knobs else 16)


def check_plan(handle: Any, name: str, size: dict[str, int]) -> None:
    """What `explain` says of a plan is what the run did."""
    text = {"text_tokens": tiny_models.TEXT} if name != "qwen" else {}
    said = handle.explain(batch=BATCH, steps=STEPS, **tiny_models.asked(name, **size), **text)
    records = handle.last_run().records
    assert said.tokens_per_step == tuple(records[step].tokens for step in range(STEPS))
    computed = sum((part == COMPUTED).sum((1, 2)) for part in said.plan.cells.values())
    calls = calls_per_step(name)
    assert computed.tolist() == [records[step].computed // calls for step in range(STEPS)]
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in str(said.plan).splitlines()}
    assert lines.get("stage", "cmmfffff") == "cmmfffff"
    full = max(said.tokens_per_step)
    assert said.plan.shares == tuple(tokens / full for tokens in said.tokens_per_step)


# ---- the others


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sets_are_refused_and_leave_nothing_behind(name):
    pipe = tiny_models.pipeline(name)
    stock = generate(pipe, name, steps=2)
    before = snapshot(pipe.transformer), scheduler_snapshot(pipe.scheduler), set(pipe.__dict__)
    for knobs in SETS:
        if expected := reasons(name, knobs):
            methods, options, _ = given(pipe.transformer, knobs)
            with pytest.raises(fastdit.FastDiTError) as raised:
                fastdit.patch(pipe, *methods, **options)
            said = [
                isinstance(raised.value, e) and re.search(w, str(raised.value)) for e, w in expected
            ]
            assert any(said), (knobs, raised.value)
            after = snapshot(pipe.transformer), scheduler_snapshot(pipe.scheduler)
            assert (*after, set(pipe.__dict__)) == before, knobs
    same_bits(generate(pipe, name, steps=2), stock)


def test_a_router_of_a_whole_runs_timesteps_is_refused_in_stages():
    pipe = tiny_models.pipeline("sd3")
    before = snapshot(pipe.transformer)
    reused = Reused(pipe.transformer, 0)
    logits = {kind: np.where(part, 4.0, -4.0) for kind, part in reused.bits.items()}
    made_for = Conditions(timesteps=tuple(range(STEPS, 0, -1)))
    router = Router(logits, reused.names, conditions=made_for)
    staged, _, _ = given(pipe.transformer, ["RALU"])
    with pytest.raises(CompositionError, match=r"HarmoniCa was made .* RALU has others; strict=Fa"):
        fastdit.patch(pipe, HarmoniCa(router), *staged)
    assert snapshot(pipe.transformer) == before
    fastdit.patch(pipe, HarmoniCa(router, strict=False), *staged)
