"""Compile every Triton kernel for GPUs that need not be here, and hold it to a budget.

    python tools/triton_aot.py             # compare with tools/triton_budget.json
    python tools/triton_aot.py --update    # write what was found as the new budget

The launchers of `triton_kernels` run as they do on a device, on meta tensors and with a driver that
only states an architecture, and stop where the compiled kernel would be launched. So what is
compiled is what a call compiles, argument types and alignments included. Read from the cubin, with
the cuobjdump of the triton wheel: registers, stack, shared memory, spills (LDL and STL in the SASS)
and global accesses narrower than 16 bytes.

Registers move with the compiler, so they are held to the budget only under the triton version that
the budget names. Spills, stack and narrow accesses are held under every version.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUDGET = Path(__file__).with_name("triton_budget.json")
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes one program may have


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    stack: int
    shared: int
    spills: int
    narrow: int  # global loads and stores below 16 bytes


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
    from triton_kernels.gated_residual import gated_residual
    from triton_kernels.launch import launch_for
    from triton_kernels.norm_modulate import norm_modulate

    batch, tokens, layout = 2, 1024, 4096

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def residual(width: int, count: int, dtype: torch.dtype, sparse: bool):
        x = new(batch, tokens, width, dtype=dtype)
        store = new(batch, layout, width, dtype=dtype)
        gate = new(batch, width, dtype=dtype)
        rows = new(batch, tokens, dtype=torch.int32) if sparse else None
        branches = [store if sparse and i else x for i in range(count)]

        def call(architecture: int) -> None:
            launch = launch_for("gated_residual", width, batch * tokens, architecture)
            cache = store if sparse else None
            fresh = 0 if sparse else -1
            gated_residual(x, branches, [gate] * count, fresh, cache, rows, x, launch=launch)

        return call

    def norm(width: int, dtype: torch.dtype, fused: bool, rms: bool = False):
        out = new(batch, tokens, width, dtype=dtype)
        store = new(batch, layout, width, dtype=dtype)
        row = new(batch, 1, width, dtype=dtype)
        x, cache, rows = out, None, None
        if fused:
            x, cache, rows = store, store, new(batch, tokens, dtype=torch.int32)

        def call(architecture: int) -> None:
            launch = launch_for("norm_modulate", width, batch * tokens, architecture)
            branch, gate = (out, row) if fused else (None, None)
            affine = (new(width, dtype=dtype), None) if rms else (None, None)
            modulation = (row, row, *affine, 1e-6, rms)
            norm_modulate(x, *modulation, branch, gate, cache, rows, out, launch=launch)

        return call

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "gated_residual bf16 D3072 k1": residual(3072, 1, bf16, False),
        "gated_residual bf16 D1152 k8 rows cache": residual(1152, 8, bf16, True),
        "gated_residual bf16 D1536 k64": residual(1536, 64, bf16, False),
        "gated_residual fp32 D2432 k2 rows cache": residual(2432, 2, fp32, True),
        "norm_modulate bf16 D1152": norm(1152, bf16, False),
        "norm_modulate bf16 D1536 rms": norm(1536, bf16, False, rms=True),
        "norm_modulate fp16 D2304": norm(2304, fp16, False),
        "norm_modulate bf16 D2432 branch rows cache": norm(2432, bf16, True),
        "norm_modulate bf16 D3072 branch rows cache": norm(3072, bf16, True),
        "norm_modulate fp32 D3072 branch rows cache": norm(3072, fp32, True),
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
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])

        def dump(option: str) -> str:
            command = [str(tool), option, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        resources, sass = dump("--dump-resource-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump: no resource usage in {resources!r}")
    accesses = re.findall(r"\b(?:LDG|STG)\.\S+", sass)
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        narrow=sum(".128" not in access for access in accesses),
    )


def measure(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Usage]:
    """Compile every instance for every architecture, with an empty cache."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for architecture in architectures:
            for name, call in instances().items():
                with compile_only(architecture) as compiled:
                    call(architecture)
                (kernel,) = compiled
                found[f"{name} sm_{architecture}"] = usage(kernel)
    return found


def complaints(name: str, found: Usage, budget: dict[str, Any], same_version: bool) -> list[str]:
    """What is over budget."""
    allowed = budget["kernels"].get(name)
    if allowed is None:
        return ["no budget: run with --update"]
    names = ["stack", "spills", "narrow"] + (["registers", "shared"] if same_version else [])
    over = [
        f"{field} {getattr(found, field)} > {allowed[field]}"
        for field in names
        if getattr(found, field) > allowed[field]
    ]
    limit = SHARED_LIMIT[int(name.rpartition("_")[2])]
    return over + ([f"shared {found.shared} > {limit}"] if found.shared > limit else [])


def render(version: str, found: dict[str, Usage]) -> str:
    """The budget file: what was found, registers in the eights that hardware hands out."""
    kernels = {}
    for name, value in found.items():
        eights = -(-value.registers // 8) * 8
        kernels[name] = dataclasses.asdict(dataclasses.replace(value, registers=eights))
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
    return f'{{\n "triton": {json.dumps(version)},\n "kernels": {{\n{lines}\n }}\n}}\n'


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
    found = measure()
    if arguments.update:
        BUDGET.write_text(render(version, found))
    budget = json.loads(BUDGET.read_text())
    same_version = budget["triton"] == version
    failed = False
    for name, value in found.items():
        over = complaints(name, value, budget, same_version)
        failed |= bool(over)
        figures = " ".join(f"{k} {v}" for k, v in dataclasses.asdict(value).items())
        print(f"{'FAIL' if over else 'ok  '} {name:52} {figures} {'; '.join(over)}")
    if not same_version:
        print(f"registers not compared: the budget is for triton {budget['triton']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
