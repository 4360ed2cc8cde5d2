"""NSGA-II by pymoo, with the settings of the ECAD paper's code (spec 6.2).

Binary tournament by constraint violation, dominance and crowding; 4-point crossover of nine matings in ten; survival by
rank and crowding over parents and offspring; duplicates removed. In pymoo the `prob` of a mutation is that of an
*individual* to be mutated at all, and each bit of one flips with `prob_var`, by default 1 / bits: the published 0.05 is
one flipped bit in every twentieth child. In effect the search recombines its seeds.

`unit="step"` varies whole steps instead (`moves.py`), which finds more where a step is best computed or reused whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdit.errors import ArgumentError, DependencyError
from fastdit.search import moves
from fastdit.search.knobs import MOVE_SHARE, Knobs

UNITS = ("bit", "step")


@dataclass(frozen=True)
class Operators:
    """NSGA-II has these settings; the defaults are the paper's.

    Attributes:
        crossover_points: Cuts of a crossover.
        crossover_share: Share of the matings that cross at all.
        mutation_share: Share of the children that mutate at all.
        mutation_bits: Mean number of flipped bits in a child that mutates.
        min_difference: A schedule that reuses fewer entries than this is infeasible.
        seed: Of the whole search.
        unit: What crossover cuts and mutation changes: "bit" as in the paper, or "step", see `moves.py`.
    """

    crossover_points: int = 4
    crossover_share: float = 0.9
    mutation_share: float = 0.05
    mutation_bits: float = 1.0
    min_difference: int = 1
    seed: int = 0
    unit: str = "bit"

    @classmethod
    def of(cls, unit: str, seed: int = 0) -> Operators:
        """A unit goes with these settings: the paper's, or more mutation and fewer cuts for steps."""
        if unit == "step":
            return cls(2, 0.5, 0.75, seed=seed, unit=unit)
        return cls(seed=seed, unit=unit)

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ArgumentError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        for name in ("crossover_share", "mutation_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        if self.crossover_points < 1 or self.mutation_bits <= 0:
            raise ArgumentError(
                "crossover_points must be at least 1 and mutation_bits above 0, got "
                f"{self.crossover_points!r} and {self.mutation_bits!r}"
            )


class Nsga2:
    """It is asked for vectors and told what they are worth.

    Args:
        seeds: The first population, bool [n, bits].
        population: Members that survive, and children per generation.
        objectives: How many.
        operators: See :class:`Operators`.
        components: (kind, block, component) of each bit of a step, as of :class:`~fastdit.search.genome.Genome`.
        orders: How many orders an entry may be drawn by.
        knobs: What else is searched; its bits are the vectors' last.
    """

    def __init__(
        self,
        seeds: np.ndarray,
        population: int,
        objectives: int,
        operators: Operators,
        components: Sequence[tuple[str, int, str]] = (),
        orders: int = 1,
        knobs: Knobs = Knobs(),  # noqa: B008 (frozen)
    ) -> None:
        require_pymoo()
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        bits = seeds.shape[1]
        self._operators = operators
        self.problem = Problem(n_var=bits, n_obj=objectives, n_ieq_constr=1, vtype=bool)
        make = _by_steps if operators.unit == "step" else _by_bits
        crossover, mutation = make(operators, bits, components, orders, knobs)
        self.algorithm = NSGA2(
            pop_size=population,
            sampling=np.array(seeds, dtype=bool),
            crossover=crossover,
            mutation=mutation,
            eliminate_duplicates=True,
        )
        self.algorithm.setup(
            self.problem, termination=NoTermination(), seed=operators.seed, verbose=False
        )
        self._asked: Any = None

    def ask(self) -> np.ndarray:
        """This is the next generation, bool [n, bits]; it is empty if the population has no new children left."""
        self._asked = self.algorithm.ask()
        if self._asked is None or len(self._asked) == 0:
            return np.zeros((0, self.problem.n_var), dtype=bool)
        return self._asked.get("X").astype(bool)

    def exchange(self, vectors: np.ndarray) -> None:
        """These are measured in place of what the last `ask` gave, bool [n, bits]."""
        from pymoo.core.population import Population

        self._asked = Population.new(X=vectors)

    def survivors(self) -> np.ndarray:
        """This is the population, bool [n, bits]."""
        return self.algorithm.pop.get("X").astype(bool)

    def tell(self, values: np.ndarray, reused: np.ndarray) -> None:
        """The vectors asked for are worth this: objectives [n, objectives], entries reused [n]."""
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        violation = self._operators.min_difference - np.asarray(reused, dtype=float)
        static = StaticProblem(
            self.problem, F=np.asarray(values, dtype=float), G=violation[:, None]
        )
        Evaluator().eval(static, self._asked)
        self.algorithm.tell(infills=self._asked)


def _by_bits(operators: Operators, bits: int, *_: Any) -> tuple[Any, Any]:
    """This is the paper's crossover and mutation."""
    from pymoo.operators.crossover.pntx import PointCrossover
    from pymoo.operators.mutation.bitflip import BitflipMutation

    return (
        PointCrossover(operators.crossover_points, prob=operators.crossover_share),
        BitflipMutation(
            prob=operators.mutation_share, prob_var=min(1.0, operators.mutation_bits / bits)
        ),
    )


def _by_steps(
    operators: Operators, bits: int, components: Sequence[Any], orders: int, knobs: Knobs
) -> tuple[Any, Any]:
    """This is crossover and mutation by `moves.py`, and of knobs one by one."""
    from pymoo.core.crossover import Crossover
    from pymoo.core.mutation import Mutation

    parts = moves.parts_of(components)
    width = len(components) * orders
    table = bits - knobs.size
    shape = (table // width, width)

    class StepCrossover(Crossover):
        def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **_: Any) -> Any:
            pairs = [self._pair(*parents, random_state) for parents in zip(*X, strict=True)]
            return np.array(pairs).reshape(len(pairs), 2, bits).swapaxes(0, 1)

        def _pair(self, one: Any, other: Any, rng: Any) -> list[Any]:
            rows = (each[:table].astype(bool).reshape(shape) for each in (one, other))
            children = moves.cross(*rows, operators.crossover_points, rng)
            tails = [each[table:].astype(bool) for each in (one, other)]
            tails = knobs.cross(*tails, rng) if knobs.size else tails
            return [np.append(*pair) for pair in zip(children, tails, strict=True)]

    class StepMutation(Mutation):
        def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **_: Any) -> Any:
            changed = X.astype(bool)
            for vector in changed:
                if knobs.size and random_state.random() < MOVE_SHARE:
                    knobs.turn(vector[table:], random_state)
                else:
                    moves.move(vector[:table].reshape(shape), parts, random_state)
            return changed

    return (
        StepCrossover(2, 2, prob=operators.crossover_share),
        StepMutation(prob=operators.mutation_share),
    )


def require_pymoo() -> None:
    """Where pymoo is not installed this is a DependencyError that names the extra."""
    try:
        import pymoo  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "the search needs pymoo, which is not installed: pip install fastdit[search]"
        ) from error
