"""Who measures: this process, or processes on this machine that load the model once each.

All have the same three verbs: `facts`, `run` (measurements as they arrive, in any order) and `close`. What a worker
finds does not depend on how many there are; latency is always measured by one worker while the others wait.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from fastdit.errors import FastDiTError, SearchError
from fastdit.search.evaluator import Evaluator, Task, Work

Measured = tuple[Task, dict[str, Any]]


class Workers(Protocol):
    """Workers measure tasks."""

    def facts(self) -> dict[str, Any]:
        """:meth:`Evaluator.facts` says this of the model."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """This measures the tasks; each is yielded once, in any order."""
        ...

    def close(self) -> None:
        """This lets the model go."""
        ...


class InProcess:
    """This process measures.

    Args:
        factory: Makes the pipeline.
        work: How to draw and judge.
    """

    def __init__(self, factory: Callable[[], Any], work: Work) -> None:
        import torch

        self._threads = torch.get_num_threads()
        self._evaluator = Evaluator(factory, work)

    def facts(self) -> dict[str, Any]:
        """See :class:`Workers`."""
        return self._evaluator.facts()

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """See :class:`Workers`."""
        for task in tasks:
            yield task, self._evaluator.measure(task)

    def close(self) -> None:
        """This gives torch its threads back."""
        import torch

        torch.set_num_threads(self._threads)


class Processes:
    """`count` processes of this machine measure. They end with this one, however it ends.

    Args:
        factory: Makes the pipeline; sent to the processes, so a function at the top level of a module, or a partial
            of one.
        work: How to draw and judge.
        count: Number of processes, >= 1.
    """

    def __init__(self, factory: Callable[[], Any], work: Work, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child may inherit held locks
        self.processes, self._pipes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, factory, work), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def facts(self) -> dict[str, Any]:
        """See :class:`Workers`."""
        self._pipes[0].send(None)
        return self._receive(self._pipes[0])

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """See :class:`Workers`."""
        waiting = list(reversed(tasks))
        alone = any(task.what == "latency" for task in tasks)
        busy: dict[Connection, Task] = {}
        for pipe in self._pipes[: 1 if alone else None]:
            self._give(pipe, waiting, busy)
        while busy:
            for pipe in wait(list(busy)):
                result = self._receive(pipe)
                task = busy.pop(pipe)
                self._give(pipe, waiting, busy)
                yield task, result

    def close(self) -> None:
        """This ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _give(self, pipe: Connection, waiting: list[Task], busy: dict[Connection, Task]) -> None:
        if waiting:
            busy[pipe] = waiting.pop()
            try:
                pipe.send(busy[pipe])
            except OSError:
                self._lost(pipe)

    def _receive(self, pipe: Connection) -> Any:
        try:
            good, result = pipe.recv()
        except (EOFError, OSError):
            self._lost(pipe)
        if not good:
            raise result
        return result

    def _lost(self, pipe: Connection) -> None:
        process = self.processes[self._pipes.index(pipe)]
        process.join(5)
        raise SearchError(
            f"a worker process ended with exit code {process.exitcode}; what was measured is in the "
            "ledger, and the same search goes on from there"
        )


def _serve(pipe: Connection, factory: Callable[[], Any], work: Work) -> None:
    """A worker loads, then answers until the other side of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's to answer
    evaluator = None
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            evaluator = evaluator or Evaluator(factory, work)
            answer = (True, evaluator.facts() if task is None else evaluator.measure(task))
        except FastDiTError as error:
            answer = (False, error)
        except Exception as error:
            answer = (False, SearchError(f"a worker failed: {type(error).__name__}: {error}"))
        try:
            pipe.send(answer)
        except OSError:
            return
