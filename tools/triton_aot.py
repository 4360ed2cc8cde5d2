"""Compile every Triton kernel for GPUs that need not be here, and hold it to a budget.

    python tools/triton_aot.py             # compare with tools/triton_budget.json
    python tools/triton_aot.py --update    # write what was found as the new budget

The launchers of `triton_kernels` run as they do on a device, on meta tensors and with a driver that
only states an architecture, and stop where the compiled kernel would be launched. So what is
compiled is what a call compiles, argument types and alignments included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from budget import Usage, hold, usages
from torch import Tensor

BUDGET = Path(__file__).with_name("triton_budget.json")
ARCHITECTURES = (80, 90, 100)


class StatedDriver:
    """Answers the questions that come before a launch; there is nothing to launch on."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def instances() -> dict[str, Callable[[int], None]]:
    """Name -> a call of a launcher, given the architecture."""
    from triton_kernels.blend import blend, blend_backward
    from triton_kernels.collapse import collapse
    from triton_kernels.gated_residual import gated_residual
    from triton_kernels.launch import launch_for
    from triton_kernels.norm_modulate import norm_modulate
    from triton_kernels.patchify import patchify
    from triton_kernels.qkv_prologue import qkv_prologue
    from triton_kernels.resolution_transition import resolution_transition
    from triton_kernels.sparse_attention import sparse_attention
    from triton_kernels.swiglu import swiglu
    from triton_kernels.token_change import token_change
    from triton_kernels.token_select import token_select

    batch, tokens, layout = 2, 1024, 4096

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def residual(
        width: int,
        count: int,
        dtype: torch.dtype,
        sparse: bool,
        weights: tuple[int, ...] = (),
        gated: torch.dtype | None = None,
    ):
        x = new(batch, tokens, width, dtype=dtype)
        store = new(batch, layout, width, dtype=dtype)
        gate = new(batch, width, dtype=gated or dtype)
        rows = new(batch, tokens, dtype=torch.int32) if sparse else None
        branches = [store if sparse and i else x for i in range(count)]
        by = new(*weights, dtype=torch.float32) if weights else None

        def call(architecture: int) -> None:
            launch = launch_for("gated_residual", width, batch * tokens, architecture)
            cache = store if sparse else None
            fresh = 0 if sparse else -1
            gates = [gate] * count
            gated_residual(x, branches, gates, fresh, cache, rows, x, by, launch=launch)

        return call

    def norm(
        width: int,
        dtype: torch.dtype,
        fused: bool,
        rms: bool = False,
        fp8: bool = False,
        modulated: torch.dtype | None = None,
    ):
        out = new(batch, tokens, width, dtype=dtype)
        store = new(batch, layout, width, dtype=dtype)
        row = new(batch, 1, width, dtype=modulated or dtype)
        x, cache, rows, branch = out, None, None, out
        if fused:
            x, cache, rows = store, store, new(batch, tokens, dtype=torch.int32)
        outputs = (out, None)
        if fp8:
            outputs = out.to(torch.float8_e4m3fn), new(batch, tokens, dtype=torch.float32)

        def call(architecture: int) -> None:
            launch = launch_for("norm_modulate", width, batch * tokens, architecture)
            residual = (branch, row) if fused else (None, None)
            affine = (new(width, dtype=dtype), None) if rms else (None, None)
            modulation = (row, row, *affine, 1e-6, rms)
            norm_modulate(x, *modulation, *residual, cache, rows, *outputs, launch=launch)

        return call

    def select(dtype: torch.dtype, channels_first: bool, metric: str, max_age: int | None = None):
        if channels_first:  # latents [B, C, H, W]
            field = new(batch, 16, 64, 2, 64, 2, dtype=dtype).permute(0, 2, 4, 3, 5, 1)
        else:  # packed tokens [B, N, 4 C]
            field = new(batch, 64, 64, 16, 2, 2, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
        drops, age, inverse = (new(batch, layout, dtype=torch.int32) for _ in range(3))
        rows = new(batch, tokens, dtype=torch.int32)
        tables = (drops, None if max_age is None else age, 900, 0.1, metric, max_age)

        def call(architecture: int) -> None:
            token_select(field, *tables, rows, inverse)

        return call

    def change(dtype: torch.dtype, channels_first: bool, sparse: bool):
        if channels_first:  # latents [B, C, H, W]
            field = new(batch, 16, 64, 2, 64, 2, dtype=dtype).permute(0, 2, 4, 3, 5, 1)
        else:  # packed tokens [B, N, 4 C]
            field = new(batch, 64, 64, 16, 2, 2, dtype=dtype).permute(0, 1, 2, 4, 5, 3)
        rate, level, score = (new(batch, layout, dtype=torch.float32) for _ in range(3))
        inverse = new(batch, layout, dtype=torch.int32) if sparse else None
        levels = new(2, dtype=torch.float32)

        def call(architecture: int) -> None:
            token_change(field, field, rate, level, levels, inverse, score)

        return call

    def prologue(
        heads: int, kv_heads: int, dim: int, dtype: torch.dtype, norm: str | None, sparse: bool
    ):
        q = new(batch, tokens, heads * dim, dtype=dtype)
        k = v = new(batch, tokens, kv_heads * dim, dtype=dtype)
        q_out = new(batch, tokens, heads, dim, dtype=dtype)
        cache = new(batch, layout, kv_heads, dim, dtype=dtype)
        rows = new(batch, tokens, dtype=torch.int32) if sparse else None
        weight, bias = (new(dim, dtype=dtype), None) if norm else (None, None)
        across = norm in ("layer", "rms_across")
        if across:
            weight = new(heads * dim, dtype=dtype)
            bias = weight if norm == "layer" else None
        # No rotation where heads are normed alone and all tokens are there.
        cos = new(layout, dim // 2, dtype=torch.float32) if sparse or across else None

        def call(architecture: int) -> None:
            affine = (weight, bias, weight, bias, 1e-6)
            qkv_prologue(q, k, v, q_out, cache, cache, rows, 0, 0, norm, *affine, cos, cos)

        return call

    def patches(dtype: torch.dtype, packed: bool, draw: bool):
        if packed:  # [B, N, 4 C], a token of it being a pixel
            field = new(batch, 64, 64, 1, 1, 64, dtype=dtype)
            tokens = new(batch, 1945, 1, 1, 64, dtype=dtype)
        else:  # latents [B, C, H, W], tokens in the order (ph, pw, C)
            field = new(batch, 16, 64, 2, 64, 2, dtype=dtype).permute(0, 2, 4, 3, 5, 1)
            tokens = new(batch, 1945, 2, 2, 16, dtype=dtype)
        table = new(batch, 1945, 3, dtype=torch.int32)
        return lambda architecture: patchify(field, table, tokens, draw=draw)

    def transition(
        dtype: torch.dtype, before: int, split: int, pixelwise: bool, raster: int | None
    ):
        after = before + 3 * split
        x, out = (new(batch, count, 64, dtype=dtype) for count in (before, after))
        table, out_table = (new(batch, count, 3, dtype=torch.int32) for count in (before, after))
        rows = new(batch, split, dtype=torch.int32)
        noise = new(batch, after, 64, dtype=torch.float32)
        how = (0.2, 0.9, -0.1, 0.99, pixelwise, raster)
        return lambda architecture: resolution_transition(
            x, table, rows, noise, *how, out, out_table
        )

    def mixture(width: int, dtype: torch.dtype, gated: bool):
        t = new(batch, tokens, width, dtype=dtype)
        r, gate = new(1, dtype=torch.float32), new(batch, width, dtype=dtype) if gated else None
        return lambda architecture: blend(t, t, r, t if gated else None, gate, None, t)

    def mixture_backward(width: int, dtype: torch.dtype, gated: bool):
        t = new(batch, tokens, width, dtype=dtype)
        r, gate = new(1, dtype=torch.float32), new(batch, width, dtype=dtype) if gated else None
        return lambda architecture: blend_backward(t, t, t, r, gate, t, t, r)

    def sums(
        width: int, count: int, dtype: torch.dtype, groups: int, weighed: torch.dtype | None = None
    ):
        branches = [new(batch, tokens, width, dtype=dtype)] * count
        weights = [new(batch, width, dtype=weighed or dtype)] * count
        found = new(groups, batch, tokens, width, dtype=torch.float32)
        members = [i % groups for i in range(count)]
        return lambda architecture: collapse(branches, weights, members, False, found)

    def product(width: int, dtype: torch.dtype, halves: bool):
        both = new(batch, tokens, 2 * width, dtype=dtype)
        gate, value = both.chunk(2, -1) if halves else [new(batch, tokens, width, dtype=dtype)] * 2
        return lambda architecture: swiglu(gate, value, gate)

    def attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, queries: int = tokens):
        q = new(batch, queries, heads, dim, dtype=dtype)
        k = new(batch, layout, kv_heads, dim, dtype=dtype)

        def call(architecture: int) -> None:
            sparse_attention(q, k, k, dim**-0.5, q, shares=(0, 2))

        return call

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "gated_residual bf16 D3072 k1": residual(3072, 1, bf16, False),
        "gated_residual bf16 D1152 k8 rows cache": residual(1152, 8, bf16, True),
        "gated_residual bf16 D1536 k64": residual(1536, 64, bf16, False),
        "gated_residual fp32 D2432 k2 rows cache": residual(2432, 2, fp32, True),
        "gated_residual bf16 D3072 k8 weights": residual(3072, 8, bf16, False, (8,)),
        "gated_residual bf16 D1536 k4 rows weights": residual(
            1536, 4, bf16, True, (4, batch, tokens)
        ),
        "gated_residual bf16 D5120 k1 fp32 gate": residual(5120, 1, bf16, False, gated=fp32),
        "norm_modulate bf16 D1152": norm(1152, bf16, False),
        "norm_modulate bf16 D1536 rms": norm(1536, bf16, False, rms=True),
        "norm_modulate fp16 D2304": norm(2304, fp16, False),
        "norm_modulate bf16 D2432 branch rows cache": norm(2432, bf16, True),
        "norm_modulate bf16 D3072 branch rows cache": norm(3072, bf16, True),
        "norm_modulate fp32 D3072 branch rows cache": norm(3072, fp32, True),
        "norm_modulate bf16 D3072 branch rows cache to fp8": norm(3072, bf16, True, fp8=True),
        "norm_modulate bf16 D5120 branch rows cache fp32 vectors": norm(
            5120, bf16, True, modulated=fp32
        ),
        "patchify bf16 packed": patches(bf16, True, False),
        "patchify fp32 latents": patches(fp32, False, False),
        "patchify bf16 latents drawn": patches(bf16, False, True),
        "resolution_transition bf16 compact": transition(bf16, 1024, 307, False, None),
        "resolution_transition bf16 compact pixels": transition(bf16, 1024, 307, True, None),
        "resolution_transition bf16 raster pixels": transition(bf16, 1945, 717, True, 64),
        "resolution_transition fp32 raster": transition(fp32, 1945, 717, False, 64),
        "blend bf16 D1152 gated": mixture(1152, bf16, True),
        "blend fp32 D1536": mixture(1536, fp32, False),
        "blend_backward bf16 D1152 gated": mixture_backward(1152, bf16, True),
        "blend_backward fp32 D1536": mixture_backward(1536, fp32, False),
        "collapse bf16 D1152 k8 in 3": sums(1152, 8, bf16, 3),
        "collapse fp32 D1152 k28 in 3": sums(1152, 28, fp32, 3),
        "collapse bf16 D5120 k4 in 3 fp32 weights": sums(5120, 4, bf16, 3, weighed=fp32),
        "swiglu bf16 D6144": product(6144, bf16, False),
        "swiglu fp16 D9216 halves": product(9216, fp16, True),
        "swiglu fp32 D6144": product(6144, fp32, False),
        "token_change bf16 packed rows": change(bf16, False, True),
        "token_change fp16 latents": change(fp16, True, False),
        "token_change fp32 latents rows": change(fp32, True, True),
        "token_select bf16 packed": select(bf16, False, "std"),
        "token_select fp16 latents age": select(fp16, True, "std", 5),
        "token_select fp32 latents l2norm": select(fp32, True, "l2norm"),
        "qkv_prologue bf16 24x128 rms rotated rows": prologue(24, 24, 128, bf16, "rms", True),
        "qkv_prologue fp16 24x64 rms": prologue(24, 24, 64, fp16, "rms", False),
        "qkv_prologue bf16 24/8x96 rms rotated rows": prologue(24, 8, 96, bf16, "rms", True),
        "qkv_prologue bf16 40x128 rms_across rotated rows": prologue(
            40, 40, 128, bf16, "rms_across", True
        ),
        "qkv_prologue bf16 32/8x72 layer rotated": prologue(32, 8, 72, bf16, "layer", False),
        "qkv_prologue bf16 32/0x72 layer rotated": prologue(32, 0, 72, bf16, "layer", False),
        "qkv_prologue bf16 16x72 copied": prologue(16, 16, 72, bf16, None, False),
        "qkv_prologue fp32 24x128 rms rotated rows": prologue(24, 24, 128, fp32, "rms", True),
        "sparse_attention bf16 24x128": attention(24, 24, 128, bf16),
        "sparse_attention fp16 24x64": attention(24, 24, 64, fp16),
        "sparse_attention bf16 24/8x96": attention(24, 8, 96, bf16),
        "sparse_attention bf16 32/8x72": attention(32, 8, 72, bf16),
        "sparse_attention bf16 24x128 64 queries": attention(24, 24, 128, bf16, 64),
        "sparse_attention bf16 24x128 1 query": attention(24, 24, 128, bf16, 1),
        "sparse_attention bf16 8x256": attention(8, 8, 256, bf16),
        "sparse_attention fp32 24x128": attention(24, 24, 128, fp32),
    }


@contextlib.contextmanager
def compile_only(architecture: int) -> Iterator[list[Any]]:
    """Within it, launches compile for `architecture` and append the compiled kernel.

    The stated driver stays: a process that compiled this way launches nothing afterwards.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = run
    driver.set_active(StatedDriver(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = stock


def usage(kernel: Any) -> Usage:
    """Read the cubin of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        (found,) = usages(cubin).values()
    return dataclasses.replace(found, shared=kernel.metadata.shared)  # asked for at launch


def measure(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Usage]:
    """Compile every instance for every architecture, with an empty cache."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for architecture in architectures:
            for name, call in instances().items():
                with compile_only(architecture) as compiled:
                    call(architecture)
                for kernel in compiled:
                    part = f" {kernel.name}" if len(compiled) > 1 else ""
                    found[f"{name}{part} sm_{architecture}"] = usage(kernel)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the budget")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    try:
        from triton import __version__ as version
    except ImportError as error:
        sys.exit(f"triton is not installed: {error}")
    return hold(BUDGET, "triton", version, measure(), arguments.update)


if __name__ == "__main__":
    sys.exit(main())
