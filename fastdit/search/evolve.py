"""The search loop: ask NSGA-II, measure, tell, generation after generation, with everything in a ledger.

A search is resumed by running it again: the loop replays itself from the first generation, and what was measured before
comes out of the ledger. So a search that was killed, at any point, ends with the front it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdit import files
from fastdit.errors import ArgumentError
from fastdit.schedules.book import PlanBook
from fastdit.schedules.schedule import Schedule
from fastdit.search import cost
from fastdit.search.archive import Archive, Candidate
from fastdit.search.evaluator import Work, genome_of
from fastdit.search.front import corner, hypervolume, on_axes
from fastdit.search.genome import Genome
from fastdit.search.ledger import Ledger
from fastdit.search.nsga2 import Nsga2, Operators, require_pymoo
from fastdit.search.quality import is_logarithmic, is_of_latents, judgement
from fastdit.search.seeds import default_population, evenly_spread_steps, first_population, seeds_of
from fastdit.search.surrogate import propose
from fastdit.search.workers import Workers

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Settings:
    """This says what is searched, beside how candidates are judged (:class:`~fastdit.search.evaluator.Work`).

    Attributes:
        generations: Generations of children after the seeds.
        population: Members and children per generation; by default the paper's for the family.
        costs: Cost objectives beside the loss, out of `cost.OBJECTIVES`; by default the paper's.
        race: Items of the race of a fresh candidate (see `archive.py`); 0 for none.
        operators: NSGA-II's settings.
        even_steps: Begin with whole steps, evenly spread, too: half of the population at most, of all costs, drawn by
            each of the orders that are searched; of the uncached run's steps and solver.
        surrogate: Generations bred on predictions between two that are measured (see `surrogate.py`); 0 measures what
            NSGA-II breeds, as the paper does.
    """

    generations: int = 50
    population: int | None = None
    costs: tuple[str, ...] = (cost.PUBLISHED,)
    race: int = 0
    operators: Operators = field(default_factory=Operators)
    even_steps: bool = False
    surrogate: int = 0

    def __post_init__(self) -> None:
        for name in ("generations", "race", "surrogate"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.population is not None and self.population < 2:
            raise ArgumentError(f"population must be at least 2, got {self.population}")
        if not self.costs or len(set(self.costs)) < len(self.costs):
            raise ArgumentError(f"costs must be distinct and at least one, got {self.costs!r}")
        if unknown := sorted(set(self.costs) - set(cost.OBJECTIVES)):
            raise ArgumentError(f"costs must be of {', '.join(cost.OBJECTIVES)}, got {unknown}")


@dataclass(frozen=True)
class State:
    """This tells whoever watches how far a search is.

    Attributes:
        generation, generations: The one in progress, and the last one; after the last, the baselines are measured.
        done, total: Measurements of it, done and known of so far.
        candidates: Effective schedules measured so far.
        front: The front of the generations that are done.
        gain: Hypervolume of that front over that of the seeds' own, minus one.
    """

    generation: int
    generations: int
    done: int
    total: int
    candidates: int
    front: Sequence[Candidate]
    gain: float


Watch = Callable[[State], None]


@dataclass(frozen=True)
class Search:
    """This search is finished.

    Attributes:
        front: What nothing dominates, the best first.
        generations: Facts of each generation: candidates, front, hypervolume.
        genome: Vectors to schedules and back.
        uncached: Costs of the uncached run, by objective.
        archive: Everything that was measured.
        schedulers: The sampler's class of each solver that was searched.
    """

    front: tuple[Candidate, ...]
    generations: tuple[dict[str, Any], ...]
    genome: Genome
    uncached: dict[str, float]
    archive: Archive
    schedulers: Mapping[str, str]

    @property
    def gain(self) -> float:
        """This is the hypervolume of the front over that of the seeds' own, minus one."""
        first, last = (self.generations[index]["hypervolume"] for index in (0, -1))
        return last / first - 1 if first else 0.0


def identity(
    work: Work, settings: Settings, seeds: Sequence[Schedule], facts: dict[str, Any]
) -> dict[str, Any]:
    """A ledger belongs to this. The number of generations is not part of it: a search can go on."""
    described = asdict(settings)
    described.pop("generations")
    described.pop("even_steps")  # those are among the seeds
    return {
        **work.described(),
        **described,
        "given": [schedule.sha256 for schedule in seeds],
        "judgement": judgement(work.quality),
        "model": facts["model"],
        "samplers": facts["samplers"],
    }


def evolve(
    folder: Path,
    work: Work,
    settings: Settings,
    seeds: Sequence[Schedule],
    workers: Workers,
    watch: Watch = lambda state: None,
    book: PlanBook | None = None,
) -> tuple[Search, Ledger]:
    """This runs or resumes the search of a folder; the ledger is open for what the caller still measures.

    Raises:
        SearchError: The folder's ledger is damaged, in use or of another search; a worker was lost.
    """
    require_pymoo()
    facts = workers.facts()
    genome = genome_of(facts, work.orders, work.knobs)
    population = settings.population or default_population(genome.spec.family)
    if settings.even_steps:
        for order in genome.orders:
            even, most = evenly_spread_steps(genome, order), population // 2 // len(genome.orders)
            chosen = np.linspace(0, len(even) - 1, min(len(even), most)).round().astype(int)
            seeds = [*seeds, *(genome.schedule(even[index]) for index in chosen)]
    if book is not None:
        seeds = [*seeds, *seeds_of(book, genome)[: population - 1 - len(seeds)]]
    first = first_population(genome, population, seeds, settings.operators.seed)
    files.make_folder(folder, "out")
    ledger = Ledger(folder / LEDGER, identity(work, settings, seeds, facts))
    try:
        archive = Archive(genome, work, settings.costs, settings.race, ledger, workers)
        algorithm = Nsga2(
            first,
            population,
            1 + len(settings.costs),
            settings.operators,
            genome.components,
            len(genome.orders),
            genome.knobs,
        )
        loop = _Loop(archive, algorithm, ledger, settings, watch)
        for number in range(settings.generations + 1):
            if not loop.generation(number):
                break
    except BaseException:
        ledger.close()
        raise
    done = tuple(ledger.generations[number] for number in range(loop.done))
    front = tuple(archive.front())
    return Search(front, done, genome, facts["costs"], archive, facts["schedulers"]), ledger


@dataclass
class _Loop:
    archive: Archive
    algorithm: Nsga2
    ledger: Ledger
    settings: Settings
    watch: Watch
    done: int = 0
    dense: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    volumes: list[float] = field(default_factory=list)

    def generation(self, number: int) -> bool:
        """This runs one generation, and gives False if there are no new children."""
        vectors = self.algorithm.ask()
        if not len(vectors):
            return False
        if number and self.settings.surrogate:
            vectors = self._proposed(vectors, number)
            self.algorithm.exchange(vectors)
        front = self.archive.front()

        def progress(done: int, total: int) -> None:
            self.watch(self._state(number, done, total, front))

        progress(0, 0)
        found = self.archive.evaluate(vectors, progress)
        reused = np.array([candidate.reused for candidate in found])
        self.dense = self.dense or next(c.values[1:] for c in found if not c.reused)
        values = self._on_axes(found)
        self.algorithm.tell(values, reused)
        self.reference = self.reference or corner(values[reused > 0])
        front = self.archive.front()
        self.volumes.append(hypervolume(self._on_axes(front), self.reference))
        self.ledger.add_generation(
            number,
            {
                "candidates": _digest(found),
                "fresh": len(self.archive.seen),
                "pictures": sum(len(c.losses) for c in self.archive.seen.values()),
                "front": [c.key for c in front],
                "hypervolume": self.volumes[-1],
            },
        )
        self.done = number + 1
        self.watch(self._state(number, 0, 0, front))
        return True

    def _proposed(self, children: np.ndarray, number: int) -> np.ndarray:
        """The surrogate would rather measure this than these children."""
        measured = [candidate for candidate in self.archive.seen.values() if candidate.reused]
        operators, work = self.settings.operators, self.archive.work
        return propose(
            self.archive.genome,
            children,
            np.stack([candidate.vector for candidate in measured]),
            self.archive.seen,
            self._on_axes(measured),
            self.reference,
            replace(operators, seed=operators.seed + number),
            self.settings.surrogate,
            is_logarithmic(work.quality),
            vanishes=not (is_of_latents(work.quality) or len(work.knobs.solvers) > 1),
        )

    def _on_axes(self, candidates: Sequence[Candidate]) -> np.ndarray:
        logarithmic = is_logarithmic(self.archive.work.quality)
        return on_axes([c.values for c in candidates], self.dense, logarithmic)

    def _state(self, number: int, done: int, total: int, front: Sequence[Candidate]) -> State:
        gain = self.volumes[-1] / self.volumes[0] - 1 if self.volumes and self.volumes[0] else 0.0
        candidates = len(self.archive.seen)
        return State(number, self.settings.generations, done, total, candidates, front, gain)


def _digest(found: Sequence[Candidate]) -> str:
    return hashlib.sha256("".join(c.key for c in found).encode()).hexdigest()[:16]
