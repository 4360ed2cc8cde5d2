"""Measures on all ranks of a torchrun launch: every rank loads the model once, the first one leads.

    torchrun --nproc-per-node 2 -m fastdit search --out found

Works in rounds of one task per rank, so that the ledger grows with each round. Messages go over gloo.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastdit.cli import launch
from fastdit.errors import FastDiTError, SearchError
from fastdit.search.evaluator import Evaluator, Task, Work
from fastdit.search.workers import Measured

PATIENCE = datetime.timedelta(days=7)  # ranks wait while the first one thinks


def launched() -> bool:
    """This tells whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and launch.number("WORLD_SIZE", 1) > 1


class Ranks:
    """These are all ranks of the launch; make one in each, then search in rank 0 and `serve` in the others.

    Args:
        factory: Makes the pipeline.
        work: How to draw and judge.
    """

    def __init__(self, factory: Callable[[], Any], work: Work) -> None:
        import torch.distributed as dist

        launch.join("gloo", timeout=PATIENCE)
        self._dist, self.rank, self._world = dist, dist.get_rank(), dist.get_world_size()
        self._evaluator = Evaluator(factory, work)

    def facts(self) -> dict[str, Any]:
        """See :class:`~fastdit.search.workers.Workers`."""
        return self._evaluator.facts()

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """See :class:`~fastdit.search.workers.Workers`; latency is measured by the first rank alone."""
        alone = [task for task in tasks if task.what == "latency"]
        shared = [task for task in tasks if task.what != "latency"]
        for task in alone:
            yield task, self._evaluator.measure(task)
        for start in range(0, len(shared), self._world):
            part = shared[start : start + self._world]
            for task, (good, result) in zip(part, self._round(part), strict=False):
                if not good:
                    raise result
                yield task, result

    def serve(self) -> None:
        """This measures what the first rank asks for, until it closes."""
        while self._round(None) is not None:
            pass

    def close(self) -> None:
        """This lets the other ranks go."""
        if self.rank == 0:
            self._dist.broadcast_object_list([None], src=0)
        self._dist.destroy_process_group()

    def _round(self, part: Sequence[Task] | None) -> list[Any] | None:
        """Each rank takes a task: rank 0 gets the answers, the others [], and None when it is over."""
        message = [part]
        self._dist.broadcast_object_list(message, src=0)
        part = message[0]
        if part is None:
            return None
        answer = self._answer(part[self.rank]) if self.rank < len(part) else None
        answers = [None] * self._world if self.rank == 0 else None
        self._dist.gather_object(answer, answers, dst=0)
        return answers or []

    def _answer(self, task: Task) -> tuple[bool, Any]:
        try:
            return True, self._evaluator.measure(task)
        except FastDiTError as error:
            return False, error
        except Exception as error:
            return False, SearchError(f"rank {self.rank}: {type(error).__name__}: {error}")
