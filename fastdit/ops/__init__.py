"""The ops: each a memory-bound region of a transformer or its sampler, on every backend.

>>> from fastdit import ops
>>> y = ops.norm_modulate(x, scale, shift)           # the backend of highest priority
>>> fast = ops.bind("cpu")                           # or one by name, for a whole run
>>> fast.gated_residual(x, [branch], [gate], out=x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdit.ops.blend import blend
from fastdit.ops.collapse import collapse
from fastdit.ops.gated_residual import gated_residual
from fastdit.ops.norm_modulate import norm_modulate
from fastdit.ops.patchify import patchify, unpatchify
from fastdit.ops.qkv_prologue import qkv_prologue
from fastdit.ops.registry import BACKENDS, choose, requested_backend
from fastdit.ops.resolution_transition import resolution_transition
from fastdit.ops.sparse_attention import sparse_attention
from fastdit.ops.token_change import token_change
from fastdit.ops.token_select import token_select

__all__ = [
    "BACKENDS",
    "Ops",
    "bind",
    "blend",
    "collapse",
    "gated_residual",
    "norm_modulate",
    "patchify",
    "qkv_prologue",
    "resolution_transition",
    "sparse_attention",
    "token_change",
    "token_select",
    "unpatchify",
]


@dataclass(frozen=True)
class Ops:
    """All ops bound to one backend, or to the automatic choice where `backend` is None."""

    backend: str | None
    blend: Callable[..., Tensor]
    collapse: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    norm_modulate: Callable[..., Tensor]
    patchify: Callable[..., Tensor]
    qkv_prologue: Callable[..., None]
    resolution_transition: Callable[..., tuple[Tensor, Tensor]]
    sparse_attention: Callable[..., Tensor]
    token_change: Callable[..., Tensor]
    token_select: Callable[..., tuple[Tensor, Tensor]]
    unpatchify: Callable[..., Tensor]

    def backend_for(self, op: str, device: torch.device | str, dtype: torch.dtype) -> str:
        """The name of the backend that will serve `op` there; BackendError where none does."""
        return choose(op, torch.device(device), dtype, self.backend).name


def bind(backend: str | None = None) -> Ops:
    """The ops on a named backend; None for FASTDIT_BACKEND, or the automatic choice."""
    name = requested_backend(backend)
    functions = (
        blend,
        collapse,
        gated_residual,
        norm_modulate,
        patchify,
        qkv_prologue,
        resolution_transition,
        sparse_attention,
        token_change,
        token_select,
        unpatchify,
    )
    return Ops(name, *(partial(function, backend=name) for function in functions))
