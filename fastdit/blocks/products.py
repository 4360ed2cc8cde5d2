"""Matrix products with what surrounds them: an activation on the way out, a concatenation that need not be.

Both are other orders of rounding than diffusers', so they run where residuals wait (see `forward.py`), and on layers
that are torch's own: a layer that somebody looks at, has quantised, or has put an adapter into, is called as it is.
Where blocks are compiled, the compiler sees them whole and needs none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdit.blocks import segments
from fastdit.observe import observed

#: the oldest architecture on which cuBLAS has an epilogue with a GELU for 16 bits
CAPABILITY = (8, 0)


class Fused(segments.Segments):
    """The calls, eager, with their products fused."""

    def __init__(self) -> None:
        super().__init__(lambda function: function)
        self.feed_forward, self.project, self.activated = feed_forward, project, activated


def project(
    module: nn.Module,
    attention_output: Tensor,
    activation: Callable[[Tensor], Tensor],
    mlp_output: Tensor,
) -> Tensor:
    """FLUX's output projection as two products, each with its columns of the weight, the second added to the first.

    The inputs [B, n, D] and [B, n, F] are read where they are: concatenated, they are read and written once more.
    """
    mlp_output = activation(mlp_output)
    if not plain(module, attention_output, mlp_output):
        return segments.project(module, attention_output, segments.unchanged, mlp_output)
    width, weight, bias = attention_output.shape[-1], module.weight, module.bias
    first, second = weight[:, :width].t(), weight[:, width:].t()
    rows = attention_output.flatten(0, 1)
    out = torch.mm(rows, first) if bias is None else torch.addmm(bias, rows, first)
    # In place, but not by `addmm_`, which torch's counter of FLOPs does not know.
    torch.addmm(out, mlp_output.flatten(0, 1), second, out=out)
    return out.unflatten(0, attention_output.shape[:2])


def activated(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(module(x))``, a GELU on the way out of the product where torch has that, rounded once."""
    form = getattr(activation, "approximate", None) if type(activation) is nn.GELU else None
    if form is None or observed(activation) or not _has_epilogue(module, form, x):
        return segments.activated(module, activation, x)
    return _with_gelu(module, x)


def feed_forward(
    module: nn.Module, x: Tensor, chunk_size: int | None = None, chunk_dim: int = 0
) -> Tensor:
    """A feed-forward module, the GELU of diffusers' on the way out of its first product."""
    if chunk_size is not None or gelu_of_products(x.device) is None:
        return segments.feed_forward(module, x, chunk_size, chunk_dim)
    if type(module).__name__ != "FeedForward" or observed(module):
        return module(x)
    first, *rest = module.net
    form = getattr(first, "approximate", None) if type(first).__name__ == "GELU" else None
    if form is None or observed(first) or not _has_epilogue(first.proj, form, x):
        return module(x)
    x = _with_gelu(first.proj, x)
    for layer in rest:
        x = layer(x)
    return x


def plain(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether a module is torch's own linear layer as it was made, unseen, and computes in its inputs' dtype."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or observed(module):
        return False
    weight, bias = module.weight, module.bias
    return (
        type(weight) is nn.Parameter
        and weight.layout is torch.strided
        and (bias is None or type(bias) is nn.Parameter)
        and all(type(x) is Tensor and x.dtype is weight.dtype for x in inputs)
    )


@functools.cache
def gelu_of_products(device: torch.device) -> str | None:
    """Which GELU the epilogue of a product is on a device, by its name in torch; None where there is none.

    On CUDA devices it is the approximation by tanh. Elsewhere torch takes the exact one, in a pass of its own.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return "tanh" if torch.cuda.get_device_capability(device) >= CAPABILITY else None


def _has_epilogue(module: nn.Module, form: str, x: Tensor) -> bool:
    return (
        x.dtype.itemsize == 2
        and gelu_of_products(x.device) == form
        and plain(module, x)
        and module.bias is not None
    )


def _with_gelu(module: nn.Linear, x: Tensor) -> Tensor:
    rows = torch._addmm_activation(module.bias, x.flatten(0, -2), module.weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


FUSED = Fused()
