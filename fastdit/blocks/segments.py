"""The heavy calls inside a block, each a function of its own so that it can be compiled apart from the dispatcher.

The rewritten block forwards stay eager: they read the step and the slots, which a compiler would turn into one graph
per step and run into its recompilation limit. When the user has compiled a block (`compile_repeated_blocks`) or the
whole transformer, these calls are compiled instead, with the user's own settings. They hold no Python state, so their
number of graphs does not depend on the schedule. The compiler's limit counts per code object, so each use of a call in
each form of block gets code of its own: an image's feed-forward and a text's, other models and other forms in the
process do not use it up.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Segments:
    """The calls, each passed through `wrap`."""

    def __init__(self, wrap: Callable[[Callable], Callable]) -> None:
        self.attention = wrap(attention)
        self.feed_forward = wrap(feed_forward)
        self.project = wrap(project)
        self.activated = wrap(activated)
        self.project_heads = wrap(project_heads)
        self.linear = wrap(linear)
        self.stock = wrap(stock)


def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An attention module with its stock processor."""
    return module(*args, **kwargs)


def feed_forward(
    module: nn.Module, x: Tensor, chunk_size: int | None = None, chunk_dim: int = 0
) -> Tensor:
    """A feed-forward module, in chunks where the user asked diffusers for that (`enable_forward_chunking`)."""
    if chunk_size is None:
        return module(x)
    if x.shape[chunk_dim] % chunk_size:
        raise ValueError(
            f"chunk_size must divide dimension {chunk_dim} of the hidden states ({x.shape[chunk_dim]}), "
            f"got {chunk_size}"
        )
    return torch.cat([module(part) for part in x.split(chunk_size, dim=chunk_dim)], dim=chunk_dim)


def project(
    module: nn.Module,
    attention_output: Tensor,
    activation: Callable[[Tensor], Tensor],
    mlp_output: Tensor,
) -> Tensor:
    """FLUX's fused output projection over the attention output and the activated MLP branch."""
    return module(torch.cat([attention_output, activation(mlp_output)], dim=2))


def activated(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """A linear layer and the activation behind it."""
    return activation(module(x))


def unchanged(x: Tensor) -> Tensor:
    """In the place of an activation that was applied before."""
    return x


def project_heads(module: nn.Module, attention: Tensor, cross: Tensor, gate: Tensor) -> Tensor:
    """Lumina's output projection over the sum of two attentions [B, N, heads, d], the second gated by head."""
    return module((attention + cross * gate.tanh().view(1, 1, -1, 1)).flatten(-2))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on its own."""
    return module(x)


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module's class: a whole model of whose blocks nothing is known."""
    return type(module).forward(module, *args, **kwargs)


EAGER = Segments(lambda function: function)
_COMPILED: weakref.WeakKeyDictionary[Callable, dict[Any, Segments]] = weakref.WeakKeyDictionary()


def segments_like(compiled: Callable | None, block: nn.Module, use: str = "") -> Segments:
    """The segments of a use in `block` under `compiled`, what `Module.compile` leaves as its call; None if eager."""
    if compiled is None:
        return EAGER
    form = (use, type(block), *sorted(block._modules))
    forms = _COMPILED.setdefault(compiled, {})
    if form not in forms:
        # A torch.compile context wraps any function; it is the only bearer of the settings (backend, mode, dynamic).
        context = inspect.getclosurevars(compiled).nonlocals.get("self")
        compile = context if callable(context) else torch.compile
        forms[form] = Segments(lambda function: compile(_with_own_code(function, form)))
    return forms[form]


@functools.cache
def _with_own_code(function: Callable, form: tuple[Any, ...]) -> Callable:
    """A copy of `function` for a use in blocks of a form; graphs are kept, and counted, per code object."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
