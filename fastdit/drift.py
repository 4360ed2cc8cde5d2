"""The drift guard: before patching, make sure the adapter still says what the installed diffusers does.

An adapter restates block forwards, so a diffusers release that changes one would be answered with wrong pictures. For
each block class present the guard compares the argument names with the adapter's, then runs one block both ways on a
few random tokens and demands equal bits. It draws from a generator of its own, runs the innermost forward, and leaves
out the second half where weights are not at hand (meta device, offloading hooks) or somebody's hook or attention
processor would see the random tokens.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.forward import Forward
from fastdit.errors import DriftError
from fastdit.observe import observed


def check_drift(adapter: Any, transformer: nn.Module) -> None:
    """Check each block class of the transformer against the adapter.

    Raises:
        DriftError: Arguments or results differ; names block class and diffusers version.
    """
    seen, compared = set(), set()
    for kind, block in adapter.blocks(transformer) if adapter.restates else ():
        variant = (
            type(block),
            *sorted(getattr(block, "_modules", {})),
            getattr(block, "context_pre_only", None),
        )
        if variant not in seen:
            seen.add(variant)
            _check_arguments(adapter, kind, block)
        if variant not in compared and _may_run(adapter, block):
            compared.add(variant)
            _check_result(adapter, transformer, kind, block)


def _check_arguments(adapter: Any, kind: str, block: nn.Module) -> None:
    theirs = tuple(inspect.signature(type(block).forward).parameters)[1:]
    ours = tuple(inspect.signature(adapter.forwards[kind]).parameters)[2:]
    if theirs != ours:
        raise DriftError(
            f"{type(block).__name__}.forward of diffusers {_version()} takes {theirs}, the {adapter.family} adapter "
            f"expects {ours}; update fastdit, or use a diffusers it supports"
        )


def _check_result(adapter: Any, transformer: nn.Module, kind: str, block: nn.Module) -> None:
    weight = next(p for p in block.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, transformer.dtype)

    arguments = adapter.probe(transformer, kind, block, random)
    forward = Forward(None, [block])
    with torch.no_grad(), _evaluating(block):
        expected = type(block).forward(block, **arguments)
        actual = adapter.forwards[kind](block, forward, **arguments)
    for mine, stock in zip(_tensors(actual), _tensors(expected), strict=True):
        if mine.shape != stock.shape or not torch.allclose(
            mine, stock, rtol=0, atol=0, equal_nan=True
        ):
            raise DriftError(
                f"{type(block).__name__}.forward of diffusers {_version()} computes something else than the "
                f"{adapter.family} adapter; update fastdit, or use a diffusers it supports"
            )


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
