"""Everything between the QKV projections and attention, for one stream of tokens, in one launch.

    q_out[:, q_offset + i] = rotate(norm(q))[:, i]
    k_cache[b, kv_offset + rows[b, i]] = rotate(norm(k))[b, i]
    v_cache[b, kv_offset + rows[b, i]] = v[b, i]

Shapes: q [B, K, H d], k and v [B, K, G d], K the active tokens, H query heads in groups that share
one of G key heads. q_out [B, Q, H, d] is compact. k_cache and v_cache [B, S, G, d] keep a row for
every token of the joint sequence: those of other tokens stay as they were, bit for bit, so a text
and an image stream write into one cache by two calls with different offsets. G may be 0: queries
alone, whose keys come from elsewhere.

norm: None; "rms", over the d elements of a head, rounded once, as torch.nn.RMSNorm; "rms_rounded",
the same with the normalised value rounded to the dtype before the weight, as diffusers' RMSNorm;
"rms_across", torch.nn.RMSNorm over all heads of a token together; "layer", LayerNorm over them. It
applies to q and k, never to v. Only `reference` rounds "rms_rounded" twice: the others compute both
in fp32 and round once at the end.

Rotation takes interleaved pairs, (x0, x1) -> (x0 c - x1 s, x1 c + x0 s), with pair j of a token by
cos[p, j] and sin[p, j]; p = kv_offset + rows[b, i] is the row where its key is stored. A complex
table is cos = table.real, sin = table.imag; one with each value twice is cos[:, ::2].contiguous().

Bytes moved: 2 B K (H + 2 G) d elements. v is copied bit-exactly. No gradient, no allocation, and no
mix of dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import define, op, refuse_gradients, resolve, traced

NORMS = (None, "rms", "rms_rounded", "layer", "rms_across")
ACROSS = ("layer", "rms_across")  # all heads of a token
AFFINE = ("q_weight", "q_bias", "k_weight", "k_bias")
HEAD_DIMS = range(8, 257, 2)

SCHEMA = (
    "qkv_prologue(Tensor q, Tensor k, Tensor v, Tensor(a!) q_out, Tensor(b!) k_cache, "
    "Tensor(c!) v_cache, Tensor? rows, int q_offset, int kv_offset, str? norm, Tensor? q_weight, "
    "Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float eps, Tensor? cos, Tensor? sin, "
    "str? backend) -> ()"
)


@op
def qkv_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    rows: Tensor | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Normalise, rotate and store the queries, keys and values of the active tokens.

    Args:
        q, k, v: [B, K, H d] and twice [B, K, G d], such as slices of a fused projection: any batch
            and token strides, last stride 1.
        q_out: [B, Q, H, d], written at tokens q_offset to q_offset + K - 1.
        k_cache, v_cache: [B, S, G, d], written at tokens kv_offset + rows.
        rows: int32 or int64 [B, K], unique in each sample; None for 0 to K - 1.
        q_offset, kv_offset: where the stream begins in q_out, and in both caches and the table.
        norm: None, "rms", "rms_rounded", "rms_across" or "layer".
        q_weight, k_weight: the norm's, [d], or [H d] and [G d] where it spans all heads; None for 1.
        q_bias, k_bias: of "layer" only; None for 0.
        eps: added to the variance or mean square.
        cos, sin: fp32 [P, d / 2] or [B, P, d / 2], last stride 1, P above every position.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory, or
            requires a gradient while grad is enabled.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> table = {"cos": cos, "sin": sin, "norm": "rms"}  # of all 512 + 4096 tokens
        >>> qkv_prologue(*text, q_out, k_cache, v_cache, **table)
        >>> qkv_prologue(*image, q_out, k_cache, v_cache, q_offset=512, kv_offset=512, **table)
    """
    affine = (q_weight, q_bias, k_weight, k_bias)
    refuse_gradients("q, k, v", q, k, v, q_out, k_cache, v_cache, affine)
    stream = (q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset)
    if traced():
        torch.ops.fastdit.qkv_prologue.default(*stream, norm, *affine, eps, cos, sin, backend)
    else:
        _run(*stream, norm, *affine, eps, cos, sin, backend)


def _run(
    q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset,
    norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin, backend=None,
) -> None:  # fmt: skip
    """Also what torch.ops calls once a trace runs."""
    _check_streams(q, k, v, q_out, k_cache, v_cache, q_offset)
    _check_table(cos, sin, q, q_out.shape[3])
    _check_rows(rows, k, k_cache, kv_offset, cos)
    affine = (q_weight, q_bias, k_weight, k_bias)
    _check_norm(norm, *affine, q, k, q_out.shape[3])
    written = (("q_out", q_out), ("k_cache", k_cache), ("v_cache", v_cache))
    read = (("q", q), ("k", k), ("v", v), ("rows", rows), ("cos", cos), ("sin", sin))
    checks.all_disjoint(written, (*read, *zip(AFFINE, affine, strict=True)))
    resolve("qkv_prologue", q.device, q.dtype, backend)(
        q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset, norm, *affine, eps, cos, sin
    )


define(SCHEMA, _run)


def _check_streams(q, k, v, q_out, k_cache, v_cache, q_offset) -> None:
    batch, tokens, width = checks.state("q", q)
    dtype, device = q.dtype, q.device
    checks.heads("q_out", q_out, batch, dtype, device)
    _, stored, heads, dim = q_out.shape
    if dim not in HEAD_DIMS:
        raise ArgumentError(f"q_out: got a last dimension of {dim}; accepted is even, 8 to 256")
    if width != heads * dim:
        raise ArgumentError(
            f"q: got shape {list(q.shape)}; accepted is [B, K, {heads * dim}], the {heads} heads "
            f"of {dim} of q_out"
        )
    if not 0 <= q_offset <= stored - tokens:
        raise ArgumentError(
            f"q_offset: got {q_offset}; accepted is 0 to {stored - tokens}, where {tokens} tokens "
            f"of q end within the {stored} of q_out"
        )
    checks.heads("k_cache", k_cache, batch, dtype, device)
    kv_heads = k_cache.shape[2]
    if k_cache.shape[3] != dim or (kv_heads and heads % kv_heads):
        raise ArgumentError(
            f"k_cache: got shape {list(k_cache.shape)}; accepted is [B, S, G, {dim}] with G a "
            f"divisor of the {heads} heads of q_out, or 0"
        )
    checks.heads("v_cache", v_cache, batch, dtype, device)
    if v_cache.shape != k_cache.shape:
        raise ArgumentError(
            f"v_cache: got shape {list(v_cache.shape)}; accepted is {list(k_cache.shape)}, that of "
            "k_cache"
        )
    checks.operand("k", k, (batch, tokens, kv_heads * dim), dtype, device)
    checks.operand("v", v, (batch, tokens, kv_heads * dim), dtype, device)


def _check_rows(rows, k, k_cache, kv_offset, cos) -> None:
    """Values of rows are looked at by the backends of the CPU only."""
    tokens, stored = k.shape[1], k_cache.shape[1]
    if rows is not None:
        checks.row_index(rows, k.shape[0], k.device)
        if rows.shape[1] != tokens:
            raise ArgumentError(
                f"rows: got shape {list(rows.shape)}; accepted is {list(k.shape[:2])}, one row for "
                "each token of q"
            )
        tokens = min(tokens, 1)
    if cos is not None:
        stored = min(stored, cos.shape[-2])
    if not 0 <= kv_offset <= stored - tokens:
        raise ArgumentError(
            f"kv_offset: got {kv_offset}; accepted is 0 to {stored - tokens}, where the tokens end "
            "within the rows of the caches and of cos and sin"
        )


def _check_norm(norm, q_weight, q_bias, k_weight, k_bias, q, k, dim) -> None:
    if norm not in NORMS:
        raise ArgumentError(
            f"norm: got {norm!r}; accepted is None, 'rms', 'rms_rounded', 'rms_across' or 'layer'"
        )
    query, key = (q.shape[2], k.shape[2]) if norm in ACROSS else (dim, dim)
    widths = (query, query, key, key) if norm == "layer" else (query, 0, key, 0)
    for name, t, width in zip(AFFINE, (q_weight, q_bias, k_weight, k_bias), widths, strict=True):
        if t is None:
            continue
        if norm is None or width == 0:
            raise ArgumentError(f"{name}: got a tensor with norm={norm!r}; accepted is None")
        checks.operand(name, t, (width,), q.dtype, q.device)


def _check_table(cos, sin, q, dim) -> None:
    if (cos is None) != (sin is None):
        raise ArgumentError("cos, sin: got one of them; accepted are both or none")
    if cos is None:
        return
    for name, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor) or t.dtype is not torch.float32 or t.dim() not in (2, 3):
            found = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ArgumentError(
                f"{name}: got {found}; accepted is torch.float32 [P, {dim // 2}] or "
                f"[B, P, {dim // 2}]"
            )
        shape = (*q.shape[: t.dim() - 2], cos.shape[-2], dim // 2)
        checks.operand(name, t, shape, torch.float32, q.device)
