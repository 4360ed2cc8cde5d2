"""What is measured of every op: shapes, forms, the bytes that must move, and who competes.

An op joins by a function here: `gpu_check.py`, `roofline.py` and the tables in docs/kernels.md follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.ops import BACKENDS
from prologue import Form, chain, forms, inputs
from shapes import Shape
from tiling import NUMBERS, WIDTH, Tiling, finish, tiling
from timing import Contender

DTYPE = torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One form of an op at one shape.

    Attributes:
        op: Stem of the op.
        name: What is measured, for people.
        shape: Hidden state of a model.
        tensors: How many [B, N, D] tensors must be read or written.
        make: (device, dtype) -> contenders on one fresh set of buffers each call.
        width: What is in place of D, where the op works on something else than the hidden state.
    """

    op: str
    name: str
    shape: Shape
    tensors: float
    make: Callable[[torch.device, torch.dtype], dict[str, Callable[[], object]]]
    width: int | None = None

    def bytes_moved(self, dtype: torch.dtype = DTYPE) -> int:
        """Modulations and tables are left out: they are small and stay in the cache."""
        width = self.width or self.shape.width
        return int(self.tensors * self.shape.batch * self.shape.tokens * width * dtype.itemsize)

    def contenders(
        self, device: torch.device, sets: int, dtype: torch.dtype = DTYPE
    ) -> dict[str, Contender]:
        """Contenders that take the number of a set."""
        made = [self.make(device, dtype) for _ in range(sets)]
        return {name: (lambda i, name=name: made[i][name]()) for name in made[0]}


def cases(shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """Every case, op by op."""
    for shape in shapes:
        for count in (1, 2, 8):
            yield gated_residual(shape, count)
    for shape in shapes:
        for branch in (False, True):
            yield norm_modulate(shape, branch)
        yield norm_modulate(shape, True, fp8=True)
    for shape in shapes:
        yield token_select(shape)
    for shape in shapes:
        yield token_change(shape)
    for form in forms(shapes):
        yield qkv_prologue(form)
    for shape in shapes:
        yield patchify(shape)
        yield unpatchify(shape)
    for shape in shapes:
        yield resolution_transition(shape)
    for shape in shapes:
        yield blend(shape)
        yield blend_backward(shape)
    for shape in shapes:
        yield collapse(shape, 12)
    for shape in shapes:
        yield swiglu(shape)


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends of this device that are not the reference."""
    able = (b for b in BACKENDS.values() if b.supports(op, device, dtype) is None)
    return [b.name for b in able if b.name != "reference"]


def gated_residual(shape: Shape, count: int) -> Case:
    """x += sum of `count` gated branches, in place."""

    def eager(x: Tensor, branches: list[Tensor], gates: list[Tensor]) -> Tensor:
        for branch, gate in zip(branches, gates, strict=True):
            x = x + gate * branch
        return x

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, shape.tokens, shape.width)
        x, *branches = (torch.randn(size, device=device, dtype=dtype) for _ in range(count + 1))
        table = 1e-3 * torch.randn(shape.batch, count, shape.width, device=device, dtype=dtype)
        gates = list(table.chunk(count, dim=1))
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(x, branches, gates),
            "compile": lambda: compiled(x, branches, gates),
        }
        for name in backends("gated_residual", device, dtype):
            run = BACKENDS[name].gated_residual
            found[name] = lambda run=run: run(x, branches, gates, -1, None, None, x)
        return found

    plural = "branch" if count == 1 else "branches"
    return Case("gated_residual", f"{count} {plural}", shape, count + 2, make)


def norm_modulate(shape: Shape, with_branch: bool, fp8: bool = False) -> Case:
    """Layer norm, scale and shift; with a branch, after a gated residual; in fp8, quantised by row."""

    def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def after_branch(x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor):
        x.add_(gate * branch)
        return plain(x, scale, shift)

    def expression(*given: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = after_branch(*given) if with_branch else plain(*given)
        if not fp8:
            return y
        most = torch.finfo(FP8).max
        row_scale = y.abs().amax(-1, keepdim=True).float() / most
        return (y.float() / row_scale).clamp(-most, most).to(FP8), row_scale

    compiled = torch.compile(expression, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, shape.tokens, shape.width)
        x, branch = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(x, dtype=FP8 if fp8 else dtype)
        row_scale = torch.empty(size[:2], device=device) if fp8 else None
        table = 1e-3 * torch.randn(shape.batch, 3, shape.width, device=device, dtype=dtype)
        scale, shift, gate = table.chunk(3, dim=1)
        given = (branch, gate) if with_branch else ()
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: expression(x, scale, shift, *given),
            "compile": lambda: compiled(x, scale, shift, *given),
        }
        residual = (*(given or (None, None)), None, None)
        for name in backends("norm_modulate", device, dtype):
            run = BACKENDS[name].norm_modulate
            affine = (x, scale, shift, None, None, 1e-6, False)
            found[name] = lambda run=run, affine=affine: run(*affine, *residual, out, row_scale)
        return found

    name = "after a gated branch" if with_branch else "plain"
    tensors = 4.0 if with_branch else 2.0
    if fp8:  # a byte an element in place of two, and four a row
        name, tensors = f"{name}, in fp8", tensors - 0.5 + 2 / shape.width
    return Case("norm_modulate", name, shape, tensors, make)


def token_select(shape: Shape) -> Case:
    """Half of the tokens, the others dropped from both sides; packed latents of 16 channels."""
    keep = max(1, shape.tokens // 2)
    high = (shape.tokens - keep) // 3

    def eager(field: Tensor, drops: Tensor) -> tuple[Tensor, Tensor]:
        metric = field.float().std(-1).mean((3, 4)).flatten(1)
        factor = (0.1 * drops).exp()
        dropped = torch.zeros_like(metric, dtype=torch.bool)
        dropped.scatter_(1, (metric / factor).topk(high).indices, True)
        score = (metric * factor).masked_fill_(dropped, float("inf"))
        low = shape.tokens - keep - high
        dropped.scatter_(1, score.topk(low, largest=False).indices, True)
        index = torch.arange(shape.tokens, device=field.device).masked_fill(dropped, shape.tokens)
        inverse = ((~dropped).cumsum(1) - 1).masked_fill_(dropped, -1)
        drops += dropped
        return index.sort(1).values[:, :keep].int(), inverse.int()

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, 1, shape.tokens, 16, 2, 2)
        field = torch.randn(size, device=device, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
        tables = torch.zeros(2, shape.batch, shape.tokens, device=device, dtype=torch.int32)
        drops, inverse = tables
        rows = drops.new_empty(shape.batch, keep)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(field, drops),
            "compile": lambda: compiled(field, drops),
        }
        for name in backends("token_select", device, dtype):
            run = BACKENDS[name].token_select
            options = (None, high, 0.1, "std", None, rows, inverse)
            found[name] = lambda run=run, options=options: run(field, drops, *options)
        return found

    return Case("token_select", "half of the tokens", shape, 1, make, width=64)


def token_change(shape: Shape) -> Case:
    """After a step that computed half of the tokens; packed latents of 16 channels."""

    def eager(field: Tensor, last: Tensor, numbers: Tensor, computed: Tensor) -> Tensor:
        rate, level = numbers
        moved = (field.float() - last.float()).flatten(3).norm(dim=-1).flatten(1)
        rate.copy_(torch.where(computed, moved / (0.5 - level).abs(), rate))
        level.copy_(torch.where(computed, 0.5, level))
        last.copy_(torch.where(computed.view(*field.shape[:3], 1, 1, 1), field, last))
        return rate * (0.4 - level).abs()

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, 1, shape.tokens, 16, 2, 2)
        field = torch.randn(size, device=device, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
        last, numbers = field.clone(), torch.ones(2, shape.batch, shape.tokens, device=device)
        score, levels = numbers[0].clone(), torch.tensor([0.5, 0.4], device=device)
        inverse = torch.arange(shape.tokens, device=device, dtype=torch.int32) % 2 - 1
        inverse = inverse.expand(shape.batch, -1).contiguous()
        computed = inverse >= 0
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(field, last, numbers, computed),
            "compile": lambda: compiled(field, last, numbers, computed),
        }
        for name in backends("token_change", device, dtype):
            run = BACKENDS[name].token_change
            found[name] = lambda run=run: run(field, last, *numbers, levels, inverse, score)
        return found

    # Of half of the tokens the velocity is read, and what was kept is read and written.
    return Case("token_change", "half of the tokens", shape, 1.5, make, width=64)


def qkv_prologue(form: Form) -> Case:
    """Norm and rotation of q and k, and the scatter of k and v."""
    expression = chain(form)
    compiled = torch.compile(expression, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        tensors, named = inputs(form, device, dtype)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: expression(*tensors, **named),
            "compile": lambda: compiled(*tensors, **named),
        }
        rows, cos, sin = (named.get(name) for name in ("rows", "cos", "sin"))
        weights = (named["q_weight"], None, named["k_weight"], None)
        arguments = (*tensors, rows, 0, 0, form.norm, *weights, 1e-6, cos, sin)
        for name in backends("qkv_prologue", device, dtype):
            run = BACKENDS[name].qkv_prologue
            found[name] = lambda run=run: run(*arguments)
        return found

    return Case("qkv_prologue", form.name, form.shape, form.tensors, make)


def patchify(shape: Shape) -> Case:
    """Tokens of two sizes out of packed latents."""
    tiles = tiling(shape)
    cells = (tiles.table[..., 1].long() * tiles.side + tiles.table[..., 2]).unsqueeze(-1)

    def eager(packed: Tensor, cells: Tensor) -> Tensor:
        return packed.gather(1, cells.expand(-1, -1, WIDTH))

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        packed = torch.randn(shape.batch, tiles.side**2, WIDTH, device=device, dtype=dtype)
        table, index = tiles.table.to(device), cells.to(device)
        tokens = packed.new_empty(shape.batch, table.shape[1], 1, 1, WIDTH)
        field = packed.view(shape.batch, tiles.side, tiles.side, 1, 1, WIDTH)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(packed, index),
            "compile": lambda: compiled(packed, index),
        }
        for name in backends("patchify", device, dtype):
            run = BACKENDS[name].patchify
            found[name] = lambda run=run: run(field, table, tokens)
        return found

    share = tiles.table.shape[1] / shape.tokens
    return Case("patchify", "mixed tokens", shape, 2 * share, make, width=WIDTH)


def unpatchify(shape: Shape) -> Case:
    """Tokens of two sizes into packed latents; torch is told which token is over each cell."""
    tiles = tiling(shape)

    def eager(tokens: Tensor, owner: Tensor) -> Tensor:
        return tokens.gather(1, owner.unsqueeze(-1).expand(-1, -1, WIDTH))

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        table, owner = tiles.table.to(device), tiles.owner.to(device)
        tokens = torch.randn(*table.shape[:2], WIDTH, device=device, dtype=dtype)
        field = tokens.new_empty(shape.batch, tiles.side, tiles.side, 1, 1, WIDTH)
        patches = tokens.view(*table.shape[:2], 1, 1, WIDTH)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(tokens, owner),
            "compile": lambda: compiled(tokens, owner),
        }
        for name in backends("unpatchify", device, dtype):
            run = BACKENDS[name].unpatchify
            found[name] = lambda run=run: run(patches, table, field)
        return found

    share = tiles.table.shape[1] / shape.tokens
    return Case("unpatchify", "mixed tokens", shape, 1 + share, make, width=WIDTH)


def resolution_transition(shape: Shape) -> Case:
    """From tokens of two sizes to all cells. The noise is fp32: two tensors' worth of bf16."""
    tiles = tiling(shape)
    pull = math.sqrt(1 - 4 * NUMBERS["correlation"]) - 1

    def eager(x: Tensor, noise: Tensor, tiles: Tiling) -> tuple[Tensor, Tensor]:
        return finish(x, noise, tiles)

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        there = tiling(shape, device)
        x = torch.randn(*there.table.shape[:2], WIDTH, device=device, dtype=dtype)
        noise = torch.randn(shape.batch, there.side**2, WIDTH, device=device)
        out = noise.to(dtype)
        out_table = there.table.new_empty((*out.shape[:2], 3))
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(x, noise, there),
            "compile": lambda: compiled(x, noise, there),
        }
        numbers = (NUMBERS["scale"], NUMBERS["deviation"], pull, 1.0, False, there.side)
        given = (x, there.table, there.rows, noise, *numbers, out, out_table)
        for name in backends("resolution_transition", device, dtype):
            run = BACKENDS[name].resolution_transition
            found[name] = lambda run=run: run(*given)
        return found

    share = tiles.table.shape[1] / shape.tokens
    return Case("resolution_transition", "to all cells", shape, share + 3, make, width=WIDTH)


def blend(shape: Shape) -> Case:
    """h + gate (r fresh + (1 - r) cached), in place."""

    def eager(fresh: Tensor, cached: Tensor, r: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return x.add_(gate * (r * fresh + (1 - r) * cached))

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, shape.tokens, shape.width)
        fresh, cached, x = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
        gate = 1e-3 * torch.randn(shape.batch, 1, shape.width, device=device, dtype=dtype)
        r = torch.full((), 0.4, device=device)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(fresh, cached, r, x, gate),
            "compile": lambda: compiled(fresh, cached, r, x, gate),
        }
        for name in backends("blend", device, dtype):
            run = BACKENDS[name].blend
            found[name] = lambda run=run: run(fresh, cached, r, x, gate, None, x)
        return found

    return Case("blend", "on x", shape, 4, make)


def blend_backward(shape: Shape) -> Case:
    """The gradients of r and fresh; the gate is a constant."""

    def eager(grad: Tensor, fresh: Tensor, cached: Tensor, r: Tensor, gate: Tensor):
        g = gate * grad
        return r * g, (g * (fresh - cached)).sum(dtype=torch.float32)

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, shape.tokens, shape.width)
        grad, fresh, cached = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
        gate = torch.randn(shape.batch, 1, shape.width, device=device, dtype=dtype)
        r = torch.full((), 0.4, device=device)
        of_fresh, of_r = torch.empty_like(fresh), torch.empty_like(r)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(grad, fresh, cached, r, gate),
            "compile": lambda: compiled(grad, fresh, cached, r, gate),
        }
        for name in backends("blend_backward", device, dtype):
            run = BACKENDS[name].blend_backward
            found[name] = lambda run=run: run(grad, fresh, cached, r, gate, of_fresh, None, of_r)
        return found

    return Case("blend_backward", "of r and fresh", shape, 4, make)


def collapse(shape: Shape, count: int) -> Case:
    """Three sums of `count` branches, kinds of three by turns, as adaLN-single gates them."""
    groups = [(1, 0, 2)[i % 3] for i in range(count)]

    def eager(branches: list[Tensor], weights: list[Tensor | None]) -> list[Tensor]:
        sums = [0.0, 0.0, 0.0]
        for branch, weight, group in zip(branches, weights, groups, strict=True):
            branch = branch.float()
            sums[0] = sums[0] + (branch if weight is None else weight * branch)
            if group:
                sums[group] = sums[group] + branch
        return [each.to(branches[0].dtype) for each in sums]

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        size = (shape.batch, shape.tokens, shape.width)
        branches = [torch.randn(size, device=device, dtype=dtype) for _ in range(count)]
        table = torch.randn(count, shape.width, device=device, dtype=dtype)
        weights = [None if i % 3 == 1 else table[i] for i in range(count)]
        sums = torch.empty((3, *size), device=device, dtype=dtype)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(branches, weights),
            "compile": lambda: compiled(branches, weights),
        }
        for name in backends("collapse", device, dtype):
            run = BACKENDS[name].collapse
            found[name] = lambda run=run: run(branches, weights, groups, False, sums)
        return found

    return Case("collapse", f"{count} branches", shape, count + 3, make)


def swiglu(shape: Shape) -> Case:
    """Gate and value as halves of one product's output, four times as wide as the hidden state each."""
    width = 4 * shape.width

    def eager(gate: Tensor, value: Tensor) -> Tensor:
        return F.silu(gate) * value

    compiled = torch.compile(eager, dynamic=False)

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        both = torch.randn(shape.batch, shape.tokens, 2 * width, device=device, dtype=dtype)
        gate, value = both.chunk(2, dim=-1)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        found: dict[str, Callable[[], object]] = {
            "eager": lambda: eager(gate, value),
            "compile": lambda: compiled(gate, value),
        }
        for name in backends("swiglu", device, dtype):
            run = BACKENDS[name].swiglu
            found[name] = lambda run=run: run(gate, value, out)
        return found

    return Case("swiglu", "halves of one product", shape, 3, make, width)
