"""A transformer call has an owner: a call of a pipeline, or a thread's or task's own loop.

A pipeline's `__call__` runs in one thread from beginning to end, so the calls under way in a thread lie on a stack. The
nearest `__call__` among a transformer call's callers whose `self` holds the transformer names the pipeline; modular
pipelines are named by an argument `components` of their blocks. A patched pipeline, and each that was met once, is
enclosed (`pipelines.py`): its calls say where they begin and end. One that is met for the first time is followed from
within, by an object in its frame that dies with it.

A loop without a pipeline belongs to its :class:`Worker`: a thread, or one task of an event loop. Tasks inherit the
context of the task that made them, but not its runs.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import threading
import traceback
import weakref
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

from fastdit.runtime.install import LINK

#: calls and loops are numbered in the order in which they begin
number = itertools.count().__next__
#: where a pipeline keeps the transformers that take turns in its steps; the patch of each follows it
TRANSFORMERS = ("transformer", "transformer_2")
#: what lies between a call of a module and its hooks
_MACHINERY = ("torch.", "fastdit.runtime.", "accelerate.", "diffusers.hooks.")
#: a name that no code can have
_SENTINEL = "\0fastdit"


class PipelineCall:
    """This is a call of a pipeline that is under way.

    Attributes:
        pipeline: Whose.
        frame: id of the frame of its `__call__`, which lives as long; 0 before it was seen.
        runs: Patched model -> its run; None where it runs stock.
        born: Its number in the order in which calls and loops began.
        over: Whether it has ended.
    """

    def __init__(self, pipeline: Any, frame: int = 0) -> None:
        self.pipeline = pipeline
        self.frame = frame
        self.followed = bool(frame)
        self.runs: dict[Any, Any] = {}
        self.born = number()
        self.over = False
        self._stack = thread.calls

    def begin(self) -> None:
        """The call is under way in this thread from now on."""
        self._stack.append(self)

    def check(self) -> None:
        """The call is about to return: this refuses what its runs made where it is wrong."""
        for run in self.runs.values():
            if run is not None:
                run.check()

    def end(self) -> None:
        """The call has returned, or was broken off: so are its runs. A second time makes up what the first left."""
        self.over = True
        if self in self._stack:
            self._stack.remove(self)
        while self.runs:
            patched, run = next(iter(self.runs.items()))
            if run is not None:
                run.end()
            self.runs.pop(patched, None)


class _Thread(threading.local):
    """The calls of pipelines that are under way in a thread are its own, outermost first."""

    def __init__(self) -> None:
        self.calls: list[PipelineCall] = []


thread = _Thread()


class _Sentinel:
    """A sentinel lives in the frame of a pipeline's `__call__`, and dies with it."""


def calling(patched: Any, depth: int = 2) -> tuple[PipelineCall | None, FrameType | None]:
    """This finds the pipeline's call that makes a call of `patched`'s transformer, and the frame that makes it."""
    frame: FrameType | None = sys._getframe(depth)
    under_way = thread.calls
    if under_way and under_way[-1].followed:
        _prune()
    top = under_way[-1] if under_way else None
    known = top.frame if top is not None and patched in top.runs else -1
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            if id(frame) == known:
                return top, frame
            pipeline = _named_by(frame, lambda found: holds(found, patched))
            if pipeline is not None:
                return _call_of(pipeline, frame), frame
        frame = frame.f_back
    return None, None


def setting(scheduler: Any, depth: int = 2) -> PipelineCall | None:
    """This finds the pipeline's call that is setting the timesteps of its `scheduler`."""
    if thread.calls and thread.calls[-1].followed:
        _prune()
    for frame, _ in traceback.walk_stack(sys._getframe(depth)):
        if frame.f_code.co_name == "__call__":
            pipeline = _named_by(
                frame, lambda found: getattr(found, "scheduler", None) is scheduler
            )
            if pipeline is not None:
                return _call_of(pipeline, frame)
    return None


def caller(depth: int = 1) -> Any:
    """This tells a module's hooks where in the user's own code the module is called."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_MACHINERY):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lasti)


def is_inside(transformer: nn.Module) -> bool:
    """This tells whether the caller runs inside the transformer's forward."""
    forward = inspect.unwrap(type(transformer).forward).__code__
    return any(
        frame.f_code is forward and frame.f_locals.get("self") is transformer
        for frame, _ in traceback.walk_stack(sys._getframe(2))
    )


def holds(pipeline: Any, patched: Any) -> bool:
    """This tells whether `patched` is of one of the pipeline's transformers."""
    for name in TRANSFORMERS:
        model = getattr(pipeline, name, None)
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.Module) and model.__dict__.get(LINK) is patched:
            return True
    return False


def _named_by(frame: FrameType, fits: Any) -> Any:
    """This gives the pipeline that a frame names as `self` or `components`, if it `fits`."""
    values = frame.f_locals
    for name in ("self", "components"):
        found = values.get(name)
        if found is None or isinstance(found, (nn.Module, dict)):
            continue
        try:
            if fits(found):
                return found
        except Exception:  # somebody's property, which is not ours to judge
            continue
    return None


def _call_of(pipeline: Any, frame: FrameType) -> PipelineCall:
    """This gives the innermost call of a pipeline that is under way; one that was not known is followed from here."""
    own = next(
        (
            outer
            for outer, _ in traceback.walk_stack(frame)
            if outer.f_code.co_name == "__call__" and outer.f_locals.get("self") is pipeline
        ),
        frame,
    )
    for call in reversed(thread.calls):
        if call.pipeline is pipeline:
            if not call.frame:
                call.frame = id(own)
            return call
    call = PipelineCall(pipeline, id(own))
    sentinel = _Sentinel()
    weakref.finalize(sentinel, call.end).atexit = False
    own.f_locals[_SENTINEL] = sentinel
    call.begin()  # last: whatever breaks off before, the sentinel ends it
    return call


def _prune() -> None:
    """This ends the followed calls that have returned, though an exception still holds their frames."""
    running = {id(frame) for frame, _ in traceback.walk_stack(sys._getframe(1))}
    for call in list(thread.calls):
        if call.followed and call.frame not in running:
            call.end()


class Worker:
    """A worker is a thread, or one task of an event loop in it."""

    def __init__(self) -> None:
        self._thread = weakref.ref(threading.current_thread())
        task = _current_task()
        self._task = None if task is None else weakref.ref(task)

    def is_here(self) -> bool:
        """This tells whether the caller runs in it."""
        task = self._task
        return self._thread() is threading.current_thread() and (
            _current_task() is (None if task is None else task())
        )

    @property
    def gone(self) -> bool:
        """This tells whether nothing can run in it any more."""
        thread = self._thread()
        if thread is None or not thread.is_alive():
            return True
        if self._task is None:
            return False
        task = self._task()
        return task is None or task.done()

    @property
    def over(self) -> bool:
        """Its loop goes on no more where it is gone, or the caller's own, which begins another."""
        return self.gone or self.is_here()


_worker: ContextVar[Worker | None] = ContextVar("fastdit", default=None)


def here() -> Worker:
    """This gives the worker that the caller runs in."""
    found = _worker.get()
    if found is None or not found.is_here():
        found = Worker()
        _worker.set(found)
    return found


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
