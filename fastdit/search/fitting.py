"""Weights of drawn outputs with which a run ends nearest to the solution, fitted to a few runs by least squares.

A step of Euler along a flow adds the output times the step's length, so between two computed steps a run moves by a
weighted sum of computed outputs. From one computed step to the next the weights are those with which the run comes
nearest to where the solution is then, over all pictures; what earlier steps missed is mended where it can be. All that
this needs of the pictures is the inner products of the outputs and of the solution's way.

The outputs are those of a run that was made before, of the unpatched run at first. Another fit to the outputs of the
run by the first weights comes nearer: the fixed point is what a fit during the run would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastdit.schedules.forecast import MAX_ORDER, last_nodes, weights

#: outputs that are added up
NODES = MAX_ORDER + 1
#: how much nearer a change of the line's weights has to bring a run, over the length of the change
RIDGE = 0.03
SHIFTS = (-2, -1, 1, 2)
#: a move is worth so much
GAIN = 1e-3
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Way:
    """Runs of some pictures beside the solution's.

    Attributes:
        sigmas: Of each step, and the last one's end.
        gram: [2 steps, 2 steps], the products of the outputs of all steps, and of the solution's way from the noise to
            the end of each step, over the square of its length, added up over the pictures.
    """

    sigmas: tuple[float, ...]
    gram: np.ndarray

    @classmethod
    def of(cls, sigmas: Sequence[float], outputs: np.ndarray, moved: np.ndarray) -> Way:
        """Of outputs [steps, pictures, ...] as the sampler takes them, and the solution's way, shaped like them."""
        rows = np.concatenate([outputs, moved]).reshape(2 * len(outputs), outputs.shape[1], -1)
        rows = rows.astype(np.float64)
        length = np.maximum(np.linalg.norm(rows[-1], axis=-1, keepdims=True), TINY)
        rows /= length
        return cls(tuple(map(float, sigmas)), np.einsum("ipx,jpx->ij", rows, rows))

    def __add__(self, other: Way) -> Way:
        return Way(self.sigmas, self.gram + other.gram)


@dataclass(frozen=True)
class Fit:
    """A plan with its weights.

    Attributes:
        weights: Drawn step -> those of the last computed outputs, latest first; they sum to 1.
        left: The square of what is left of the solution's way in the end, by the outputs that it was fitted to.
    """

    computed: tuple[int, ...]
    weights: dict[int, tuple[float, ...]]
    left: float


def fit(way: Way, computed: Sequence[int]) -> Fit:
    """The weights with which a run that computes these steps comes nearest to the solution."""
    sigmas, steps = way.sigmas, len(way.sigmas) - 1
    found: dict[int, tuple[float, ...]] = {}
    # What is left of the solution's way, in terms of the rows of the Gram matrix.
    made = np.zeros(2 * steps)
    for index, step in enumerate(computed):
        end = computed[index + 1] if index + 1 < len(computed) else steps
        made[step] += sigmas[step + 1] - sigmas[step]
        if end == step + 1:
            continue
        nodes = last_nodes(computed[: index + 1], sigmas, NODES - 1)
        length = sigmas[end] - sigmas[step + 1]
        if abs(length) < TINY:  # the run stays where it is
            repeat = (1.0, *[0.0] * (len(nodes) - 1))
            found |= dict.fromkeys(range(step + 1, end), repeat)
            continue
        own = _line(sigmas, nodes, range(step + 1, end))
        left = -made
        left[steps + end - 1] += 1
        left[list(nodes)] -= length * own
        own += _changes(way.gram, nodes, left / length)
        made[list(nodes)] += length * own
        found |= dict.fromkeys(range(step + 1, end), tuple(map(float, own)))
    made[-1] -= 1
    return Fit(tuple(computed), found, float(made @ way.gram @ made))


def improved(way: Way, computed: Sequence[int]) -> Fit:
    """The fit that is reached from these steps by the moves of a computed one that leave least."""
    best = fit(way, computed)
    while True:
        least = min((fit(way, each) for each in _moved(way, best.computed)), key=lambda f: f.left)
        if least.left >= best.left * (1 - GAIN):
            return best
        best = least


def _moved(way: Way, computed: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield computed
    for step, by in ((step, by) for step in computed[1:] for by in SHIFTS):
        if 0 < step + by < len(way.sigmas) - 1 and step + by not in computed:
            yield tuple(sorted({*computed, step + by} - {step}))


def _line(sigmas: Sequence[float], nodes: Sequence[int], drawn: Sequence[int]) -> np.ndarray:
    """The mean weights of lines through the last two nodes, over the lengths of the drawn steps."""
    last = nodes[:2]
    at = [sigmas[node] for node in last]
    lengths = [sigmas[step + 1] - sigmas[step] for step in drawn]
    found = np.zeros(len(nodes))
    found[: len(last)] = np.average(
        [weights(at, sigmas[step]) for step in drawn], axis=0, weights=lengths
    )
    return found


def _changes(gram: np.ndarray, nodes: Sequence[int], left: np.ndarray) -> np.ndarray:
    """What to add to the nodes' weights, 0 in sum, so that the least of what is left stays."""
    if len(nodes) == 1:
        return np.zeros(1)
    changes = np.zeros((len(nodes) - 1, len(gram)))
    changes[:, nodes[0]] = -1
    changes[range(len(changes)), nodes[1:]] = 1
    products = changes @ gram @ changes.T
    products += np.diag(RIDGE * products.diagonal() + TINY)
    others = np.linalg.solve(products, changes @ gram @ left)
    return np.array([-others.sum(), *others])
