"""A patched model follows pipelines and schedulers, since they tell of its runs."""

from __future__ import annotations

import weakref
from typing import Any

from fastdit.runtime import clock, pipelines
from fastdit.runtime.disguise import is_ordinary


class Followed:
    """One patched model follows these pipelines and schedulers until it is unpatched."""

    def __init__(self, patched: Any) -> None:
        self._patched = patched
        # By id: somebody's own pipeline may not be hashable.
        self.pipelines: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._schedulers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def follow(self, pipeline: Any) -> None:
        """From now on a pipeline tells of its calls, and its scheduler of its steps."""
        if is_ordinary(pipeline):  # another is followed from within its call
            self.pipelines[id(pipeline)] = pipeline
            pipelines.enclose(pipeline, self._patched)
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            clock.check_scheduler(scheduler)
            self._schedulers[id(scheduler)] = scheduler
            clock.attach(scheduler, self._patched)

    def unfollow(self) -> None:
        """All pipelines and schedulers are as they were before."""
        for scheduler in list(self._schedulers.values()):
            clock.detach(scheduler, self._patched)
        for pipeline in list(self.pipelines.values()):
            pipelines.release(pipeline, self._patched)
        self._schedulers.clear()
        self.pipelines.clear()
