"""A patched model: what never changes while it is patched, shared by all threads and pipelines.

It is told of three things: a scheduler sets its timesteps (`clock.py`), the transformer is called (native hooks), and
the user begins a run by hand. It finds whose that is (`owners.py`) and hands it to the run concerned; of its own it
keeps only which runs there are. It has no locks, which an interrupt could leave behind locked: what several threads may
do at once is one step of a dict, or may be done twice.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.forward import Forward
from fastdit.errors import ArgumentError, FastDiTError, ScheduleError
from fastdit.observe import observed
from fastdit.runtime import clock, owners, pipelines
from fastdit.runtime.arrivals import (
    refuse_other_attention,
    refuse_other_caches,
    refuse_replaced_blocks,
)
from fastdit.runtime.call import Call
from fastdit.runtime.graphs import Graphs
from fastdit.runtime.owners import Hand, PipelineCall, Place, Seat
from fastdit.runtime.run import OPEN_STEPS, Run
from fastdit.schedules.conditions import Conditions, guidance_of
from fastdit.schedules.plan import RunPlan, plan_run
from fastdit.schedules.solvers import noise_of
from fastdit.spec import ModelSpec

#: plans that are kept: numbers of steps, and which of them compute a part of the tokens
PLANS = 32


class _Here(threading.local):
    """The transformer call in progress in a thread, and what its blocks ask."""

    call: Call | None = None
    forward: Forward | None = None


class Patched:
    """A patched transformer.

    Attributes:
        adapter, spec, methods, ops: What runs, fixed when patching.
        blocks: The transformer's blocks of all kinds in running order.
        eager: True on the `reference` backend: no rewrite that changes a rounding.
        linears: Layers of the blocks whose weights are kept packed in a run.
        graphs: What captures and replays whole runs; None where they stay eager.
        pipeline: The pipeline that was patched: a weak reference, or what gives None.
        acts: Whether a method leaves anything out.
        max_cache_bytes: The least that a method allows caches to hold; None for no bound.
        here: The call in progress in this thread.
    """

    def __init__(
        self,
        adapter: Any,
        spec: ModelSpec,
        methods: Sequence[Any],
        ops: Any,
        blocks: Sequence[nn.Module],
        eager: bool,
        linears: Sequence[nn.Linear] = (),
        graphs: Graphs | None = None,
        pipeline: Any = None,
    ) -> None:
        self.adapter = adapter
        self.spec = spec
        self.methods = tuple(methods)
        self.ops = ops
        self.blocks = tuple(blocks)
        self.eager = eager
        self.linears = tuple(linears)
        self.graphs = graphs
        self.pipeline: Callable[[], Any] = _nobody if pipeline is None else weakref.ref(pipeline)
        self.acts = any(method.writes for method in self.methods)
        self.forecasts = any(method.forecasts for method in self.methods)
        # A family that runs two token sizes by its own attention may do so for one image of several.
        self._stands_in = self._writer("rows") is not None or (
            self._writer("resolution") is not None and adapter.replaces_attention
        )
        self._asks = any(method.made_for is not None for method in self.methods)
        bounds = (m.max_cache_bytes for m in self.methods if m.max_cache_bytes is not None)
        self.max_cache_bytes: int | None = min(bounds, default=None)
        dtypes = (m.cache_dtype for m in self.methods if m.cache_dtype is not None)
        self._cache_dtype: str | None = next(dtypes, None)
        self.here = _Here()
        self._plans: dict[Any, RunPlan] = {}
        self._seats: weakref.WeakKeyDictionary[Place, Seat] = weakref.WeakKeyDictionary()
        # By id: a set of weak references cannot be read while another thread begins a run.
        self._live: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
        self._hands: set[Hand] = set()
        self._last: Run | None = None
        self._unclaimed: Callable[[], Run | None] = _nobody
        # By id: somebody's own pipeline may not be hashable.
        self._followed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._enclosed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        # Hooks that a compiled model calls as they are. Bound methods, so that a copied model's hooks belong to its own
        # patch; wrapped here and not in the class, since torch's compiler takes long to import.
        self.forward_pre_hook = types.MethodType(_uncompiled(Patched.before_forward), self)
        self.forward_hook = types.MethodType(_uncompiled(Patched.after_forward), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        """A copied model gets a patch of its own: the same methods, the copied blocks, no run."""
        clone = Patched.__new__(Patched)
        memo[id(self)] = clone
        pipeline = memo.get(id(self.pipeline()))  # where the whole pipeline is being copied
        clone.__init__(
            self.adapter,
            self.spec,
            self.methods,
            self.ops,
            copy.deepcopy(self.blocks, memo),
            self.eager,
            copy.deepcopy(self.linears, memo),
            self.graphs and Graphs(),
            pipeline,
        )
        if pipeline is not None:  # an ordinary one again, but for the copied hook on its decoder
            clone._enclosed[id(pipeline)] = pipeline
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FastDiTError(
            "a patched model cannot be pickled: call fastdit.unpatch first; "
            "state_dict and save_pretrained work as they are"
        )

    # ---- who is followed

    def follow(self, pipeline: Any) -> None:
        """Let a pipeline tell of its calls, and its scheduler of its steps."""
        if pipelines.can_enclose(pipeline):
            self._enclosed[id(pipeline)] = pipeline
            pipelines.enclose(pipeline, self)
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            clock.check_scheduler(scheduler)
            self._followed[id(scheduler)] = scheduler
            clock.attach(scheduler, self)

    def unfollow(self) -> None:
        """Leave all pipelines and schedulers as they were."""
        for scheduler in list(self._followed.values()):
            clock.detach(scheduler, self)
        for pipeline in list(self._enclosed.values()):
            pipelines.release(pipeline, self)
        self._followed.clear()
        self._enclosed.clear()

    # ---- runs

    def start(
        self,
        steps: int | None,
        scheduler: Any = None,
        levels: clock.Levels | None = None,
        by_hand: bool = False,
        in_use: bool = False,
        pipeline: Any = None,
    ) -> Run | None:
        """Begin a run of `steps` steps; None where a run that begins here is to be stock.

        Args:
            in_use: The pipeline has already taken the scheduler's timesteps.

        Raises:
            ScheduleError: A method does not fit this number of steps.
        """
        seat = self.seat()
        if seat.disabled:
            self._note(None)
            return None
        rows, resolution = self._writer("rows"), self._writer("resolution")
        if steps is None and rows is not None:
            raise ScheduleError(
                f"{rows.name} must know the number of steps when a run starts: "
                "call the transformer inside `with handle.run(timesteps)`"
            )
        if resolution is not None and scheduler is None:
            raise ScheduleError(
                f"{resolution.name} takes its steps from the pipeline's scheduler, but this is no call of its run"
            )
        if scheduler is not None:
            self.check_sampler(noise_of(scheduler))
        planned = OPEN_STEPS if steps is None else steps
        if resolution is not None:
            resolution.check_steps(planned)
        for method in self.methods:
            if method is not resolution:
                method.check_steps(self._steps_of(method, planned))
        if resolution is not None:
            clock.check_flow(scheduler)
            levels.check_default(resolution.name)
            clock.replace_sigmas(scheduler, resolution.run_sigmas, in_use)
            levels = levels.with_sigmas(resolution.run_sigmas)
        run = Run(self, steps, self.plan(planned, levels=levels), scheduler, levels, by_hand)
        run.take(made for made in (m.begin(run) for m in self.methods) if made is not None)
        if pipeline is not None and pipelines.can_enclose(pipeline):
            run.pipeline = weakref.ref(pipeline)
        if seat.watch is not None and seat.watch.begin(run):
            run.previews = seat.watch
        return run

    def check_sampler(self, noise: str) -> None:
        """Refuse a sampler that a method does not fit.

        Args:
            noise: What makes it draw noise at each step; "" for one that draws none.
        """
        for method in self.methods:
            method.check_sampler(noise)

    def _writer(self, field: str) -> Any:
        return next((method for method in self.methods if field in method.writes), None)

    def _steps_of(self, method: Any, steps: int) -> int:
        """The steps that `method` has a say in: one that leaves tokens out has to wait for the full resolution."""
        resolution = self._writer("resolution")
        if "rows" in method.writes and resolution is not None:
            last = resolution.stages()[-1]
            return last.steps if last.layout == "full" else 0
        return steps

    def plan(
        self, steps: int, partial: tuple[bool, ...] = (), levels: clock.Levels | None = None
    ) -> RunPlan:
        """The plan of a run. One that was mapped to other noise levels is made anew for each run."""
        repeats = self.forecasts and levels is not None and levels.repeat
        key = steps, partial, repeats
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        plan = plan_run(self.methods, self.spec, steps, partial, levels, not self.eager, repeats)
        if plan.reuse is None or not plan.reuse.rows:
            if len(self._plans) >= PLANS:
                self._plans = {}
            self._plans[key] = plan
        return plan

    def claim(self, follower: clock.Follower, scheduler: Any) -> PipelineCall | Place:
        """Who sets the timesteps of a scheduler, and is the only one to do so until they are set.

        Raises:
            ScheduleError: The scheduler leads somebody else's run, or is about to.
        """
        owner = owners.setting(scheduler, 3) or owners.here()
        self._claim(follower, owner, scheduler)
        return owner

    def _claim(self, follower: clock.Follower, owner: Any, scheduler: Any) -> None:
        before = follower.claim(owner)
        while before is not owner and _is_over(before):  # it was interrupted
            follower.unclaim(before)
            before = follower.claim(owner)
        run = follower.run
        leads = None if run is None or not run.live else run.owner
        # A loop that has not begun, or was given up here or where nothing runs any more, is in nobody's way.
        begun = isinstance(leads, PipelineCall) or (leads is not None and run.first is not None)
        if before is not owner or (begun and leads is not owner and not _is_over(leads)):
            follower.unclaim(owner)
            raise ScheduleError(
                f"this {type(scheduler).__name__} leads a run that is in progress, and one scheduler cannot lead two; "
                "give each pipeline its own: Pipeline.from_pipe(pipe, "
                "scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))"
            )

    def start_led(
        self, follower: clock.Follower, owner: Any, scheduler: Any, levels: clock.Levels
    ) -> None:
        """A scheduler has set its timesteps: `owner` begins a run that it leads, if it runs this model."""
        call = owner if isinstance(owner, PipelineCall) else None
        if call is not None and not owners.holds(call.pipeline, self):
            return
        if follower.run is not None:
            follower.run.end()
        if call is not None and call.runs.get(self) is not None:
            call.runs[self].end()
        if call is not None:
            self.follow(call.pipeline)
        run = self.start(
            len(scheduler.timesteps), scheduler, levels, pipeline=call and call.pipeline
        )
        if call is not None:
            call.runs[self] = run
        else:
            seat = self.seat()
            if seat.run is not None:
                seat.run.end()
            seat.run = run
            if run is not None:
                self._unclaimed = weakref.ref(run)
        self._enlist(run, owner, follower)

    def _enlist(
        self, run: Run | None, owner: Any = None, follower: clock.Follower | None = None
    ) -> None:
        """Count a run among the live ones. What ends it knows it already, lest an interrupt comes between."""
        if follower is not None:
            follower.run = run
        if run is not None:
            run.follower = follower
            if owner is not None:
                run.owner = owner
            self._live[id(run)] = run

    def forget(self, run: Run) -> None:
        """A run has ended."""
        self._live.pop(id(run), None)
        if run.records:
            self._note(run)
        if run.follower is not None and run.follower.run is run:
            run.follower.run = None
        here = self.here
        while here.call is not None and here.call.run is run:  # an interrupt came between the hooks
            here.call = here.call.outer
            here.forward = None if here.call is None else here.call.forward

    def live_runs(self) -> list[Run]:
        """The runs in progress, of all threads; loops that were given up count until their thread goes on."""
        return [run for found in self._live.valuerefs() if (run := found()) is not None]

    def refuse_while_running(self, verb: str) -> None:
        """Refuse to take the patch away from under a run.

        Raises:
            FastDiTError: A pipeline's call, or a `with handle.run(...)`, is in progress.
        """
        for run in self.live_runs():
            owner = run.owner
            if run.by_hand or (isinstance(owner, PipelineCall) and owner.live):
                what = "a `with handle.run(...)`" if run.by_hand else "a call of a pipeline"
                raise FastDiTError(
                    f"cannot {verb} a model while {what} runs on it (step {run.step} of {run.steps}); "
                    "let it end first"
                )

    # ---- this thread's own

    def seat(self) -> Seat:
        """What goes on here with this model outside of pipelines."""
        place = owners.here()
        found = self._seats.get(place)
        if found is None:
            found = self._seats[place] = Seat()
        return found

    def begin_by_hand(self, seat: Seat, hand: Hand, steps: int) -> Run | None:
        """Begin a run that the user leads here."""
        hand.run = self.start(steps, by_hand=True)
        self._hands.add(hand)
        seat.hands.append(hand)
        self._enlist(hand.run)
        return hand.run

    def end_by_hand(self, seat: Seat, hand: Hand) -> None:
        """End such a run, also one that was broken off while it began."""
        if hand in seat.hands:
            seat.hands.remove(hand)
        self._hands.discard(hand)
        if hand.run is not None:
            hand.run.end()

    def advance(self, velocity: Tensor | None) -> None:
        """A step of the loop here is done, says the user; one that a scheduler leads hears the scheduler."""
        seat = self.seat()
        if not seat.hands and seat.disabled:
            return
        if not seat.hands and seat.run is None:
            raise ArgumentError(
                "advance() needs a run in progress: use it inside `with h.run(timesteps)`"
            )
        run = seat.hands[-1].run if seat.hands else seat.run
        if run is None or run.led:
            return
        if velocity is not None and not isinstance(velocity, Tensor):
            raise ArgumentError(f"velocity must be a tensor or None, got {velocity!r}")
        run.advance(velocity)

    def reset(self) -> None:
        """End the runs of this thread's or task's own loops."""
        seat = self.seat()
        for run in (*(hand.run for hand in seat.hands), seat.run):
            if run is not None:
                run.end()
        if self._last is seat.last:
            self._last = None
        seat.run = seat.last = None

    def end(self) -> None:
        """The patch goes: end every loop that was given up."""
        for run in self.live_runs():
            run.end()
        self._seats.clear()
        self._last = None

    def last_run(self) -> Run | None:
        """The run of this thread's or task's last call, else of the last call of all."""
        found = self._seats.get(owners.here())
        return found.last if found is not None and found.last is not None else self._last

    def cache_bytes(self) -> int:
        """Bytes that the caches of all runs hold now."""
        return sum(run.cache_bytes() for run in self.live_runs())

    # ---- one transformer call

    def before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Native forward pre-hook of the transformer: place this call in its run and prepare it.

        Returns:
            The arguments of a call of the active tokens alone; None where all tokens pass.
        """
        here = self.here
        if here.call is not None and not owners.is_inside(transformer):
            here.call = None
        call = here.call = Call(here.call)
        here.forward = None
        arguments = self.adapter.call(transformer, args, kwargs)
        run, site = self._run_of(arguments.timestep)
        call.run = run  # from now on what ends the run takes the call away, where an interrupt passes by the hook below
        if run is None:
            return None
        if self.acts and torch.is_grad_enabled():
            self._refuse_checkpointing(transformer)
        place = run.place(site, arguments.timestep)
        try:
            if not run.image_tokens:
                self._check_first_call(transformer, run, arguments)
            given = call.begin(run, place, transformer, arguments, args, kwargs)
        except FastDiTError:
            run.end()
            raise
        here.forward = call.forward
        return given

    def after_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """Native forward hook of the transformer, also called after an exception.

        Returns:
            The output with the velocities of all tokens after a call of the active ones; None to leave it.
        """
        here = self.here
        call = here.call
        if call is None:
            return None
        here.call = call.outer
        here.forward = None if call.outer is None else call.outer.forward
        if (call.forward is None and call.forecast is None) or output is None:
            return None
        return call.finish(output)

    def __call__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The transformer's rewritten forward, where runs are replayed."""
        call = self.here.call
        if call is None or (call.forward is None and call.forecast is None):
            return type(transformer).forward(transformer, *args, **kwargs)
        return call.compute(args, kwargs)

    def _run_of(self, timestep: Any) -> tuple[Run | None, Any]:
        """The run that a transformer call belongs to, and where in its pipeline's code it is made; None runs stock."""
        call, frame = owners.calling(self, 3)
        seat = self.seat() if call is None or self._hands else None
        if call is not None and not (
            seat is not None and seat.hands and seat.hands[-1].born > call.born
        ):
            run = call.runs.get(self, _NEW)
            if run is _NEW or (run is not None and not run.live):
                run = self._begin_in(call, frame, run is _NEW)
            if self._asks and run is not None and not run.guidance:
                run.guidance = guidance_of(frame.f_locals)
            site = frame.f_code, frame.f_lasti
        else:
            run = self._own_run(seat, timestep)
            # Without a scheduler that counts the steps, two calls in a loop may just as well be two steps.
            site = owners.caller(2) if run is not None and run.led else None
        return run, site

    def _note(self, run: Run | None) -> None:
        """The last run here, which the report is about; None for one that is stock."""
        self._last = self.seat().last = run

    def _begin_in(self, call: PipelineCall, frame: FrameType, first: bool) -> Run | None:
        """The run of a pipeline's call whose scheduler set its timesteps before it was followed, or has none left."""
        pipeline = call.pipeline
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        self.follow(pipeline)
        if first and timesteps is not None and len(timesteps):
            follower = clock.follower_of(scheduler, self)
            levels = clock.found_levels(scheduler, frame.f_locals)
            try:
                self._claim(follower, call, scheduler)
                run = self.start(len(timesteps), scheduler, levels, in_use=True, pipeline=pipeline)
                call.runs[self] = run
                self._enlist(run, call, follower)
            finally:
                follower.unclaim(call)
        else:
            run = call.runs[self] = self.start(self._made_steps(), pipeline=pipeline)
            self._enlist(run, call)
        return run

    def _made_steps(self) -> int | None:
        """The number of steps that a method was made for."""
        return next((m.run_steps for m in self.methods if m.run_steps is not None), None)

    def _own_run(self, seat: Seat, timestep: Any) -> Run | None:
        """The run of a loop without a pipeline. Without a scheduler the timestep tells, which waits for a GPU."""
        if seat.hands:
            run = None if seat.disabled else seat.hands[-1].run
            if run is not None:
                run.check_open()
            return run
        if seat.disabled:
            return None
        run = seat.run
        if run is None or not run.live:
            run = self._adopted(seat) or run
        if run is None or not run.live or (not run.led and run.rises(timestep)):
            if run is not None:
                run.end()
            run = seat.run = self.start(self._made_steps())
            self._enlist(run, owners.here())
        return run

    def _adopted(self, seat: Seat) -> Run | None:
        """A run whose timesteps were set elsewhere, by what has ended since: an earlier cell of a notebook."""
        run = self._unclaimed()
        if (
            run is None
            or not run.live
            or run.first is not None
            or not (run.owner is None or run.owner.gone)
        ):
            return None
        seat.run, run.owner = run, owners.here()
        return run

    # ---- what a run's first call shows

    def _check_first_call(self, transformer: nn.Module, run: Run, arguments: Any) -> None:
        """Refuse a run that a method was not made for, or that something which came after `patch` would spoil."""
        refuse_replaced_blocks(self, transformer)
        if self.acts:
            names = " + ".join(method.name for method in self.methods)
            refuse_other_caches(transformer, self.blocks, names)
        if self._stands_in:
            refuse_other_attention(self, arguments.tells_attention)
        wanted = {m.name: m.made_for for m in self.methods if m.made_for is not None}
        # Only where somebody asks: the timesteps may have to come from a GPU.
        found = (
            replace(Conditions.of(run.scheduler, arguments.tokens, {}), **run.guidance)
            if wanted
            else None
        )
        for name, conditions in wanted.items():
            conditions.check(found, name)
        run.image_tokens, run.text_tokens = arguments.tokens, arguments.text
        self._note(run)

    def _refuse_checkpointing(self, transformer: nn.Module) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when the caches have moved on."""
        if getattr(transformer, "gradient_checkpointing", False):
            raise ArgumentError(
                "a schedule cannot run under gradient checkpointing, which recomputes blocks in the backward pass; "
                "call disable_gradient_checkpointing() on the transformer, or run under torch.no_grad()"
            )

    # ---- what calls ask

    def may_collapse(self) -> bool:
        """Whether reused outputs may be kept as sums: nobody looks at the stream between blocks."""
        return not self.eager and not any(map(observed, self.blocks))

    def precision(self, arguments: Any) -> tuple[torch.dtype, torch.dtype] | None:
        """(dtype of slots, dtype of the streams) where a method keeps less than the model computes in."""
        if self._cache_dtype is None:
            return None
        slots, streams = getattr(torch, self._cache_dtype), arguments.hidden_states.dtype
        return (slots, streams) if slots.itemsize < streams.itemsize else None

    def compiled_call(self, transformer: nn.Module, run: Run) -> Any:
        """The transformer's compiled call, by `transformer.compile()` or a wrapper in the pipeline; or None."""
        pipeline = run.pipeline() or self.pipeline()
        wrapper = getattr(pipeline, "transformer", None)
        if getattr(wrapper, "_orig_mod", None) is transformer:
            return wrapper.forward
        return transformer._compiled_call_impl


_NEW = object()


def _is_over(owner: Any) -> bool:
    """Whether an owner of runs is at it no more, or is the caller's own place, where a loop was given up."""
    if isinstance(owner, PipelineCall):
        return not owner.live
    return owner is None or owner.gone or owner.is_here()


def _nobody() -> None:
    """In place of a weak reference to nothing."""


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)
