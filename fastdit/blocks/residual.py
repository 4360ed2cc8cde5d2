"""A residual stream within a block: what is added waits until somebody reads it; see `forward.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdit.backends.base import MAX_BRANCHES
from fastdit.blocks.active import CachedRows
from fastdit.blocks.float8 import QuantisedRows
from fastdit.blocks.nodes import Drawn
from fastdit.blocks.ranges import Ranges, ranges_of
from fastdit.observe import observed
from fastdit.schedules.forecast import MAX_ORDER

if TYPE_CHECKING:
    from fastdit.blocks.forward import Forward

Gate = Tensor | Ranges | None
#: what residuals take
Branch = Tensor | CachedRows | Drawn


class Residual:
    """One residual stream inside one block: ``h + sum_i gate_i * branch_i``, added late.

    `h` is [B, n, D]; branches are [B, n, D], gates [B, D] or [B, 1, D], two of them in ranges, one for each token
    [B, n, D], or None for 1.
    """

    __slots__ = ("_branch_first", "_forward", "_h", "_stream", "_waiting", "_wide")

    def __init__(
        self, forward: Forward, stream: str, h: Tensor, branch_first: bool, wide: bool
    ) -> None:
        self._forward = forward
        self._stream = stream
        self._h = h
        self._branch_first = branch_first
        self._wide = wide
        self._waiting = forward._waiting.setdefault(stream, [])

    def add(self, branch: Branch, gate: Gate = None) -> None:
        """Add ``gate * branch``, now or when the stream is next read."""
        forward = self._forward
        if forward.immediate or not self.suits(branch, gate):
            branch = gathered(branch)
            branch = branch if gate is None else _rows(gate) * branch
            h = self.read()
            if self._wide and gate is not None:
                self._h = (h.float() + branch).type_as(h)
            else:
                self._h = branch + h if self._branch_first else h + branch
            return
        if any(value.stride(-1) != 1 for value in _values(branch)):
            branch = gathered(branch).contiguous()
        self._waiting.append((branch, gate))

    def add_component(
        self, name: str, compute: Callable[[], Tensor], gate: Gate, shared: Tensor
    ) -> None:
        """Add :meth:`Forward.component`, or the sums that it is in.

        `shared` [B, G, D] is what the gates of all blocks have in common; see :class:`~fastdit.spec.BlockKind`.
        """
        self._forward.add_component(name, compute, (self, gate), shared=shared)

    def suits(self, branch: Branch, gate: Gate) -> bool:
        """Whether the ops take this branch of the stream."""
        h = self._h
        return branch.shape == h.shape and branch.dtype is h.dtype and self._suits(gate)

    def normed(
        self,
        norm: nn.Module,
        scale: Gate,
        shift: Gate,
        readers: Sequence[nn.Module] = (),
        out: Tensor | QuantisedRows | None = None,
    ) -> Any:
        """``norm(h) * (1 + scale) + shift`` [B, n, D], the input of a component.

        `norm` is a LayerNorm or RMSNorm module; scale and shift may be None. It comes as :class:`QuantisedRows` where
        `readers`, the linear layers that read it and that nothing else does, all take those.
        """
        forward = self._forward
        if not self.takes_op(norm, scale):
            h = self.read()
            normed = norm(h.float() if self._wide else h)
            normed = normed if scale is None else normed * (1 + _rows(scale))
            normed = normed if shift is None else normed + _rows(shift)
            return normed.type_as(h) if self._wide else normed
        branch = gate = None
        alone = self._waiting[0][0] if len(self._waiting) == 1 else None
        if isinstance(alone, Tensor) and self._is_owned():
            branch, gate = self._waiting.pop()
        if self.read().stride(-1) != 1:  # PixArt's patch embedding comes out transposed
            self._h = forward._own_streams[self._stream] = self._h.contiguous()
        given = norm_parameters(norm, self._h.dtype)
        ranges = ranges_of((scale, shift, gate))
        if ranges:
            if out is None:
                out = torch.empty_like(self._h, memory_format=torch.contiguous_format)
            for some in ranges:
                forward.ops.norm_modulate(
                    some.rows(self._h),
                    some.vector(scale),
                    some.vector(shift),
                    branch=some.rows(branch),
                    gate=some.vector(gate),
                    out=some.rows(out),
                    **given,
                )
            return out
        given |= {"branch": branch, "gate": gate}
        if out is None and forward.quantises(readers, self._h):
            out = QuantisedRows.like(self._h, self._h.shape[1])
        if not isinstance(out, QuantisedRows):
            return forward.ops.norm_modulate(self._h, scale, shift, out=out, **given)
        given |= {"out": out.data, "row_scale": out.scale}
        forward.ops.norm_modulate(self._h, scale, shift, **given)
        return out

    def takes_op(self, norm: nn.Module, scale: Gate) -> bool:
        """Whether :meth:`normed` uses the op, or torch as diffusers does."""
        return not self._forward.immediate and is_plain(norm, self._h) and self._suits(scale)

    def _suits(self, *vectors: Gate) -> bool:
        """Whether the ops take these operands: the stream's dtype, or fp32 where it is wide, and no more batch rows.

        Autocast mixes dtypes, and a prompt given once for several images has fewer rows than its modulation.
        """
        h = self._h
        other = torch.float32 if self._wide and h.itemsize == 2 else h.dtype
        return all(
            v is None or (v.dtype in (h.dtype, other) and v.shape[0] in (1, h.shape[0]))
            for v in vectors
        )

    def read(self) -> Tensor:
        """The stream with everything added."""
        per = 1 if self._forward.weights is None else 1 + MAX_ORDER
        at_rows = [pair for pair in self._waiting if _active_rows(pair[0]) is not None]
        computed = [pair for pair in self._waiting if _active_rows(pair[0]) is None]
        most = (MAX_BRANCHES - per) // per
        for first in range(0, len(at_rows), most):
            some = at_rows[first : first + most]
            # Beside those read at rows, the op takes one that was computed.
            fresh = next((pair for pair in computed if isinstance(pair[0], Tensor)), None)
            if fresh is not None:
                computed.remove(fresh)
                some = [fresh, *some]
            self._add_up(some, fresh=-1 if fresh is None else 0, rows=_active_rows(some[-1][0]))
        most = MAX_BRANCHES // per
        for first in range(0, len(computed), most):
            self._add_up(computed[first : first + most])
        self._waiting.clear()
        return self._h

    def _add_up(self, pairs: Sequence[tuple[Branch, Gate]], **at: Any) -> None:
        at["weights"] = self._weights([branch for branch, _ in pairs])
        parts = [(value, gate) for branch, gate in pairs for value in _values(branch)]
        branches, gates = zip(*parts, strict=True)
        h, ranges = self._h, ranges_of(gates)
        out = h if self._is_owned() else None
        if ranges and out is None:
            out = torch.empty_like(h, memory_format=torch.contiguous_format)
        add = self._forward.ops.gated_residual
        for some in ranges:
            x = some.rows(h)
            at_range = at | {"weights": some.weights(at["weights"])}
            add(
                x,
                [some.rows(branch) for branch in branches],
                [some.vector(gate) for gate in gates],
                out=x if out is h else some.rows(out),
                **at_range,
            )
        self._h = out if ranges else add(h, branches, gates, out=out, **at)
        self._forward._own_streams[self._stream] = self._h

    def _weights(self, branches: Sequence[Branch]) -> Tensor | None:
        """What the op weighs the branches' values with: a number each, or one for each token."""
        drawn = [branch if isinstance(branch, Drawn) else None for branch in branches]
        if not any(drawn):
            return None
        forward = self._forward
        if all(branch is None or branch.by_token is None for branch in drawn):
            nodes = [() if branch is None else branch.nodes for branch in drawn]
            places = [None if branch is None else branch.place for branch in drawn]
            return forward.weights.of(forward.step, nodes, self._h, places=places)
        shape = self._h.shape[:2]
        found = []
        for branch in drawn:
            if branch is not None and branch.by_token is not None:
                found.append(branch.by_token)
            else:
                nodes = [() if branch is None else branch.nodes]
                weights = forward.weights.of(forward.step, nodes, self._h)
                found.append(weights[:, None, None].expand(-1, *shape))
        return found[0] if len(found) == 1 else torch.cat(found)

    def leave(self, clips: bool = False) -> Tensor:
        """The block's output. What still waits is added here unless the next block is sure to take it over.

        `clips` where the block in fp16 clips to that dtype's finite range.
        """
        if self._forward._drops(self._stream):
            self.discard()
            return self._h
        if clips and self._h.dtype is torch.float16:
            self._h = self.read().clip(-65504, 65504)
        if self._forward._may_wait():
            return self._h
        h = self.read()
        self._forward._own_streams.pop(self._stream, None)  # somebody may hold on to it
        return h

    def discard(self) -> None:
        """Forget what still waits: the stream ends in this block and nobody reads it."""
        self._waiting.clear()

    def _is_owned(self) -> bool:
        """Whether `h` was made here and was seen by nobody else, so that it may be updated in place."""
        return self._forward._own_streams.get(self._stream) is self._h


def joint_normed(
    streams: Sequence[Residual],
    norm: nn.Module,
    scale: Gate,
    shift: Gate,
    readers: Sequence[nn.Module] = (),
) -> Any:
    """The streams' normed and modulated rows one after the other, [B, sum n, D], without joining the streams first.

    As :meth:`Residual.normed` gives those of one.
    """
    first = streams[0]._h
    lengths = [stream._h.shape[1] for stream in streams]
    scales, shifts = by_rows(scale, lengths), by_rows(shift, lengths)
    affine = list(zip(streams, scales, shifts, strict=True))
    if not all(stream.takes_op(norm, own) for stream, own, _ in affine):
        return torch.cat([stream.normed(norm, *own) for stream, *own in affine], dim=1)
    out: Tensor | QuantisedRows
    if streams[0]._forward.quantises(readers, first):
        out = QuantisedRows.like(first, sum(lengths))
        parts = out.split(lengths)
    else:
        out = first.new_empty(first.shape[0], sum(lengths), first.shape[2])
        parts = out.split(lengths, dim=1)
    for (stream, *own), part in zip(affine, parts, strict=True):
        stream.normed(norm, *own, out=part)
    return out


def by_rows(vector: Gate, lengths: Sequence[int]) -> Sequence[Gate]:
    """What of a vector is for each of several streams: its rows, where it has some for all of them; else all of it."""
    if vector is None or vector.ndim < 3 or vector.shape[1] != sum(lengths):
        return [vector] * len(lengths)
    return vector.split(lengths, dim=1)


def _active_rows(branch: Branch) -> Tensor | None:
    """The active rows of an output that is kept of all tokens; None for one that is of the stream's."""
    return None if isinstance(branch, Tensor) else branch.rows


def _values(branch: Branch) -> Sequence[Tensor]:
    """The tensors that the op reads for a branch."""
    if isinstance(branch, Drawn):
        return branch.values
    return (branch.whole,) if isinstance(branch, CachedRows) else (branch,)


def gathered(value: Any) -> Any:
    """A component's output whose :class:`CachedRows` and :class:`Drawn` parts are written down."""
    if isinstance(value, tuple):
        return tuple(gathered(part) for part in value)
    return value.gathered() if isinstance(value, (CachedRows, Drawn)) else value


def _rows(vector: Tensor | Ranges) -> Tensor:
    """[B, D] -> [B, 1, D]; those of two ranges -> [B, n, D]; already per-token vectors stay."""
    if isinstance(vector, Ranges):
        return vector.spread()
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def is_plain(norm: nn.Module, h: Tensor) -> bool:
    """Whether the op may stand in for the module: a norm over the last axis, in the stream's dtype, no hooks.

    diffusers' FP32LayerNorm computes in fp32 whatever it is given, as the op does; its weights may be fp32.
    """
    weight, name = getattr(norm, "weight", None), type(norm).__name__
    suits = weight is None or weight.dtype is h.dtype or name == "FP32LayerNorm"
    plain = name in ("LayerNorm", "FP32LayerNorm") or _is_rms(norm, h)
    return plain and suits and not observed(norm)


def _is_rms(norm: nn.Module, h: Tensor) -> bool:
    """Whether it is an RMSNorm as the op computes it: in fp64 it takes the variance in fp32, as diffusers does.

    Torch's own does not, and without an eps it takes one that depends on the dtype.
    """
    if isinstance(norm, nn.RMSNorm):
        return norm.eps is not None and h.dtype is not torch.float64
    return type(norm).__name__ == "RMSNorm"


def norm_parameters(norm: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """A plain norm's arguments to `norm_modulate` of a stream of a dtype: fp32 ones stay so beside 16 bits."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if weight is not None and weight.dtype is torch.float32 and dtype.itemsize == 2:
        dtype = torch.float32
    return {
        "weight": None if weight is None else weight.to(dtype),
        "bias": None if bias is None else bias.to(dtype),
        "eps": norm.eps,
        "rms": type(norm).__name__ == "RMSNorm",
    }
