"""Making and using the sums of `schedules/collapse.py` within one transformer call.

While outputs pass on the way to the stream they are also added up, in fp32, a chunk at a time. Then the sums take the
outputs' place in all of their slots, also among the last outputs that a forecast is drawn through; so whatever empties
slots empties them, and then the components compute and are added up anew. The first component of a sum adds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks.nodes import Drawn, HeldSums, Nodes
from fastdit.schedules.collapse import CHUNK, StepSums, Sum


@dataclass
class _Making:
    """A sum that is being made.

    Attributes:
        slots, outputs, gates: What waits for its chunk.
        added: Slot -> the forecast's outputs that it held, None without any, of what was added up.
        sums: What was added up.
    """

    slots: list[Any] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gates: list[Tensor | None] = field(default_factory=list)
    added: dict[Any, Nodes | None] = field(default_factory=dict)
    sums: Tensor | None = None


@dataclass(eq=False, repr=False)
class Sums:
    """The sums of one call.

    Attributes:
        plan: Those of the step.
        groups: Component -> the shared vector that its gate contains, 0 for none.
    """

    plan: StepSums
    groups: Mapping[str, int]
    _making: dict[Sum, _Making] = field(default_factory=dict, init=False)

    def add(
        self,
        forward: Any,
        stream: Any,
        name: str,
        compute: Callable[[], Tensor],
        gate: Tensor | None,
        shared: Tensor,
    ) -> None:
        """Add a component of the running block to the stream, by itself or, at the first of a sum, with all of it."""
        slot = forward.index, name
        output = forward.component(name, compute)
        parts = output.values if isinstance(output, Drawn) else (output,)
        if not any(isinstance(part, HeldSums) for part in parts):
            stream.add(output, gate)
            self._make(forward, stream, slot, output, gate, shared)
            return
        for place, part in enumerate(parts):
            if not isinstance(part, HeldSums):
                stream.add(_weighed(output, place, part), gate)
            elif part.slots[0] == slot:
                first, *groups = forward.from_slot(part.sums)
                stream.add(_weighed(output, place, first))
                change = shared - part.shared
                for group, by in zip(groups, change.unbind(1), strict=True):
                    stream.add(_weighed(output, place, group), by)

    def _make(
        self,
        forward: Any,
        stream: Any,
        slot: Any,
        output: Tensor | Drawn,
        gate: Tensor | None,
        shared: Tensor,
    ) -> None:
        """Add the output up if its slot is to hold sums."""
        total = self.plan.newest.get(slot)
        if total is None or total.last <= self.plan.step or slot not in forward.slots:
            return
        if isinstance(output, Drawn) or not stream.suits(output, gate):
            return
        making = self._making.setdefault(total, _Making())
        making.slots.append(slot)
        making.outputs.append(output if output.stride(-1) == 1 else output.contiguous())
        making.gates.append(gate)
        end = slot == total.slots[-1]
        if not end and len(making.outputs) < CHUNK:
            return
        if making.sums is None:
            # Several chunks are added up in a wide dtype, and rounded once.
            several = len(total.slots) > CHUNK
            dtype = torch.promote_types(output.dtype, torch.float32 if several else output.dtype)
            making.sums = output.new_empty((1 + shared.shape[1], *output.shape), dtype=dtype)
        groups = [self.groups[name] for _, name in making.slots]
        more = bool(making.added)
        forward.ops.collapse(making.outputs, making.gates, groups, out=making.sums, accumulate=more)
        for done in making.slots:
            held = forward.slots.pop(done)
            making.added[done] = held.with_newest(None) if isinstance(held, Nodes) else None
        for waiting in (making.slots, making.outputs, making.gates):
            waiting.clear()
        if end and len(making.added) == len(total.slots):
            sums = forward.to_slot(making.sums.to(output.dtype))
            held = HeldSums(total.slots, sums, shared.clone())
            for done, nodes in making.added.items():
                forward.slots[done] = held if nodes is None else nodes.with_newest(held)


def _weighed(output: Any, place: int, part: Tensor) -> Tensor | Drawn:
    """A part of an output, by the weight of its place where the output is drawn."""
    return output.part(place, part) if isinstance(output, Drawn) else part
