"""What a plan of whole steps comes to, foreseen from one unpatched run of each picture.

To first order a run that draws some outputs ends where the unpatched one does, moved by what each drawn output is off
times the step that it leads over. Both are sums of the unpatched run's outputs with weights that the plan and the
sigmas say, so the Gram matrix of these outputs, and of the unpatched run's distance to the solution, tells the error of
any plan without a call of the model. That is what InvarDiff (arXiv 2512.05134) takes quantiles of a few runs for;
here the steps that compute are moved about, and the orders by which the others are drawn, while the error falls.

How a drawn output changes the later ones is left out, so what is foreseen only says what is worth measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastdit.schedules.forecast import last_nodes, weights

#: steps that compute, and the order by which the others are drawn, or one for each step
Place = tuple[tuple[int, ...], int | tuple[int, ...]]

SHIFTS = (-2, -1, 1, 2)
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Foresight:
    """The unpatched runs of some pictures.

    Attributes:
        sigmas: Of each step, and the last one's end.
        gram: [pictures, steps + 1, steps + 1], the products of the outputs of all steps, and as the last of them of
            the distance to the solution.
    """

    sigmas: tuple[float, ...]
    gram: np.ndarray

    @classmethod
    def of(cls, sigmas: Sequence[float], outputs: np.ndarray, off: np.ndarray) -> Foresight:
        """Of outputs [steps, pictures, ...] as the sampler takes them, and what is off at the end [pictures, ...]."""
        rows = np.concatenate([outputs, off[None]]).reshape(len(outputs) + 1, len(off), -1)
        rows = rows.astype(np.float64)
        return cls(tuple(map(float, sigmas)), np.einsum("ipx,jpx->pij", rows, rows))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def moved(self) -> list[float]:
        """How far the outputs are from those of the step before, relatively, added up over the pictures."""
        squares = np.einsum("pii->pi", self.gram)[:, :-1]
        both = np.einsum("pii->pi", self.gram[:, 1:, :-1])[:, : self.steps - 1]
        far = squares[:, 1:] + squares[:, :-1] - 2 * both
        ratios = np.sqrt(np.maximum(far, 0) / np.maximum(squares[:, :-1], TINY))
        return [0.0, *ratios.sum(axis=0).tolist()]

    def losses(self, place: Place) -> np.ndarray:
        """The logarithm of each picture's foreseen distance to the solution."""
        weights = self._weights(place)
        squares = np.einsum("pij,i,j->p", self.gram, weights, weights)
        return 0.5 * np.log(np.maximum(squares, TINY))

    def improved(self, place: Place, orders: Sequence[int] = ()) -> Place:
        """The place that is reached from this one by the moves that lower the foreseen error most.

        A move shifts a computed step by one or two, or has a drawn one drawn by another of `orders`.
        """
        best, loss = place, self.losses(place).mean()
        while True:
            found = [(self.losses(other).mean(), other) for other in self._moves(best, orders)]
            least, other = min(found, default=(loss, best))
            if least >= loss - 1e-9:
                return best
            best, loss = other, least

    def _moves(self, place: Place, orders: Sequence[int]) -> Iterator[Place]:
        computed, drawn = place
        for index, by in ((i, by) for i in range(1, len(computed)) for by in SHIFTS):
            moved = computed[index] + by
            if 0 < moved < self.steps and moved not in computed:
                steps = tuple(sorted({*computed, moved} - {computed[index]}))
                yield steps, _moved(drawn, computed[index], moved)
        if not isinstance(drawn, tuple):
            return
        for step, order in ((s, o) for s in range(1, self.steps) for o in orders):
            if step not in computed and drawn[step] != order:
                yield computed, (*drawn[:step], order, *drawn[step + 1 :])

    def _weights(self, place: Place) -> np.ndarray:
        computed, orders = place
        found, made, known = np.zeros(self.steps + 1), [], set(computed)
        found[-1] = 1.0
        for step in range(self.steps):
            if step in known:
                made.append(step)
                continue
            order = orders if isinstance(orders, int) else orders[step]
            length = self.sigmas[step + 1] - self.sigmas[step]
            nodes = last_nodes(made, self.sigmas, order)
            at = tuple(self.sigmas[node] for node in nodes)
            found[step] -= length
            found[list(nodes)] += length * np.array(_lagrange(at, self.sigmas[step]))
        return found


_lagrange = lru_cache(1 << 16)(weights)


def _moved(orders: int | tuple[int, ...], old: int, new: int) -> int | tuple[int, ...]:
    """A step no longer computes, and is drawn as the one was that computes now."""
    if isinstance(orders, int):
        return orders
    found = list(orders)
    found[old], found[new] = found[new], 0
    return tuple(found)
