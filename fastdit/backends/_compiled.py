"""Tensors as the compiled modules take them (csrc/bindings.h), for the backends `cpu` and `cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastdit.backends.base import Backend

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/operand.h
PARTIALS = 1024  # of csrc/blend.h
NORM_CODES = {
    None: 0,
    "rms": 1,
    "rms_rounded": 1,
    "layer": 2,
    "rms_across": 3,
}  # csrc/qkv_prologue.h


def load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module fastdit.<name> and nothing to say, or None and why there is none."""
    try:
        return import_module(f"fastdit.{name}"), ""
    except ModuleNotFoundError:
        return None, f"the compiled module fastdit.{name} is not in {Path(__file__).parents[1]}"
    except ImportError as error:
        return None, f"the compiled module fastdit.{name} could not be loaded ({error})"


class Compiled(Backend):
    """A backend whose ops are functions of a compiled module."""

    def __init__(self, module: ModuleType | None):
        self.module = module

    def _context(self, x: Tensor, stored: int) -> tuple[int, ...]:
        """The arguments after the op's own; `stored` rows are in every store used at `rows`."""
        raise TypeError(f"backend {self.name} does not say where it runs")

    def _scratch(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """An int32 tensor that lives as long as a launch; None where a kernel asks for none."""
        return None

    def gated_residual(self, x, branches, gates, fresh, cache, rows, out, weights=None):
        width = x.shape[2]
        # A call each would take as long as the launch. Stores of another length than K need their strides told.
        if rows is None:
            operand = _address
            read = [b.data_ptr() if b.is_contiguous() else strided(b) for b in branches]
        else:
            operand = strided
            read = list(map(strided, branches))
        by = [
            None
            if g is None
            else g.data_ptr()
            if g.numel() == width
            else (g.data_ptr(), g.stride(0), 0)
            if g.dim() == 2
            else _modulation(g, width)
            for g in gates
        ]
        self.module.gated_residual(
            DTYPE_CODES[x.dtype],
            x.itemsize == 2 and _wide(gates),
            *x.shape,
            _address(x),
            x.stride(2),
            _address(out),
            read,
            by,
            0 if weights is None else weights.data_ptr(),
            weights is not None and weights.ndim > 1,
            fresh,
            None if cache is None else operand(cache),
            None if rows is None else _row_index(rows),
            *self._context(x, 0 if rows is None else _shortest(branches, fresh, cache)),
        )

    def norm_modulate(
        self, x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out,
        row_scale=None,
    ):  # fmt: skip
        width = out.shape[2]
        operand = _address if rows is None else strided
        self.module.norm_modulate(
            DTYPE_CODES[x.dtype],
            *out.shape,
            operand(x),
            _address(out),
            None if scale is None else _modulation(scale, width, x.dtype),
            None if shift is None else _modulation(shift, width, x.dtype),
            None if weight is None else _modulation(weight, width, x.dtype),
            None if bias is None else _modulation(bias, width, x.dtype),
            eps,
            rms,
            None if branch is None else _address(branch),
            None if gate is None else _modulation(gate, width, x.dtype),
            None if cache is None else operand(cache),
            None if rows is None else _row_index(rows),
            None if row_scale is None else _table(row_scale),
            *self._context(x, x.shape[1]),
        )

    def token_select(self, velocity, drops, age, high, starvation, metric, max_age, rows, inverse):
        keys = self._scratch((2, *drops.shape), drops.device)
        self.module.token_select(
            DTYPE_CODES[velocity.dtype],
            _view(velocity),
            _table(drops),
            None if age is None else _table(age),
            rows.shape[1],
            high,
            starvation,
            metric == "l2norm",
            max_age or 0,
            _table(rows),
            _table(inverse),
            0 if keys is None else keys.data_ptr(),
            *self._context(velocity, 0),
        )

    def token_change(self, velocity, last, rate, level, levels, inverse, score):
        self.module.token_change(
            DTYPE_CODES[velocity.dtype],
            _view(velocity),
            _view(last),
            _table(rate),
            _table(level),
            levels.data_ptr(),
            None if inverse is None else _table(inverse),
            _table(score),
            *self._context(velocity, 0),
        )

    def qkv_prologue(
        self, q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset,
        norm, q_weight, q_bias, k_weight, k_bias, eps, cos, sin,
    ):  # fmt: skip
        batch, tokens, _ = q.shape
        _, stored, kv_heads, head = k_cache.shape
        if cos is not None:
            stored = min(stored, cos.shape[-2])
        self.module.qkv_prologue(
            DTYPE_CODES[q.dtype],
            batch,
            tokens,
            q_out.shape[2],
            kv_heads,
            head,
            strided(q),
            strided(k),
            strided(v),
            _from_token(q_out, q_offset),
            _from_token(k_cache, kv_offset),
            _from_token(v_cache, kv_offset),
            None if rows is None else _row_index(rows),
            NORM_CODES[norm],
            None if q_weight is None else q_weight.data_ptr(),
            None if q_bias is None else q_bias.data_ptr(),
            None if k_weight is None else k_weight.data_ptr(),
            None if k_bias is None else k_bias.data_ptr(),
            eps,
            None if cos is None else _angles(cos, kv_offset),
            None if sin is None else _angles(sin, kv_offset),
            *self._context(q, stored - kv_offset),
        )

    def patchify(self, field, table, tokens):
        self._patchify(field, table, tokens, False)

    def unpatchify(self, tokens, table, field):
        self._patchify(field, table, tokens, True)

    def _patchify(self, field, table, tokens, draw):
        self.module.patchify(
            DTYPE_CODES[field.dtype],
            _view(field),
            _view(tokens),
            strided(table),
            draw,
            *self._context(field, 0),
        )

    def resolution_transition(
        self, x, table, rows, noise, scale, deviation, pull, unsplit, pixelwise, raster, out,
        out_table,
    ):  # fmt: skip
        self.module.resolution_transition(
            DTYPE_CODES[x.dtype],
            *x.shape,
            strided(x),
            strided(table),
            rows.shape[1],
            _row_index(rows),
            strided(noise),
            scale,
            deviation,
            pull,
            unsplit,
            pixelwise,
            raster or 0,
            strided(out),
            strided(out_table),
            *self._context(x, 0),
        )

    def blend(self, fresh, cached, r, x, gate, blended, out):
        self.module.blend(
            DTYPE_CODES[fresh.dtype],
            *fresh.shape,
            _address(fresh),
            _address(cached),
            r.data_ptr(),
            _given(x),
            _modulation(gate, fresh.shape[2]),
            _given(blended),
            _address(out),
            *self._context(fresh, 0),
        )

    def blend_backward(self, grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r):
        partial = None if grad_r is None else self._scratch((PARTIALS,), grad.device)
        self.module.blend_backward(
            DTYPE_CODES[grad.dtype],
            *grad.shape,
            _address(grad),
            _given(fresh),
            _given(cached),
            r.data_ptr(),
            _modulation(gate, grad.shape[2]),
            _given(grad_fresh),
            _given(grad_cached),
            0 if grad_r is None else grad_r.data_ptr(),
            0 if partial is None else partial.data_ptr(),
            *self._context(grad, 0),
        )

    def collapse(self, branches, weights, groups, accumulate, sums):
        first = branches[0]
        width = first.shape[2]
        self.module.collapse(
            DTYPE_CODES[first.dtype],
            first.itemsize == 2 and _wide(weights),
            DTYPE_CODES[sums.dtype],
            *first.shape,
            [_address(branch) for branch in branches],
            [_modulation(by, width) for by in weights],
            list(groups),
            accumulate,
            [_address(each) for each in sums],
            *self._context(first, 0),
        )

    def swiglu(self, gate, value, out):
        self.module.swiglu(
            DTYPE_CODES[gate.dtype],
            *gate.shape,
            _address(gate),
            _address(value),
            _address(out),
            *self._context(gate, 0),
        )


def _given(t: Tensor | None) -> int | tuple[int, int, int] | None:
    return None if t is None else _address(t)


def _address(t: Tensor) -> int | tuple[int, int, int]:
    """The bare address of a contiguous [B, K, D]."""
    return t.data_ptr() if t.is_contiguous() else strided(t)


def strided(t: Tensor) -> tuple[int, int, int]:
    stride = t.stride()
    return t.data_ptr(), stride[0], stride[1]


def _view(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return t.data_ptr(), t.shape, t.stride()


def _from_token(t: Tensor, first: int) -> tuple[int, int, int]:
    """[B, tokens, heads, d] from one of its tokens on."""
    batch, token, _, _ = t.stride()
    return t.data_ptr() + first * token * t.itemsize, batch, token


def _angles(t: Tensor, first: int) -> tuple[int, int, int]:
    """[P, d / 2] or [B, P, d / 2] from one of its rows on."""
    batch, row = (0, t.stride(0)) if t.dim() == 2 else t.stride()[:2]
    return t.data_ptr() + first * row * t.itemsize, batch, row


def _modulation(
    t: Tensor | None, width: int, beside: torch.dtype | None = None
) -> int | tuple[int, ...] | None:
    """The bare address of a single row; strides of 0 wherever it has one row for all.

    One of another dtype than what is `beside` it is fp32, which is told.
    """
    if t is None:
        return None
    wide = beside is not None and t.dtype is not beside
    if t.numel() == width:
        return (t.data_ptr(), 0, 0, 1) if wide else t.data_ptr()
    shape, stride = t.shape, t.stride()
    per_token = stride[1] if len(shape) == 3 and shape[1] > 1 else 0
    found = t.data_ptr(), stride[0] if shape[0] > 1 else 0, per_token
    return (*found, 1) if wide else found


def _wide(modulations: Sequence[Tensor | None]) -> bool:
    """Whether those that there are, all of one dtype, are fp32."""
    for t in modulations:
        if t is not None:
            return t.dtype is torch.float32
    return False


def _row_index(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), rows.stride(0), rows.dtype is torch.int64


def _table(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0)


def _shortest(branches, fresh: int, cache: Tensor | None) -> int:
    """Rows that every store read or written at `rows` has."""
    sizes = [branch.shape[1] for i, branch in enumerate(branches) if i != fresh]
    if cache is not None:
        sizes.append(cache.shape[1])
    return min(sizes, default=1 << 62)
