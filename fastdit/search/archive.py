"""Measures candidates, each effective schedule once, and stops early with those that cannot win.

The race: a fresh candidate is first judged on the first few items. It stops there if a schedule of the front so far is
no dearer in any cost and better on *every one* of these items. It then has the loss of that rival plus their mean
difference on these items, so it stays dominated by it, and never enters a front. The front so far is the one before the
generation, and items are drawn in order: neither workers nor their timing play a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastdit.search import cost
from fastdit.search.evaluator import Task, Work
from fastdit.search.front import non_dominated
from fastdit.search.genome import Genome
from fastdit.search.ledger import Ledger
from fastdit.search.quality import average, is_geometric

if TYPE_CHECKING:
    from fastdit.search.workers import Workers

Progress = Callable[[int, int], None]
Point = tuple[float, ...]


def silent(done: int, total: int) -> None:
    """Nobody watches this progress."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """This schedule was measured.

    Attributes:
        key: The effective schedule's name.
        vector: bool [genome size].
        losses: Of each item that was drawn.
        values: The objectives: mean loss, then the costs.
        reused: Entries of the uncached run's, out of the genome's cells, that are not computed for all tokens.
        complete: Whether all items were drawn; False after a lost race.
    """

    key: str
    vector: np.ndarray
    losses: tuple[float, ...]
    values: tuple[float, ...]
    reused: int
    complete: bool


class Archive:
    """An archive has all candidates of a search.

    Args:
        genome: The model's bit vectors.
        work: How candidates are judged.
        costs: The cost objectives, names of `cost.OBJECTIVES`.
        race: Items of the race; 0 draws all items of every candidate.
        ledger: Where measurements are kept.
        workers: Who measures what the ledger does not know.
    """

    def __init__(
        self,
        genome: Genome,
        work: Work,
        costs: Sequence[str],
        race: int,
        ledger: Ledger,
        workers: Workers,
    ) -> None:
        self.genome, self.work, self.costs = genome, work, tuple(costs)
        self.race = race if 0 < race < work.items else 0
        self._ledger, self._workers = ledger, workers
        self.seen: dict[str, Candidate] = {}

    def front(self) -> list[Candidate]:
        """Nothing seen so far dominates these candidates, the best first; the uncached run is never one."""
        complete = [c for c in self.seen.values() if c.complete and c.reused]
        return [complete[index] for index in non_dominated([c.values for c in complete])]

    def evaluate(
        self, vectors: np.ndarray, progress: Progress = silent, racing: bool = True
    ) -> list[Candidate]:
        """This measures vectors, bool [n, genome size].

        Args:
            vectors: What to measure; those with the same effective schedule are one candidate.
            progress: Hears of pieces done and known of.
            racing: Whether a candidate may be stopped early; otherwise all are complete.
        """
        keys = [self.genome.key(vector) for vector in vectors]
        fresh = {
            key: vector
            for key, vector in zip(keys, vectors, strict=True)
            if key not in self.seen or not (racing or self.seen[key].complete)
        }
        front = self.front()
        if cost.LATENCY in self.costs:
            tasks = [self._task(key, vector, "latency") for key, vector in fresh.items()]
            self._measure(tasks, progress)
        first = self.race or self.work.items
        self._losses(fresh, 0, first, progress)
        lost: dict[str, tuple[Candidate, float]] = {}
        if self.race:
            if racing:
                rivals = {key: self._rival(key, front) for key in fresh}
                lost = {key: rival for key, rival in rivals.items() if rival is not None}
            rest = {key: vector for key, vector in fresh.items() if key not in lost}
            self._losses(rest, first, self.work.items, progress)
        for key, vector in fresh.items():
            self.seen[key] = self._candidate(key, vector, lost.get(key))
        return [self.seen[key] for key in keys]

    def _task(self, key: str, vector: np.ndarray, what: str, first: int = 0, last: int = 0) -> Task:
        return Task(key, what, self.genome.to_bytes(vector), self.work.steps, first, last)

    def fewer_steps(
        self, counts: Sequence[int], progress: Progress = silent, solver: str | None = None
    ) -> list[Point]:
        """The unpatched model is measured at other numbers of steps, judged like everything else.

        Args:
            counts: Of steps.
            progress: Hears of pieces done and known of.
            solver: One of those searched; None for the uncached run's.
        """
        items, named = self.work.items, "" if solver is None else f"-{solver}"
        keys = {steps: f"unpatched-{steps}{named}" for steps in counts}
        if cost.LATENCY in self.costs:
            tasks = [
                Task(key, "latency", None, steps, solver=solver) for steps, key in keys.items()
            ]
            self._measure(tasks, progress)
        tasks = [Task(key, "losses", None, steps, 0, items, solver) for steps, key in keys.items()]
        self._measure(tasks, progress)
        return [
            (self._average(self._ledger.losses[key, 0, items]), *self._cost(key))
            for key in keys.values()
        ]

    def _losses(
        self, vectors: dict[str, np.ndarray], first: int, last: int, progress: Progress
    ) -> None:
        tasks = [self._task(key, vector, "losses", first, last) for key, vector in vectors.items()]
        self._measure(tasks, progress)

    def _measure(self, tasks: Sequence[Task], progress: Progress) -> None:
        missing = [task for task in tasks if not self._known(task)]
        for done, (task, found) in enumerate(self._workers.run(missing), 1):
            costs = dict(found["costs"])
            if task.what == "latency":
                costs[cost.LATENCY] = found["latency"]
            self._ledger.add_costs(task.key, costs)
            if task.what == "losses":
                self._ledger.add_losses(task.key, task.first, task.last, found["losses"])
            progress(done, len(missing))

    def _average(self, losses: Sequence[float]) -> float:
        return average(self.work.quality, losses)

    def _known(self, task: Task) -> bool:
        if task.what == "latency":
            return cost.LATENCY in self._ledger.costs.get(task.key, {})
        return (task.key, task.first, task.last) in self._ledger.losses

    def _cost(self, key: str) -> tuple[float, ...]:
        return tuple(self._ledger.costs[key][name] for name in self.costs)

    def _rival(self, key: str, front: Sequence[Candidate]) -> tuple[Candidate, float] | None:
        """This member of the front ends the race of `key`, which then has this loss."""
        own, costs = self._ledger.losses[key, 0, self.race], self._cost(key)
        found = []
        for rival in front:
            behind = np.subtract(own, rival.losses[: self.race])
            dearer = any(r > c for r, c in zip(rival.values[1:], costs, strict=True))
            if not dearer and (behind > 0).all():
                found.append((self._behind(rival, own), rival))
        if not found:
            return None
        loss, rival = min(found, key=lambda pair: (pair[0], pair[1].key))
        return rival, loss

    def _candidate(
        self, key: str, vector: np.ndarray, lost: tuple[Candidate, float] | None
    ) -> Candidate:
        first, reused = self.race or self.work.items, self.genome.reused(vector)
        losses = list(self._ledger.losses[key, 0, first])
        if lost is not None:
            return Candidate(key, vector, tuple(losses), (lost[1], *self._cost(key)), reused, False)
        if self.race:
            losses += self._ledger.losses[key, first, self.work.items]
        values = (self._average(losses), *self._cost(key))
        return Candidate(key, vector, tuple(losses), values, reused, True)

    def _behind(self, rival: Candidate, own: Sequence[float]) -> float:
        """A candidate that is as far behind on all items as on these first has this loss."""
        first = rival.losses[: self.race]
        if is_geometric(self.work.quality):
            return rival.values[0] * self._average(own) / self._average(first)
        return rival.values[0] + float(np.subtract(own, first).mean())
