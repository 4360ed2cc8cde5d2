"""Attention of active tokens over the keys and values of all: what RAS puts in place of a stock processor.

Where all tokens are active it is the stock attention without its concatenations, and on a GPU takes its place for every
method (`fuses`).

Keys and values live, normed and rotated, in one buffer per attention in the family's own token order. A dense step
writes all of it, a sparse step the rows of its active tokens; the queries are those of the active tokens and of the
text. Nothing is concatenated along the keys, and no key is gathered.

Two ways run: norms as modules, rotation and writes as torch operations, in diffusers' own order and with its
roundings, wherever residuals are added at once (see `blocks/forward.py`); else one `qkv_prologue` for each stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit.backends.base import attention as torch_attention
from fastdit.blocks.attention_choice import TORCH, attend_by, chosen
from fastdit.blocks.float8 import QuantisedRows, linear
from fastdit.observe import observed
from fastdit.ops.qkv_prologue import HEAD_DIMS as PROLOGUE_HEAD_DIMS
from fastdit.ops.sparse_attention import HEAD_DIMS, sparse_attention


def fuses(device: torch.device) -> bool:
    """Whether `qkv_prologue` gains over torch's norms, rotation and concatenations where all tokens are active."""
    return device.type == "cuda"


@dataclass(eq=False)
class Rotation:
    """Rotary angles of the rows of a joint sequence: `cos` and `sin` [S, d], each value twice, fp32 or fp64.

    [B, S, d] where the images of a batch have angles of their own. A stream behind the last row does not turn.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, *parts: Tensor) -> Rotation:
        """From complex numbers of length one, [n, d / 2] or [B, n, d / 2], of one part of the rows after the other."""
        batch = max((part.shape[:-2] for part in parts), key=len)
        turns = torch.cat([part.expand(*batch, -1, -1) for part in parts], dim=-2)
        return cls(*(t.repeat_interleave(2, dim=-1) for t in (turns.real, turns.imag)))

    def turns(self, part: Part) -> bool:
        """Whether a stream has angles."""
        return part.offset < self.cos.shape[-2]

    @functools.cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """[S, d / 2] or [B, S, d / 2], each value once."""
        return self.cos[..., ::2].float().contiguous(), self.sin[..., ::2].float().contiguous()


class KeyValues(NamedTuple):
    """Keys and values of one attention, [B, S, G, d] each."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Part:
    """One stream's share of an attention.

    Attributes:
        q, k, v: [B, n, heads * d], as projected.
        norm_q, norm_k: Norms over d, or over all heads together where their weight is that long; or None. That of keys
            does not matter where there are none, and k and v have no width.
        offset: Row of the keys where this stream begins.
        rows: [B, n] rows of its tokens, counted from `offset`; None for 0 to n - 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    offset: int
    rows: Tensor | None


def projectors(attention: nn.Module, added: bool = False) -> tuple[nn.Module, ...]:
    """The layers that make q, k and v of a stream, or all three; `added` for those of the text."""
    if getattr(attention, "fused_projections", False):
        return (attention.to_added_qkv if added else attention.to_qkv,)
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    return tuple(getattr(attention, name) for name in names)


def projections(
    attention: nn.Module, x: Tensor | QuantisedRows, added: bool = False
) -> tuple[Tensor, ...]:
    """q, k and v of a stream; `added` for the projections of the text. Honours `fuse_qkv_projections`."""
    made = tuple(linear(layer, x) for layer in projectors(attention, added))
    return made[0].chunk(3, dim=-1) if len(made) == 1 else made


def readers(fw: Any, attention: nn.Module, added: bool = False) -> tuple[nn.Module, ...]:
    """The layers that alone read what an attention is given; () where its own processor calls them."""
    return () if fw.tokens is None else projectors(attention, added)


def attend(
    tokens: Any,
    key: Any,
    parts: Sequence[Part],
    length: int,
    heads: int,
    rotation: Rotation | None = None,
    processor: Any = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of the parts' queries, one after the other, over all `length` keys.

    Args:
        tokens: The call's :class:`~fastdit.blocks.active.ActiveTokens`; the keys and values of attention `key` are made
            here when all tokens pass.
        parts: The streams, in the order of the joint sequence.
        rotation: Of all rows, or of the first streams', or None.
        scale: Of the products; None for 1 / sqrt(d).
        processor: The stock processor, whose attention backend is used if the user has set one.
        mask: Added to the products, or which of them count, [B or 1, 1 or sum n, length]; or None.

    Returns:
        [B, sum n, heads * d].
    """
    batch, head_dim = parts[0].q.shape[0], parts[0].q.shape[-1] // heads
    if tokens.rows is None:
        shape = (batch, length, parts[0].k.shape[-1] // head_dim, head_dim)
        held = KeyValues(parts[0].k.new_empty(shape), parts[0].v.new_empty(shape))
        if tokens.keys is not None:
            tokens.keys[key] = held
    else:
        held = tokens.keys[key]
    query = _prologue(tokens.ops, parts, held, heads, rotation)
    if query is None:
        query = _prologue_as_stock(parts, held, head_dim, rotation)
    k, v = held.k.to(query.dtype), held.v.to(query.dtype)
    out = _attention(tokens.ops, query, k, v, processor, scale, mask)
    return out.flatten(2).to(query.dtype)


def _prologue(
    ops: Any, parts: Sequence[Part], held: KeyValues, heads: int, rotation: Rotation | None
) -> Tensor | None:
    """Queries [B, sum n, H, d] by the op, keys and values written; None where the op does not stand for the modules."""
    head_dim = held.k.shape[-1]
    if ops is None or head_dim not in PROLOGUE_HEAD_DIMS:
        return None
    affine = [_affine(part, head_dim) for part in parts]
    q = parts[0].q
    if any(given is None for given in affine) or q.dtype is not held.k.dtype:
        return None
    if rotation is not None and q.dtype is rotation.cos.dtype is torch.float64:
        return None  # the op's angles are fp32
    total = sum(part.q.shape[1] for part in parts)
    query = q.new_empty(q.shape[0], total, heads, head_dim)
    first = 0
    for part, given in zip(parts, affine, strict=True):
        turns = rotation is not None and rotation.turns(part)
        cos, sin = rotation.halves if turns else (None, None)
        ops.qkv_prologue(
            part.q,
            part.k,
            part.v,
            query,
            held.k,
            held.v,
            rows=part.rows,
            q_offset=first,
            kv_offset=part.offset,
            cos=cos,
            sin=sin,
            **given,
        )
        first += part.q.shape[1]
    return query


def _affine(part: Part, head_dim: int) -> dict[str, Any] | None:
    """The op's arguments for the norms of a part; None for norms it does not know."""
    if part.norm_q is None and part.norm_k is None:
        return {}
    norms = {"q": (part.norm_q, part.q.shape[-1])}
    if part.k.shape[-1]:
        norms["k"] = part.norm_k, part.k.shape[-1]
    if any(norm is None or observed(norm) for norm, _ in norms.values()):
        return None
    kinds = {(_kind(norm, head_dim, width), norm.eps) for norm, width in norms.values()}
    kind, eps = kinds.pop()
    if kinds or kind is None:
        return None
    found = {"norm": kind, "eps": eps}
    for side, (norm, _) in norms.items():
        for name in ("weight", "bias"):
            value = getattr(norm, name, None)
            if value is not None and value.dtype is not part.q.dtype:
                return None
            found[f"{side}_{name}"] = value
    return found


def _kind(norm: nn.Module, head_dim: int, width: int) -> str | None:
    """What `qkv_prologue` calls a norm of heads of `head_dim`, `width` all together; None if it has no name for it."""
    name, eps = type(norm).__name__, getattr(norm, "eps", None)
    if eps is None:
        return None
    if name == "RMSNorm" and getattr(norm, "bias", None) is None:
        weight = norm.weight
        if weight is None or tuple(weight.shape) == (head_dim,):
            return "rms" if type(norm).__module__.startswith("torch.") else "rms_rounded"
    across = tuple(getattr(norm, "normalized_shape", ())) == (width,)
    known = {
        "LayerNorm": "layer",
        "RMSNorm": "rms_across",
    }  # diffusers' RMSNorm has no such attribute
    return known.get(name) if across else None


def _prologue_as_stock(
    parts: Sequence[Part], held: KeyValues, head_dim: int, rotation: Rotation | None
) -> Tensor:
    """The same by the modules, in diffusers' order."""
    queries = []
    for part in parts:
        q, k = (_normed(*pair, head_dim) for pair in ((part.norm_q, part.q), (part.norm_k, part.k)))
        v = part.v.unflatten(-1, (-1, head_dim))
        if rotation is not None and rotation.turns(part):
            turn = [_rows_of(t, part, k.shape[1]) for t in (rotation.cos, rotation.sin)]
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        queries.append(q)
        _write(held.k, part, k)
        _write(held.v, part, v)
    return queries[0] if len(queries) == 1 else torch.cat(queries, dim=1)


def _normed(norm: nn.Module | None, x: Tensor, head_dim: int) -> Tensor:
    """[B, n, heads * d] as [B, n, heads, d], normed by head or across the heads."""
    across = norm is not None and tuple(getattr(norm, "normalized_shape", ())) == x.shape[-1:]
    if across and x.shape[-1] != head_dim:
        x = norm(x)
        norm = None
    x = x.unflatten(-1, (-1, head_dim))
    return x if norm is None else norm(x)


def _rows_of(table: Tensor, part: Part, count: int) -> Tensor:
    """Rotation [B or 1, n, 1, d] at the rows of a part."""
    if part.rows is None:
        return table[..., part.offset : part.offset + count, None, :]
    rows = part.offset + part.rows
    if table.ndim == 2:
        return table[rows][:, :, None]
    return table.take_along_dim(rows[..., None], dim=1)[:, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs, in the angles' precision, as diffusers' `apply_rotary_emb` does."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _write(store: Tensor, part: Part, values: Tensor) -> None:
    """store[b, offset + rows] = values [B, n, G, d], which a norm may have made wider, under autocast."""
    values = values.to(store.dtype)
    if part.rows is None:
        store[:, part.offset : part.offset + values.shape[1]] = values
    else:
        batch = torch.arange(store.shape[0], device=store.device)[:, None]
        store[batch, part.offset + part.rows] = values


def _attention(
    ops: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    processor: Any,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    """[B, Q, H, d] over [B, S, G, d], on the attention backend that the user chose, else by the op.

    Torch's own runs with a mask, and for heads that the op does not take; one that was measured to be faster on this
    GPU runs in the op's place, unless the user has named the backend of ops.
    """
    backend = _backend_of(processor)
    mask = None if mask is None else mask.unsqueeze(1)
    if backend is not None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, scale=scale, backend=backend
        )
    if mask is not None or query.shape[-1] not in HEAD_DIMS:
        return torch_attention(query, key, value, scale, mask)
    if ops is None:
        return sparse_attention(query, key, value, scale=scale, backend="reference")
    name = chosen(query, key) if ops.backend in (None, "cuda") else TORCH
    if name != TORCH:
        return attend_by(name, query, key, value, scale)
    return ops.sparse_attention(query, key, value, scale=scale)


def _backend_of(processor: Any) -> Any:
    """The attention backend of diffusers that the user chose, for a processor or for all; None where they did not."""
    if not hasattr(processor, "_attention_backend"):
        return None  # the stock one asks torch too
    if processor._attention_backend is not None:
        return processor._attention_backend
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend, _ = _AttentionBackendRegistry.get_active_backend()
    return None if backend == "native" else backend


def joint_attention(
    fw: Any,
    name: str,
    attention: nn.Module,
    image: Tensor | QuantisedRows,
    text: Tensor | QuantisedRows,
    *,
    text_first: bool = True,
    rotation: Rotation | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """An attention with projections for a text of its own: active image tokens [B, K, D] and text [B, T, D] over all.

    Args:
        text_first: The order of the joint sequence.
        rotation: Of all its rows, or of the image's where these are the first.
        mask: Which text tokens are read, bool [B, T]; None for all.

    Returns:
        (image, text) as they came; the text is None where the module drops it.
    """
    tokens, length = fw.tokens, text.shape[1]
    first, second = (length, 0) if text_first else (0, tokens.count)
    norms = attention.norm_q, attention.norm_k
    added_norms = attention.norm_added_q, attention.norm_added_k
    parts = [
        Part(*projections(attention, image), *norms, first, tokens.rows),
        Part(*projections(attention, text, added=True), *added_norms, second, None),
    ]
    if mask is not None:
        shown = mask.new_ones(mask.shape[0], tokens.count)
        mask = torch.cat([mask, shown] if text_first else [shown, mask], dim=1)[:, None]
    mask = tokens.weighed(mask, length, text_first)
    out = attend(
        tokens,
        (fw.index, name),
        parts[::-1] if text_first else parts,
        length + tokens.count,
        attention.heads,
        rotation,
        attention.processor,
        mask=mask,
    )
    if text_first:
        rest, own = out.split((length, image.shape[1]), dim=1)
    else:
        own, rest = out.split((image.shape[1], length), dim=1)
    drops = getattr(attention, "context_pre_only", None)
    rest = None if drops else attention.to_add_out(rest)
    return attention.to_out[1](attention.to_out[0](own)), rest


def self_attention(
    fw: Any,
    attention: nn.Module,
    x: Tensor | QuantisedRows,
    mask: Tensor | None = None,
    rotation: Rotation | None = None,
    text: int = 0,
    scale: float | None = None,
    projects: bool = True,
    qkv: Sequence[Tensor] | None = None,
) -> Tensor:
    """A self-attention module of the active tokens over all: x [B, K, D] -> [B, K, D].

    Args:
        mask: Added to the products, or which keys count, [B, 1 or N, N].
        rotation: Of all tokens.
        text: How many tokens of `x` are no image's; they are where the call's `text_first` and `texts` say.
        scale: Of the products; None for 1 / sqrt(d).
        projects: Whether the module's output projection follows.
        qkv: Its queries, keys and values of `x`, where the caller has them.
    """
    tokens = fw.tokens
    rows = tokens.joint_rows(text) if text else tokens.rows
    part = Part(*(qkv or projections(attention, x)), attention.norm_q, attention.norm_k, 0, rows)
    if mask is not None and mask.shape[1] > 1 and rows is not None:
        mask = mask.take_along_dim(rows[..., None], dim=1)
    mask = tokens.weighed(mask, text)
    out = attend(
        tokens,
        (fw.index, attention),
        (part,),
        text + tokens.count,
        attention.heads,
        rotation,
        attention.processor,
        scale,
        mask,
    )
    if not projects:
        return out
    out = attention.to_out[1](attention.to_out[0](out))
    factor = getattr(attention, "rescale_output_factor", 1.0)
    return out if factor == 1.0 else out / factor


def cross_attention(
    fw: Any, attention: nn.Module, x: Tensor, context: Tensor, mask: Tensor, rotation: Rotation
) -> Tensor:
    """The active image tokens' attention, x [B, K, D], to what has no positions, context [B, T, C]; not projected.

    Args:
        mask: Which rows of the context count, bool [B, T].
        rotation: Of the queries of all tokens.
    """
    tokens, heads = fw.tokens, attention.heads
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    head_dim = q.shape[-1] // heads
    k, v = _normed(attention.norm_k, k, head_dim).to(v.dtype), v.unflatten(-1, (-1, head_dim))
    none = q[..., :0]
    part = Part(q, none, none, attention.norm_q, None, 0, tokens.rows)
    store = q.new_empty(q.shape[0], tokens.count, 0, head_dim)
    query = _prologue(tokens.ops, (part,), KeyValues(store, store), heads, rotation)
    if query is None:
        query = _normed(attention.norm_q, q, head_dim)
        turn = [_rows_of(t, part, query.shape[1]) for t in (rotation.cos, rotation.sin)]
        query = _rotate(query, *turn).to(q.dtype)
    return _attention(tokens.ops, query, k, v, attention.processor, None, mask[:, None])
