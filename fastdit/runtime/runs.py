"""The runs of a patched model: which there are, and how a transformer call finds its own.

They are told of three things: a scheduler sets its timesteps (`clock.py`), the transformer is called, and the user
begins a run by hand. They find whose that is (`owners.py`). They have no locks, which an interrupt could leave behind
locked: what several threads may do at once is one step of a dict, or may be done twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor

from fastdit.errors import ArgumentError, FastDiTError, ScheduleError
from fastdit.runtime import clock, owners, pipelines
from fastdit.runtime.owners import Hand, PipelineCall, Place, Seat
from fastdit.runtime.run import OPEN_STEPS, Run
from fastdit.schedules.conditions import guidance_of

_NEW = object()


class Runs:
    """The runs of one patched model."""

    def __init__(self, patched: Any) -> None:
        self._patched = patched
        self._seats: weakref.WeakKeyDictionary[Place, Seat] = weakref.WeakKeyDictionary()
        # By id: a set of weak references cannot be read while another thread begins a run.
        self._live: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
        self._hands: set[Hand] = set()
        self._last: Run | None = None
        self._unclaimed: Callable[[], Run | None] = _nobody

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
            self.note(None)
            return None
        rows, resolution = self._patched.writer("rows"), self._patched.writer("resolution")
        if steps is None and rows is not None:
            raise ScheduleError(
                f"{rows.name} must know the number of steps when a run starts: "
                "call the transformer inside `with handle.run(timesteps)`"
            )
        if resolution is not None and scheduler is None:
            raise ScheduleError(
                f"{resolution.name} takes its steps from the pipeline's scheduler, but this is no call of its run"
            )
        planned = OPEN_STEPS if steps is None else steps
        if resolution is not None:
            resolution.check_steps(planned)
        for method in self._patched.methods:
            if method is not resolution:
                method.check_steps(self._steps_of(method, planned))
        if resolution is not None:
            clock.check_flow(scheduler)
            levels.check_default(resolution.name)
            clock.replace_sigmas(scheduler, resolution.run_sigmas, in_use)
            levels = levels.with_sigmas(resolution.run_sigmas)
        run = Run(
            self._patched,
            steps,
            self._patched.plan(planned, levels=levels),
            scheduler,
            levels,
            by_hand,
        )
        run.take(made for made in (m.begin(run) for m in self._patched.methods) if made is not None)
        if pipeline is not None and pipelines.can_enclose(pipeline):
            run.pipeline = weakref.ref(pipeline)
        if seat.watch is not None and seat.watch.begin(run):
            run.previews = seat.watch
        return run

    def _steps_of(self, method: Any, steps: int) -> int:
        """The steps that `method` has a say in: one that leaves tokens out has to wait for the full resolution."""
        resolution = self._patched.writer("resolution")
        if "rows" in method.writes and resolution is not None:
            last = resolution.stages()[-1]
            return last.steps if last.layout == "full" else 0
        return steps

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
        if call is not None and not owners.holds(call.pipeline, self._patched):
            return
        if follower.run is not None:
            follower.run.end()
        if call is not None and call.runs.get(self._patched) is not None:
            call.runs[self._patched].end()
        if call is not None:
            self._patched.followed.follow(call.pipeline)
        run = self.start(
            len(scheduler.timesteps), scheduler, levels, pipeline=call and call.pipeline
        )
        if call is not None:
            call.runs[self._patched] = run
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
            self.note(run)
        if run.follower is not None and run.follower.run is run:
            run.follower.run = None
        here = self._patched.here
        while here.call is not None and here.call.run is run:  # an interrupt came between the hooks
            here.call = here.call.outer
            here.forward = None if here.call is None else here.call.forward

    def live(self) -> list[Run]:
        """The runs in progress, of all threads; loops that were given up count until their thread goes on."""
        return [run for found in self._live.valuerefs() if (run := found()) is not None]

    def refuse_while_running(self, verb: str) -> None:
        """Refuse to take the patch away from under a run.

        Raises:
            FastDiTError: A pipeline's call, or a `with handle.run(...)`, is in progress.
        """
        for run in self.live():
            owner = run.owner
            if run.by_hand or (isinstance(owner, PipelineCall) and owner.live):
                what = "a `with handle.run(...)`" if run.by_hand else "a call of a pipeline"
                raise FastDiTError(
                    f"cannot {verb} a model while {what} runs on it (step {run.step} of {run.steps}); "
                    "let it end first"
                )

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
        for run in self.live():
            run.end()
        self._seats.clear()
        self._last = None

    def last(self) -> Run | None:
        """The run of this thread's or task's last call, else of the last call of all."""
        found = self._seats.get(owners.here())
        return found.last if found is not None and found.last is not None else self._last

    def cache_bytes(self) -> int:
        """Bytes that the caches of all runs hold now."""
        return sum(run.cache_bytes() for run in self.live())

    def of(self, timestep: Any) -> tuple[Run | None, Any]:
        """The run that a transformer call belongs to, and where in its pipeline's code it is made; None runs stock."""
        call, frame = owners.calling(self._patched, 3)
        seat = self.seat() if call is None or self._hands else None
        if call is not None and not (
            seat is not None and seat.hands and seat.hands[-1].born > call.born
        ):
            run = call.runs.get(self._patched, _NEW)
            if run is _NEW or (run is not None and not run.live):
                run = self._begin_in(call, frame, run is _NEW)
            if self._patched.asks and run is not None and not run.guidance:
                run.guidance = guidance_of(frame.f_locals)
            site = frame.f_code, frame.f_lasti
        else:
            run = self._own_run(seat, timestep)
            # Without a scheduler that counts the steps, two calls in a loop may just as well be two steps.
            site = owners.caller(2) if run is not None and run.led else None
        return run, site

    def note(self, run: Run | None) -> None:
        """The last run here, which the report is about; None for one that is stock."""
        self._last = self.seat().last = run

    def _begin_in(self, call: PipelineCall, frame: FrameType, first: bool) -> Run | None:
        """The run of a pipeline's call whose scheduler set its timesteps before it was followed, or has none left."""
        pipeline = call.pipeline
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        self._patched.followed.follow(pipeline)
        if first and timesteps is not None and len(timesteps):
            follower = clock.follower_of(scheduler, self._patched)
            levels = clock.found_levels(scheduler, frame.f_locals)
            try:
                self._claim(follower, call, scheduler)
                run = self.start(len(timesteps), scheduler, levels, in_use=True, pipeline=pipeline)
                call.runs[self._patched] = run
                self._enlist(run, call, follower)
            finally:
                follower.unclaim(call)
        else:
            run = call.runs[self._patched] = self.start(self._made_steps(), pipeline=pipeline)
            self._enlist(run, call)
        return run

    def _made_steps(self) -> int | None:
        """The number of steps that a method was made for."""
        return next((m.run_steps for m in self._patched.methods if m.run_steps is not None), None)

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


def _is_over(owner: Any) -> bool:
    """Whether an owner of runs is at it no more, or is the caller's own place, where a loop was given up."""
    if isinstance(owner, PipelineCall):
        return not owner.live
    return owner is None or owner.gone or owner.is_here()


def _nobody() -> None:
    """In place of a weak reference to nothing."""
