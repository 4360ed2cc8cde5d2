"""The steps of a model cost multiply-accumulates, bytes moved, and cache.

Counted are the multiply-accumulates of layers and of attention products; norms and activations are not. The cache size
is the sum of the slots that are kept after the worst step. A copy without weights is counted (see `counts.py`), so the
weights may be anywhere.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from fastdit.account.counts import counts_of
from fastdit.adapters import find_adapter
from fastdit.adapters.base import Size
from fastdit.errors import UnsupportedModelError
from fastdit.schedules.actions import COMPUTE, KEEP, REUSE, kept_of, order_of
from fastdit.schedules.collapse import Slot, passes
from fastdit.schedules.plan import RunPlan
from fastdit.schedules.schedule import Schedule


class ComponentCost(NamedTuple):
    """A component of one block costs this in a step that computes all tokens.

    Attributes:
        block: Its number over all kinds.
        name: The component's.
        macs: Multiply-accumulates.
        bytes: Of its output.
        adds: Whether its output is added to the stream itself.
    """

    block: int
    name: str
    macs: int
    bytes: int
    adds: bool


@dataclass(eq=False, repr=False)
class Cost:
    """A cost sums over the components of a model for one size; per-component values are computed once.

    Attributes:
        adapter, transformer: A family's adapter, and a model (on the meta device if you like).
        size: Image and text tokens of a picture.
        transformer_batch: Pictures times branches of guidance.
        itemsize: Bytes of an element.
        components: What each costs, in running order.
    """

    adapter: Any
    transformer: nn.Module
    size: Size
    transformer_batch: int = 1
    itemsize: int = 1

    @classmethod
    def of(cls, transformer: nn.Module, image: int, text: int, transformer_batch: int = 1) -> Cost:
        """This gives the costs of a transformer, in its own dtype.

        Raises:
            UnsupportedModelError: No adapter knows the model.
        """
        adapter, size = find_adapter(transformer), Size(image, text)
        return cls(adapter, transformer, size, transformer_batch, transformer.dtype.itemsize)

    def __post_init__(self) -> None:
        first: dict[str, int] = {}
        for index, (kind, _) in enumerate(self.adapter.blocks(self.transformer)):
            first.setdefault(kind, index)
        self.spec = self.adapter.spec(self.transformer)
        self._counts = counts_of(self.adapter, self.transformer, self.size)
        unit = self.adapter.token_multiple
        self._padding = Size(-self.size.image % unit, -self.size.text % unit)
        self._sparse: dict[int, list[int]] = {}
        self.components: list[ComponentCost] = []
        for kind, block, component in self.spec.components():
            index = first[kind.name] + block
            macs, elements = (self._of(what, index, component) for what in ("macs", "slot"))
            adds = component not in kind.consumers
            output = elements * self.itemsize
            self.components.append(ComponentCost(index, component, macs, output, adds))
        self.overhead, self.prompt = self._of("outside"), self._of("prompt")
        token = self.adapter.width(self.transformer) * self.transformer_batch * self.itemsize
        layouts = self.adapter.layouts.values()
        alone = bool(layouts) and all(part == "image" for parts in layouts for part in parts)
        self.stream = (self.size.image + (0 if alone else self.size.text)) * token
        self._shared = 2 * token  # the parts of the gates that all blocks share, kept beside sums

    def _of(self, what: str, *where: Any) -> int:
        """This is a count of the whole batch."""
        return self._counts.of(what, *where).at(self._padded(self.size.image)) * (
            self.transformer_batch
        )

    def _padded(self, image: int) -> Size:
        """So many active image tokens and the text, with the padding of all."""
        return Size(image + self._padding.image, self.size.text + self._padding.text)

    @property
    def exact(self) -> bool:
        """The model was counted; without an adapter, and before its first call of this size, it cannot be."""
        return self._counts.exact

    @property
    def reusable_share(self) -> float:
        """This share of the arithmetic of a step is in components: the most that reuse can spare."""
        inside = sum(c.macs for c in self.components)
        return inside / max(1, inside + self.overhead)

    def component_macs(self) -> dict[str, np.ndarray]:
        """Each block kind has multiply-accumulates [blocks, components] of a step, 0 for what the model lacks."""
        found = {k.name: np.zeros((k.count, len(k.components))) for k in self.spec.kinds}
        for (kind, block, name), c in zip(self.spec.components(), self.components, strict=True):
            found[kind.name][block, kind.components.index(name)] = c.macs
        return found

    def at(self, image: int) -> Cost:
        """These are the costs of the same model on so many image tokens."""
        if image == self.size.image:
            return self
        return replace(self, size=Size(image, self.size.text))

    def reuse_share(self, plan: RunPlan) -> float:
        """This share of the components of all steps does not run; of a model without any, of the steps."""
        if not self.components:
            return sum(map(bool, plan.forecasts)) / plan.steps
        skipped = sum(
            not step[c.block][c.name] & COMPUTE for step in plan.actions for c in self.components
        )
        return skipped / (plan.steps * len(self.components))

    def macs(
        self,
        plan: RunPlan,
        tokens: Sequence[int] = (),
        keeps_prompt: bool = False,
        keeps_keys: bool = False,
    ) -> int:
        """A run whose steps compute so many image tokens, all if not said, takes these multiply-accumulates.

        `keeps_prompt` where the prompt is projected at the first step only, as a patched model does, and `keeps_keys`
        where keys and values of the prompt alone are.
        """
        total = (1 - plan.steps) * self.prompt if keeps_prompt else 0
        for c in self.components if keeps_keys else ():
            again = sum(
                not plan.actions or bool(plan.actions[step][c.block][c.name] & COMPUTE)
                for step in range(plan.steps)
                if not plan.forecast_order(step)
            )
            total -= max(0, again - 1) * self._of("prompt_key_macs", c.block, c.name)
        for step in range(plan.steps):
            if plan.forecast_order(step):
                continue
            count = tokens[step] if tokens else self.size.image
            actions = plan.actions[step] if plan.actions else None
            outside = self._counts.of("outside").at(self._padded(count))
            total += outside * self.transformer_batch + sum(
                macs
                for c, macs in zip(self.components, self.sparse_macs(count), strict=True)
                if actions is None or actions[c.block][c.name] & COMPUTE
            )
        return total

    def linear_macs(self, schedule: Schedule | None, steps: int, part: slice = slice(None)) -> int:
        """A run's linear layers take so many, the products of attention left out: ECAD's count (spec 6.6).

        A component whose bit computes is counted even if nobody reads it, and all tokens are. `schedule` is bound to
        the model; None computes everything. `part` are the run's steps of the schedule's.
        """
        total = steps * self.overhead
        bits = {
            (kind, name): layer.bits[part, :, index].sum(axis=0)
            for kind, layer in (() if schedule is None else schedule.layers.items())
            for index, name in enumerate(layer.components)
        }
        for (kind, block, component), macs in zip(self.spec.components(), self.linear, strict=True):
            times = bits.get((kind.name, component))
            total += macs * (steps if times is None else int(times[block]))
        return total

    @functools.cached_property
    def linear(self) -> list[int]:
        """These are the MACs of every component without products of attention."""
        return [self._of("layers", c.block, c.name) for c in self.components]

    def sparse_macs(self, count: int) -> list[int]:
        """Every component takes these MACs for `count` active image tokens, whose attentions read the keys of all.

        Of the products (count + t) ask and (image + t) are asked, t being the text where it asks too.
        """
        if count not in self._sparse:
            size, found = self._padded(count), []
            for c in self.components:
                terms = self._counts.of("macs", c.block, c.name)
                image, text = terms.values[3], terms.values[5]
                asked = size.image + (size.text if text else 0)
                spared = image * asked * (self.size.image - count)
                found.append((terms.at(size) + spared) * self.transformer_batch)
            self._sparse[count] = found
        return self._sparse[count]

    def key_bytes(self) -> int:
        """A method that leaves tokens out keeps keys and values of so many bytes."""
        size = self._padded(self.size.image)
        keys = (self._counts.keys(block, size) for block in range(self.spec.block_count))
        return sum(keys) * self.transformer_batch * self.itemsize

    def prompt_bytes(self) -> int:
        """The projected prompt that a patched model keeps has so many bytes."""
        return self._of("prompt_slot") * self.itemsize

    def prompt_key_bytes(self) -> int:
        """Keys and values of the prompt alone, which a patched model keeps where it may, have so many bytes."""
        return self._of("prompt_keys") * self.itemsize

    def modulation_bytes(self, conditions: int) -> int:
        """The modulations made ahead for so many conditions have so many bytes."""
        size = self._padded(self.size.image)
        return self._counts.of("modulation").at(size) * conditions * self.itemsize

    def bytes_of_outputs(self) -> int:
        """All outputs that are added to the stream in one step have so many bytes."""
        return sum(c.bytes for c in self.components if c.adds)

    def residual_bytes(self, plan: RunPlan) -> int:
        """Residual updates move so many bytes: each output once, and the stream read and written once per update.

        An update adds all that waits, where a component that computes reads the stream, and at the end; one that takes
        several launches counts once. In place of an output that is drawn those are read that it is drawn through.
        Outputs kept as sums are read once more, when those are made.
        """
        if not plan.actions:
            updates = sum(c.adds for c in self.components)
            return plan.steps * (self.bytes_of_outputs() + 2 * updates * self.stream)
        total, computed = 0, Counter[Slot]()
        for number, step in enumerate(plan.actions):
            if plan.forecast_order(number):
                continue
            added = [(c, step[c.block][c.name]) for c in self.components if c.adds]
            computed.update((c.block, c.name) for c, flags in added if flags & COMPUTE)
            values = [
                (c.bytes, min(1 + order_of(flags), max(1, computed[c.block, c.name])))
                for c, flags in added
            ]
            updates = sum(1 for _, flags in added if flags & COMPUTE)
            updates += bool(added and added[0][1] & REUSE)  # else nothing waits for the first
            total += sum(size * count for size, count in values) + 2 * updates * self.stream
        size = {(c.block, c.name): c.bytes for c in self.components}
        for sums in plan.sums:
            total += sum(
                passes(len(s.slots), s.count) * size[s.slots[0]] for s in set(sums.made.values())
            )
            total += sum(
                s.count * size[s.slots[0]] for s in set().union(*sums.used.values())
            ) - sum(len(used) * size[slot] for slot, used in sums.used.items())
        return total

    def cache_bytes(
        self, plan: RunPlan, itemsize: int | None = None, estimated: bool = False
    ) -> int:
        """At most so many bytes are kept after any step; `itemsize` is that of kept outputs, the model's if not said.

        Raises:
            UnsupportedModelError: They are not known, and no estimate will do.
        """
        if self.components and not self.exact and not estimated:
            raise UnsupportedModelError(
                f"max_cache_bytes needs the size of every output, which is not known of "
                f"{type(self.transformer).__name__}: it has no adapter, and its call cannot be made without weights"
            )
        most, kept_size = 0, itemsize or self.itemsize
        size = {(c.block, c.name): c.bytes for c in self.components}
        for number, step in enumerate(plan.actions):
            sums = plan.sums[number].kept if plan.sums else ()
            within = Counter(slot for each in sums for slot in each.slots)
            outputs = sum(
                c.bytes * (kept_of(step[c.block][c.name]) - within[c.block, c.name])
                for c in self.components
                if step[c.block][c.name] & KEEP
            )
            outputs += sum(s.count * size[s.slots[0]] for s in sums)
            shared = self._shared * sum(s.count > 1 for s in sums)
            most = max(most, outputs * kept_size // self.itemsize + shared)
        if plan.forecasts:  # the model's own last outputs
            elements = self.adapter.output_elements(self.transformer, self.size.image)
            most += (1 + max(plan.forecasts)) * elements * self.transformer_batch * self.itemsize
        return most
