"""out = silu(gate) * value, with silu(g) = g / (1 + exp(-g)): the gated activation of SwiGLU feed-forwards.

Shapes: gate, value and out [B, N, D]. Rows may lie anywhere: gate and value may be halves of what one product
wrote, and out a part of what another one reads, so that nothing is cut out or concatenated. Every backend but
`reference` computes in fp32 and rounds once; that one rounds silu before the product, as diffusers' modules do,
which in 16 bits all take silu in fp32, `FP32SiLU` by name.

Bytes moved: 3 B N D elements (eager: 5, and 13 where silu is cast to fp32 and back).

Source: GLU Variants Improve Transformer (arXiv 2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.backends.reference import gated_silu
from fastdit.errors import ArgumentError
from fastdit.ops import checks
from fastdit.ops.registry import checked, define, new_like, op, requires_grad, resolve, traced

SCHEMA = "swiglu(Tensor gate, Tensor value, Tensor(a!) out, str? backend) -> ()"


@op
def swiglu(
    gate: Tensor, value: Tensor, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Multiply a value by the SiLU of its gate in one pass.

    Args:
        gate, value: [B, N, D] of one dtype, last stride 1.
        out: where to write, gate or value itself for in place; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`. A gradient flows where grad is enabled and an input requires it (through
        `reference`); `out` is refused then.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory.
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> gate, value = linear_in(u).chunk(2, dim=-1)
        >>> h = linear_out(swiglu(gate, value))
    """
    if torch.is_grad_enabled() and requires_grad(gate, value):
        if out is not None:
            raise ArgumentError(f"out: {checks.IN_PLACE}")
        _check(gate, value, None)
        return gated_silu(gate, value)
    if traced():
        out = new_like(gate) if out is None else out
        torch.ops.fastdit.swiglu.default(gate, value, out, backend)
        return out
    _check(gate, value, out)
    out = new_like(gate) if out is None else out
    resolve("swiglu", gate.device, gate.dtype, backend)(gate, value, out)
    return out


def _check(gate, value, out) -> None:
    """`out` is None where it is yet to be allocated: new memory overlaps nothing."""
    shape = checks.state("gate", gate)
    checks.operand("value", value, shape, gate.dtype, gate.device)
    if out is not None:
        checks.operand("out", out, shape, gate.dtype, gate.device)
        checks.alone("out", out, ())
        checks.disjoint_or_same("out", out, "gate", gate)
        checks.disjoint_or_same("out", out, "value", value)


define(SCHEMA, checked("swiglu", _check))
