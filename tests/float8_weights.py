"""What torchao makes of a linear layer's weight, restated: fp8 with a scale for each row, by inputs quantised alike.

The attributes go by torchao's names. It stands in for torchao, which need not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from truth import quantised


class KernelPreference(Enum):
    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"


@dataclass(frozen=True)
class PerRow:
    dim: int = -1


@dataclass(frozen=True)
class PerTensor:
    pass


@dataclass(frozen=True)
class ProductSettings:
    emulate: bool = False
    use_fast_accum: bool = True
    pad_inner_dim: bool = False


@dataclass(frozen=True)
class QuantizeTensorToFloat8Kwargs:
    float8_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Any = PerRow()
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None
    kernel_preference: KernelPreference = KernelPreference.AUTO


class Float8Tensor(torch.Tensor):
    __module__ = "torchao.stand_in"

    @staticmethod
    def __new__(cls, qdata, scale, **settings):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=settings["dtype"])

    def __init__(self, qdata, scale, **settings):
        self.qdata, self.scale, self.settings = qdata, scale, settings
        self.block_size = settings["block_size"]
        self.mm_config = settings["mm_config"]
        self.act_quant_kwargs = settings["act_quant_kwargs"]
        self.kernel_preference = settings["kernel_preference"]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        x, weight, bias = (*args, *(kwargs or {}).values())
        if weight.act_quant_kwargs is None:
            return F.linear(x, (weight.qdata.float() * weight.scale).to(x.dtype), bias)
        data, scale = quantised(x)
        out = torch._scaled_mm(
            data.reshape(-1, data.shape[-1]),
            weight.qdata.t(),
            scale_a=scale.reshape(-1, 1),
            scale_b=weight.scale.t(),
            bias=bias,
            out_dtype=x.dtype,
        )
        return out.reshape(*x.shape[:-1], -1)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale, **args[0].settings)
        raise NotImplementedError(str(func))


def quantise(layer: nn.Linear, inputs: dict[str, Any] | None = None, **settings: Any) -> None:
    """Put such a weight in the place of a layer's own; `inputs` are settings of its inputs that are not the usual."""
    data, scale = quantised(layer.weight.detach())
    given = {
        "block_size": [1, data.shape[1]],
        "mm_config": ProductSettings(),
        "act_quant_kwargs": replace(QuantizeTensorToFloat8Kwargs(), **(inputs or {})),
        "kernel_preference": KernelPreference.AUTO,
        "dtype": layer.weight.dtype,
    }
    weight = Float8Tensor(data, scale[:, None], **(given | settings))
    layer.weight = nn.Parameter(weight, requires_grad=False)


def quantise_blocks(blocks: list[nn.Module]) -> None:
    """All linear layers in the blocks."""
    for block in blocks:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                quantise(layer)
