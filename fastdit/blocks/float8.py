"""Rows in fp8 for the linear layers that torchao keeps in fp8, quantised where they are normed.

Such a layer quantises its input first: it reads all rows for their largest magnitudes, reads them again to divide,
and writes what the product then reads. Where a norm's output goes to such layers alone, `norm_modulate` writes that
itself: a row is read once, and a byte an element is written. The product is torch's, by the weight and the scales that
torchao keeps, so it is torchao's own but for what it is given.

It runs where residuals wait (see `forward.py`), in bfloat16, for weights and inputs with a scale for each row.
Otherwise the layer is called as it is: one scale for all, bounds, another kernel than torch's, hooks, adapters, packed
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit.backends.base import FP8
from fastdit.observe import observed

#: what torchao's product by row takes and gives
DTYPE = torch.bfloat16
#: whose kernels may be torch's
KERNELS = ("auto", "torch")


@dataclass(frozen=True, eq=False, repr=False)
class QuantisedRows:
    """These are the input of linear layers.

    Attributes:
        data: [B, n, D] in fp8.
        scale: [B, n], fp32, what each row is to be multiplied by.
    """

    data: Tensor
    scale: Tensor

    @classmethod
    def like(cls, x: Tensor, tokens: int) -> QuantisedRows:
        """New memory for `tokens` rows for each sample of x [B, n, D]."""
        batch, _, width = x.shape
        data = x.new_empty((batch, tokens, width), dtype=FP8)
        return cls(data, x.new_empty((batch, tokens), dtype=torch.float32))

    @property
    def shape(self) -> torch.Size:
        """That of the rows, [B, n, D]."""
        return self.data.shape

    def split(self, lengths: Sequence[int]) -> list[QuantisedRows]:
        """Views of so many tokens each, one after the other."""
        parts = zip(self.data.split(lengths, 1), self.scale.split(lengths, 1), strict=True)
        return [QuantisedRows(*part) for part in parts]


class Weight(NamedTuple):
    """[N, D] in fp8, fp32 [N, 1] for its rows, and whether their product may add up faster than it is exact."""

    data: Tensor
    scale: Tensor
    fast: bool


def read_rows(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether all `layers`, at least one, take x's rows quantised."""
    return (
        bool(layers) and x.dtype is DTYPE and all(weight_of(layer) is not None for layer in layers)
    )


def linear(layer: nn.Module, x: Tensor | QuantisedRows) -> Tensor:
    """``layer(x)`` [B, n, N]; of quantised rows, which :func:`read_rows` has allowed, by their product."""
    if not isinstance(x, QuantisedRows):
        return layer(x)
    weight = weight_of(layer)
    out = torch._scaled_mm(
        x.data.flatten(0, 1),
        weight.data.t(),
        scale_a=x.scale.flatten().unsqueeze(1),
        scale_b=weight.scale.t(),
        bias=layer.bias,
        out_dtype=DTYPE,
        use_fast_accum=weight.fast,
    )
    return out.unflatten(0, x.shape[:2])


def weight_of(layer: nn.Module) -> Weight | None:
    """That of torch's own linear layer, unseen, with a weight of torchao's that also quantises inputs, both by row."""
    state = layer.__dict__
    if type(layer) is not nn.Linear or "forward" in state or observed(layer):
        return None
    weight, bias = state["_parameters"]["weight"], state["_parameters"]["bias"]
    kind = type(weight)
    if kind.__name__ != "Float8Tensor" or not kind.__module__.startswith("torchao."):
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype is not DTYPE):
        return None
    inputs, product = weight.act_quant_kwargs, weight.mm_config
    if product is None or not _by_row(inputs) or weight.dtype is not DTYPE:
        return None
    data, scale, block = weight.qdata, weight.scale, weight.block_size
    if (
        data.dtype is not FP8
        or not data.is_contiguous()
        or scale.dtype is not torch.float32
        or tuple(scale.shape) != (data.shape[0], 1)
        or tuple(block) != (1, data.shape[1])
        or product.emulate
        or product.pad_inner_dim
        or weight.kernel_preference.value not in KERNELS
    ):
        return None
    return Weight(data, scale, product.use_fast_accum)


def _by_row(inputs: object) -> bool:
    """Whether torchao's settings of a layer's inputs are what `norm_modulate` does."""
    if type(inputs).__name__ != "QuantizeTensorToFloat8Kwargs" or inputs.float8_dtype is not FP8:
        return False
    granularity = inputs.granularity
    return (
        type(granularity).__name__ == "PerRow"
        and getattr(granularity, "dim", -1) == -1
        and inputs.hp_value_lb is None
        and inputs.hp_value_ub is None
        and inputs.kernel_preference.value in KERNELS
    )
