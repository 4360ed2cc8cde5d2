"""What came to a model after it was patched is looked for at each run's first call, and refused by name where a method
would leave it out or be spoilt by it.

Hooks, LoRA and schedulers are honoured elsewhere; what is refused here needs another `fastdit.patch`, or to go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastdit.errors import ArgumentError, FastDiTError, UnsupportedModelError

#: diffusers' attention backends that add a mask to the products; others drop it, or take it for what counts
ADDING_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_math")


def refuse_replaced_blocks(patched: Any, transformer: nn.Module) -> None:
    """The blocks must be those that were patched.

    Raises:
        FastDiTError: Naming the first that is another.
    """
    now = patched.adapter.blocks(transformer)
    if len(now) != len(patched.blocks):
        raise FastDiTError(
            f"the transformer has {len(now)} blocks, it had {len(patched.blocks)} when it was patched; "
            "call fastdit.patch again"
        )
    for index, ((kind, block), known) in enumerate(zip(now, patched.blocks, strict=True)):
        if block is not known:
            raise FastDiTError(
                f"block {index} of the transformer, in {kind}, was replaced after patching; call fastdit.patch again"
            )


def refuse_other_attention(patched: Any, told: Sequence[str]) -> None:
    """Where fastdit's own attention stands in for diffusers' processors, these must be the stock ones.

    Args:
        told: Names of arguments that the call passes on to processors.

    Raises:
        UnsupportedModelError: Naming the processor.
        ArgumentError: Naming the arguments, or the attention backend that would drop the weights of keys.
    """
    weighs = any(method.weighs_keys for method in patched.possible)
    some = (m.name for m in patched.possible if m.writes & {"rows", "resolution"})
    names = " and ".join(dict.fromkeys(some))
    for index, block in enumerate(patched.blocks):
        for name, module in block.named_children():
            if not patched.adapter.has_stock_processor(module):
                raise UnsupportedModelError(
                    f"{name} of block {index} has the attention processor {type(module.processor).__qualname__}, "
                    f"which {names} would leave out; remove it, or run inside `with handle.disabled()`"
                )
            backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
            if weighs and backend not in (None, *ADDING_BACKENDS):
                raise ArgumentError(
                    f"the attention backend of {name} in block {index} must be one of {', '.join(ADDING_BACKENDS)} for "
                    f"{names}, which weighs keys by a mask; got {getattr(backend, 'value', backend)}"
                )
    if told:
        raise ArgumentError(
            f"attention arguments {', '.join(told)} are for attention processors, in whose place {names} computes; "
            "leave them out, or run inside `with handle.disabled()`"
        )


def refuse_other_caches(patched: Any, transformer: nn.Module) -> None:
    """diffusers' own caches (`enable_cache`) skip calls that a plan of methods counts on, or add to it unseen.

    Raises:
        UnsupportedModelError: Naming the hook and where it is.
    """
    if not patched.acts:
        return
    for where, module in _places_of_caches(transformer, patched.blocks):
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if getattr(hook, "_is_stateful", False):
                methods = " + ".join(method.name for method in patched.methods)
                raise UnsupportedModelError(
                    f"{where} carries diffusers' {type(hook).__name__}, another cache, which does not compose with "
                    f"{methods}; call disable_cache() on the transformer, or patch it without methods"
                )


def _places_of_caches(
    transformer: nn.Module, blocks: Sequence[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Caches are attached to these modules: the blocks and their parts; any, where no blocks are known."""
    yield "the transformer", transformer
    for index, block in enumerate(blocks):
        yield f"block {index}", block
        for name, part in block.named_children():
            yield f"{name} of block {index}", part
    if not blocks:
        yield from transformer.named_modules()
