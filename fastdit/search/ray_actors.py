"""Measures on a Ray cluster: persistent actors that load the model once each. Needs the extra `fastdit[ray]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastdit.errors import DependencyError, SearchError
from fastdit.search.evaluator import Evaluator, Task, Work
from fastdit.search.workers import Measured


class RayActors:
    """There are `count` actors, each with its own model.

    Args:
        factory: Makes the pipeline, on the actor's machine.
        work: How to draw and judge.
        count: Number of actors, >= 1.
        address: Of a running cluster; a local one is started if left out.
        gpus: GPUs per actor; by default one where the cluster has any.

    Raises:
        DependencyError: Ray is not installed.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        work: Work,
        count: int,
        address: str | None = None,
        gpus: float | None = None,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise DependencyError(
                "Ray is not installed: pip install fastdit[search,ray]"
            ) from error
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(Evaluator).options(num_cpus=work.threads, num_gpus=gpus)
        self.actors = [actor.remote(factory, work) for _ in range(count)]

    def facts(self) -> dict[str, Any]:
        """See :class:`~fastdit.search.workers.Workers`."""
        return self._ray.get(self.actors[0].facts.remote())

    def run(self, tasks: Sequence[Task]) -> Iterator[Measured]:
        """See :class:`~fastdit.search.workers.Workers`; latency is measured by one actor."""
        waiting = list(reversed(tasks))
        alone = any(task.what == "latency" for task in tasks)
        busy: dict[Any, tuple[Any, Task]] = {}

        def give(actor: Any) -> None:
            if waiting:
                task = waiting.pop()
                busy[actor.measure.remote(task)] = (actor, task)

        for actor in self.actors[: 1 if alone else None]:
            give(actor)
        while busy:
            (ready,), _ = self._ray.wait(list(busy), num_returns=1)
            actor, task = busy.pop(ready)
            try:
                result = self._ray.get(ready)
            except self._ray.exceptions.RayActorError as error:
                raise SearchError(
                    "a Ray actor ended; what was measured is in the ledger, and the same search goes on from there"
                ) from error
            give(actor)
            yield task, result

    def close(self) -> None:
        """This ends the actors, and the local cluster if this started it."""
        for actor in self.actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
