"""The runs of a patched model begin here, and a transformer call finds its own.

Three things tell of them: a scheduler sets its timesteps (`clock.py`), the transformer is called, and the user begins a
run by hand. A call of a pipeline has its run (`owners.py`); a loop without a pipeline has it in the :class:`Local`
state of its worker. Nothing here takes a lock, which an interrupt could leave behind locked: what several threads may
do at once is one step of a dict, or may be done twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

from fastdit.errors import ArgumentError, FastDiTError, ScheduleError
from fastdit.runtime import clock, owners
from fastdit.runtime.disguise import is_ordinary
from fastdit.runtime.guard import Guard
from fastdit.runtime.owners import PipelineCall, Worker
from fastdit.runtime.run import OPEN_STEPS, Run, nobody, one_call_too_many
from fastdit.runtime.timesteps import Timesteps, check_flow, found_timesteps, replace_sigmas
from fastdit.schedules.conditions import guidance_of
from fastdit.schedules.solvers import noise_of

_NEW = object()


@dataclass(eq=False)
class Local:
    """A worker has a local state for each patched model: what goes on there outside of pipelines.

    Attributes:
        run: The run of a loop that is led by a scheduler, or followed by timestep.
        manual: The loops by hand that are open, the innermost last.
        disabled: The `with handle.disabled()` that are open.
        watch: What collects previews of the runs that begin, inside `with handle.watch()`.
        budget: What the runs that begin have in place of the patch's, inside `with handle.budget(...)`.
        last: The run that made the last call here.
    """

    run: Run | None = None
    manual: list[ManualLoop] = field(default_factory=list)
    disabled: set[Any] = field(default_factory=set)
    watch: Any = None
    budget: Any = None
    last: Run | None = None


@dataclass(eq=False)
class ManualLoop:
    """A manual loop is a `with handle.run(...)` that is open.

    Attributes:
        local: The state of the worker that opened it.
        timesteps: What it was given.
        run: The run that it leads; None where it was begun while disabled.
        born: Its number in the order in which calls and loops began.
    """

    local: Local
    timesteps: Any
    run: Run | None = None
    born: int = field(default_factory=owners.number)


class Runs:
    """These are the runs of one patched model, and what its workers own."""

    def __init__(self, patched: Any) -> None:
        self._patched = patched
        self._locals: weakref.WeakKeyDictionary[Worker, Local] = weakref.WeakKeyDictionary()
        # By id: a set of weak references cannot be read while another thread begins a run.
        self._live: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
        self._manual: set[ManualLoop] = set()
        self._last: Run | None = None
        self._unclaimed: Callable[[], Run | None] = nobody

    # ---- which there are

    def live(self) -> list[Run]:
        """The runs in progress are those of all threads; loops that were given up count until their thread goes on."""
        return [run for found in self._live.valuerefs() if (run := found()) is not None]

    def last(self) -> Run | None:
        """The last run is that of this worker's last call, else of the last call of all."""
        found = self._locals.get(owners.here())
        return found.last if found is not None and found.last is not None else self._last

    def cache_bytes(self) -> int:
        """The caches of all runs hold so many bytes now."""
        return sum(run.cache_bytes() for run in self.live())

    def refuse_while_running(self, verb: str) -> None:
        """The patch is not taken away from under a run.

        Raises:
            FastDiTError: A pipeline's call, or a `with handle.run(...)`, is in progress.
        """
        for run in self.live():
            owner = run.owner()
            manual = run.told is not None
            if manual or (isinstance(owner, PipelineCall) and not owner.over):
                what = "a `with handle.run(...)`" if manual else "a call of a pipeline"
                raise FastDiTError(
                    f"cannot {verb} a model while {what} runs on it (step {run.step} of {run.steps}); "
                    "let it end first"
                )

    def note(self, run: Run | None) -> None:
        """The report is about this run from now on; None is one that is stock."""
        self._last = self.local().last = run

    def forget(self, run: Run) -> None:
        """A run has ended: it counts as live no more, and no call of it is in progress."""
        self._live.pop(id(run), None)
        if run.records:
            self.note(run)
        if run.follower is not None and run.follower.run is run:
            run.follower.run = None
        here = self._patched.here
        while here.call is not None and here.call.run is run:  # an interrupt came between the hooks
            here.call = here.call.outer
            here.forward = None if here.call is None else here.call.forward

    def end(self) -> None:
        """The patch goes, and with it every loop that was given up."""
        for run in self.live():
            run.end()
        self._locals.clear()
        self._last = None

    # ---- how they begin

    def _start(
        self, steps: int | None, timesteps: Timesteps | None, in_use: bool, pipeline: Any
    ) -> Run | None:
        """A run of `steps` steps starts; None where it is to be stock.

        Args:
            timesteps: Those of the scheduler that leads it.
            in_use: The pipeline has already taken the scheduler's timesteps.

        Raises:
            ScheduleError: A method does not fit this number of steps.
        """
        patched, local = self._patched, self.local()
        if local.disabled:
            self.note(None)
            return None
        planned = OPEN_STEPS if steps is None else steps
        methods = patched.under(local.budget, planned)
        sparse, resolution = (
            patched.writer(field, planned, local.budget) for field in ("rows", "resolution")
        )
        if steps is None and sparse is not None:
            raise ScheduleError(
                f"{sparse.name} must know the number of steps when a run starts: "
                "call the transformer inside `with handle.run(timesteps)`"
            )
        if resolution is not None and timesteps is None:
            raise ScheduleError(
                f"{resolution.name} takes its steps from the pipeline's scheduler, but this is no call of its run"
            )
        if timesteps is not None:
            leading = timesteps.scheduler
            patched.check_sampler(noise_of(leading), type(leading).__name__, local.budget)
        full = planned
        if resolution is not None:
            last = resolution.stages()[-1]
            full = last.steps if last.layout == "full" else 0
        for method in methods:  # one that leaves tokens out waits for the full resolution
            method.check_steps(full if "rows" in method.writes else planned)
        if resolution is not None:
            check_flow(timesteps.scheduler)
            timesteps.check_default(resolution.name)
            replace_sigmas(timesteps.scheduler, resolution.run_sigmas, in_use)
            timesteps = timesteps.with_sigmas(resolution.run_sigmas)
        plan = patched.plan(planned, timesteps=timesteps, budget=local.budget)
        bounds = (m.bounds(planned) for m in methods)
        watched = next((Guard(found) for found in bounds if found is not None), None)
        run = Run(patched, steps, plan, timesteps, local.budget, watched)
        run.take(made for made in (m.begin(run) for m in methods) if made is not None)
        if pipeline is not None and is_ordinary(pipeline):
            run.pipeline = weakref.ref(pipeline)
        if local.watch is not None and local.watch.begin(run):
            run.previews = local.watch
        return run

    def begin(
        self,
        owner: PipelineCall | ManualLoop | Worker,
        steps: int | None,
        timesteps: Timesteps | None = None,
        follower: clock.Follower | None = None,
        in_use: bool = False,
    ) -> Run | None:
        """A call of a pipeline, a loop by hand, or another loop of the worker here begins a run."""
        call = owner if isinstance(owner, PipelineCall) else None
        run = self._start(steps, timesteps, in_use, call and call.pipeline)
        if call is not None:
            call.runs[self._patched] = run
        elif isinstance(owner, ManualLoop):
            owner.run = run
            self._manual.add(owner)
            owner.local.manual.append(owner)
        else:
            local = self.local()
            if local.run is not None:
                local.run.end()
            local.run = run
        # What ends the run knows it already, lest an interrupt comes between.
        if follower is not None:
            follower.run = run
        if run is not None:
            run.follower = follower
            if isinstance(owner, ManualLoop):
                run.told = owner.timesteps
            else:
                run.owner = weakref.ref(owner)
            self._live[id(run)] = run
        return run

    def begin_led(self, follower: clock.Follower, owner: Any, timesteps: Timesteps) -> None:
        """A scheduler has set its timesteps: `owner` begins a run that it leads, if it runs this model."""
        call = owner if isinstance(owner, PipelineCall) else None
        if call is not None and not owners.holds(call.pipeline, self._patched):
            return
        for before in (follower.run, None if call is None else call.runs.get(self._patched)):
            if before is not None:
                before.end()
        if call is not None:
            self._patched.followed.follow(call.pipeline)
        run = self.begin(owner, len(timesteps.scheduler.timesteps), timesteps, follower)
        if call is None and run is not None:
            self._unclaimed = weakref.ref(run)

    def _begin_in(self, call: PipelineCall, frame: FrameType, first: bool) -> Run | None:
        """A pipeline's call begins a run whose timesteps were set before the scheduler was followed, or has none."""
        scheduler = getattr(call.pipeline, "scheduler", None)
        set_before = getattr(scheduler, "timesteps", None)
        self._patched.followed.follow(call.pipeline)
        if not first or set_before is None or not len(set_before):
            return self.begin(call, self._patched.made_steps)
        follower = clock.follower_of(scheduler, self._patched)
        timesteps = found_timesteps(scheduler, frame.f_locals)
        try:
            follower.claim(call, scheduler)
            return self.begin(call, len(set_before), timesteps, follower, in_use=True)
        finally:
            follower.unclaim(call)

    # ---- what a worker owns

    def local(self) -> Local:
        """This gives the local state of the worker that the caller runs in."""
        worker = owners.here()
        found = self._locals.get(worker)
        if found is None:
            found = self._locals[worker] = Local()
        return found

    def end_manual(self, loop: ManualLoop) -> None:
        """A loop by hand ends its run, also one that was broken off while it began."""
        if loop in loop.local.manual:
            loop.local.manual.remove(loop)
        self._manual.discard(loop)
        if loop.run is not None:
            loop.run.end()

    def advance(self, velocity: Tensor | None) -> None:
        """The user says that a step of the loop here is done; one that a scheduler leads hears the scheduler."""
        local = self.local()
        if not local.manual and local.disabled:
            return
        if not local.manual and local.run is None:
            raise ArgumentError(
                "advance() needs a run in progress: use it inside `with h.run(timesteps)`"
            )
        run = local.manual[-1].run if local.manual else local.run
        if run is None or run.led:
            return
        if velocity is not None and not isinstance(velocity, Tensor):
            raise ArgumentError(f"velocity must be a tensor or None, got {velocity!r}")
        run.advance(velocity)

    def reset(self) -> None:
        """This ends the runs of the worker's own loops."""
        local = self.local()
        for run in (*(loop.run for loop in local.manual), local.run):
            if run is not None:
                run.end()
        if self._last is local.last:
            self._last = None
        local.run = local.last = None

    # ---- how a transformer call finds its own

    def of(self, timestep: Any) -> tuple[Run | None, Any]:
        """This finds the run of a transformer call, None where it is stock, and the place in the code that calls."""
        call, frame = owners.calling(self._patched, 3)
        local = self.local() if call is None or self._manual else None
        if call is not None and not (
            local is not None and local.manual and local.manual[-1].born > call.born
        ):
            run = call.runs.get(self._patched, _NEW)
            if run is _NEW or (run is not None and not run.live):
                run = self._begin_in(call, frame, run is _NEW)
            if self._patched.asks_guidance and run is not None and not run.guidance:
                run.guidance = guidance_of(frame.f_locals)
            site = frame.f_code, frame.f_lasti
        else:
            run = self._own(local, timestep)
            # Without a scheduler that counts the steps, two calls in a loop may just as well be two steps.
            site = owners.caller(2) if run is not None and run.led else None
        if run is not None and run.first is None and run.led:
            clock.relieve(run)
        return run, site

    def _own(self, local: Local, timestep: Any) -> Run | None:
        """A loop without a pipeline has this run. Without a scheduler the timestep tells, which waits for a GPU."""
        if local.manual:
            run = None if local.disabled else local.manual[-1].run
            if run is not None and not run.live:
                raise ScheduleError(one_call_too_many(run.steps))
            return run
        if local.disabled:
            return None
        run = local.run
        if run is None or not run.live:
            run = self._adopted(local) or run
        if run is None or not run.live or (not run.led and run.rises(timestep)):
            if run is not None:
                run.end()
            run = self.begin(owners.here(), self._patched.made_steps)
        return run

    def _adopted(self, local: Local) -> Run | None:
        """A worker takes over a run whose timesteps one that has ended set, such as an earlier cell of a notebook."""
        run = self._unclaimed()
        if run is None or not run.live or run.first is not None:
            return None
        owner = run.owner()
        if owner is not None and not owner.gone:
            return None
        local.run, run.owner = run, weakref.ref(owners.here())
        return run
