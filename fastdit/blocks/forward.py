"""One call of the transformer: which component runs, where its output is kept, and when the residual stream is updated.

Adapters restate a block as `Forward` and `Residual` calls. Two ways of running it share that one text:

* *immediate*: every gated residual is added at once and out of place, in diffusers' own order and with its roundings.
  So does the `reference` backend, and everything that needs autograd or runs under autocast.
* *deferred*: a residual waits until somebody reads the stream, also across blocks. Then one `gated_residual` adds all
  that waited (a run of n reused components moves (n + 2) X bytes for the 5 n X of eager code), or `norm_modulate` adds
  a single one on the way. Reused components do not read the hidden state, so this is exact algebra; only the rounding
  is (in our favour) another.

Slots hold references to module outputs, copies only in a lower precision. A slot is freed after its last reuse, so
before the step that computes it anew: outputs written straight into slots (``out=``) would spare neither a copy nor
memory. Where a step computes some tokens, a slot has to outlive that: the first such step copies it, and the rows of
this and later steps are written into the copy, which nobody else holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.modulation import Modulations
from fastdit.blocks.nodes import Drawn, Nodes, Weights
from fastdit.blocks.segments import EAGER, segments_like
from fastdit.blocks.sums import Sums
from fastdit.observe import observed, private
from fastdit.ops.gated_residual import MAX_BRANCHES
from fastdit.schedules.actions import COMPUTE, DRAWN, KEEP, REUSE, BlockActions, kept_of, order_of
from fastdit.schedules.forecast import MAX_ORDER

#: of a component's output; the name alone, or with the number of a further call of it in the same block
Key = tuple[int, str] | tuple[int, str, int]
Slots = dict[Key, Any]
Gate = Tensor | None

#: what an empty plan says of every component
ALWAYS: BlockActions = {}


@dataclass(frozen=True)
class Stored:
    """A kept output of all tokens, [B, N, D], of which the active rows [B, K] are meant; the residual reads them there.

    `index` [B K] are these rows in the samples laid end to end.
    """

    whole: Tensor
    rows: Tensor
    index: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, *self.whole.shape[2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def gathered(self) -> Tensor:
        """A copy of the rows."""
        return self.whole.flatten(0, 1).index_select(0, self.index).view(self.shape)

    def renewed(self, fresh: Tensor, owned: bool) -> Tensor:
        """All tokens with the rows replaced, in place where `whole` is `owned`: made by this, so contiguous."""
        tokens, fresh = self.whole.flatten(0, 1), fresh.to(self.dtype).flatten(0, 1)
        if not owned:
            return tokens.index_copy(0, self.index, fresh).view(self.whole.shape)
        tokens.index_copy_(0, self.index, fresh)
        return self.whole


#: what residuals take
Branch = Tensor | Stored | Drawn


class Tokens:
    """Which image tokens a call computes, and where the keys and values of all of them live.

    Attributes:
        count: Image tokens, N.
        rows: [B, K] active ones, or None for all.
        texts: [B] text tokens before each image in a joint stream whose texts are unlike long, see `take_texts`; None
            where all are as long.
        keys: Attention -> its keys and values.
        ops: The ops that stand for modules in attention; None where only modules will do.
        memory: Free space of the adapter that lives as long as the keys: `rotation`.
    """

    def __init__(
        self, count: int, rows: Tensor | None, keys: dict[Any, Any], memory: Any, ops: Any
    ) -> None:
        self.count = count
        self.rows = rows
        self.texts: Tensor | None = None
        self.keys = keys
        self.memory = memory
        self.ops = ops
        self._joint: dict[int, Tensor] = {}
        self._index: dict[tuple[str, int], Tensor] = {}

    @property
    def active(self) -> int:
        """Image tokens that pass."""
        return self.count if self.rows is None else self.rows.shape[1]

    def take_texts(self, mask: Tensor) -> Tensor:
        """Note how long texts are, by a mask [B, S] of this call's [text, image, padding], and give the keys'."""
        if self.rows is None:
            return mask
        self.texts = mask.sum(dim=1) - self.active
        places = torch.arange(mask.shape[1] - self.active + self.count, device=mask.device)
        return places < self.texts[:, None] + self.count

    def joint_rows(self, text: int) -> Tensor | None:
        """Rows of [text, image] that are active: all text, [B, text + K]; and all padding, where there is any."""
        if self.rows is None:
            return None
        if text not in self._joint:
            active = self.active
            places = torch.arange(text + active, device=self.rows.device)
            image = (places - (text if self.texts is None else self.texts[:, None])).expand(
                self.rows.shape[0], -1
            )
            chosen = self.rows.gather(1, image.clamp(0, active - 1)) + places - image
            behind = torch.where(image < active, chosen, places - active + self.count)
            self._joint[text] = torch.where(image < 0, places, behind)
        return self._joint[text]

    def stored(self, held: Any, layout: Sequence[str]) -> Any:
        """A component's kept output for this call's tokens."""
        if isinstance(held, (tuple, list)):
            return tuple(self._stored(h, part) for h, part in zip(held, layout, strict=False))
        return self._stored(held, layout[0])

    def renewed(self, held: Any, value: Any, layout: Sequence[str], owned: bool) -> Any:
        """A component's kept output with its active rows replaced, in place where it is `owned`."""
        if isinstance(held, (tuple, list)):
            parts = zip(self.stored(held, layout), value, strict=False)
            return tuple(_renewed(part, fresh, owned) for part, fresh in parts)
        return _renewed(self.stored(held, layout), value, owned)

    def _stored(self, held: Tensor | None, part: str) -> Tensor | Stored | None:
        if held is None or part == "text":  # all text is active
            return held
        count = held.shape[1]
        rows = self.rows if part == "image" else self.joint_rows(count - self.count)
        if (part, count) not in self._index:
            first = torch.arange(rows.shape[0], device=rows.device)[:, None] * count
            self._index[part, count] = (first + rows).flatten()
        return Stored(held, rows, self._index[part, count])


class Forward:
    """What the blocks of one transformer call ask; adapters use it inside their blocks' forwards.

    Attributes:
        index: Index of the running block, over all kinds.
        scratch: Free space of the adapter for values that live as long as this call.
        family: Free space of the adapter that lives as long as the patch.
        modulations: Those made ahead for the next steps, or None.
        computed, reused: Components that ran, and that a plan spared, in this call.
    """

    def __init__(
        self,
        ops: Any,
        blocks: Sequence[nn.Module],
        *,
        actions: Sequence[BlockActions] = (),
        slots: Slots | None = None,
        owned: set[Key] | None = None,
        immediate: bool = True,
        defer: bool = False,
        family: dict[str, Any] | None = None,
        compiled: Callable[..., Any] | None = None,
        tokens: Tokens | None = None,
        layouts: Mapping[str, Sequence[str]] | None = None,
        precision: tuple[torch.dtype, torch.dtype] | None = None,
        modulations: Modulations | None = None,
        sums: Sums | None = None,
        step: int = 0,
        weights: Weights | None = None,
    ) -> None:
        self.step = step
        self.weights = weights
        self.ops = ops
        self.blocks = blocks
        self.actions = actions
        self.slots: Slots = {} if slots is None else slots
        self._owned_slots = set() if owned is None else owned
        self.immediate = immediate
        self.defer = defer
        self.family = {} if family is None else family
        self.scratch: dict[str, Any] = {}
        self.segments = EAGER
        self.index = 0
        self.computed = 0
        self.tokens = tokens
        self.modulations = modulations
        self.sums = sums
        self._layouts = {} if layouts is None else layouts
        self._precision = precision
        self._compiled = self._block_compiled = compiled
        self._planned = 0
        self._row: BlockActions = ALWAYS
        self._asked: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Tensor, Gate]]] = {}
        self._owned: dict[str, Tensor] = {}

    def start_block(self, index: int) -> None:
        """Called before each block's rewritten forward."""
        block = self.blocks[index]
        self.index = index
        self._row = self.actions[index] if self.actions else ALWAYS
        self._planned += len(self._row)
        self._asked = {}
        self._block_compiled = block._compiled_call_impl or self._compiled
        self.segments = segments_like(self._block_compiled, block)

    def take_counts(self, computed: int, reused: int) -> None:
        """Stand for a call whose blocks were not visited."""
        self.computed, self._planned = computed, computed + reused

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

    def component(self, name: str, compute: Callable[[], Any]) -> Any:
        """The component's output: fresh from `compute`, or from its slot where the plan reuses it.

        Where a call has some of the tokens, what comes from a slot is :class:`Stored`: residuals take it as it is,
        anything else through :func:`gathered`.

        A slot that is missing (another batch, swapped embeddings, a CFG branch seen for the first time) computes.
        """
        flags = self._row.get(name, COMPUTE)
        if flags & DRAWN:
            return self._drawn(name, flags, compute)
        # The slot of the component's next call: some blocks call one module on several streams.
        again = self._asked.get(name, 0)
        key = (self.index, name, again) if again else (self.index, name)
        self._asked[name] = again + 1
        self._planned += again > 0 and name in self._row
        sparse = self.tokens is not None and self.tokens.rows is not None
        value = held = self.slots.get(key)
        if value is None or flags & COMPUTE:
            compiles = self._block_compiled is not None
            value = self._compiled_as(name, compute) if compiles else compute()
            self.computed += 1
            if sparse and held is not None and flags & KEEP:
                held = self._renewed(key, held, value)
            else:
                self._owned_slots.discard(key)
                # The rows of a value that was never held whole cannot stand for it later.
                held = None if sparse else self.packed(value)
        else:
            value = self.tokens.stored(held, self._layouts[name]) if sparse else held
            if self._precision is not None:
                value = self.unpacked(gathered(value))
        if flags & KEEP and held is not None:
            self.slots[key] = held
        else:
            self.slots.pop(key, None)
        return value

    def _drawn(self, name: str, flags: int, compute: Callable[[], Any]) -> Any:
        """The output of a component of which some steps draw theirs: its slot holds the last computed ones."""
        again = self._asked.get(name, 0)
        key = (self.index, name, again) if again else (self.index, name)
        self._asked[name] = again + 1
        self._planned += again > 0
        nodes = self.slots.get(key)
        count = kept_of(flags)
        if nodes is None or flags & COMPUTE:
            compiles = self._block_compiled is not None
            value = self._compiled_as(name, compute) if compiles else compute()
            self.computed += 1
            levels = self.weights.levels
            nodes = (nodes or Nodes()).with_node(
                self.step, self.packed(value), levels, max(1, count)
            )
        else:
            used = nodes._replace(values=tuple(map(self.unpacked, nodes.values)))
            value = used.drawn(self.step, order_of(flags), self.weights)
            value = gathered(value) if self.immediate else value
        if count:
            self.slots[key] = nodes.kept(count)
        else:
            self.slots.pop(key, None)
        return value

    def _compiled_as(self, use: str, compute: Callable[..., Any], *given: Any) -> Any:
        """``compute(*given)``, its segments with code of their own for this use."""
        before = self.segments
        self.segments = segments_like(self._block_compiled, self.blocks[self.index], use)
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
        owned = key in self._owned_slots and not locked
        (self._owned_slots.discard if locked else self._owned_slots.add)(key)
        return self.tokens.renewed(held, value, self._layouts[key[1]], owned)

    def parted(self, branch: Branch, text: int) -> tuple[Branch, Branch]:
        """The first `text` tokens of a joint output, all active, and the image's."""
        if isinstance(branch, Drawn):
            every = slice(None)
            return branch.part(every, slice(text)), branch.part(every, slice(text, None))
        if isinstance(branch, Tensor):
            return branch[:, :text], branch[:, text:]
        return branch.whole[:, :text], self.tokens.stored(branch.whole[:, text:], ("image",))

    def packed(self, value: Any) -> Any:
        """A value as slots keep it."""
        return value if self._precision is None else _cast(value, self._precision[0])

    def unpacked(self, held: Any) -> Any:
        """A value out of a slot."""
        return held if self._precision is None else _cast(held, self._precision[1])

    def modulation(self, norm: nn.Module, compute: Callable[..., Tensor], *given: Any) -> Tensor:
        """``compute(*given)`` [B, k D], the modulation of an adaLN norm; made ahead where the next steps are known."""
        if self._block_compiled is not None:
            children = self.blocks[self.index]._modules.items()
            use = next((name for name, child in children if child is norm), "")
            compute = functools.partial(self._compiled_as, use, compute)
        # Looked up as they lie: attributes of modules are found by a call each.
        linear = norm._modules.get("linear") or next(reversed(norm._modules.values()))
        if self.modulations is None or not private(linear):
            return compute(*given)
        return self.modulations.of(norm, compute)

    def adaln(
        self, layer: nn.Module, embedding: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An adaLN layer's linear(activation(embedding)) [B, k D], the linear's input in `dtype` if given.

        The layer is a norm with `silu` and `linear`, or a sequence of an activation and a linear layer.
        """
        parts = layer._modules
        if isinstance(layer, nn.Sequential):
            activation, linear = parts.values()
        else:
            activation, linear = parts["silu"], parts["linear"]

        def compute(given: Tensor) -> Tensor:
            return self.segments.linear(linear, activation(given).to(dtype or given.dtype))

        return self.modulation(layer, compute, embedding)

    def rotation(self, make: Callable[[], Any]) -> Any:
        """The rotation of all positions; a call of a part of the tokens has that of the last whole one."""
        memory = self.tokens.memory
        if self.tokens.rows is None and "rotation" not in self.scratch:
            memory.rotation = self.scratch["rotation"] = make()
        return memory.rotation

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``norm(x)`` [B, n, D] of what is not a residual stream: a component's output, or a text."""
        if self.immediate or x.stride(-1) != 1 or not _is_plain(norm, x):
            return norm(x)
        return self.ops.norm_modulate(x, **_parameters(norm))

    # ---- residual streams

    def enter(self, hidden_states: Tensor, stream: str, branch_first: bool = False) -> Residual:
        """Take over a block input as residual stream `stream` ("image" or "text").

        `branch_first` where diffusers writes ``branch + h``: the same sum, but torch lays a sum out in memory like its
        first operand, and what reads it next rounds by layout.
        """
        return Residual(self, stream, hidden_states, branch_first)

    @property
    def reused(self) -> int:
        """Components of the blocks visited that did not run; 0 without a plan."""
        return max(0, self._planned - self.computed)

    @property
    def settled(self) -> bool:
        """Whether no residual waits; anything else at the end of a call is a defect of an adapter."""
        return not any(self._waiting.values())

    def _may_wait(self) -> bool:
        """Whether residuals may wait beyond the running block: nobody looks at the stream before the next one."""
        following = self.index + 1
        return (
            self.defer
            and following < len(self.blocks)
            and not observed(self.blocks[self.index])
            and not observed(self.blocks[following])
        )


class Residual:
    """One residual stream inside one block: ``h + sum_i gate_i * branch_i``, added late.

    `h` is [B, n, D]; branches are [B, n, D], gates [B, D] or [B, 1, D] or None for 1.
    """

    __slots__ = ("_branch_first", "_forward", "_h", "_stream", "_waiting")

    def __init__(self, forward: Forward, stream: str, h: Tensor, branch_first: bool) -> None:
        self._forward = forward
        self._stream = stream
        self._h = h
        self._branch_first = branch_first
        self._waiting = forward._waiting.setdefault(stream, [])

    def add(self, branch: Branch, gate: Gate = None) -> None:
        """Add ``gate * branch``, now or when the stream is next read."""
        forward = self._forward
        if forward.immediate or not self.suits(branch, gate):
            branch = gathered(branch)
            branch = branch if gate is None else _rows(gate) * branch
            self._h = branch + self.read() if self._branch_first else self.read() + branch
            return
        held = branch.whole if isinstance(branch, Stored) else branch
        if isinstance(branch, Drawn):
            if any(value.stride(-1) != 1 for value in branch.values):
                branch = gathered(branch)
        elif held.stride(-1) != 1:
            branch = gathered(branch).contiguous()
        self._waiting.append((branch, gate))

    def add_component(
        self, name: str, compute: Callable[[], Tensor], gate: Gate, shared: Tensor
    ) -> None:
        """Add :meth:`Forward.component`, or the sums that it is in.

        `shared` [B, G, D] is what the gates of all blocks have in common; see :class:`~fastdit.spec.BlockKind`.
        """
        forward = self._forward
        if forward.sums is None:
            self.add(forward.component(name, compute), gate)
        else:
            forward.sums.add(forward, self, name, compute, gate, shared)

    def suits(self, branch: Branch, gate: Gate) -> bool:
        """Whether the ops take this branch of the stream."""
        return branch.shape == self._h.shape and self._suits(branch, gate)

    def normed(
        self, norm: nn.Module, scale: Gate, shift: Gate, out: Tensor | None = None
    ) -> Tensor:
        """``norm(h) * (1 + scale) + shift`` [B, n, D], the input of a component.

        `norm` is a LayerNorm or RMSNorm module; scale and shift may be None.
        """
        forward = self._forward
        if not self.takes_op(norm, scale):
            normed = norm(self.read())
            normed = normed if scale is None else normed * (1 + _rows(scale))
            return normed if shift is None else normed + _rows(shift)
        branch = gate = None
        alone = self._waiting[0][0] if len(self._waiting) == 1 else None
        if isinstance(alone, Tensor) and self._is_owned():
            branch, gate = self._waiting.pop()
        if self.read().stride(-1) != 1:  # PixArt's patch embedding comes out transposed
            self._h = forward._owned[self._stream] = self._h.contiguous()
        return forward.ops.norm_modulate(
            self._h,
            scale,
            shift,
            branch=branch,
            gate=gate,
            out=out,
            **_parameters(norm),
        )

    def takes_op(self, norm: nn.Module, scale: Gate) -> bool:
        """Whether :meth:`normed` uses the op, or torch as diffusers does."""
        return not self._forward.immediate and _is_plain(norm, self._h) and self._suits(scale)

    def _suits(self, *vectors: Gate) -> bool:
        """Whether the ops take these operands: the stream's dtype, and no more batch rows than it has.

        Autocast mixes dtypes, and a prompt given once for several images has fewer rows than its modulation.
        """
        h = self._h
        return all(
            v is None or (v.dtype is h.dtype and v.shape[0] in (1, h.shape[0])) for v in vectors
        )

    def read(self) -> Tensor:
        """The stream with everything added."""
        stored = [(b.whole, gate) for b, gate in self._waiting if isinstance(b, Stored)]
        computed = [(b, gate) for b, gate in self._waiting if not isinstance(b, Stored)]
        if stored:
            rows = next(b.rows for b, _ in self._waiting if isinstance(b, Stored))
        for first in range(0, len(stored), MAX_BRANCHES - 1):
            # Beside those read at rows, the op takes one that was computed.
            fresh, computed = computed[:1], computed[1:]
            pairs = [*fresh, *stored[first : first + MAX_BRANCHES - 1]]
            self._add_up(pairs, fresh=len(fresh) - 1, rows=rows)
        most = MAX_BRANCHES if self._forward.weights is None else MAX_BRANCHES // (1 + MAX_ORDER)
        for first in range(0, len(computed), most):
            self._add_up(computed[first : first + most])
        self._waiting.clear()
        return self._h

    def _add_up(self, pairs: Sequence[tuple[Any, Gate]], **at: Any) -> None:
        nodes = [b.nodes if isinstance(b, Drawn) else () for b, _ in pairs]
        if any(nodes):
            forward = self._forward
            at["weights"] = forward.weights.of(forward.step, nodes, self._h)
            parts = ((b.values if isinstance(b, Drawn) else (b,), gate) for b, gate in pairs)
            pairs = [(value, gate) for values, gate in parts for value in values]
        branches, gates = zip(*pairs, strict=True)
        self._h = self._forward.ops.gated_residual(
            self._h, branches, gates, out=self._h if self._is_owned() else None, **at
        )
        self._forward._owned[self._stream] = self._h

    def clip_to_half(self) -> None:
        """Clip to fp16's finite range, as FLUX does after a block in that dtype."""
        if self._h.dtype is torch.float16:
            self._h = self.read().clip(-65504, 65504)

    def leave(self) -> Tensor:
        """The block's output. What still waits is added here unless the next block is sure to take it over."""
        if self._forward._may_wait():
            return self._h
        h = self.read()
        self._forward._owned.pop(self._stream, None)  # somebody may hold on to it
        return h

    def discard(self) -> None:
        """Forget what still waits: the stream ends in this block and nobody reads it."""
        self._waiting.clear()

    def _is_owned(self) -> bool:
        """Whether `h` was made here and was seen by nobody else, so that it may be updated in place."""
        return self._forward._owned.get(self._stream) is self._h


def joint_normed(streams: Sequence[Residual], norm: nn.Module, scale: Gate, shift: Gate) -> Tensor:
    """The streams' normed and modulated rows one after the other, [B, sum n, D], without joining the streams first."""
    first = streams[0]._h
    if not all(stream.takes_op(norm, scale) for stream in streams):
        return torch.cat([stream.normed(norm, scale, shift) for stream in streams], dim=1)
    lengths = [stream._h.shape[1] for stream in streams]
    out = first.new_empty(first.shape[0], sum(lengths), first.shape[2])
    for stream, part in zip(streams, out.split(lengths, dim=1), strict=True):
        stream.normed(norm, scale, shift, out=part)
    return out


def gathered(value: Any) -> Any:
    """A component's output whose :class:`Stored` and :class:`Drawn` parts are written down."""
    if isinstance(value, tuple):
        return tuple(gathered(part) for part in value)
    return value.gathered() if isinstance(value, (Stored, Drawn)) else value


def _renewed(held: Any, fresh: Tensor | None, owned: bool) -> Tensor | None:
    return held.renewed(fresh, owned) if isinstance(held, Stored) else fresh


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A component's output in another dtype."""
    if isinstance(value, (tuple, list)):
        return tuple(None if part is None else part.to(dtype) for part in value)
    return value.to(dtype)


def _rows(vector: Tensor) -> Tensor:
    """[B, D] -> [B, 1, D]; already per-token vectors stay."""
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def _is_plain(norm: nn.Module, h: Tensor) -> bool:
    """Whether the op may stand in for the module: a norm over the last axis, in the stream's dtype, no hooks."""
    weight = getattr(norm, "weight", None)
    return (
        (type(norm).__name__ == "LayerNorm" or _is_rms(norm, h))
        and not observed(norm)
        and (weight is None or weight.dtype is h.dtype)
    )


def _is_rms(norm: nn.Module, h: Tensor) -> bool:
    """Whether it is an RMSNorm as the op computes it: in fp64 it takes the variance in fp32, as diffusers does.

    Torch's own does not, and without an eps it takes one that depends on the dtype.
    """
    if isinstance(norm, nn.RMSNorm):
        return norm.eps is not None and h.dtype is not torch.float64
    return type(norm).__name__ == "RMSNorm"


def _parameters(norm: nn.Module) -> dict[str, Any]:
    """A plain norm's arguments to `norm_modulate`."""
    return {
        "weight": norm.weight,
        "bias": getattr(norm, "bias", None),
        "eps": norm.eps,
        "rms": type(norm).__name__ == "RMSNorm",
    }
