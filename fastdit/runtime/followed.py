"""The pipelines and schedulers that a patched model follows."""

from __future__ import annotations

import weakref
from typing import Any

from fastdit.runtime import clock, pipelines


class Followed:
    """The pipelines and schedulers that one patched model follows."""

    def __init__(self, patched: Any) -> None:
        self._patched = patched
        # By id: somebody's own pipeline may not be hashable.
        self.schedulers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.pipelines: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def follow(self, pipeline: Any) -> None:
        """Let a pipeline tell of its calls, and its scheduler of its steps."""
        if pipelines.can_enclose(pipeline):
            self.pipelines[id(pipeline)] = pipeline
            pipelines.enclose(pipeline, self._patched)
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            clock.check_scheduler(scheduler)
            self.schedulers[id(scheduler)] = scheduler
            clock.attach(scheduler, self._patched)

    def unfollow(self) -> None:
        """Leave all pipelines and schedulers as they were."""
        for scheduler in list(self.schedulers.values()):
            clock.detach(scheduler, self._patched)
        for pipeline in list(self.pipelines.values()):
            pipelines.release(pipeline, self._patched)
        self.schedulers.clear()
        self.pipelines.clear()
