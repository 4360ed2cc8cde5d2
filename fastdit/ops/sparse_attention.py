"""Attention of some queries over all keys: out = softmax(scale q k^T) v, no mask.

Shapes: q and out [B, Q, H, d], k and v [B, S, G, d], the H query heads in groups that share one of G
key heads: head h reads key head h // (H / G).

Attention is bought: torch's own (`scaled_dot_product_attention`) serves it on every device and in
every backend but two. `triton` has a kernel that shares the keys of a tile among programs where few
queries would leave processors idle; `cpu` has one that lays keys and values out anew for all queries,
where torch cuts few queries into small tiles. They run where

* the backend is named, by argument or by FASTDIT_BACKEND, or
* no backend is named and they were measured to be faster than torch: `triton` by `benchmarks/tune.py`
  at these very sizes, in a 16-bit dtype, on this architecture (the table of
  `triton_kernels/launch.py`); `cpu` in fp32 with AVX-512 (`benchmarks/bench_sparse_attention.py`).

So without a measurement none runs unasked. A gradient flows through torch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.backends.base import Backend, attention
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import BACKENDS, choose, define, named, op, requires_grad, traced

HEAD_DIMS = range(1, 257)
SCHEMA = "sparse_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) out, str? backend) -> ()"


@op
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from some tokens to all.

    Args:
        q: [B, Q, H, d], the active tokens' queries; any batch and token strides, d from 1 to 256.
        k, v: [B, S, G, d], of all tokens; G divides H, S is at least 1.
        scale: of the products; 1 / sqrt(d) by default.
        backend: a backend by name; None for FASTDIT_BACKEND, or the choice in the module text.

    Returns:
        [B, Q, H, d], of the dtype of q; its strides are those of the attention that ran.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or value.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> out = sparse_attention(query, k_cache, v_cache)  # behind `qkv_prologue`
    """
    _check(q, k, v, scale)
    differentiable = torch.is_grad_enabled() and requires_grad(q, k, v)
    kernel = None if differentiable else _kernel(q, k, backend)
    if kernel is None:
        return attention(q, k, v, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    run = torch.ops.fastdit.sparse_attention.default if traced() else _run
    run(q, k, v, 1 / math.sqrt(q.shape[3]) if scale is None else scale, out, kernel.name)
    return out


def _kernel(q: Tensor, k: Tensor, backend: str | None) -> Backend | None:
    """Whose kernel serves; None for torch's attention."""
    name = named(backend)
    if name is not None:
        chosen = choose("sparse_attention", q.device, q.dtype, name)
        return chosen if chosen.attends else None
    return next((b for b in BACKENDS.values() if b.attends and b.outruns_torch(q, k)), None)


def _run(q, k, v, scale, out, backend=None) -> None:
    """Also what torch.ops calls once a trace runs."""
    choose("sparse_attention", q.device, q.dtype, backend).sparse_attention(q, k, v, scale, out)


define(SCHEMA, _run)


def _check(q, k, v, scale) -> None:
    if not isinstance(q, Tensor) or q.dim() != 4 or q.dtype not in checks.FLOATING:
        found = f"{q.dtype} {list(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
        raise ArgumentError(f"q: got {found}; accepted is a floating tensor [B, Q, H, d]")
    batch, _, heads, dim = q.shape
    checks.heads("q", q, batch, q.dtype, q.device)
    if dim not in HEAD_DIMS:
        raise ArgumentError(f"q: got a last dimension of {dim}; accepted is 1 to 256")
    checks.heads("k", k, batch, q.dtype, q.device)
    _, keys, kv_heads, _ = k.shape
    if k.shape[3] != dim or kv_heads < 1 or heads % kv_heads or keys < 1:
        raise ArgumentError(
            f"k: got shape {list(k.shape)}; accepted is [{batch}, S, G, {dim}] with S at least 1 and "
            f"G a divisor of the {heads} heads of q"
        )
    checks.heads("v", v, batch, q.dtype, q.device)
    if v.shape != k.shape:
        raise ArgumentError(f"v: got shape {list(v.shape)}; accepted is {list(k.shape)}, that of k")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ArgumentError(f"scale: got {scale!r}; accepted is a finite number, or None")
