"""The drift guard: before patching, make sure the adapter still says what the installed diffusers does.

An adapter restates block forwards, so a diffusers release that changes one would be answered with wrong pictures. For
each form of block present the guard compares the argument names with the adapter's, then runs one block both ways on a
few random tokens, as an example call of the model gives them, and demands equal bits. It draws from a generator of its
own, runs the innermost forward, and leaves out the second half where weights are not at hand (meta device, offloading
hooks) or somebody's hook or attention processor would see the random tokens. Where an adapter restates the forward of
the whole model, that of a small one of its class is compared, once in a process.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdit.account.skeleton import Skeleton, forms, made_once, structure
from fastdit.adapters.base import Size, dtype_of
from fastdit.blocks.forward import Forward
from fastdit.errors import DriftError
from fastdit.observe import observed

#: image and text tokens of the example whose blocks are compared
_SIZE = Size(9, 5)
_given: dict[Any, dict[Any, Any]] = {}
restated: dict[Any, bool] = {}
#: of the restated forward of a model, which may leave tokens out and order them otherwise
_CLOSE = 1e-5


def check_drift(adapter: Any, transformer: nn.Module) -> None:
    """Check each form of block of the transformer against the adapter.

    Raises:
        DriftError: Arguments or results differ; names block class and diffusers version.
    """
    if not adapter.restates:
        return
    blocks = list(zip(forms(adapter, transformer), adapter.blocks(transformer), strict=True))
    for kind, block in dict(reversed(blocks)).values():
        _check_arguments(adapter, kind, block)
    compared = set()
    for form, (kind, block) in blocks:
        if form not in compared and _may_run(adapter, block):
            compared.add(form)
            given = given_to_blocks(adapter, transformer)[form]
            _check_result(adapter, kind, block, drawn(given, block))
    if adapter.restates_model:
        known = type(transformer).__mro__
        stock = next(cls for cls in known if cls.__name__ in adapter.model_classes)
        if not made_once(restated, (adapter.family, stock), lambda: _is_restated(adapter, stock)):
            raise DriftError(
                f"{stock.__name__}.forward of diffusers {_version()} computes something else than the "
                f"{adapter.family} adapter; update fastdit, or use a diffusers it supports"
            )


def given_to_blocks(adapter: Any, transformer: nn.Module) -> dict[Any, Any]:
    """Form of a block -> (args, kwargs) on the meta device, in the adapter's example.

    Raises:
        DriftError: The transformer cannot be called so.
    """

    def capture() -> dict[Any, Any]:
        skeleton = Skeleton(adapter, transformer)
        try:
            visits = skeleton.run(adapter.example(skeleton.transformer, _SIZE)).visits
        except Exception as error:
            raise DriftError(
                f"{type(transformer).__name__} of diffusers {_version()} cannot be called as the {adapter.family} "
                f"adapter does: {error}; update fastdit, or use a diffusers it supports"
            ) from error
        return {form: (visit.args, visit.kwargs) for form, visit in visits.items()}

    return made_once(_given, (dtype_of(transformer), *structure(adapter, transformer)), capture)


def drawn(value: Any, block: nn.Module, generator: torch.Generator | None = None) -> Any:
    """Arguments of a block with random tensors in place of those without values; masks hide the last token."""
    generator = generator or torch.Generator().manual_seed(0)
    if isinstance(value, (tuple, list)):
        return type(value)(drawn(part, block, generator) for part in value)
    if isinstance(value, dict):
        return {name: drawn(part, block, generator) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    found = torch.randn(value.shape, generator=generator)
    if value.is_complex():
        found = torch.polar(torch.ones_like(found), found)
    elif not value.is_floating_point():
        found = torch.ones_like(found)
        found[..., -1] = 0
    device = next(p for p in block.parameters() if p.is_floating_point()).device
    return found.to(device, value.dtype)


def _check_arguments(adapter: Any, kind: str, block: nn.Module) -> None:
    theirs = tuple(inspect.signature(type(block).forward).parameters)[1:]
    ours = tuple(inspect.signature(adapter.forwards[kind]).parameters)[2:]
    if theirs != ours:
        raise DriftError(
            f"{type(block).__name__}.forward of diffusers {_version()} takes {theirs}, the {adapter.family} adapter "
            f"expects {ours}; update fastdit, or use a diffusers it supports"
        )


def _check_result(adapter: Any, kind: str, block: nn.Module, given: Any) -> None:
    args, kwargs = given
    forward = Forward(None, [block])
    with torch.no_grad(), _evaluating(block):
        expected = type(block).forward(block, *args, **kwargs)
        actual = adapter.forwards[kind](block, forward, *args, **kwargs)
    for mine, stock in zip(_tensors(actual), _tensors(expected), strict=True):
        if mine.shape != stock.shape or not torch.allclose(
            mine, stock, rtol=0, atol=0, equal_nan=True
        ):
            raise DriftError(
                f"{type(block).__name__}.forward of diffusers {_version()} computes something else than the "
                f"{adapter.family} adapter; update fastdit, or use a diffusers it supports"
            )


def _is_restated(adapter: Any, stock: Any) -> bool:
    """Whether the adapter's forward of a whole model gives what the model's own does."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        model, given = adapter.small(stock, _SIZE)
    model, draw = model.double().eval(), torch.Generator().manual_seed(0)

    def valued(tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        return values if tensor.is_meta else tensor

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[-1] ** 0.5)
        told = tree_map_only(Tensor, valued, given)
        latents = adapter.as_latents(told[adapter.image_argument])
        call = _Whole(adapter.call(model, (), told), [block for _, block in adapter.blocks(model)])
        known = adapter.read_prompt(model, told)
        mine = adapter.run_model(model, call, known, told | {adapter.image_argument: latents})
        theirs = adapter.as_latents(stock.forward(model, **told | {"return_dict": False})[0])
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=_CLOSE, atol=_CLOSE)


class _Whole:
    """What an adapter's forward of a model reads of a call of all tokens, whose modules run as they are."""

    layout = None
    unseen = False

    def __init__(self, arguments: Any, blocks: list[nn.Module]) -> None:
        self.arguments, self.forward = arguments, Forward(None, blocks)
        self.tokens = self.count = arguments.tokens
        self.memory: dict[Any, Any] = {}


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]


def _may_run(adapter: Any, block: nn.Module) -> bool:
    theirs = any(
        observed(m)
        or "_hf_hook" in m.__dict__
        or "_diffusers_hook" in m.__dict__
        or not adapter.has_stock_processor(m)
        for m in block.modules()
    )
    return not theirs and all(p.device.type != "meta" for p in block.parameters())


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode each module is in."""
    training = [module for module in block.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _version() -> str:
    return importlib.metadata.version("diffusers")
