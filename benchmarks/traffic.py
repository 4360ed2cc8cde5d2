"""Bytes that a step moves beside its matrix products and attention, counted by dispatch at real shapes on no memory.

Each launch that makes or changes a tensor's memory reads its inputs and writes its outputs once. Matrix products and
attention are left out: what they read and write is within their arithmetic. The rest is fused ops, which norm whole
rows, rotate or add what was kept, and so have to read what a product wrote; and what a product could do on its way:
GELU and SwiGLU where it writes, and whatever only lays a tensor out anew. So the floor is the fused ops' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastdit
from dispatch_trace import bytes_of
from fastdit import Schedule
from fastdit.account.skeleton import output_of
from real_models import RealModel

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "_addmm_activation"}
PRODUCTS |= {"addmm_", "baddbmm_", "_scaled_mm", "scaled_dot_product_attention", "sparse_attention"}
ACTIVATIONS = {"gelu", "silu", "swiglu"}
COPIES = {"cat", "clone", "copy_", "_to_copy", "contiguous", "stack", "index_select", "gather"}
KINDS = ("fused ops", "activations", "copies", "other")
VIEWS = {"_unsafe_view", "_reshape_alias", "detach"}  # which their schemas do not say


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic: ...``

    Attributes:
        bytes: By kind, of `KINDS`.
        launches: Of these, and of products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("_local_scalar_dense", "equal") and args[0].is_meta:
            return True  # of no memory nothing can be read: one step is like another
        result = output_of(func, args, kwargs)
        aliases = [argument.alias_info for argument in func._schema.arguments]
        views = any(alias is not None and not alias.is_write for alias in aliases)
        if not (views or "empty" in name or name in VIEWS):
            self.launches += 1
            if name not in PRODUCTS:
                self.bytes[_kind(func, name)] += _moved(func, name, args, kwargs, result)
        return result


def _kind(func: Any, name: str) -> str:
    if name in ACTIVATIONS:
        return "activations"
    if func.namespace == "fastdit":
        return "fused ops"
    return "copies" if name in COPIES else "other"


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    given = list(_tensors((args, kwargs)))
    if name == "qkv_prologue":  # its outputs are rows of stores that are wider than the call
        return 2 * sum(map(bytes_of, given[:3]))
    moved = sum(map(bytes_of, given))
    if name == "residual_norm_modulate":
        moved += bytes_of(given[0])  # the stream is read, and written
    elif func.namespace != "fastdit":
        moved += sum(map(bytes_of, _tensors(result)))
        if func._schema.is_mutable and "copy_" in name:
            moved -= bytes_of(given[0])  # which is only written
    return moved


def _without_memory(given: Any) -> Any:
    """What a model is given on the host, since it looks at it, has no values where it meets what has none."""
    metas = {tensor.is_meta for tensor in _tensors(given)}
    return tree_map_only(Tensor, lambda t: t.to("meta"), given) if len(metas) > 1 else given


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _Whole(TorchFunctionMode):
    """What is one launch on a GPU, and what torch would take apart on no memory, or not take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__:  # a mask that has values says how many
            args, kwargs = _without_memory((args, kwargs))
        if func in (F.rms_norm, torch.rms_norm):  # it reads its rows and writes them
            return torch.mul(args[0], 1)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, v = given["query"], given["value"]
        batch, heads, queries, _ = q.shape  # a GPU's output lies as [B, Q, H, d]
        rows, columns = q.new_empty(batch, queries, 1), v.new_empty(batch, 1, heads * v.shape[-1])
        return torch.bmm(rows, columns).unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The way that a GPU goes, on tensors without memory."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch("fastdit.blocks.attention.fuses", lambda device: True))
        gelu = "fastdit.blocks.products.gelu_of_products"
        stack.enter_context(patch(gelu, lambda device: "tanh"))
        # torch does not know autocast on tensors without memory
        stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: False))
        # programs run under dispatch as without, and call ops where that sees them
        stack.enter_context(patch("fastdit.runtime.programmed.is_seen", lambda: False))
        stack.enter_context(patch("fastdit.programs.recorder.handed_over", _as_called))
        stack.enter_context(_Whole())
        yield


def _as_called(overload: Any, given: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    return overload._schema.name.partition("::")[2], overload, given


def stock(real: RealModel, model: nn.Module) -> Traffic:
    """A step of the unpatched model, which is on the meta device."""
    given = real.arguments(model, tiny=False)
    with _as_on_a_gpu(), Traffic() as found:
        model(**given)
    return found


def patched(real: RealModel, model: nn.Module) -> tuple[Traffic, Traffic]:
    """A dense step, and one in which everything is reused, by their programs; neither is the first of a run."""
    given = real.arguments(model, tiny=False)
    found = []
    for methods in ([], [fastdit.Cached(Schedule.every(2))]):
        handle = fastdit.patch(model, *methods)
        for _ in range(2):
            with _as_on_a_gpu(), Traffic(), handle.run(torch.tensor([999.0, 0.0])):
                model(**given)
                handle.advance()
                with Traffic() as second:
                    model(**given)
                handle.advance()
        handle.unpatch()
        found.append(second)
    return found[0], found[1]
