"""One call of the transformer: which component runs, where its output is kept, and when the residual stream is updated.

Adapters restate a block as `Forward` and `Residual` calls. Two ways of running it share that one text:

* *immediate*: every gated residual is added at once and out of place, in diffusers' own order and with its roundings.
  So does the `reference` backend, and everything that needs autograd or runs under autocast.
* *deferred*: a residual waits until somebody reads the stream, also across blocks. Then one `gated_residual` adds all
  that waited (a run of n reused components moves (n + 2) X bytes for the 5 n X of eager code), or `norm_modulate` adds
  a single one on the way. Reused components do not read the hidden state, so this is exact algebra; only the rounding
  is (in our favour) another.

A slot is freed after its last reuse, so before the step that computes it anew: outputs written straight into slots
(``out=``) would spare neither a copy nor memory.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.active import ActiveTokens
from fastdit.blocks.float8 import read_rows
from fastdit.blocks.held import is_held
from fastdit.blocks.modulation import Modulations
from fastdit.blocks.nodes import Drawn, HeldSums, Nodes, Weights
from fastdit.blocks.products import FUSED
from fastdit.blocks.residual import Branch, Gate, Residual, gathered, is_plain, norm_parameters
from fastdit.blocks.segments import EAGER, Segments, segments_like
from fastdit.blocks.sums import Sums, parted
from fastdit.blocks.token_nodes import TokenNodes
from fastdit.observe import observed
from fastdit.schedules.actions import COMPUTE, DRAWN, KEEP, REUSE, BlockActions, kept_of, order_of

#: of a component's output; the name alone, or with the number of a further call of it in the same block
Key = tuple[int, str] | tuple[int, str, int]
Slots = dict[Key, Any]

#: what an empty plan says of every component
ALWAYS: BlockActions = {}


@dataclass(eq=False, repr=False)
class Forward:
    """What the blocks of one transformer call ask; adapters use it inside their blocks' forwards.

    Attributes:
        ops: The bound ops; None where every residual is added at once.
        blocks: All blocks, in running order.
        actions: What the plan says of each block's components; without it all compute.
        slots, owned: The branch's kept outputs, and the keys of those that nobody else holds.
        immediate: Whether every residual is added at once.
        defer: Whether residuals may wait beyond their block.
        compiled: What the user's compilation of the whole transformer left as its call, or None.
        tokens: Those that pass, where the adapter's own attention runs; else None.
        layouts, unread: The adapter's.
        references: Image tokens behind those of the picture, where the adapter counts them.
        precision: The dtypes of slots and of the model, where they differ; else None.
        modulations: Those made ahead for the next steps, or None.
        sums: What stands for several outputs, or None.
        step, weights: The step in progress, and the weights of the run's forecasts; None without any.
        scratch: Free space of the adapter for values that live as long as this call.
        index, ends: Index of the running block, over all kinds, and whether it is the last one of its list.
        computed, reused: Components that ran, and that a plan spared, in this call.
    """

    ops: Any
    blocks: Sequence[nn.Module]
    _: KW_ONLY
    actions: Sequence[BlockActions] = ()
    slots: Slots = field(default_factory=dict)
    owned: dict[Key, None] = field(default_factory=dict)
    immediate: bool = True
    defer: bool = False
    compiled: Callable[..., Any] | None = None
    tokens: ActiveTokens | None = None
    layouts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unread: Sequence[str] = ()
    references: int = 0
    precision: tuple[torch.dtype, torch.dtype] | None = None
    modulations: Modulations | None = None
    sums: Sums | None = None
    step: int = 0
    weights: Weights | None = None
    scratch: dict[Any, Any] = field(default_factory=dict, init=False)
    segments: Segments = field(default=EAGER, init=False)
    index: int = field(default=0, init=False)
    ends: bool = field(default=True, init=False)
    computed: int = field(default=0, init=False)
    _planned: int = field(default=0, init=False)
    _row: BlockActions = field(default_factory=dict, init=False)
    _asked: dict[str, int] = field(default_factory=dict, init=False)
    _visited: dict[int, dict[str, int]] = field(default_factory=dict, init=False)
    _waiting: dict[str, list[tuple[Tensor, Gate]]] = field(default_factory=dict, init=False)
    _own_streams: dict[str, Tensor] = field(default_factory=dict, init=False)
    _block_compiled: Callable[..., Any] | None = field(default=None, init=False)

    def start_block(self, index: int, ends: bool = True) -> None:
        """Called before each block's rewritten forward; `ends` for the last one of its list."""
        block = self.blocks[index]
        self.index = index
        self.ends = ends
        self._row = self.actions[index] if self.actions else ALWAYS
        first = index not in self._visited
        self._planned += len(self._row) if first else 0
        self._asked = self._visited.setdefault(index, {})
        self._block_compiled = block._compiled_call_impl or self.compiled
        fused = self._block_compiled is None and not self.immediate
        self.segments = FUSED if fused else segments_like(self._block_compiled, block)

    def leave_out_idle(self) -> None:
        """What the running block, in a forward of its own, did not ask for is no part of this call."""
        idle = [name for name in self._row if name not in self._asked]
        self._planned -= len(idle)
        self._asked.update(dict.fromkeys(idle, 0))

    # ---- components

    def computes(self, component: str) -> bool:
        """Whether the component's module runs in this call, so that its input is worth preparing."""
        flags = self._row.get(component, COMPUTE)
        if flags & COMPUTE or not flags & REUSE:
            return bool(flags & COMPUTE)
        again = self._asked.get(component)
        return ((self.index, component, again) if again else (self.index, component)) not in (
            self.slots
        )

    def consumes(self, component: str) -> bool:
        """Whether the component runs in this call for its consumer alone, which nobody else compiles or rounds."""
        kept = self._row.get(component, COMPUTE) & (KEEP | DRAWN)
        return self.fuses_segments and not kept and self.computes(component)

    @property
    def fuses_segments(self) -> bool:
        """Whether ops may stand for what the running block's segments do: residuals wait, and nobody compiles it."""
        return self.segments is FUSED

    def quantises(self, readers: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether the running block gives `readers` their input in fp8, x [B, n, D] normed."""
        return self.fuses_segments and read_rows(readers, x)

    def component(self, name: str, compute: Callable[[], Any]) -> Any:
        """The component's output: fresh from `compute`, or from its slot where the plan reuses it.

        Where a call has some of the tokens, what comes from a slot is :class:`CachedRows`: residuals take it as it is,
        anything else through :func:`gathered`.

        A slot that is missing (another batch, swapped embeddings, a CFG branch seen for the first time) computes.
        """
        flags = self._row.get(name, COMPUTE)
        # The slot of the component's next call: some blocks call one module on several streams, or run again.
        again = self._asked.get(name, 0)
        key = (self.index, name, again) if again else (self.index, name)
        self._asked[name] = again + 1
        self._planned += again > 0 and name in self._row
        if flags & DRAWN:
            return self._drawn(key, flags, compute)
        sparse = self.tokens is not None and self.tokens.rows is not None
        value = held = self.slots.get(key)
        if value is None or flags & COMPUTE:
            compiles = self._block_compiled is not None
            value = self._compiled_as(name, compute) if compiles else compute()
            self.computed += 1
            if sparse and held is not None and flags & KEEP:
                held = self._renewed(key, held, value)
            else:
                self.owned.pop(key, None)
                # The rows of a value that was never held whole cannot stand for it later.
                held = None if sparse else self.to_slot(value)
        else:
            value = self.tokens.stored(held, self.layouts[name]) if sparse else held
            if self.precision is not None:
                value = self.from_slot(gathered(value))
        if flags & KEEP and held is not None:
            self.slots[key] = held
        else:
            self.slots.pop(key, None)
        return value

    def add_component(
        self,
        name: str,
        compute: Callable[[], Any],
        *targets: tuple[Residual, Gate],
        shared: Tensor | None = None,
    ) -> None:
        """Add a component's output, or the sums that it is in, to the streams of its parts, by their gates.

        `shared` [B, G, D] is what the gates of all blocks have in common, where they are not the same.
        """
        if self.sums is not None:
            self.sums.add(self, name, compute, targets, shared)
            return
        for (stream, gate), part in parted(self.component(name, compute), targets):
            stream.add(part, gate)

    def _drawn(self, key: Key, flags: int, compute: Callable[[], Any]) -> Any:
        """The output of a component of which some steps draw theirs: its slot holds the last computed ones."""
        nodes, count = self.slots.get(key), kept_of(flags)
        sparse = self.tokens is not None and self.tokens.rows is not None
        if sparse and isinstance(nodes, Nodes):
            nodes = TokenNodes.of(nodes)
        of_tokens = isinstance(nodes, TokenNodes)
        if nodes is None or flags & COMPUTE:
            compiles = self._block_compiled is not None
            value = self._compiled_as(key[1], compute) if compiles else compute()
            self.computed += 1
            kept = self.to_slot(value)
            given = self.step, kept, max(1, count)
            if of_tokens:
                nodes = nodes.with_node(*given, self.tokens, self.layouts[key[1]], self.weights)
            elif (
                not sparse
            ):  # the rows of a value that was never held whole cannot stand for it later
                nodes = (nodes or Nodes()).with_node(*given, self.weights.sigmas)
        elif of_tokens:
            given = self.step, order_of(flags), self.tokens, self.layouts[key[1]]
            value = nodes.drawn(*given, self.weights)
            if self.precision is not None:
                value = self.from_slot(gathered(value))
        else:
            used = nodes._replace(values=tuple(map(self.from_slot, nodes.values)))
            value = used.drawn(self.step, order_of(flags), self.weights)
        value = gathered(value) if self.immediate else value
        if count and nodes is not None:
            self.slots[key] = nodes.kept(count)
        else:
            self.slots.pop(key, None)
        return value

    def _compiled_as(self, use: str, compute: Callable[..., Any], *given: Any) -> Any:
        """``compute(*given)``, its segments with code of their own for this use."""
        segments = segments_like(self._block_compiled, self.blocks[self.index], use)
        return self._with(segments, compute, *given)

    def _with(self, segments: Segments, compute: Callable[..., Any], *given: Any) -> Any:
        before, self.segments = self.segments, segments
        try:
            return compute(*given)
        finally:
            self.segments = before

    def _renewed(self, key: Key, held: Any, value: Any) -> Any:
        """What a slot held, with the active rows of a value; a copy the first time, from then on in place."""
        parts = held if isinstance(held, (tuple, list)) else (held,)
        locked = torch.is_grad_enabled() or (
            not torch.is_inference_mode_enabled()
            and any(part is not None and part.is_inference() for part in parts)
        )
        owned = key in self.owned and not locked
        if locked:
            self.owned.pop(key, None)
        else:
            self.owned[key] = None
        return self.tokens.renewed(held, value, self.layouts[key[1]], owned)

    def parted(self, branch: Branch, text: int, text_first: bool = True) -> tuple[Branch, Branch]:
        """The `text` tokens of a joint output, at least one and all active, and the image's, in their order."""
        if isinstance(branch, Drawn):
            own, rest = (
                (slice(text, None), slice(text))
                if text_first
                else (slice(-text), slice(-text, None))
            )
            parts = branch.tokens(rest), self._image_of(branch.tokens(own), branch)
        else:
            whole = branch if isinstance(branch, Tensor) else branch.whole
            image = whole.shape[1] - text
            first, behind = (text, 0) if text_first else (0, image)
            parts = whole.narrow(1, behind, text), whole.narrow(1, first, image)
            if not isinstance(branch, Tensor):
                parts = parts[0], self.tokens.stored(parts[1], ("image",))
        return parts if text_first else parts[::-1]

    def _image_of(self, image: Drawn, joint: Drawn) -> Drawn:
        if joint.rows is None:
            return image
        whole = image.values[0]
        rows = self.tokens.rows_of("image", whole.shape[1])
        return replace(image, rows=rows, index=self.tokens.index("image", whole))

    def to_slot(self, value: Any) -> Any:
        """A value as slots keep it."""
        return value if self.precision is None else _cast(value, self.precision[0])

    def from_slot(self, held: Any) -> Any:
        """A value out of a slot; sums are cast where they are added."""
        if self.precision is None or isinstance(held, HeldSums):
            return held
        return _cast(held, self.precision[1])

    def modulation(
        self, norm: nn.Module, compute: Callable[..., tuple[Tensor, ...]], *given: Any
    ) -> tuple[Tensor, ...]:
        """``compute(*given)``, vectors [B, ...] of an adaLN norm; made ahead where the next steps are known."""
        if self._block_compiled is not None and any(map(is_held, norm.modules())):
            compute = functools.partial(self._with, EAGER, compute)  # its weights come and go
        elif self._block_compiled is not None:
            children = self.blocks[self.index]._modules.items()
            use = next((name for name, child in children if child is norm), "")
            compute = functools.partial(self._compiled_as, use, compute)
        ahead = self.modulations
        if (
            ahead is None
            or not ahead.stands_for(norm)
            or (self.immediate and not ahead.is_given(given))
        ):
            return compute(*given)
        return ahead.of(norm, compute)

    def adaln(
        self,
        layer: nn.Module,
        embedding: Tensor | tuple[Tensor, ...],
        parts: int,
        dtype: torch.dtype | None = None,
        then: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> tuple[Tensor, ...]:
        """An adaLN layer's linear(activation(embedding)) as so many vectors [B, D], or what `then` makes of these.

        The layer is a norm with `silu` and `linear`, or a sequence of a linear layer and what comes before it, if
        anything does. The linear's input is in `dtype` if given. Of several embeddings, which one product turns, each
        vector comes once for each.
        """
        embeddings = embedding if isinstance(embedding, tuple) else (embedding,)
        several = len(embeddings)
        children = layer._modules
        if isinstance(layer, nn.Sequential):
            *before, linear = children.values()
        else:
            *before, linear = children["silu"], children["linear"]

        def compute(given: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            if several > 1:
                given = torch.cat([given, *others])
            for activation in before:
                given = activation(given)
            made = self.segments.linear(linear, given.to(dtype or given.dtype))
            vectors = made.chunk(parts, dim=1)
            if several > 1:
                vectors = tuple([part for vector in vectors for part in vector.chunk(several)])
            return vectors if then is None else then(*vectors)

        return self.modulation(layer, compute, *embeddings)

    def rotation(self, make: Callable[[], Any]) -> Any:
        """The rotation of all positions; a call of a part of the tokens has that of the last whole one."""
        memory = self.tokens.memory
        if self.tokens.rows is None and "rotation" not in self.scratch:
            memory["rotation"] = self.scratch["rotation"] = make()
        return memory["rotation"]

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``norm(x)`` [B, n, D] of what is not a residual stream: a component's output, or a text."""
        if self.immediate or x.stride(-1) != 1 or not is_plain(norm, x):
            return norm(x)
        return self.ops.norm_modulate(x, **norm_parameters(norm, x.dtype))

    # ---- residual streams

    def enter(
        self, hidden_states: Tensor, stream: str, branch_first: bool = False, wide: bool = False
    ) -> Residual:
        """Take over a block input as residual stream `stream` ("image" or "text").

        `branch_first` where diffusers writes ``branch + h``: the same sum, but torch lays a sum out in memory like its
        first operand, and what reads it next rounds by layout. `wide` where it takes norms and gated sums in fp32.
        """
        return Residual(self, stream, hidden_states, branch_first, wide)

    def enter_joint(self, joint: Tensor, text: int) -> tuple[Residual, Residual]:
        """Take over a block input [B, T + N, D] as two residual streams, the first `text` rows and the image's.

        They are views of it, and are written into where it is nobody else's.
        """
        held = self.scratch.get("joint")
        if held is None or held[0] is not joint:
            parts = joint.split((text, joint.shape[1] - text), dim=1)
            held = self.scratch["joint"] = joint, *parts
            before = self.blocks[max(0, self.index - 1)]
            if self.defer and not observed(self.blocks[self.index]) and not observed(before):
                self._own_streams.update(zip(("text", "image"), parts, strict=True))
        return self.enter(held[1], "text"), self.enter(held[2], "image")

    def leave_joint(self, text: Residual, image: Residual, clips: bool = False) -> Tensor:
        """The block's output where :meth:`enter_joint` took over its input."""
        parts = text.leave(clips), image.leave(clips)
        joint, *held = self.scratch["joint"]
        return joint if all(map(operator.is_, parts, held)) else torch.cat(parts, dim=1)

    @property
    def reused(self) -> int:
        """Components of the blocks visited that did not run; 0 without a plan."""
        return max(0, self._planned - self.computed)

    @property
    def reuses_all(self) -> bool:
        """Whether the plan computes nothing in this call."""
        rows = self.actions
        return bool(rows) and all(r and not any(f & COMPUTE for f in r.values()) for r in rows)

    @property
    def complete(self) -> bool:
        """Whether no residual waits; anything else at the end of a call is a defect of an adapter."""
        return not any(self._waiting.values())

    def waits_at_first(self) -> bool:
        """Whether something may be added to a stream before the first block: nobody looks at it there."""
        return self.defer and not observed(self.blocks[0])

    def wait_at_first(self, stream: str, branch: Tensor) -> None:
        """Add a branch [B, n, D] to the stream that the first block enters, once somebody reads that."""
        self._waiting.setdefault(stream, []).append((branch, None))

    def _drops(self, stream: str) -> bool:
        """Whether the running block is the last one and nobody reads a stream behind it."""
        last = self.index == len(self.blocks) - 1
        return last and self.defer and stream in self.unread and not observed(self.blocks[-1])

    def _may_wait(self) -> bool:
        """Whether residuals may wait beyond the running block: nobody looks at the stream before the next one."""
        following = self.index + 1
        return (
            self.defer
            and following < len(self.blocks)
            and not observed(self.blocks[self.index])
            and not observed(self.blocks[following])
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A component's output in another dtype."""
    if isinstance(value, (tuple, list)):
        return tuple(None if part is None else part.to(dtype) for part in value)
    return value.to(dtype)
