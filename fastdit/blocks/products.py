"""Matrix products with what surrounds them: an activation on the way out, a concatenation that need not be.

Both are other orders of rounding than diffusers', so they run where residuals wait (see `forward.py`), and on layers
that are torch's own: a layer that somebody looks at, has quantised, or has put an adapter into, is called as it is.
Where blocks are compiled, the compiler sees them whole and needs none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.blocks import segments
from fastdit.blocks.float8 import QuantisedRows, linear
from fastdit.observe import observed

#: the oldest architecture on which cuBLAS has an epilogue with a GELU for 16 bits
CAPABILITY = (8, 0)


class Fused(segments.Segments):
    """The calls, eager, with their products fused."""

    def __init__(self) -> None:
        super().__init__(lambda function: function)
        self.feed_forward, self.project, self.activated = feed_forward, project, activated
        self.linear = linear


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
    own = weight_and_bias(module, attention_output, mlp_output)
    if own is None:
        return segments.project(module, attention_output, segments.unchanged, mlp_output)
    weight, bias = own
    width, wide = attention_output.shape[-1], mlp_output.shape[-1]
    first, second = weight.split((width, wide), 1)
    out = F.linear(attention_output, first, bias)
    rows = out.view(-1, out.shape[-1])
    # In place, but not by `addmm_`, which torch's counter of FLOPs does not know.
    torch.addmm(rows, mlp_output.reshape(-1, wide), second.t(), out=rows)
    return out


def activated(module: nn.Module, activation: nn.Module, x: Tensor | QuantisedRows) -> Tensor:
    """``activation(module(x))``, a GELU on the way out of the product where torch has that, rounded once."""
    if isinstance(x, QuantisedRows):
        return activation(linear(module, x))
    form = getattr(activation, "approximate", None) if type(activation) is nn.GELU else None
    if form is None or gelu_of_products(x.device) != form or observed(activation):
        return segments.activated(module, activation, x)
    out = _with_gelu(module, x)
    return segments.activated(module, activation, x) if out is None else out


def feed_forward(
    module: nn.Module, x: Tensor | QuantisedRows, chunk_size: int | None = None, chunk_dim: int = 0
) -> Tensor:
    """A feed-forward module, the GELU of diffusers' on the way out of its first product."""
    if isinstance(x, QuantisedRows):
        first, *rest = module.net
        out = first.gelu(linear(first.proj, x))
        for layer in rest:
            out = layer(out)
        return out
    if chunk_size is not None or gelu_of_products(x.device) is None:
        return segments.feed_forward(module, x, chunk_size, chunk_dim)
    if not _is_diffusers(module) or observed(module):
        return module(x)
    first, *rest = module.net
    form = getattr(first, "approximate", None) if type(first).__name__ == "GELU" else None
    if form is None or gelu_of_products(x.device) != form or observed(first):
        return module(x)
    out = _with_gelu(first.proj, x)
    if out is None:
        return module(x)
    for layer in rest:
        out = layer(out)
    return out


def first_layer(module: nn.Module, chunk_size: int | None = None) -> tuple[nn.Module, ...]:
    """The linear layer that alone reads a feed-forward's input: of diffusers' with a GELU, unseen and not in chunks."""
    if chunk_size is not None or not _is_diffusers(module):
        return ()
    first = module.net[0]
    if type(first).__name__ != "GELU" or any(
        "forward" in part.__dict__ or observed(part) for part in (module, first)
    ):
        return ()
    return (first.proj,)


def _is_diffusers(module: nn.Module) -> bool:
    """Whether it is the feed-forward that most models share; others have classes of that name in files of their own."""
    return type(module).__name__ == "FeedForward" and hasattr(module, "net")


def weight_and_bias(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Those of torch's own linear layer as it was made, unseen, which computes in its inputs' dtype; None of others."""
    state = module.__dict__
    if type(module) is not nn.Linear or "forward" in state or observed(module):
        return None
    weight, bias = state["_parameters"]["weight"], state["_parameters"]["bias"]
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return None
    for x in inputs:
        if type(x) is not Tensor or x.dtype is not weight.dtype:
            return None
    return (weight, bias) if bias is None or type(bias) is nn.Parameter else None


@functools.cache
def gelu_of_products(device: torch.device) -> str | None:
    """Which GELU the epilogue of a product is on a device, by its name in torch; None where there is none.

    On CUDA devices it is the approximation by tanh. Elsewhere torch takes the exact one, in a pass of its own.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return "tanh" if torch.cuda.get_device_capability(device) >= CAPABILITY else None


def _with_gelu(module: nn.Module, x: Tensor) -> Tensor | None:
    """The GELU of a layer's output, in 16 bits; None where torch has no epilogue for it."""
    own = weight_and_bias(module, x) if x.dtype.itemsize == 2 else None
    if own is None or own[1] is None:
        return None
    weight, bias = own
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


FUSED = Fused()
