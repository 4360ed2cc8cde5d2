"""The ops once more, spelled out without looking at fastdit: what is true, and what stock does.

`exact_*` is the mathematics in fp64 without casts. `eager_*` is stock diffusers' expression in the
dtype of its inputs; the `reference` backend must equal it bit for bit, all others by the rule of
tolerance.py. Rows are read through `torch.gather`, which the library does not use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(store: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return store
    return store.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, store.shape[-1]))


def gate_of(gate: Tensor) -> Tensor:
    return gate[:, None, :] if gate.dim() == 2 else gate


def eager_gated_residual(x, branches, gates, fresh=-1, rows=None, weights=None):
    dtype = x.dtype
    for i, (branch, gate) in enumerate(zip(branches, gates, strict=True)):
        active = branch if i == fresh else rows_of(branch, rows)
        if weights is not None:
            weight = weights[i] if weights.ndim == 1 else weights[i][..., None]
            active = (weight * active).to(active.dtype)
        x = x + active if gate is None else x + gate_of(gate) * active
        x = x.to(dtype)  # beside a gate in fp32 it was wider
    return x


def exact_gated_residual(x, branches, gates, fresh=-1, rows=None, weights=None):
    weights = None if weights is None else weights.double()
    branches = [branch.double() for branch in branches]
    gates = [None if gate is None else gate.double() for gate in gates]
    return eager_gated_residual(x.double(), branches, gates, fresh, rows, weights)


def eager_norm_modulate(
    x, scale=None, shift=None, weight=None, bias=None, eps=1e-6, rms=False, branch=None, gate=None
):
    """x holds the active rows already. Returns y and the updated x."""
    if branch is not None:
        x = eager_gated_residual(x, [branch], [gate])
    if any(t is not None and t.itemsize > x.itemsize for t in (scale, shift, weight, bias)):
        given = [None if t is None else t.float() for t in (scale, shift, weight, bias)]
        return eager_norm_modulate(x.float(), *given, eps, rms)[0].to(x.dtype), x
    if rms:
        mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        y = x * torch.rsqrt(mean_square + eps)
        y = y.to(x.dtype)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = y if scale is None else y * (1 + gate_of(scale))
    return (y if shift is None else y + gate_of(shift)), x


def exact_norm_modulate(
    x, scale=None, shift=None, weight=None, bias=None, eps=1e-6, rms=False, branch=None, gate=None
):
    x, scale, shift, weight, bias, branch, gate = (
        None if t is None else t.double() for t in (x, scale, shift, weight, bias, branch, gate)
    )
    if branch is not None:
        x = exact_gated_residual(x, [branch], [gate])
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + gate_of(scale))
    return (y if shift is None else y + gate_of(shift)), x


def quantised(y):
    """y in fp8 and what each row is to be multiplied by, as torchao writes it; rows of zeros stay zeros."""
    row_scale = (y.abs().amax(dim=-1) / 448.0).float()
    row_scale[row_scale < 2.0**-126] = 0.0
    small = row_scale == 0
    scaled = (y.float() / row_scale[..., None]).clamp(-448.0, 448.0)
    scaled[small] = 0.0
    return scaled.to(torch.float8_e4m3fn), row_scale


def dequantised(data, row_scale):
    return data.double() * row_scale.double()[..., None]


def eager_head_norm(x, heads, norm=None, weight=None, bias=None, eps=1e-6):
    """x [B, K, heads d] -> [B, K, heads, d]."""
    batch, tokens, width = x.shape
    if norm == "layer":
        x = F.layer_norm(x, (width,), weight, bias, eps)
    if norm == "rms_across":
        x = F.rms_norm(x, (width,), weight, eps)
    x = x.reshape(batch, tokens, heads, width // heads)
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if norm == "rms_rounded":
        return eager_norm_modulate(x, weight=weight, eps=eps, rms=True)[0]
    return x


def exact_head_norm(x, heads, norm=None, weight=None, bias=None, eps=1e-6):
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    batch, tokens, width = x.shape
    if norm == "layer":
        x, _ = exact_norm_modulate(x, weight=weight, bias=bias, eps=eps)
    if norm == "rms_across":
        x, _ = exact_norm_modulate(x, weight=weight, eps=eps, rms=True)
    x = x.reshape(batch, tokens, heads, width // heads)
    if norm in ("rms", "rms_rounded"):
        return exact_norm_modulate(x, weight=weight, eps=eps, rms=True)[0]
    return x


def eager_rotation(x, cos, sin, positions):
    """x [B, K, heads, d] by cos and sin [P, d/2] or [B, P, d/2] at positions [B, K]."""
    twice = [table_at(t, positions).repeat_interleave(2, dim=-1)[:, :, None] for t in (cos, sin)]
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(3)
    return (x.float() * twice[0] + turned.float() * twice[1]).to(x.dtype)


def exact_rotation(x, cos, sin, positions):
    cos, sin = (table_at(t.double(), positions)[:, :, None] for t in (cos, sin))
    real, imaginary = x[..., ::2].double(), x[..., 1::2].double()
    pairs = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return torch.stack(pairs, dim=-1).flatten(3)


def table_at(table, positions):
    table = table.expand(positions.shape[0], *table.shape[-2:])
    return rows_of(table, positions)


def eager_blend(fresh, cached, r, x=None, gate=None):
    """Returns the result and the blend, which is rounded before its gate."""
    wide = torch.float64 if fresh.dtype is torch.float64 else torch.float32
    rest = 1 - r.to(wide)
    blended = (r.to(wide) * fresh.to(wide) + rest * cached.to(wide)).to(fresh.dtype)
    if r in (0, 1):
        blended = fresh if r == 1 else cached
    return (blended if x is None else eager_gated_residual(x, [blended], [gate])), blended


def exact_blend(fresh, cached, r, x=None, gate=None):
    fresh, cached, r, x, gate = (
        None if t is None else t.double() for t in (fresh, cached, r, x, gate)
    )
    return eager_blend(fresh, cached, r, x, gate)


def eager_blend_backward(grad, fresh, cached, r, gate=None):
    """Gradients of fresh, cached and r, and the magnitude of what the last one adds up."""
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    g = grad.to(wide) if gate is None else gate_of(gate.to(wide)) * grad.to(wide)
    terms = g * (fresh.to(wide) - cached.to(wide))
    weight = r.to(wide)
    of_fresh, of_cached = ((w * g).to(grad.dtype) for w in (weight, 1 - weight))
    return of_fresh, of_cached, terms.sum().to(r.dtype), terms.abs().sum().item()


def exact_blend_backward(grad, fresh, cached, r, gate=None):
    grad, fresh, cached, r, gate = (
        None if t is None else t.double() for t in (grad, fresh, cached, r, gate)
    )
    return eager_blend_backward(grad, fresh, cached, r, gate)


def eager_collapse(branches, weights, groups, sums=None, count=1, dtype=None):
    """Sums in fp32 (fp64) and rounded to dtype; `sums` are what they begin with."""
    wide = torch.float64 if branches[0].dtype is torch.float64 else torch.float32
    zero = torch.zeros(branches[0].shape, dtype=wide)
    found = [zero.clone() for _ in range(count)] if sums is None else list(sums.to(wide))
    for branch, weight, group in zip(branches, weights, groups, strict=True):
        term = branch.to(wide) if weight is None else gate_of(weight.to(wide)) * branch.to(wide)
        found[0] = found[0] + term
        if group:
            found[group] = found[group] + branch.to(wide)
    return torch.stack(found).to(dtype or branches[0].dtype)


def exact_collapse(branches, weights, groups, sums=None, count=1):
    branches = [branch.double() for branch in branches]
    weights = [None if weight is None else weight.double() for weight in weights]
    sums = None if sums is None else sums.double()
    return eager_collapse(branches, weights, groups, sums, count)


def eager_swiglu(gate, value):
    """As diffusers' modules, with the SiLU rounded."""
    return F.silu(gate) * value


def exact_swiglu(gate, value):
    gate = gate.double()
    return gate * gate.sigmoid() * value.double()


def eager_attention(q, k, v, scale=None):
    """q [B, Q, H, d] over k and v [B, S, G, d], as diffusers' dispatcher calls torch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **grouped).transpose(1, 2)


def exact_attention(q, k, v, scale=None):
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bshd->bhqs", q, k) * (
        q.shape[3] ** -0.5 if scale is None else scale
    )
    return torch.einsum("bhqs,bshd->bqhd", scores.softmax(dim=-1), v)
