"""The forms of qkv_prologue that models have, their inputs, and the chain of torch calls they replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shapes import ALL, TINY, Shape


@dataclass(frozen=True)
class Form:
    """One model's attention at one share of active tokens."""

    name: str
    shape: Shape
    heads: int
    kv_heads: int
    norm: str
    rotated: bool
    share: float = 1.0

    @property
    def tokens(self) -> int:
        """Active ones."""
        return max(1, int(self.shape.tokens * self.share))

    @property
    def tensors(self) -> float:
        """What is read and written, in units of the hidden state."""
        return 2 * self.tokens / self.shape.tokens * (1 + 2 * self.kv_heads / self.heads)


_NAMED = {shape.name: shape for shape in ALL}
_FLUX, _SD35 = _NAMED["flux-1024"], _NAMED["sd3.5-large-1024"]
_LUMINA = Shape("lumina-next-1024", 2, 4096, 2304)

FORMS = (
    Form("rms, rotated", _FLUX, 24, 24, "rms", True),
    Form("rms, rotated, 1/4 of rows", _FLUX, 24, 24, "rms", True, 0.25),
    Form("rms", _SD35, 38, 38, "rms_rounded", False),
    Form("layer, rotated", _LUMINA, 32, 8, "layer", True),
)
TINY_FORMS = (
    Form("rms, rotated", TINY[0], 4, 2, "rms", True),
    Form("rms, rotated, 1/3 of rows", TINY[0], 4, 4, "rms", True, 0.34),
    Form("rms", TINY[0], 4, 4, "rms_rounded", False),
    Form("layer, rotated", TINY[0], 4, 2, "layer", True),
)


def forms(shapes: tuple[Shape, ...]) -> tuple[Form, ...]:
    """Those of these shapes, with Lumina's beside the real ones."""
    if shapes == TINY:
        return TINY_FORMS
    return tuple(form for form in FORMS if form.shape in (*shapes, _LUMINA))


def inputs(form: Form, device: torch.device, dtype: torch.dtype) -> tuple[list, dict[str, Tensor]]:
    """The six tensors of a call, q, k and v as slices of one projection, and those by name."""
    batch, dim = form.shape.batch, form.shape.width // form.heads
    widths = [heads * dim for heads in (form.heads, form.kv_heads, form.kv_heads)]
    fused = torch.randn(batch, form.tokens, sum(widths), device=device, dtype=dtype)
    cache = (batch, form.shape.tokens, form.kv_heads, dim)
    outputs = [
        torch.empty(size, device=device, dtype=dtype)
        for size in ((batch, form.tokens, form.heads, dim), cache, cache)
    ]
    named = {}
    for name, width in zip(("q_weight", "k_weight"), widths, strict=False):
        size = width if form.norm == "layer" else dim
        named[name] = torch.randn(size, device=device, dtype=dtype)
    if form.rotated:
        angles = 6.3 * torch.rand(form.shape.tokens, dim // 2, device=device)
        named |= {"cos": angles.cos(), "sin": angles.sin()}
    if form.share < 1:
        picks = torch.randperm(form.shape.tokens, device=device)[: form.tokens]
        named["rows"] = picks.sort().values.repeat(batch, 1)
    return [*fused.split(widths, dim=2), *outputs], named


def chain(form: Form) -> Callable[..., None]:
    """What stock models do, one torch call after the other."""
    return partial(_chain, form.norm)


def _chain(
    norm, q, k, v, q_out, k_cache, v_cache, q_weight, k_weight, cos=None, sin=None, rows=None
):
    q = _normed(norm, q, q_weight, q_out.shape[3])
    k = _normed(norm, k, k_weight, q_out.shape[3])
    if cos is not None:
        # Stock models keep a table with each value twice; making it is not timed by much.
        cos, sin = ((t if rows is None else t[rows]).repeat_interleave(2, -1) for t in (cos, sin))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    q_out.copy_(q)
    v = v.unflatten(-1, k.shape[2:])
    if rows is None:
        k_cache.copy_(k)
        v_cache.copy_(v)
    else:
        sample = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        k_cache[sample, rows] = k
        v_cache[sample, rows] = v


def _normed(norm: str, x: Tensor, weight: Tensor, dim: int) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight).unflatten(-1, (-1, dim))
    return F.rms_norm(x.unflatten(-1, (-1, dim)), (dim,), weight, 1e-6)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
