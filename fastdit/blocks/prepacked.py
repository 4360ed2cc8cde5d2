"""Weights in the layout that products of few rows read fastest, kept beside the model's own for the length of a run.

On a CPU a matrix product first lays its weights out in the order in which its inner loop reads them. With thousands of
rows that is lost in the arithmetic; with those of a sparse step it takes as long as half of it. MKL keeps that layout
where it is asked to, and multiplies as it does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.errors import ArgumentError, BackendError

#: Fewer rows are those of modulations, one product for many steps; with more the layout is not worth its memory.
LEAST_ROWS, MOST_ROWS = 65, 2048


@dataclass
class _Held:
    """What is kept of a layer: how its last call was, (rows, address and version of the weight), and one layout."""

    last: tuple[int, int, int] | None = None
    packed: Tensor | None = None
    packed_for: tuple[int, int, int] | None = None


class PrepackedWeights:
    """Weights of linear layers, each laid out for one number of rows.

    A layer's are laid out at the second of two calls in succession with as many rows and the same weights. A single
    call of other rows in between, such as a step of all tokens, changes nothing.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Linear, _Held] = {}

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        """``module(x)`` [..., out] of x [..., in]; fp32 without gradient, everything else as torch does it."""
        rows = x.numel() // max(1, x.shape[-1])
        if not LEAST_ROWS <= rows <= MOST_ROWS or not _serves(module, x):
            return type(module).forward(module, x)
        weight = module.weight
        call = rows, weight.data_ptr(), weight._version
        held = self._held.setdefault(module, _Held())
        if call not in (held.packed_for, held.last):
            held.last = call
            return type(module).forward(module, x)
        if held.packed_for != call:
            held.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            held.packed_for = call
        held.last = call
        return torch.ops.mkl._mkl_linear(x, held.packed, weight, module.bias, rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the layouts take: those of the weights, though MKL reserves some room that it never touches."""
        return sum(
            layer.weight.nbytes for layer, one in self._held.items() if one.packed is not None
        )

    def clear(self) -> None:
        """Forget all layouts."""
        self._held.clear()


def linears_of(blocks: list[nn.Module]) -> list[nn.Linear]:
    """The layers that may be packed: torch's own class, which an adapter of peft has inside."""
    return [part for block in blocks for part in block.modules() if type(part) is nn.Linear]


def check_packable(transformer: nn.Module, backend: str | None) -> None:
    """Refuse where nothing would come of it.

    Raises:
        BackendError: This torch was built without MKL.
        ArgumentError: No linear layer has a plain fp32 weight on the CPU, or `backend` is the one that changes nothing.
    """
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        raise BackendError("pack_weights needs a torch with MKL, which this one was built without")
    if backend == "reference":
        raise ArgumentError(
            'pack_weights: got True with backend "reference", which runs every layer as torch does; '
            "accepted is another backend, or False"
        )
    weights = [layer.weight for layer in linears_of([transformer])]
    if not any(map(packs, weights)):
        given = ", ".join(sorted({_described(weight) for weight in weights}))
        raise ArgumentError(
            f"pack_weights: got True for linear weights in {given or 'layers of another class'}; accepted are weights "
            "in float32 on cpu, as torch's own dense Parameter, made outside of inference mode"
        )


def _described(weight: Tensor) -> str:
    dtype, kind = str(weight.dtype).removeprefix("torch."), type(weight).__name__
    mode = ", inference" if weight.is_inference() else ""
    return f"{dtype} on {weight.device.type} ({kind}{mode})"


def packs(weight: Any) -> bool:
    """Whether it is laid out like MKL's: not quantised, sparse, or made by a parametrization at each call.

    Nor an inference tensor, whose writes nobody counts.
    """
    return (
        type(weight) is nn.Parameter
        and weight.layout is torch.strided
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and not weight.is_inference()
        and weight.is_contiguous()
    )


def _serves(module: nn.Linear, x: Tensor) -> bool:
    bias = module.bias
    return (
        packs(module.weight)
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype is torch.float32))
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
