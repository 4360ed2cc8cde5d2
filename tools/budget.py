"""What a compiled kernel takes of a GPU, read from its cubin, and the budget it is held to.

Registers and shared memory move with the compiler, so they are held to the budget only under the
compiler version that the budget names. Spills, stack and narrow accesses are held under every one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

# Bytes of shared memory one block may have, by compute capability.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    stack: int
    shared: int
    spills: int  # LDL and STL in the SASS
    narrow: int  # global loads and stores below 16 bytes


def cuobjdump() -> str | None:
    """The one of the triton wheel; the CUDA toolkit may have none."""
    try:
        import triton
    except ImportError:
        return None
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def usages(cubin: Path) -> dict[str, Usage]:
    """Mangled name -> usage of every kernel of a cubin."""

    def dump(option: str) -> str:
        command = [str(cuobjdump()), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found = {}
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", dump("-sass"), re.S))
    resources = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(resources, dump("--dump-resource-usage")):
        accesses = re.findall(r"\b(?:LDG|STG)\.\S+", code[name])
        found[name] = Usage(
            registers=int(registers),
            stack=int(stack),
            shared=int(shared),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", code[name])),
            narrow=sum(".128" not in access for access in accesses),
        )
    if not found:
        raise RuntimeError(f"cuobjdump: no kernels in {cubin}")
    return found


def complaints(name: str, found: Usage, budget: dict[str, Any], same_version: bool) -> list[str]:
    """What is over budget; `name` ends in sm_ and an architecture."""
    allowed = budget["kernels"].get(name)
    if allowed is None:
        return ["no budget: run with --update"]
    names = ["stack", "spills", "narrow"] + (["registers", "shared"] if same_version else [])
    over = [
        f"{field} {getattr(found, field)} > {allowed[field]}"
        for field in names
        if getattr(found, field) > allowed[field]
    ]
    limit = SHARED_LIMIT[int(name.rpartition("_")[2].rstrip("a"))]
    return over + ([f"shared {found.shared} > {limit}"] if found.shared > limit else [])


def render(compiler: str, version: str, found: dict[str, Usage]) -> str:
    """A budget file: what was found, registers in the eights that hardware hands out."""
    kernels = {}
    for name, value in found.items():
        eights = -(-value.registers // 8) * 8
        kernels[name] = dataclasses.asdict(dataclasses.replace(value, registers=eights))
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
    return f'{{\n "{compiler}": {json.dumps(version)},\n "kernels": {{\n{lines}\n }}\n}}\n'


def hold(path: Path, compiler: str, version: str, found: dict[str, Usage], update: bool) -> int:
    """Print every kernel beside its budget; 1 if one is over, else 0. `update` writes the budget."""
    if update:
        path.write_text(render(compiler, version, found))
    budget = json.loads(path.read_text())
    same_version = budget[compiler] == version
    failed = False
    for name, value in found.items():
        over = complaints(name, value, budget, same_version)
        failed |= bool(over)
        figures = " ".join(f"{k} {v}" for k, v in dataclasses.asdict(value).items())
        print(f"{'FAIL' if over else 'ok  '} {name:52} {figures} {'; '.join(over)}")
    if not same_version:
        print(f"registers not compared: the budget is for {compiler} {budget[compiler]}")
    return int(failed)
