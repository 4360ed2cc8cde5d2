"""Whose call is this: which call of which pipeline, or which thread's or task's own loop.

A pipeline's `__call__` runs in one thread from beginning to end, so the calls under way in a thread lie on a stack. The
nearest `__call__` among a transformer call's callers whose `self` holds the transformer names the pipeline; modular
pipelines are named by an argument `components` of their blocks. A patched pipeline, and each that was met once, is
enclosed (`pipelines.py`): its calls say where they begin and end. One that is met for the first time is followed from
within, by an object in its frame that dies with it.

A loop without a pipeline belongs to its :class:`Place`: a thread, or one task of an event loop. Tasks inherit the
context of the task that made them, but not its runs.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import threading
import weakref
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

from fastdit.runtime.install import LINK

_number = itertools.count().__next__
#: where a pipeline keeps the models whose patches follow it
_TRANSFORMERS = ("transformer", "transformer_2")
#: what lies between a call of a module and its hooks
_MACHINERY = ("torch.", "fastdit.runtime.", "accelerate.", "diffusers.hooks.")
#: a name that no code can have
_TOKEN = "\0fastdit"


class PipelineCall:
    """A call of a pipeline that is under way.

    Attributes:
        pipeline: Whose.
        frame: id of the frame of its `__call__`, which lives as long; 0 before it was seen.
        runs: Patched model -> its run; None where it runs stock.
        born: Its place in the order in which calls and loops began.
        live: False once it is over.
    """

    __slots__ = ("__weakref__", "_stack", "born", "followed", "frame", "live", "pipeline", "runs")

    def __init__(self, pipeline: Any, frame: int = 0) -> None:
        self.pipeline = pipeline
        self.frame = frame
        self.followed = bool(frame)
        self.runs: dict[Any, Any] = {}
        self.born = _number()
        self.live = True
        self._stack = _thread.calls

    def begin(self) -> None:
        """It is under way in this thread."""
        self._stack.append(self)

    def end(self) -> None:
        """It has returned, or was broken off: so are its runs. What was broken off here is made up."""
        self.live = False
        if self in self._stack:
            self._stack.remove(self)
        while self.runs:
            patched, run = next(iter(self.runs.items()))
            if run is not None:
                run.end()
            self.runs.pop(patched, None)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[PipelineCall] = []


_thread = _Thread()


class _Token:
    """Lives in the frame of a pipeline's `__call__`."""

    __slots__ = ("__weakref__",)


def calls() -> list[PipelineCall]:
    """The calls of pipelines that are under way in this thread, outermost first."""
    return _thread.calls


def calling(patched: Any, depth: int = 2) -> tuple[PipelineCall | None, FrameType | None]:
    """The call of a pipeline that a call of `patched`'s transformer belongs to, and the frame in which it is made."""
    frame: FrameType | None = sys._getframe(depth)
    under_way = _thread.calls
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
    """The call of a pipeline that is setting the timesteps of its `scheduler`."""
    frame: FrameType | None = sys._getframe(depth)
    if _thread.calls and _thread.calls[-1].followed:
        _prune()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            pipeline = _named_by(
                frame, lambda found: getattr(found, "scheduler", None) is scheduler
            )
            if pipeline is not None:
                return _call_of(pipeline, frame)
        frame = frame.f_back
    return None


def caller(depth: int = 1) -> Any:
    """Where in the user's own code a module is called, for what runs in its hooks."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_MACHINERY):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lasti)


def is_inside(transformer: nn.Module) -> bool:
    """Whether the caller runs inside the transformer's forward."""
    forward = inspect.unwrap(type(transformer).forward).__code__
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is forward and frame.f_locals.get("self") is transformer:
            return True
        frame = frame.f_back
    return False


def holds(pipeline: Any, patched: Any) -> bool:
    """Whether `patched` is of one of the pipeline's transformers."""
    for name in _TRANSFORMERS:
        model = getattr(pipeline, name, None)
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.Module) and model.__dict__.get(LINK) is patched:
            return True
    return False


def _named_by(frame: FrameType, fits: Any) -> Any:
    """The pipeline that a frame names as `self` or `components`, if it `fits`."""
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
    """The innermost call of a pipeline that is under way; one that was not known is followed from here."""
    own = frame
    while own is not None and not (
        own.f_code.co_name == "__call__" and own.f_locals.get("self") is pipeline
    ):
        own = own.f_back
    own = frame if own is None else own
    for call in reversed(_thread.calls):
        if call.pipeline is pipeline:
            if not call.frame:
                call.frame = id(own)
            return call
    call = PipelineCall(pipeline, id(own))
    token = _Token()
    weakref.finalize(token, call.end).atexit = False
    own.f_locals[_TOKEN] = token
    call.begin()  # last: whatever breaks off before, the token ends it
    return call


def _prune() -> None:
    """End the followed calls that have returned, though an exception still holds their frames."""
    running, frame = set(), sys._getframe(1)
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    for call in list(_thread.calls):
        if call.followed and call.frame not in running:
            call.end()


class Place:
    """A thread, or one task of an event loop in it."""

    __slots__ = ("__weakref__", "_task", "_thread")

    def __init__(self) -> None:
        self._thread = weakref.ref(threading.current_thread())
        task = _current_task()
        self._task = None if task is None else weakref.ref(task)

    def is_here(self) -> bool:
        """Whether this is where the caller runs."""
        task = self._task
        return self._thread() is threading.current_thread() and (
            _current_task() is (None if task is None else task())
        )

    @property
    def gone(self) -> bool:
        """Whether nothing can run there any more."""
        thread = self._thread()
        if thread is None or not thread.is_alive():
            return True
        if self._task is None:
            return False
        task = self._task()
        return task is None or task.done()


_place: ContextVar[Place | None] = ContextVar("fastdit", default=None)


def here() -> Place:
    """Where the caller runs."""
    found = _place.get()
    if found is None or not found.is_here():
        found = Place()
        _place.set(found)
    return found


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class Hand:
    """A `with handle.run(...)` that is open.

    Attributes:
        run: What it leads; None where it was begun while disabled.
        born: Its place in the order in which calls and loops began.
    """

    __slots__ = ("born", "run")

    def __init__(self) -> None:
        self.run: Any = None
        self.born = _number()


class Seat:
    """What goes on with one patched model in one :class:`Place`, outside of pipelines.

    Attributes:
        run: The run of a loop that is led by a scheduler, or followed by timestep.
        hands: The `with handle.run(...)` that are open, the innermost last.
        disabled: The `with handle.disabled()` that are open.
        watch: What collects previews of the runs that begin, inside `with handle.watch()`.
        last: The run that made the last call here.
    """

    __slots__ = ("disabled", "hands", "last", "run", "watch")

    def __init__(self) -> None:
        self.run: Any = None
        self.hands: list[Hand] = []
        self.disabled: set[Any] = set()
        self.watch: Any = None
        self.last: Any = None
