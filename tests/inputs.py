"""Inputs that are hard on a kernel: ugly sizes, views, offsets, poisoned outputs, guard bands."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit import ops
from fastdit.backends.base import Backend
from fastdit.ops import BACKENDS
from fastdit.ops.patchify import in_patches
from tolerance import Mismatch, bits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# B, K, D. Vectors are 4, 8 or 16 long and taken by fours, so widths end everywhere between.
SHAPES = (
    (1, 1, 1),
    (3, 2, 7),
    (2, 17, 64),
    (1, 113, 72),
    (2, 2, 511),
    (1, 17, 528),
    (2, 3, 1152),
    (2, 2, 2047),
    (1, 1, 2305),
)

#: the backends that serve this machine's CPU
SERVING = [
    name
    for name, backend in BACKENDS.items()
    if backend.supports("gated_residual", torch.device("cpu"), torch.float32) is None
]

GUARD = 37  # elements either side; odd, so that what lies between is not aligned


def checks_of(op_file: str) -> dict[str, Callable[[Runner], None]]:
    """The checks of the ops of one of `ops.FILES`, by name."""
    return importlib.import_module(f"test_{op_file}").CHECKS


@dataclass(frozen=True)
class Runner:
    """Calls one backend: through the public op if it is a registered one, else directly; `op` is what is tested."""

    backend: Backend
    label: str
    op: str = "gated_residual"

    def dtypes(self) -> list[torch.dtype]:
        cpu = torch.device("cpu")
        return [d for d in DTYPES if self.backend.supports(self.op, cpu, d) is None]

    def repeats(self, count: int) -> int:
        """How often a repeat is worth making; a GPU's threads run one after the other in the emulator."""
        return min(count, 2) if self.label.endswith("emulated") else count

    def gated_residual(
        self, x, branches, gates, *, weights=None, fresh=-1, cache=None, rows=None, out=None
    ) -> Tensor:
        out = poisoned(x.shape, x.dtype) if out is None else out
        if BACKENDS.get(self.backend.name) is self.backend:
            name = self.backend.name
            places = {"fresh": fresh, "cache": cache, "rows": rows, "out": out}
            return ops.gated_residual(x, branches, gates, weights=weights, **places, backend=name)
        self.backend.gated_residual(x, branches, gates, fresh, cache, rows, out, weights)
        return out

    def norm_modulate(
        self,
        x,
        scale=None,
        shift=None,
        *,
        weight=None,
        bias=None,
        eps=1e-6,
        rms=False,
        branch=None,
        gate=None,
        cache=None,
        rows=None,
        out=None,
        row_scale=None,
    ) -> Tensor:
        if out is None:
            dtype = x.dtype if row_scale is None else torch.float8_e4m3fn
            out = poisoned(x.shape if rows is None else (*rows.shape, x.shape[-1]), dtype)
        if BACKENDS.get(self.backend.name) is self.backend:
            affine = {"weight": weight, "bias": bias, "eps": eps, "rms": rms}
            residual = {"branch": branch, "gate": gate, "cache": cache}
            outputs = {"out": out, "row_scale": row_scale, "backend": self.backend.name}
            return ops.norm_modulate(x, scale, shift, **affine, **residual, rows=rows, **outputs)
        given = (x, scale, shift, weight, bias, eps, rms, branch, gate, cache, rows, out)
        self.backend.norm_modulate(*given, *([] if row_scale is None else [row_scale]))
        return out

    def token_select(
        self,
        velocity,
        drops,
        keep,
        *,
        age=None,
        high=0,
        starvation=0.1,
        metric="std",
        max_age=None,
        rows=None,
        inverse=None,
    ) -> tuple[Tensor, Tensor]:
        rows = unwritten((drops.shape[0], keep)) if rows is None else rows
        inverse = unwritten(drops.shape) if inverse is None else inverse
        if BACKENDS.get(self.backend.name) is self.backend:
            options = {"age": age, "high": high, "starvation": starvation, "metric": metric}
            options |= {"max_age": max_age, "rows": rows, "inverse": inverse}
            return ops.token_select(velocity, drops, keep, **options, backend=self.backend.name)
        self.backend.token_select(
            velocity, drops, age, high, starvation, metric, max_age, rows, inverse
        )
        return rows, inverse

    def token_change(
        self, velocity, last, rate, level, levels, *, inverse=None, score=None
    ) -> Tensor:
        score = poisoned(rate.shape, torch.float32) if score is None else score
        if BACKENDS.get(self.backend.name) is self.backend:
            options = {"inverse": inverse, "score": score, "backend": self.backend.name}
            return ops.token_change(velocity, last, rate, level, levels, **options)
        self.backend.token_change(velocity, last, rate, level, levels, inverse, score)
        return score

    def qkv_prologue(
        self,
        q,
        k,
        v,
        q_out,
        k_cache,
        v_cache,
        *,
        rows=None,
        q_offset=0,
        kv_offset=0,
        norm=None,
        q_weight=None,
        q_bias=None,
        k_weight=None,
        k_bias=None,
        eps=1e-6,
        cos=None,
        sin=None,
    ) -> None:
        affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
        table = {"cos": cos, "sin": sin}
        if BACKENDS.get(self.backend.name) is self.backend:
            offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
            options = {"rows": rows, **offsets, "norm": norm, **affine, "eps": eps, **table}
            stream = (q, k, v, q_out, k_cache, v_cache)
            ops.qkv_prologue(*stream, **options, backend=self.backend.name)
            return
        stream = (q, k, v, q_out, k_cache, v_cache, rows, q_offset, kv_offset)
        self.backend.qkv_prologue(*stream, norm, *affine.values(), eps, cos, sin)

    def patchify(self, field, table, *, channels_last=False, out=None) -> Tensor:
        size = (*table.shape[:2], field.shape[3:].numel())
        out = poisoned(size, field.dtype) if out is None else out
        if BACKENDS.get(self.backend.name) is self.backend:
            options = {"channels_last": channels_last, "out": out}
            return ops.patchify(field, table, **options, backend=self.backend.name)
        self.backend.patchify(field, table, in_patches(out, field, channels_last))
        return out

    def unpatchify(self, tokens, table, out, *, channels_last=False) -> Tensor:
        if BACKENDS.get(self.backend.name) is self.backend:
            options = {"channels_last": channels_last, "backend": self.backend.name}
            return ops.unpatchify(tokens, table, out, **options)
        self.backend.unpatchify(in_patches(tokens, out, channels_last), table, out)
        return out

    def resolution_transition(
        self,
        x,
        table,
        rows,
        noise,
        *,
        scale,
        deviation,
        correlation,
        unsplit=None,
        pixelwise=False,
        raster=None,
        out=None,
        out_table=None,
    ) -> tuple[Tensor, Tensor]:
        size = noise.shape[:2]
        out = poisoned(noise.shape, x.dtype) if out is None else out
        out_table = unwritten((*size, 3)) if out_table is None else out_table
        numbers = {"scale": scale, "deviation": deviation}
        if BACKENDS.get(self.backend.name) is self.backend:
            options = numbers | {"correlation": correlation, "unsplit": unsplit}
            options |= {"pixelwise": pixelwise, "raster": raster}
            options |= {"out": out, "out_table": out_table, "backend": self.backend.name}
            return ops.resolution_transition(x, table, rows, noise, **options)
        unsplit = math.sqrt(1 - correlation) if unsplit is None else unsplit
        pull = math.sqrt(1 - 4 * correlation) - 1
        self.backend.resolution_transition(
            x,
            table,
            rows,
            noise,
            *numbers.values(),
            pull,
            unsplit,
            pixelwise,
            raster,
            out,
            out_table,
        )
        return out, out_table

    def blend(self, fresh, cached, r, *, x=None, gate=None, blended=None, out=None) -> Tensor:
        out = poisoned(fresh.shape, fresh.dtype) if out is None else out
        if BACKENDS.get(self.backend.name) is self.backend:
            residual = {"x": x, "gate": gate, "blended": blended}
            return ops.blend(fresh, cached, r, **residual, out=out, backend=self.backend.name)
        self.backend.blend(fresh, cached, r, x, gate, blended, out)
        return out

    def blend_backward(
        self, grad, fresh, cached, r, *, gate=None, wanted="fcr", outs=(None, None, None)
    ) -> list[Tensor | None]:
        """Gradients of fresh, cached and r, those that are wanted."""
        shapes = (grad.shape, grad.shape, ())
        dtypes = (grad.dtype, grad.dtype, r.dtype)
        made = [
            (poisoned(shape, dtype) if out is None else out) if letter in wanted else None
            for letter, shape, dtype, out in zip("fcr", shapes, dtypes, outs, strict=True)
        ]
        self.backend.blend_backward(grad, fresh, cached, r, gate, *made)
        return made

    def collapse(self, branches, weights, groups, *, dtype=None, out=None) -> Tensor:
        first = branches[0]
        if out is None:
            out = poisoned((1 + max(groups), *first.shape), dtype or first.dtype)
        if BACKENDS.get(self.backend.name) is self.backend:
            return ops.collapse(branches, weights, groups, out=out, backend=self.backend.name)
        self.backend.collapse(branches, weights, groups, False, out)
        return out

    def swiglu(self, gate, value, *, out=None) -> Tensor:
        out = poisoned(gate.shape, gate.dtype) if out is None else out
        if BACKENDS.get(self.backend.name) is self.backend:
            return ops.swiglu(gate, value, out=out, backend=self.backend.name)
        self.backend.swiglu(gate, value, out)
        return out

    def sparse_attention(self, q, k, v, *, scale=None, out=None) -> Tensor:
        """The op makes its own output; with `out`, the backend writes there."""
        if out is None and BACKENDS.get(self.backend.name) is self.backend:
            return ops.sparse_attention(q, k, v, scale=scale, backend=self.backend.name)
        out = poisoned(q.shape, q.dtype) if out is None else out
        self.backend.sparse_attention(
            q, k, v, 1 / math.sqrt(q.shape[3]) if scale is None else scale, out
        )
        return out


def generator(*key: int) -> torch.Generator:
    """Reproducible from the case's own numbers, whatever ran before."""
    seed = 0
    for number in key:
        seed = (seed * 1009 + number + 1) % (1 << 31)
    return torch.Generator().manual_seed(seed)


def normal(shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)


def near(value, shape, g: torch.Generator) -> Tensor:
    """In fp32, so near to a value that rounded to 16 bits they are far from themselves, once that is taken off."""
    return value + 2.0**-11 * normal(shape, torch.float32, g)


def sixteen_bits(dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """Those beside which a vector may be fp32."""
    return [dtype for dtype in dtypes if dtype.itemsize == 2]


def poisoned(shape, dtype: torch.dtype) -> Tensor:
    """NaN in every element, so that one left unwritten shows."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def unwritten(shape) -> Tensor:
    """An int32 table of what no op writes."""
    return torch.full(tuple(shape), -0x7F7F7F7F, dtype=torch.int32)


def some_rows(batch: int, active: int, tokens: int, g: torch.Generator, dtype=torch.int64):
    """[B, K] sorted and unique in each sample, of `tokens` rows."""
    picks = [torch.randperm(tokens, generator=g)[:active].sort().values for _ in range(batch)]
    return torch.stack(picks).to(dtype)


class Guarded:
    """A tensor inside a larger buffer; `assert_intact` says whether the rest was written to."""

    def __init__(self, values: Tensor):
        self.fill = 7.25 if values.is_floating_point() else 7
        self.buffer = torch.full((values.numel() + 2 * GUARD,), self.fill, dtype=values.dtype)
        self.tensor = self.buffer[GUARD : GUARD + values.numel()].view(values.shape)
        self.tensor.copy_(values)

    def assert_intact(self, what: str) -> None:
        for band in (self.buffer[:GUARD], self.buffer[-GUARD:]):
            if not bool((band == self.fill).all()):
                raise Mismatch(f"{what}: wrote outside its tensor")


class Untouched:
    """Remembers the bits of tensors; `check` says which one changed."""

    def __init__(self, **tensors: Tensor | None):
        self.tensors = {name: t for name, t in tensors.items() if t is not None}
        self.before = {name: bits(t).clone() for name, t in self.tensors.items()}

    def check(self, what: str) -> None:
        for name, t in self.tensors.items():
            if not torch.equal(bits(t), self.before[name]):
                raise Mismatch(f"{what}: changed its input {name}")


def misaligned(t: Tensor, offset: int = 1) -> Tensor:
    """The same values at an address that is no multiple of a vector's size."""
    buffer = torch.empty(t.numel() + offset, dtype=t.dtype)
    return buffer[offset:].view(t.shape).copy_(t)


def padded_rows(t: Tensor, padding: int = 3) -> Tensor:
    """The same values as a view whose token and batch strides are larger than its sizes."""
    batch, tokens, width = t.shape
    buffer = poisoned((batch, tokens + 2, width + padding), t.dtype)
    return buffer[:, 1 : tokens + 1, :width].copy_(t)


def gate_kinds(batch: int, tokens: int, width: int, dtype, g) -> dict[str, Tensor | None]:
    """Every accepted form of a gate, scale or shift."""
    return {
        "none": None,
        "[D]": normal((width,), dtype, g),
        "[B, D]": normal((batch, width), dtype, g),
        "[1, D]": normal((1, width), dtype, g),
        "[1, 1, D]": normal((1, 1, width), dtype, g),
        "[B, 1, D]": normal((batch, 1, width), dtype, g),
        "[B, K, D]": normal((batch, tokens, width), dtype, g),
        "chunk": normal((batch, 6, width), dtype, g).chunk(6, dim=1)[2],
        "expanded": normal((1, 1, width), dtype, g).expand(batch, tokens, width),
        "padded": padded_rows(normal((batch, tokens, width), dtype, g)),
    }
