"""The kernels of triton_kernels on CUDA devices, compute capability 8.0 and up: one pass each.

fp32, bf16 and fp16; fp64 is left to `reference`. Kernels are compiled at first use, once for each
dtype, width and form of the arguments, so run a step before capturing it into a CUDA graph.
Launches go to torch's current stream and nothing waits. Nothing is allocated, but for the keys of
token_select and the partial sums of blend_backward and sparse_attention, which torch allocates.

With TRITON_INTERPRET=1 Triton's interpreter runs the same kernels on CPU tensors, for tests: it is
thousands of times slower, and truncates to bf16 where a GPU rounds (tests/interpreter.py mends it).
Triton is imported when a kernel is first called, never by `import fastdit`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.backends._device import refuse_device
from fastdit.backends.base import Backend
from fastdit.errors import BackendError

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
FP32_HEAD_DIM = 128  # largest d of sparse_attention in fp32 that the tests prove
CAPABILITY = (8, 0)  # the oldest architecture the kernels are compiled for in the tests


def _launched(name: str, file: str | None = None) -> Callable[..., None]:
    """An op whose launcher has its arguments; see :meth:`Triton.kernel`."""

    def op(self: Triton, *arguments) -> None:
        self.kernel(name, file)(*arguments)

    return op


class Triton(Backend):
    name = "triton"
    # Below `cuda` on devices; where the interpreter is on, `cpu` stays first.
    priority = 5

    def supports(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"it has float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'fastdit[triton]')"
        if device.type == "cuda":
            return refuse_device(device, CAPABILITY)
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") == "1":
                return None
            return "it runs on CUDA devices, and on the cpu only with TRITON_INTERPRET=1"
        return f"it runs on CUDA devices, not on {device.type}"

    @staticmethod
    @functools.cache
    def kernel(name: str, file: str | None = None) -> Callable[..., None]:
        """The launcher `name` of a file of triton_kernels, by default the one of that name."""
        return getattr(importlib.import_module(f"triton_kernels.{file or name}"), name)

    gated_residual = _launched("gated_residual")
    norm_modulate = _launched("norm_modulate")
    token_select = _launched("token_select")
    token_change = _launched("token_change")
    qkv_prologue = _launched("qkv_prologue")
    blend = _launched("blend")
    blend_backward = _launched("blend_backward", "blend")
    collapse = _launched("collapse")
    swiglu = _launched("swiglu")
    patchify = _launched("patchify")
    resolution_transition = _launched("resolution_transition")

    def unpatchify(self, tokens, table, field):
        self.kernel("patchify")(field, table, tokens, draw=True)

    attends = True

    def sparse_attention(self, q, k, v, scale, out):
        if q.dtype is torch.float32 and q.shape[3] > FP32_HEAD_DIM:
            raise BackendError(
                f"backend 'triton' cannot run sparse_attention in torch.float32 with d of {q.shape[3]}: "
                f"its sums are exact enough up to {FP32_HEAD_DIM}; use another backend, or 16 bits"
            )
        self.kernel("sparse_attention")(q, k, v, scale, out)

    def outruns_torch(self, q: Tensor, k: Tensor) -> bool:
        """At sizes in the table of `triton_kernels/launch.py`."""
        if q.device.type != "cuda":
            return False
        from triton_kernels.launch import faster_than_torch

        measured = faster_than_torch(q, k) is not None
        return measured and self.supports("sparse_attention", q.device, q.dtype) is None


BACKEND = Triton()
