"""SwiGLU feed-forwards: gate and value by the module's own layers, and one op between these and the last.

Stock computes ``last(silu(gate(x)) * value(x))`` in four passes over what the products wrote, casts to fp32 among them.
The op stands for these where residuals wait (see `forward.py`), between layers that are torch's own, plain or torchao's
in fp8. A module that somebody looks at, has changed, or has put an adapter into, is called as it is. So is one in fp64,
where some of diffusers' take the SiLU in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.float8 import weight_of
from fastdit.blocks.products import weight_and_bias
from fastdit.observe import observed

#: file and class of diffusers -> its layers: of gate and value, or of both at once, gate first; and the last
LAYERS = {
    "attention.LuminaFeedForward": ("linear_1", "linear_3", "linear_2"),
    "transformer_flux2.Flux2FeedForward": ("linear_in", "linear_out"),
    "transformer_z_image.FeedForward": ("w1", "w3", "w2"),
}


def feed_forward(fw: Any, module: nn.Module, x: Tensor) -> Tensor:
    """A feed-forward module [B, n, D] -> [B, n, N] of a call's :class:`~fastdit.blocks.forward.Forward`."""
    layers = _layers_of(module, x) if fw.fuses_segments else None
    if layers is None:
        return fw.segments.feed_forward(module, x)
    *first, last = layers
    if len(first) == 2:
        gate, value = (layer(x) for layer in first)
        return last(fw.ops.swiglu(gate, value, out=gate))
    return last(fw.ops.swiglu(*first[0](x).chunk(2, dim=-1)))


def _layers_of(module: nn.Module, x: Tensor) -> list[nn.Module] | None:
    """The layers of a module that the op serves; None of another."""
    kind = type(module)
    names = LAYERS.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
    if names is None or x.ndim != 3 or x.dtype is torch.float64:
        return None
    layers = [module._modules[name] for name in names]
    # What else is in there has no weights: an activation, which may hold another.
    others = (part for part in module.modules() if all(part is not layer for layer in layers))
    if any("forward" in part.__dict__ or observed(part) for part in others):
        return None
    plain = (weight_and_bias(layer, x) or weight_of(layer) for layer in layers)
    return layers if all(plain) else None
