"""What a student computes: r fresh + (1 - r) drawn, of each component's output or of the model's own.

What is drawn repeats the last output that was stored, or is the line or parabola through the last ones at the sampler's
sigmas, by the same code as at inference (`blocks/nodes.py`). A gradient reaches r through fresh - drawn.

Where all of a step is drawn by one order above 0, inference extrapolates the model's output and visits no block. So a
student with one ratio for a whole step blends that output, which the teacher has computed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.blocks.forward import Forward, Slots
from fastdit.blocks.nodes import Nodes, Weights
from fastdit.blocks.residual import gathered
from fastdit.schedules.router import TAU

#: what a step may weigh its components by: a ratio for each, or one of these two
COMPUTE, STOCK = "compute", "stock"
Ratios = Tensor | str
#: the slot of the model's own output
OUTPUT = (-1, "output")


@dataclass(frozen=True)
class Blending:
    """A student blends so.

    Attributes:
        tau: A slot is renewed where r > tau.
        keep: What with, the "blended" output or the "fresh" one.
        order: Of the forecasts; 0 repeats.
        whole: Blend the model's output in place of its components'.
    """

    tau: float = TAU
    keep: str = "blended"
    order: int = 0
    whole: bool = False

    def renewed(self, held: Nodes | None, step: int, value: Any, weights: Weights) -> Nodes:
        """This is a slot with one more output, of which as many stay as forecasts are drawn through."""
        return (held or Nodes()).with_node(step, value, self.order + 1, weights.sigmas)

    def drawn(self, held: Nodes, step: int, weights: Weights) -> Any:
        """A slot gives this in place of an output."""
        return gathered(held.drawn(step, self.order, weights))


class BlendForward(Forward):
    """In this transformer call every component runs, and its output is blended with what its slot gives.

    A pure function of the slots it was made with: what it would store is in `written`, so that checkpointed blocks may
    run again in the backward pass.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        places: Mapping[tuple[int, str], int],
        ratios: Ratios,
        slots: Slots,
        blending: Blending,
        step: int,
        weights: Weights,
    ) -> None:
        bound = ops.bind("reference")
        super().__init__(bound, blocks, slots=dict(slots), step=step, weights=weights)
        self.written: Slots = {}
        self._places = places
        self._blending = blending
        self._ratios = ratios.unbind() if isinstance(ratios, Tensor) else None
        self._renew = (ratios > blending.tau).tolist() if isinstance(ratios, Tensor) else None

    def computes(self, component: str) -> bool:
        """Everything runs."""
        return True

    def component(self, name: str, compute: Callable[[], Any]) -> Any:
        """The output is blended; see the class."""
        key = self.index, name
        fresh = compute()
        self.computed += 1
        held = self.slots.get(key)
        if self._ratios is None or held is None:
            out, renew = fresh, True
        else:
            place = self._places[key]
            drawn = self._blending.drawn(held, self.step, self.weights)
            out, renew = _blend(fresh, drawn, self._ratios[place]), self._renew[place]
        if renew:
            kept = _detached(out if self._blending.keep == "blended" else fresh)
            self.written[key] = self._blending.renewed(held, self.step, kept, self.weights)
        return out


def blend_output(
    fresh: Tensor, ratios: Ratios, slots: Slots, blending: Blending, step: int, weights: Weights
) -> tuple[Tensor, Slots]:
    """This blends the model's own output by the one ratio of a step, and gives the slots after it."""
    held = slots.get(OUTPUT)
    out, renew = fresh, True
    if isinstance(ratios, Tensor) and held is not None:
        out = _mixed(fresh, blending.drawn(held, step, weights), ratios[0])
        renew = bool(ratios[0] > blending.tau)
    if not renew:
        return out, slots
    # The pipeline may write into what it gets.
    kept = (out if blending.keep == "blended" else fresh).detach().clone()
    return out, slots | {OUTPUT: blending.renewed(held, step, kept, weights)}


def _blend(fresh: Any, drawn: Any, weight: Tensor) -> Any:
    """This is r fresh + (1 - r) drawn, of a tensor or of each of a tuple."""
    if isinstance(fresh, (tuple, list)):
        return tuple(map(_blend, fresh, drawn, [weight] * len(fresh)))
    if fresh is None:
        return None
    if fresh.ndim == 3:
        return ops.blend(fresh, drawn, weight)
    return _mixed(fresh, drawn, weight)  # Lumina's attentions have their heads apart


def _mixed(fresh: Tensor, drawn: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(fresh.dtype)
    return weight * fresh + (1 - weight) * drawn


def _detached(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_detached, value))
    return None if value is None else value.detach()
