"""bf16 for Triton's interpreter, which keeps it as uint16 and computes on the bit patterns.

Upstream, arithmetic on bf16 is silently wrong, and fp32 -> bf16 truncates where GPUs round to
nearest even. Here every operation on bf16 widens to fp32, computes and rounds, which is what one
GPU instruction does. A sum of bf16 is refused: kernels cast to fp32 first.

For speed, CPU tensors only: they are not copied back onto themselves after a launch, and
triton.language is patched once for the process instead of around every call.

Used as a pytest plugin (`-p interpreter`) in a process that has TRITON_INTERPRET=1 from its start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config) -> None:
    if not INTERPRETED:
        raise RuntimeError("the interpreter plugin needs TRITON_INTERPRET=1 from the start")
    # numpy warns where kernels meet NaN and infinity, which the tests feed them on purpose.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    install()


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bit patterns, rounded to nearest even; every NaN becomes a quiet one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter's builder once; kernels run unchanged."""
    import triton.language as tl
    from triton.runtime import interpreter as upstream

    builder, handle = upstream.InterpreterBuilder, upstream.TensorHandle
    stock = {name: getattr(builder, name) for name in ("create_dot", "unary_op", "cast_impl")}
    stock_binary, stock_sum = builder.binary_op, upstream.ReduceOps.sum

    def is_bf16(value) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def values(value) -> np.ndarray:
        return widen(value.data) if is_bf16(value) else value.data

    def wide(value):
        return handle(values(value), tl.float32) if is_bf16(value) else value

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = wide(a), wide(b)
        return stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) or is_bf16(rhs)):
            return stock_binary(self, lhs, rhs, op)
        result = op(values(lhs), values(rhs))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self, arg, op):
        if not is_bf16(arg):
            return stock["unary_op"](self, arg, op)
        return handle(narrow(op(values(arg))), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # overflow to inf is the right result
                return stock["cast_impl"](self, src, dst_type)
        if target == tl.bfloat16:
            return handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return handle(values(src).astype(upstream._get_np_dtype(dst_type)), target)

    def sum_of(self, tensor):
        if tensor.dtype.scalar == tl.bfloat16:
            raise TypeError("tl.sum of bf16: cast to fp32 first")
        return stock_sum(self, tensor)

    def as_they_are(self, args, kwargs):
        return list(args), kwargs

    def nothing(self, args, args_host, kwargs, kwargs_host):
        """Upstream copies whole storages back, which for CPU tensors is a copy onto themselves."""

    stock_patch, patched_modules = upstream._patch_lang, set()

    def patch_lang_once(fn):
        seen = {v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core}
        if not seen <= patched_modules:
            patched_modules.update(seen)
            stock_patch(fn)
        return upstream._LangPatchScope()  # of no changes, so that nothing is restored

    for name, patched in (
        ("create_dot", create_dot),
        ("binary_op", binary_op),
        ("unary_op", unary_op),
        ("cast_impl", cast_impl),
    ):
        setattr(builder, name, patched)
    upstream.ReduceOps.sum = sum_of
    upstream._patch_lang = patch_lang_once
    upstream.GridExecutor._init_args_hst = as_they_are
    upstream.GridExecutor._restore_args_dev = nothing


@contextlib.contextmanager
def debug_build() -> Iterator[None]:
    """Kernels as TRITON_DEBUG=1 would compile them: assertions hold, integers may not overflow."""
    from triton.runtime.interpreter import interpreter_builder as builder

    release = builder.options
    builder.options = dataclasses.replace(release, debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = release
