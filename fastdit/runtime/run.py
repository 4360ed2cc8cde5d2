"""A run is one pass of one pipeline, or of one hand-written loop, over its timesteps.

Everything that a pass makes lives in its :class:`Run`, and goes when it ends: caches, packed weights, what methods
keep, the place in a recording of graphs. Of an ended run only what the report tells is left.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks.nodes import HeldSums, Weights
from fastdit.blocks.prepacked import PrepackedWeights
from fastdit.errors import FastDiTError, ScheduleError
from fastdit.methods.base import MethodRun, Step
from fastdit.runtime.branch import Branch
from fastdit.runtime.guard import Guard
from fastdit.runtime.timesteps import Timesteps
from fastdit.schedules.actions import BlockActions
from fastdit.schedules.plan import RunPlan
from fastdit.schedules.solvers import step_sigmas
from fastdit.versions import Watched

#: steps planned for when nobody says how many there will be: the training timesteps of every supported family
OPEN_STEPS = 1000


def nobody() -> None:
    """This stands for a weak reference to nothing."""


@dataclass
class StepRecord:
    """A record is what one step did: tokens through the blocks, components computed and reused by all its calls.

    Of its last call it has what the blocks were told, too; nothing where all compute.
    """

    tokens: int = 0
    computed: int = 0
    reused: int = 0
    actions: Sequence[BlockActions] = ()


@dataclass(eq=False, repr=False)
class Run:
    """A run is one pass over the timesteps.

    Attributes:
        patched: The model that runs.
        steps: How many there are; None where nobody says.
        plan: What each step computes.
        timesteps: Those of the scheduler that leads it, if one does.
        budget: What it has in place of the patch's; None for the patch's own.
        guard: What watches its forecasts; None where nothing does.
        led: Its steps are told by a scheduler.
        step, first: The step in progress and the first executed one, as indices of the scheduler.
        methods: What the methods keep and decide in this run, in the order in which they were given.
        selection, resolution: Those of them that choose the active tokens, and the tokens' sizes; or None.
        told: The timesteps that `with handle.run(...)` was given; None where it did not begin this.
        pipeline: Weak reference to the pipeline that runs, or what gives None.
        owner: Weak reference to the call of a pipeline or the worker (`owners.py`) that it belongs to. A worker keeps
            its runs, and the report the last run of a pipeline: neither is to be kept by them.
        guidance: Names of guidance scales -> what the pipeline's call was given.
        follower: What the scheduler that leads it knows of it.
        live: False once it has ended.
        branches, outputs, positions, latents, patch: What its calls leave behind for each other.
        calls: How many there were in this step, so far.
        records: Step -> what it did, which the report tells.
        keeps_prompt_keys: Whether keys and values of the prompt alone are kept.
        watched: The weights that are not read at each step.
        doubts, unforeseen: What tells, on the device, at which steps the model was given another timestep than its
            tables of shed modulations were made for, and at which it had no table.
        programs: How many calls ran as programs.
        trace: What captures and replays its calls, or why nothing does; see `graphs.py`.
        model, hooks, stage: What `programmed.py` knows of it.
    """

    patched: Any
    steps: int | None
    plan: RunPlan
    timesteps: Timesteps | None = None
    budget: Any = None
    guard: Guard | None = None
    step: int = 0
    first: int | None = None
    methods: tuple[MethodRun, ...] = ()
    selection: Any = None
    resolution: Any = None
    told: Sequence[Any] | None = None
    pipeline: Callable[[], Any] = nobody
    owner: Callable[[], Any] = nobody
    guidance: dict[str, Any] = field(default_factory=dict)
    follower: Any = None
    live: bool = True
    branches: dict[Any, Branch] = field(default_factory=dict)
    prepacked: PrepackedWeights = field(default_factory=PrepackedWeights)
    previews: Any = None
    trace: Any = None
    model: Any = None
    hooks: int = -1
    stage: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    bytes_checked: Any = None
    keeps_prompt_keys: bool = True
    watched: Watched | None = None
    doubts: list[tuple[int, Tensor]] = field(default_factory=list)
    unforeseen: set[int] = field(default_factory=set)
    image_tokens: int = 0
    text_tokens: int = 0
    patch: Any = 1
    latents: Sequence[int] = ()
    positions: Tensor | None = None
    calls: int = 0
    records: dict[int, StepRecord] = field(default_factory=dict)
    programs: int = 0
    packed_bytes: int = 0
    peak_bytes: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._ended = False
        self.led = self.timesteps is not None
        # A scheduler knows its run; a strong reference back would keep both, and the model, alive.
        self._scheduler = weakref.ref(self.timesteps.scheduler) if self.led else nobody
        self._by_timestep = not self.led
        self._doubts = False
        self._timestep: Any = None  # of the calls of this step, as a tensor or as a number
        self._sites: dict[Any, int] = {}
        self._usual: dict[Any, int] | None = None

    @property
    def scheduler(self) -> Any:
        """It tells the steps; None where there is none, or it is gone."""
        return self._scheduler()

    @cached_property
    def forecast_weights(self) -> Weights:
        """Its forecasts have these weights, at the sigmas that the scheduler, or the user, says."""
        return Weights(self.sigmas, self.plan.weights)

    @property
    def has_sums(self) -> bool:
        """Some reused outputs are kept as sums; where outputs are drawn, only of steps that are known to lie apart."""
        if not self.plan.sums or not self.patched.forecasts:
            return bool(self.plan.sums)
        sigmas = self.forecast_weights.sigmas
        return len(set(sigmas)) == len(sigmas) >= (self.steps or OPEN_STEPS)

    def hear_sigma(self, timestep: Any) -> None:
        """Where neither scheduler nor user said the sigmas, each step's timestep stands for its own; it is read."""
        sigmas = self.forecast_weights.sigmas
        while len(sigmas) <= self.step:
            sigmas.append(value_of(timestep))

    @property
    def sigmas(self) -> list[float]:
        """The sigma of each step, for which a user's timestep stands; empty where nobody says either. Read it once."""
        scheduler = self.scheduler
        if scheduler is not None:
            return step_sigmas(scheduler)
        return [] if self.told is None else [float(t) for t in self.told]

    def take(self, methods: Iterable[MethodRun]) -> None:
        """The run begins with what the methods keep."""
        self.methods = tuple(methods)
        for made in self.methods:
            if "rows" in made.method.writes:
                self.selection = made
            if "resolution" in made.method.writes:
                self.resolution = made

    # ---- where it stands

    def locate(self, site: Any, timestep: Any) -> Any:
        """This gives the key of the branch of a call at `site` in the pipeline's code, and brings the step up to date.

        A pipeline calls its transformer at the same places, and there as often, in every step. So one that calls more
        often either has several conditions or never tells its scheduler that a step is done: then the timestep tells.

        Raises:
            ScheduleError: There are more steps than were announced, or a method needs the scheduler to tell them.
        """
        if self.first is None and self.led:
            # Image-to-image enters the schedule late, a model that was patched in mid-run later still; a plan has the
            # scheduler's indices.
            places = (
                getattr(self.scheduler, name, None) for name in ("step_index", "_begin_index")
            )
            self.step = self.first = next(filter(None, places), 0)
        count = self._sites.get(site, 0)
        if self._by_timestep:
            if self.follow(timestep):
                count = 0
        elif self.led and count and (self._usual is None or count >= self._usual.get(site, 0)):
            self._cross_check(timestep)
            count = self._sites.get(site, 0)
        elif not count:
            self._timestep = timestep
        if self.step >= (self.steps or OPEN_STEPS):
            raise ScheduleError(one_call_too_many(self.steps or OPEN_STEPS))
        self.first = self.first or 0
        self._sites[site] = count + 1
        if self._usual is not None and count >= self._usual.get(site, 0):
            self._usual[site] = count + 1
        self.calls += 1
        return site, count

    def follow(self, timestep: Any) -> bool:
        """Another timestep is another step, and this tells whether it is one. It waits for a GPU to read the value."""
        value = value_of(timestep)
        another = self._timestep is not None and value != value_of(self._timestep)
        if another:
            self._next_step(Step())
        self._timestep = value
        return another

    def rises(self, timestep: Any) -> bool:
        """A call that is noisier than the one before belongs to another run."""
        if self._timestep is None:
            return False
        before, now = value_of(self._timestep), value_of(timestep)
        return now < before if self.patched.adapter.timesteps_rise else now > before

    def _cross_check(self, timestep: Any) -> None:
        """A call more than there usually are in a step is none of this step, if its timestep is another.

        Then what came before was a call before the loop, and its caches are of no use; or, if that happens again before
        the scheduler says that a step is done, nobody tells the steps but the timestep.
        """
        before = self._timestep
        if timestep is before or value_of(timestep) == value_of(before):
            return
        if self.resolution is not None:
            raise ScheduleError(
                f"{self.resolution.method.name} leads the scheduler, but the pipeline does not step it: it went from "
                f"timestep {value_of(before):g} to {value_of(timestep):g} by itself"
            )
        if not self._doubts:
            self._doubts = True
            self.drop_caches()
            self._sites.clear()
            self._timestep = timestep
            return
        self._by_timestep = True
        self.step += 1
        self.follow(timestep)

    def begin_step(self, scheduler: Any, velocity: Any, timestep: Any, sample: Any) -> None:
        """The scheduler is about to do a step with what the model gave it."""
        if not self.live:
            return
        # Of several transformers, the one that did this step tells of it.
        if self.previews is not None and self.calls:
            if not self.previews.latents:
                adapter = self.patched.adapter
                self.previews.grid = adapter.grid(self.latents, self.positions, self.patch)
            self.previews.add(scheduler, velocity, timestep, sample)
        for method in self.methods:
            method.begin_step(scheduler, sample)

    def end_step(self, step: Step) -> None:
        """A step is done, says the scheduler or the user."""
        if not self.live:
            return
        self._doubts = False
        self._next_step(step)
        if self.steps is not None and self.step >= self.steps:
            self.end()
            self.check()

    def _next_step(self, step: Step) -> None:
        if self.first is not None:
            if step.velocity is None and self.outputs:
                step.velocity = torch.stack(self.outputs).mean(0)
            if self.guard is not None and step.velocity is not None:
                self.guard.pictures = len(step.velocity)
            for method in self.methods:
                method.end_step(step)
        self.outputs.clear()
        if self._usual is None and self._sites:
            self._usual = dict(self._sites)
        self._sites.clear()
        self._timestep = None
        self.step += 1
        self.calls = 0

    def advance(self, velocity: Tensor | None) -> None:
        """The user says that a step is done, so the timestep need not tell."""
        self._by_timestep = False
        self.end_step(Step(velocity=velocity))

    # ---- what it holds

    def forget_prompts(self) -> None:
        """What was made of the prompt alone is made anew."""
        for branch in self.branches.values():
            branch.prompts.clear()
            branch.form = None

    def forget_weights(self) -> None:
        """So is what was made for steps to come."""
        self.forget_prompts()
        for branch in self.branches.values():
            branch.modulations = None

    def go_by(self, budget: Any) -> None:
        """Before its first call: it goes by this budget."""
        self.budget = budget
        self.plan = self.patched.plan(self.plan.steps, (), self.timesteps, budget)

    def plan_partial(self, partial: tuple[bool, ...]) -> None:
        """The plan is made anew for steps of which some compute a part of the tokens only."""
        if self.plan.reuse is not None:
            self.plan = self.patched.plan(self.steps, partial, self.timesteps, self.budget)

    def drop_caches(self) -> None:
        """All caches are freed; a run that goes on computes what it misses."""
        for branch in self.branches.values():
            branch.clear()
        self.branches.clear()
        self.outputs.clear()
        self.packed_bytes = max(self.packed_bytes, self.prepacked.nbytes)
        self.prepacked.clear()

    def cache_bytes(self) -> int:
        """The caches hold so many bytes now; each storage counts once."""
        storages = {}
        for branch in list(self.branches.values()):
            made = [*branch.slots.values(), *branch.prompts.values(), branch.velocity]
            waiting = [*made, *branch.keys.values(), branch.outputs.nodes, branch.outputs.tokens]
            while waiting:
                value = waiting.pop()
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
                elif isinstance(value, HeldSums):
                    waiting += *value.sums, value.shared
                elif isinstance(value, (tuple, list)):
                    waiting += value
        return sum(storages.values())

    def check(self) -> None:
        """This refuses a result that was made with modulations of something else than the model was given.

        It reads once what was noted on the device in all steps, and waits for that.

        Raises:
            FastDiTError: Naming the steps.
        """
        doubts, self.doubts[:] = list(self.doubts), []
        told = torch.stack([flag for _, flag in doubts]).tolist() if doubts else []
        wrong = sorted({step for (step, _), flag in zip(doubts, told, strict=True) if flag})
        if wrong:
            raise FastDiTError(
                f"the model was given other timesteps at steps {wrong} than its scheduler has, for which the tables of "
                "its shed modulations were made: the result is wrong. Run it without shed_modulations"
            )

    def end(self) -> None:
        """The run is over, or was broken off: only what the report tells stays. A second time makes up the rest."""
        if self._ended:
            return
        if self.live:
            self.seconds = time.perf_counter() - self.started
        self.live = False
        if self.trace is not None and not isinstance(self.trace, str):
            self.trace.end()
        self.drop_caches()
        for method in self.methods:
            method.end()
        self.told = self._timestep = None
        self.timesteps = None  # they hold the scheduler
        self.patched.runs.forget(self)
        self._ended = True


def value_of(timestep: Any) -> float:
    """This reads a timestep argument as a number; it waits for a GPU."""
    if isinstance(timestep, Tensor):
        return float(timestep.reshape(-1)[0])
    return float(timestep or 0)


def one_call_too_many(steps: int) -> str:
    """This is the message for a call after the last step."""
    return (
        f"the transformer was called for step {steps + 1} of a run of {steps} steps; "
        "call reset() on the handle before another run"
    )
