"""Compile every CUDA kernel for GPUs that need not be here, and hold it to a budget.

    python tools/cuda_aot.py             # compare with tools/cuda_budget.json
    python tools/cuda_aot.py --update    # write what was found as the new budget

Needs nvcc, and the cuobjdump of the triton wheel. An aligned kernel may read the row index, and x
where it is transposed, in small pieces; so do token_change, token_select, patchify and
resolution_transition all they need, which is little and of any strides. What is written in fp8 goes
in as many bytes as 16 bytes have elements, with a number for each row. Everything else goes in 16
bytes at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from budget import Usage, cuobjdump, hold, usages

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHITECTURES = ("80", "89", "90a", "100a", "120")
KERNELS = sorted(p.stem for p in (ROOT / "csrc").glob("*.cu") if "__global__" in p.read_text())


def nvcc() -> str | None:
    """Where setup.py looks for it."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").exists():
            return str(Path(home, "bin/nvcc"))
    return shutil.which("nvcc")


def compile_for(architecture: str, op: str, folder: Path) -> dict[str, Usage]:
    """The kernels of one file, by a name that says what each is an instance of."""
    cubin = folder / f"{op}-{architecture}.cubin"
    command = [str(nvcc()), "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3"]
    command += [str(ROOT / "csrc" / f"{op}.cu"), "-o", str(cubin)]
    subprocess.run(command, check=True)
    return {f"{readable(k)} sm_{architecture}": v for k, v in sorted(usages(cubin).items())}


def readable(mangled: str) -> str:
    """gated_residual_kernel<fd::bf16, 2, true, true, true> as `gated_residual bf16 x2 aligned weighted wide`,
    collapse_kernel<fd::bf16, float, true, false> as `collapse bf16 fp32 aligned`,
    patchify_kernel<fd::bf16> as `patchify bf16`, token_keys_kernel<fd::bf16> as
    `token_select keys bf16`, token_change_kernel<fd::bf16> as `token_change bf16`."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    counted = (
        r"(\w+)_kernel<(?:fd::)?(\w+), (\d+), (true|false)(?:, (true|false))?(?:, (true|false))?>"
    )
    if found := re.search(counted, name):
        op, dtype, count, aligned, also, wide = found.groups()
        form = (" to fp8" if op.endswith("norm_modulate") else " weighted") * (also == "true")
        form += " wide" * (wide == "true")
        return f"{op} {_short(dtype)} x{count} {'aligned' if aligned == 'true' else 'any'}{form}"
    if found := re.search(r"(patchify|resolution_transition)_kernel<(?:fd::)?(\w+)>", name):
        return f"{found[1]} {_short(found[2])}"
    if found := re.search(
        r"(\w+)_kernel<((?:(?:fd::)?\w+, )+?)(true|false)(?:, (true|false))?>", name
    ):
        op, dtypes, aligned, wide = found.groups()
        types = " ".join(_short(t.removeprefix("fd::")) for t in dtypes.split(", ")[:-1])
        return (
            f"{op} {types} {'aligned' if aligned == 'true' else 'any'}{' wide' * (wide == 'true')}"
        )
    if re.search(r"\bsum_kernel\(", name):
        return "blend_backward sum"
    if found := re.search(r"token_change_kernel<(?:fd::)?(\w+)>", name):
        return f"token_change {_short(found[1])}"
    if found := re.search(r"token_(\w+)_kernel(?:<(?:fd::)?(\w+)>)?\(", name):
        part = {"select": "rows"}.get(found[1], found[1])
        return f"token_select {part} {_short(found[2] or '')}".rstrip()
    raise RuntimeError(f"a kernel of an unknown form: {name.strip()}")


def _short(dtype: str) -> str:
    return {"float": "fp32"}.get(dtype, dtype)


def measure() -> dict[str, Usage]:
    """Every kernel on every architecture."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_for, architecture, op, Path(folder))
            for architecture in ARCHITECTURES
            for op in KERNELS
        ]
        return {name: usage for job in jobs for name, usage in job.result().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the budget")
    arguments = parser.parse_args()
    if nvcc() is None:
        sys.exit("nvcc is not installed")
    if cuobjdump() is None:
        sys.exit("triton is not installed, whose cuobjdump reads the kernels")
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    return hold(BUDGET, "nvcc", version[1] if version else "?", measure(), arguments.update)


if __name__ == "__main__":
    sys.exit(main())
