"""out = r fresh + (1 - r) cached, alone or gated and added to x: a learned choice between two tensors.

Shapes: fresh, cached, x and out [B, K, D]; r a scalar on their device. With x the result is
x + gate * (r fresh + (1 - r) cached), and `blended` takes the blend itself. Where r is 1 the blend
is fresh and where it is 0 it is cached, bit for bit and whatever the other holds, so a slot that was
never filled is not read by a component that is sure to run. Which it is nobody looks at from the
host: nothing waits for a device.

Gradients, in one more pass (`blend_backward`), with g = gate * dL/dout, or dL/dout without a gate:

    dL/dr = sum g (fresh - cached)        fp32, in two stages of fixed order
    dL/dfresh = r g        dL/dcached = (1 - r) g        dL/dx = dL/dout

and that of a gate through `reference`. Only what requires a gradient is computed. There is no
second derivative.

Bytes moved: forward 3 B K D elements, 4 with x, one more with `blended` (eager: 7 and 12); backward
4 for dL/dr and dL/dfresh, one more for dL/dcached.

Source: the training of learned caching (Learning-to-Cache, arXiv 2406.01733; HarmoniCa,
arXiv 2410.01723), where r is one router's output for one component and the cached operand carries
no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdit.backends.reference import gate_gradient
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, new_like, op, requires_grad, resolve, traced

SCHEMA = (
    "blend(Tensor fresh, Tensor cached, Tensor r, Tensor? x, Tensor? gate, Tensor(a!)? blended, "
    "Tensor(b!) out, str? backend) -> ()"
)
BACKWARD_SCHEMA = (
    "blend_backward(Tensor grad, Tensor? fresh, Tensor? cached, Tensor r, Tensor? gate, "
    "Tensor(a!)? grad_fresh, Tensor(b!)? grad_cached, Tensor(c!)? grad_r, str? backend) -> ()"
)


@op
def blend(
    fresh: Tensor,
    cached: Tensor,
    r: Tensor,
    *,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    blended: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Blend a fresh tensor with a cached one, and add the result to a residual stream if given.

    Args:
        fresh, cached: [B, K, D] of one dtype, last stride 1.
        r: float32 scalar (of no dimensions), the weight of fresh; float64 is accepted with float64.
        x: [B, K, D], the residual stream.
        gate: None, or [D], [B or 1, D], [B or 1, K or 1, D]; needs x.
        blended: [B, K, D], where to write the blend before its gate, as a constant; needs x.
        out: where to write, x itself for in place; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`. A gradient flows where grad is enabled and an input requires it; `out` is refused
        then. A second derivative is torch's error of a function that is once differentiable.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> r = torch.sigmoid(logits[step])  # float32 [components], one router
        >>> h = blend(attn(u), slots["attn"], r[0], x=h, gate=gate_msa)
    """
    if torch.is_grad_enabled() and requires_grad(fresh, cached, r, x, gate):
        if out is not None:
            raise ArgumentError(f"out: {checks.IN_PLACE}")
        return _Blend.apply(fresh, cached, r, x, gate, blended, backend)
    return _forward(fresh, cached, r, x, gate, blended, out, backend)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fresh, cached, r, x, gate, blended, backend):
        needs = ctx.needs_input_grad
        # The tensors themselves are needed for dL/dr and dL/dgate alone.
        kept = (fresh, cached) if needs[2] or needs[4] else (None, None)
        ctx.save_for_backward(*kept, r, gate)
        ctx.backend = backend
        out = _forward(fresh, cached, r, x, gate, blended, None, backend)
        if blended is not None:
            torch.autograd.graph.increment_version(blended)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        fresh, cached, r, gate = ctx.saved_tensors
        for_fresh, for_cached, for_r, for_x, for_gate, *_ = ctx.needs_input_grad
        if grad.stride(-1) != 1:  # of a sum it is expanded
            grad = grad.contiguous()
        grad_fresh = new_like(grad) if for_fresh else None
        grad_cached = new_like(grad) if for_cached else None
        grad_r = torch.empty_like(r) if for_r else None
        grad_gate = gate_gradient(grad, fresh, cached, r, gate) if for_gate else None
        if for_fresh or for_cached or for_r:
            run = torch.ops.fastdit.blend_backward.default if traced() else _run_backward
            run(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r, ctx.backend)
        return grad_fresh, grad_cached, grad_r, grad if for_x else None, grad_gate, None, None


def _forward(fresh, cached, r, x, gate, blended, out, backend) -> Tensor:
    if traced():
        out = new_like(fresh) if out is None else out
        torch.ops.fastdit.blend.default(fresh, cached, r, x, gate, blended, out, backend)
        return out
    _check(fresh, cached, r, x, gate, blended, out)
    out = new_like(fresh) if out is None else out
    function = resolve("blend", fresh.device, fresh.dtype, backend)
    function(fresh, cached, r, x, gate, blended, out)
    return out


def _check(fresh, cached, r, x, gate, blended, out) -> None:
    """`out` is None where it is yet to be allocated: new memory overlaps nothing."""
    shape = checks.state("fresh", fresh)
    dtype, device = fresh.dtype, fresh.device
    checks.operand("cached", cached, shape, dtype, device)
    checks.scalar("r", r, dtype, device)
    if x is None:
        for name, t in (("gate", gate), ("blended", blended)):
            if t is not None:
                raise ArgumentError(f"{name}: got a tensor without x; accepted is None")
    else:
        checks.operand("x", x, shape, dtype, device)
    if gate is not None:
        checks.modulation("gate", gate, shape, dtype, device)
    read = (("fresh", fresh), ("cached", cached), ("r", r), ("gate", gate))
    if blended is not None:
        checks.operand("blended", blended, shape, dtype, device)
        checks.alone("blended", blended, (*read, ("x", x)))
    if out is not None:
        checks.operand("out", out, shape, dtype, device)
        checks.alone("out", out, (*read, ("blended", blended)))
        if x is not None:
            checks.disjoint_or_same("out", out, "x", x)


def _check_backward(grad, fresh, cached, r, gate, grad_fresh, grad_cached, grad_r) -> None:
    shape = checks.state("grad", grad)
    dtype, device = grad.dtype, grad.device
    checks.scalar("r", r, dtype, device)
    read = [("grad", grad), ("r", r), ("gate", gate), ("fresh", fresh), ("cached", cached)]
    if gate is not None:
        checks.modulation("gate", gate, shape, dtype, device)
    if grad_r is not None:
        checks.operand("fresh", fresh, shape, dtype, device)
        checks.operand("cached", cached, shape, dtype, device)
        checks.scalar("grad_r", grad_r, dtype, device)
        checks.alone("grad_r", grad_r, read)
        read.append(("grad_r", grad_r))
    for name, t in (("grad_fresh", grad_fresh), ("grad_cached", grad_cached)):
        if t is not None:
            checks.operand(name, t, shape, dtype, device)
            checks.alone(name, t, read)
            read.append((name, t))


_run_backward = checked("blend_backward", _check_backward)
define(SCHEMA, checked("blend", _check))
define(BACKWARD_SCHEMA, _run_backward)
