"""Which reused outputs are kept as three sums (PixArt).

In a model whose gates are a table of the block plus a vector tau(t) that all blocks share (adaLN-single), outputs C_i
that are reused at several steps add to the stream

    sum_i gate_i(t) C_i = sum_i gate_i(s) C_i + sum_g (tau_g(t) - tau_g(s)) sum_{i in group g} C_i

exactly, with s any one step and g a group of gates (ECAD spec section 10, which takes the tables for gate_i(s); the
difference form does not cancel where tau is large). The sums are made at step s, while the outputs pass anyway; from
then on a step reads three tensors for n, and the outputs are not kept.

:func:`find_sums` says which. Outputs may share sums if they are reused at the same steps and nothing between them
reads the stream at any of these. Only outputs that are recomputed at the same step do, so none has to be kept beside
its sum and memory never grows; and only where fewer bytes move, so never for a single step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        made, last: The step that makes the sums, and the last one that uses them; from made + 1 on all do.
    """

    slots: tuple[Slot, ...]
    made: int
    last: int


@dataclass(frozen=True)
class StepSums:
    """These sums are made or used at one step.

    Attributes:
        step: Its number.
        made, used: Slot -> the sum it enters, or is part of, at this step.
    """

    step: int
    made: dict[Slot, Sum]
    used: dict[Slot, Sum]

    @property
    def kept(self) -> int:
        """So many sums are there after the step."""
        return len(set(self.made.values()) | {s for s in self.used.values() if s.last > self.step})


def passes(outputs: int) -> int:
    """Sums cost as many bytes as this many outputs: each is read, and the sums are written, after a chunk read too."""
    return outputs + 3 + 6 * ((outputs - 1) // CHUNK)


def find_sums(computes: np.ndarray, slots: Sequence[Slot]) -> list[StepSums]:
    """This finds the sums of every step of `computes`, bool [steps, slots], whose first step computes everything."""
    steps = len(computes)
    # The next step from each one on at which the output is computed.
    until = np.full((steps + 1, len(slots)), steps)
    for step in reversed(range(steps)):
        until[step] = np.where(computes[step], step, until[step + 1])
    covered = np.zeros(len(slots), dtype=int)  # in a sum up to before this step
    found: list[Sum] = []
    for step in range(1, steps):
        if (computes[step] | (covered > step)).all():
            continue
        for run in _split(range(len(slots)), computes[step]):
            for members in _classes(run, until[step]):
                members = [slot for slot in members if covered[slot] <= step]
                end = int(until[step, members[0]]) if members else step
                if (end - step) * (len(members) - 3) > passes(len(members)):  # outputs read less
                    covered[members] = end
                    found.append(Sum(tuple(slots[i] for i in members), step - 1, end - 1))
    return [
        StepSums(
            step,
            {slot: s for s in found if s.made == step for slot in s.slots},
            {slot: s for s in found if s.made < step <= s.last for slot in s.slots},
        )
        for step in range(steps)
    ]


def _classes(run: Sequence[int], until: np.ndarray) -> list[list[int]]:
    """Slots of a run belong together if one step ends their reuse and none between them is computed before."""
    found, stack = [], [list(run)]
    while stack:
        part = stack.pop()
        ends = until[part] == until[part].min()
        found.append([slot for slot, end in zip(part, ends, strict=True) if end])
        stack += _split(part, ends)
    return found


def _split(slots: Sequence[int], at: np.ndarray) -> list[list[int]]:
    """This gives the maximal runs of slots that are not marked."""
    runs: list[list[int]] = [[]]
    for slot, marked in zip(slots, at, strict=True):
        if marked:
            runs.append([])
        else:
            runs[-1].append(slot)
    return [run for run in runs if run]
