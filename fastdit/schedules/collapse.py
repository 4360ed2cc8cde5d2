"""Which reused outputs are kept as sums: as three (PixArt), or as one for each component (FLUX.2).

In a model whose gates are a table of the block plus a vector tau(t) that all blocks share (adaLN-single), outputs C_i
that are reused at several steps add to the stream

    sum_i gate_i(t) C_i = sum_i gate_i(s) C_i + sum_g (tau_g(t) - tau_g(s)) sum_{i in group g} C_i

exactly, with s any one step and g a group of gates (ECAD spec section 10, which takes the tables for gate_i(s); the
difference form does not cancel where tau is large). The sums are made at step s, while the outputs pass anyway; from
then on a step reads three tensors for n, and the outputs are not kept.

Where the gates of a component are the same in all blocks, it adds gate(t) sum_i C_i: one sum, which knows no step.

A forecast is sum_j w_j(t) C_ij over the steps j that it is drawn through (`forecast.py`). Outputs drawn through the
same steps have the same w_j, so they add

    sum_j w_j(t) (sum_i gate_i(j) C_ij + sum_g (tau_g(t) - tau_g(j)) sum_{i in group g} C_ij)

which is exact again: three sums for each step that is drawn through, made when that step computes, in place of n
outputs. These are the polynomial's coefficients in Lagrange's form. In powers of sigma they would be linear
combinations of the same sums, formed anew by a pass over all of them whenever another step computes; so they stay
sums of one step, and the few numbers w_j, in fp32, do the rest.

:func:`find_sums` says which. Outputs of a step may share sums if later steps read them at the same time, by the same
weights, and nothing between them reads the stream at any of these. Then all are done with at once, so none has to be
kept beside its sum and memory never grows. There are sums only where fewer bytes move: never for a single use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: outputs added up in one pass; as many are held until then
CHUNK = 32

#: (block over all kinds, component): where an output is kept
Slot = tuple[int, str]


@dataclass(frozen=True, eq=False)
class Sum:
    """These outputs are kept as sums.

    Attributes:
        slots: Where those outputs were kept, in running order.
        made: The step that makes the sums.
        uses: The steps that read them, rising.
        count: How many sums there are.
    """

    slots: tuple[Slot, ...]
    made: int
    uses: tuple[int, ...]
    count: int = 3

    @property
    def last(self) -> int:
        """The last step that reads them."""
        return self.uses[-1]


@dataclass(frozen=True)
class StepSums:
    """These sums are made, used and kept at one step.

    Attributes:
        step: Its number.
        newest: Slot -> the sum that its last computed output is part of, or enters at this step.
        used: Slot -> the sums that what it gives at this step is read from.
        kept: Those that are there after the step.
    """

    step: int
    newest: dict[Slot, Sum]
    used: dict[Slot, tuple[Sum, ...]]
    kept: tuple[Sum, ...]

    @property
    def made(self) -> dict[Slot, Sum]:
        """Slot -> the sum that its output enters at this step."""
        return {slot: each for slot, each in self.newest.items() if each.made == self.step}


def passes(outputs: int, sums: int = 3) -> int:
    """Sums cost as many bytes as this many outputs: each is read, and the sums are written, after a chunk read too."""
    return outputs + sums + 2 * sums * ((outputs - 1) // CHUNK)


def find_sums(
    computes: np.ndarray,
    slots: Sequence[Slot],
    reads: np.ndarray | None = None,
    orders: np.ndarray | None = None,
    alike: Sequence[Any] | None = None,
) -> list[StepSums]:
    """This finds the sums of every step.

    Args:
        computes: Which slot's output is computed, bool [steps, slots]; at the first step all are.
        slots: Where they are kept, in running order.
        reads: Which slot is read, bool [steps, slots]; those that do not compute by default.
        orders: By which order what is read is drawn, [steps, slots]; 0 by default.
        alike: Of each slot what outputs must have in common to be kept as one sum; None where they are kept as three.
    """
    reads = ~computes if reads is None else reads
    orders = np.zeros(computes.shape, dtype=int) if orders is None else orders
    uses, count = _Uses(computes, reads, orders), 3 if alike is None else 1
    nodes = np.maximum.accumulate(np.where(computes, np.arange(len(computes))[:, None], 0))
    summed = np.full(len(slots), -1)  # the step that computed what entered a sum last
    found: list[tuple[Sum, list[int]]] = []
    for step, node in enumerate(nodes):
        classes: dict[int, list[int]] = defaultdict(list)
        after = uses.after[step]
        for place in np.flatnonzero((summed != node) & uses.passes[step] & (after > 0)).tolist():
            classes[int(after[place])].append(place)
        for later, places in classes.items():
            if not _pays(len(places), uses.counts[later], count):
                continue
            steps = uses.steps(later)
            for members in _split(places, computes[list(steps)].any(axis=0), alike):
                if _pays(len(members), len(steps), count):
                    summed[members] = node[members]
                    made = Sum(tuple(slots[i] for i in members), step, steps, count)
                    found.append((made, members))
    return _by_step(found, nodes)


def _by_step(found: Sequence[tuple[Sum, list[int]]], nodes: np.ndarray) -> list[StepSums]:
    """`nodes` is the step that computed what each slot has at each step; beside a sum are its places in there."""
    newest: list[dict[Slot, Sum]] = [{} for _ in nodes]
    used: list[dict[Slot, tuple[Sum, ...]]] = [{} for _ in nodes]
    for each, places in found:
        for place, slot in zip(places, each.slots, strict=True):
            held = nodes[:, place]
            until = int(np.searchsorted(held, held[each.made], side="right"))
            for step in range(each.made, until):
                newest[step][slot] = each
            for step in each.uses:
                used[step][slot] = (*used[step].get(slot, ()), each)
    kept = [tuple(s for s, _ in found if s.made <= step < s.last) for step in range(len(nodes))]
    return [
        StepSums(step, *those) for step, those in enumerate(zip(newest, used, kept, strict=True))
    ]


def _pays(outputs: int, uses: int, sums: int) -> bool:
    """Whether fewer bytes are read than it takes to make the sums."""
    return uses * (outputs - sums) > passes(outputs, sums)


class _Uses:
    """Which steps read the outputs, as chains: outputs of one chain are read by the same steps by the same weights.

    A chain is a number, 0 for no more uses.

    Attributes:
        counts: Chain -> so many uses.
        after: The chain of the uses behind a step, of the output that a slot has then; int [steps, slots].
        passes: Whether a slot's last output is added to the stream by itself, bool [steps, slots].
    """

    def __init__(self, computes: np.ndarray, reads: np.ndarray, orders: np.ndarray) -> None:
        self.counts, self.passes = [0], computes.copy()
        self._links: list[tuple[int, tuple[int, ...], int]] = [(0, (), 0)]  # step, nodes, next
        self._known: dict[tuple[int, tuple[int, ...], int], int] = {}
        self.after = np.zeros(computes.shape, dtype=np.int64)
        for place in range(computes.shape[1]):
            self._follow(place, *(array[:, place].tolist() for array in (computes, reads, orders)))

    def _follow(
        self, place: int, computes: list[bool], reads: list[bool], orders: list[int]
    ) -> None:
        """Backward over the steps, the chain of every output that a slot has had until then."""
        computed = [step for step, does in enumerate(computes) if does]
        chains = dict.fromkeys(computed, 0)
        for step in reversed(range(len(computes))):
            while computed[-1] > step:
                computed.pop()
            self.after[step, place] = chains[computed[-1]]
            if reads[step]:
                nodes = tuple(computed[-1 - orders[step] :])
                self.passes[step, place] = len(nodes) == 1
                for node in nodes:
                    link = step, nodes if len(nodes) > 1 else (), chains[node]
                    chains[node] = self._number(link)

    def _number(self, link: tuple[int, tuple[int, ...], int]) -> int:
        if link not in self._known:
            self._known[link] = len(self._links)
            self._links.append(link)
            self.counts.append(self.counts[link[2]] + 1)
        return self._known[link]

    def steps(self, chain: int) -> tuple[int, ...]:
        """These steps read an output of the chain, rising."""
        return tuple(self._walk(chain))

    def _walk(self, chain: int) -> Iterator[int]:
        while chain:
            step, _, chain = self._links[chain]
            yield step


def _split(
    places: Sequence[int], reading: np.ndarray, alike: Sequence[Any] | None
) -> list[list[int]]:
    """This parts places wherever one between them reads the stream, and those that are not alike."""
    before = np.cumsum(reading)
    found: dict[Any, list[int]] = defaultdict(list)
    for place in places:
        found[int(before[place]), None if alike is None else alike[place]].append(place)
    return list(found.values())
