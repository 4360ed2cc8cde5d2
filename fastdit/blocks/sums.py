"""Making and using the sums of `schedules/collapse.py` within one transformer call.

While outputs pass on the way to the stream they are also added up, in fp32, a chunk at a time; what has been added up
leaves its slot. The sums are kept in a slot too, so whatever empties slots empties them; then the components compute,
or are read from their own slots, and are added up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdit.schedules.collapse import CHUNK, StepSums, Sum


@dataclass
class _Making:
    """A sum that is being made: outputs that wait for their chunk, and how many were added up."""

    slots: list[Any] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gates: list[Tensor | None] = field(default_factory=list)
    sums: Tensor | None = None
    done: int = 0


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
        slot, step = (forward.index, name), self.plan.step
        used = self.plan.used.get(slot)
        if used is not None and used in forward.slots:
            if slot == used.slots[0]:
                self._use(forward, stream, forward.slots[used], shared)
            if slot == used.slots[-1] and used.last == step:
                del forward.slots[used]
            return
        output = forward.component(name, compute)
        stream.add(output, gate)
        making = self.plan.made.get(slot, used)
        if making is not None and making.last > step and stream.suits(output, gate):
            self._make(forward, making, slot, output, gate, shared)

    def _use(self, forward: Any, stream: Any, held: tuple[Tensor, Tensor], shared: Tensor) -> None:
        sums, before = held
        change = shared - before
        first, *groups = forward.from_slot(sums)
        stream.add(first)
        for group, gate in zip(groups, change.unbind(1), strict=True):
            stream.add(group, gate)

    def _make(
        self,
        forward: Any,
        total: Sum,
        slot: Any,
        output: Tensor,
        gate: Tensor | None,
        shared: Tensor,
    ) -> None:
        making = self._making.setdefault(total, _Making())
        making.slots.append(slot)
        making.outputs.append(output if output.stride(-1) == 1 else output.contiguous())
        making.gates.append(gate)
        end = slot == total.slots[-1]
        if not end and len(making.outputs) < CHUNK:
            return
        if making.sums is None:
            wide = torch.promote_types(output.dtype, torch.float32)
            making.sums = output.new_empty((1 + shared.shape[1], *output.shape), dtype=wide)
        groups = [self.groups[name] for _, name in making.slots]
        forward.ops.collapse(
            making.outputs, making.gates, groups, out=making.sums, accumulate=making.done > 0
        )
        making.done += len(making.outputs)
        for done in making.slots:
            forward.slots.pop(done, None)
        for waiting in (making.slots, making.outputs, making.gates):
            waiting.clear()
        if end and making.done == len(total.slots):
            sums = forward.to_slot(making.sums.to(output.dtype))
            forward.slots[total] = sums, shared.clone()
