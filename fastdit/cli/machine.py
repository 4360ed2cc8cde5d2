"""What fastdit can run on here: the backends, what each serves on each device, and what was
compiled.

Only looks; nothing is built, and no kernel runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Sequence

import torch

from fastdit import ops
from fastdit.errors import BackendError
from fastdit.ops.registry import ENVIRONMENT
from fastdit.schedules.plan import OPS

DTYPES = ("float32", "bfloat16", "float16", "float64")


def devices() -> tuple[str, ...]:
    """Torch can use these types of device here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def describe(device: str) -> str:
    """This says in words what a device is, with the number of threads where that matters."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads > 1)})"


def backend_rows() -> list[tuple[str, str, Sequence[str]]]:
    """Rows are (backend, device, per dtype what it serves there), and what automatic resolution picks."""
    rows: list[tuple[str, str, Sequence[str]]] = []
    for device in devices():
        for name in sorted(ops.BACKENDS, key=lambda n: -ops.BACKENDS[n].priority):
            rows.append((name, device, [_served(name, device, dtype) for dtype in DTYPES]))
        rows.append(("(automatic)", device, [_picked(device, dtype) for dtype in DTYPES]))
    return rows


def refusals() -> list[tuple[str, str]]:
    """Each backend that serves nothing on any device here has (backend, why)."""
    found = []
    for name, backend in ops.BACKENDS.items():
        reasons = [
            backend.supports(op, torch.device(device), getattr(torch, dtype))
            for device in devices()
            for dtype in DTYPES
            for op in OPS
        ]
        if all(reasons):
            found.append((name, str(reasons[0])))
    return found


def built() -> list[tuple[str, str]]:
    """The compiled modules, the libraries they meet, and the environment have (part, what it is)."""
    triton = importlib.util.find_spec("triton")
    cuda = torch.version.cuda or "without CUDA"
    return [
        ("fastdit._C", _module("fastdit._C", "build_info")),
        ("fastdit._cuda", _module("fastdit._cuda", "info")),
        ("triton", importlib.import_module("triton").__version__ if triton else "not installed"),
        ("torch", f"{torch.__version__}, CUDA {cuda}" if torch.version.cuda else torch.__version__),
        ("devices", ", ".join(describe(device) for device in devices())),
        ("python", platform.python_version()),
        (ENVIRONMENT, os.environ.get(ENVIRONMENT) or "not set"),
    ]


def _served(name: str, device: str, dtype: str) -> str:
    backend = ops.BACKENDS[name]
    served = [
        op for op in OPS if not backend.supports(op, torch.device(device), getattr(torch, dtype))
    ]
    if len(served) == len(OPS):
        return "yes"
    return ", ".join(served) or "-"


def _picked(device: str, dtype: str) -> str:
    bound = ops.bind()
    picked = []
    for op in OPS:
        try:
            picked.append(bound.backend_for(op, device, getattr(torch, dtype)))
        except BackendError:
            picked.append("-")
    return ", ".join(dict.fromkeys(picked))


def _module(name: str, function: str) -> str:
    """This says a compiled module's own facts, or that it is not there."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"not built ({error})"
    found = getattr(module, function)()
    return ", ".join(
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in found.items()
    )
