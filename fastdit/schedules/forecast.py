"""Forecasts: the polynomial through an output's last computed values, read at the sigma of another step.

Order 0 repeats the last value, order 1 is the line through the last two, order 2 the parabola through three. The sigmas
are those of the sampler's own grid, where steps are of unlike length. With a model's whole output that makes a linear
multistep method of the sampler, such as Adams and Bashforth's; Euler takes the line's value at the beginning of each
step that it skips, AB2 that in its middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: the highest order: through three values
MAX_ORDER = 2
#: (step, steps that were computed, latest first) -> as many weights, where they are not a polynomial's
Fitted = Mapping[tuple[int, tuple[int, ...]], tuple[float, ...]]


def weights(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """This gives Lagrange's weights: sum_i w_i f(nodes[i]) is the polynomial through all nodes, at `at`.

    They sum to 1. Nodes must be distinct; one alone has weight 1.
    """
    found = []
    for i, own in enumerate(nodes):
        weight = 1.0
        for j, other in enumerate(nodes):
            if j != i:
                weight *= (at - other) / (own - other)
        found.append(weight)
    return tuple(found)


def last_nodes(computed: Sequence[int], sigmas: Sequence[float], order: int) -> tuple[int, ...]:
    """This chooses the steps a forecast of `order` is drawn through: the last ones at distinct sigmas, latest first.

    A step at the sigma of an earlier one replaces it: Heun computes twice there.

    Args:
        computed: Steps whose output was computed, rising.
        sigmas: The sigma of every step.
        order: 0 to :data:`MAX_ORDER`; fewer nodes give a lower one.
    """
    found: list[int] = []
    for step in reversed(computed):
        if len(found) > order:
            break
        if all(sigmas[step] != sigmas[other] for other in found):
            found.append(step)
    return tuple(found)
