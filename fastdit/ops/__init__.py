"""The ops: each a memory-bound region of a transformer or its sampler, on every backend.

>>> from fastdit import ops
>>> y = ops.norm_modulate(x, scale, shift)           # the backend of highest priority
>>> fast = ops.bind("cpu")                           # or one by name, for a whole run
>>> fast.gated_residual(x, [branch], [gate], out=x)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# Each file of this folder is imported here, so that type checkers see what it exports.
from fastdit.ops.blend import blend as blend
from fastdit.ops.collapse import collapse as collapse
from fastdit.ops.gated_residual import gated_residual as gated_residual
from fastdit.ops.norm_modulate import norm_modulate as norm_modulate
from fastdit.ops.patchify import patchify as patchify
from fastdit.ops.patchify import unpatchify as unpatchify
from fastdit.ops.qkv_prologue import qkv_prologue as qkv_prologue
from fastdit.ops.registry import BACKENDS, OPS, choose, requested_backend
from fastdit.ops.resolution_transition import resolution_transition as resolution_transition
from fastdit.ops.sparse_attention import sparse_attention as sparse_attention
from fastdit.ops.swiglu import swiglu as swiglu
from fastdit.ops.token_change import token_change as token_change
from fastdit.ops.token_select import token_select as token_select

__all__ = ["BACKENDS", "FILES", "OPS", "Ops", "bind", *OPS]

#: the files of this folder that hold ops; their kernels, tests and benchmarks are named after them
FILES = tuple(sorted({call.__module__.rpartition(".")[2] for call in OPS.values()}))


class Ops:
    """Every op, by its name, bound to one backend, or to the automatic choice where `backend` is None."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        vars(self).update({op: partial(call, backend=backend) for op, call in OPS.items()})

    def __getattr__(self, op: str) -> Callable[..., Any]:
        raise AttributeError(f"op: got {op!r}; there are {', '.join(OPS)}")

    def backend_for(self, op: str, device: torch.device | str, dtype: torch.dtype) -> str:
        """The name of the backend that will serve `op` there; BackendError where none does."""
        return choose(op, torch.device(device), dtype, self.backend).name


def bind(backend: str | None = None) -> Ops:
    """The ops on a named backend; None for FASTDIT_BACKEND, or the automatic choice."""
    return Ops(requested_backend(backend))
