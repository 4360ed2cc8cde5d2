"""Making and using the sums of `schedules/collapse.py` within one transformer call.

While outputs pass on the way to the stream they are also added up, in fp32, a chunk at a time; each part by itself of
outputs that go to several streams. Then the sums take the outputs' place in all of their slots, also among the last
outputs that a forecast is drawn through; so whatever empties slots empties them, and then the components compute and
are added up anew. The first component of a sum adds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks.nodes import Drawn, HeldSums, Nodes
from fastdit.schedules.collapse import CHUNK, StepSums, Sum

#: (stream, gate) of each part of an output
Targets = Sequence[tuple[Any, Tensor | None]]


@dataclass
class _Making:
    """A sum that is being made.

    Attributes:
        slots, outputs, gates: What waits for its chunk; of each output its parts.
        added: Slot -> the forecast's outputs that it held, None without any, of what was added up.
        sums: What was added up, of each part.
    """

    slots: list[Any] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    gates: list[Tensor | None] = field(default_factory=list)
    added: dict[Any, Nodes | None] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Sums:
    """The sums of one call.

    Attributes:
        plan: Those of the step.
        groups: Component -> the shared vector that its gate contains, 0 for none; empty where gates are the same in all
            blocks.
    """

    plan: StepSums
    groups: Mapping[str, int]
    _making: dict[Sum, _Making] = field(default_factory=dict, init=False)

    def add(
        self,
        forward: Any,
        name: str,
        compute: Callable[[], Any],
        targets: Targets,
        shared: Tensor | None,
    ) -> None:
        """Add a component of the running block to its streams, by itself or, at the first of a sum, with all of it."""
        slot = forward.index, name
        output = forward.component(name, compute)
        values = output.values if isinstance(output, Drawn) else (output,)
        if not any(isinstance(value, HeldSums) for value in values):
            for (stream, gate), part in parted(output, targets):
                stream.add(part, gate)
            self._make(forward, slot, output, targets, shared)
            return
        for place, value in enumerate(values):
            if not isinstance(value, HeldSums):
                for (stream, gate), part in parted(value, targets):
                    stream.add(_weighed(output, place, part), gate)
            elif value.slots[0] == slot:
                for (stream, gate), sums in zip(targets, value.sums, strict=True):
                    first, *groups = forward.from_slot(sums)
                    stream.add(_weighed(output, place, first), gate if shared is None else None)
                    change = () if shared is None else (shared - value.shared).unbind(1)
                    for group, by in zip(groups, change, strict=True):
                        stream.add(_weighed(output, place, group), by)

    def _make(
        self, forward: Any, slot: Any, output: Any, targets: Targets, shared: Tensor | None
    ) -> None:
        """Add the output up if its slot is to hold sums."""
        total = self.plan.newest.get(slot)
        if total is None or total.last <= self.plan.step or slot not in forward.slots:
            return
        parts = [part for _, part in parted(output, targets)]
        if any(isinstance(part, Drawn) for part in parts):
            return
        if not all(stream.suits(part, gate) for (stream, gate), part in parted(output, targets)):
            return
        making = self._making.setdefault(total, _Making())
        making.slots.append(slot)
        making.outputs.append([p if p.stride(-1) == 1 else p.contiguous() for p in parts])
        making.gates.append(None if shared is None else targets[0][1])
        end = slot == total.slots[-1]
        if not end and len(making.outputs) < CHUNK:
            return
        if not making.sums:
            # Several chunks are added up in a wide dtype, and rounded once.
            wide = torch.float32 if len(total.slots) > CHUNK else parts[0].dtype
            dtype = torch.promote_types(parts[0].dtype, wide)
            count = 1 if shared is None else 1 + shared.shape[1]
            making.sums = [part.new_empty((count, *part.shape), dtype=dtype) for part in parts]
        groups = [self.groups.get(name, 0) for _, name in making.slots]
        more = bool(making.added)
        for outputs, sums in zip(zip(*making.outputs, strict=True), making.sums, strict=True):
            forward.ops.collapse(outputs, making.gates, groups, out=sums, accumulate=more)
        for done in making.slots:
            held = forward.slots.pop(done)
            making.added[done] = held.with_newest(None) if isinstance(held, Nodes) else None
        for waiting in (making.slots, making.outputs, making.gates):
            waiting.clear()
        if end and len(making.added) == len(total.slots):
            sums = tuple(forward.to_slot(each.to(parts[0].dtype)) for each in making.sums)
            held = HeldSums(total.slots, sums, None if shared is None else shared.clone())
            for done, nodes in making.added.items():
                forward.slots[done] = held if nodes is None else nodes.with_newest(held)


def parted(output: Any, targets: Targets) -> Iterator[tuple[tuple[Any, Tensor | None], Any]]:
    """Each part of an output, with where it goes."""
    return zip(targets, output if len(targets) > 1 else (output,), strict=True)


def _weighed(output: Any, place: int, part: Tensor) -> Tensor | Drawn:
    """A part of an output, by the weight of its place where the output is drawn."""
    return output.part(place, part) if isinstance(output, Drawn) else part
