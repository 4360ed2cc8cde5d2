"""The CUDA kernels' own source as a backend on the CPU: csrc compiled with csrc/emulation.h.

`build()` compiles what the checkout holds; `build({"file": text})` compiles with other text in some
files, which is how faults are planted. Objects are kept under build/emulation by what went in.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from fastdit.backends._compiled import DTYPE_CODES
from fastdit.backends.cuda import Cuda

CSRC = Path(__file__).parents[1] / "csrc"
BUILT = CSRC.parent / "build" / "emulation"
KERNELS = tuple(sorted(p.name for p in CSRC.glob("*.cu") if "__global__" in p.read_text()))
HOST = ("bindings_cuda.cpp", "emulation.cpp")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DFD_EMULATE",
    '-DFD_CUDA_ARCHS="emulated"',
)


class Emulated(Cuda):
    """The backend `cuda` on tensors of the CPU."""

    name = "cuda emulated"

    def supports(self, op, device, dtype):
        if device.type != "cpu":
            return f"the emulator runs on the cpu, not on {device.type}"
        return None if dtype in DTYPE_CODES else f"it has no {dtype}"

    def _context(self, x, stored):
        return 0, 0


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def compile_command(source: Path, target: Path, *options: str) -> list[str]:
    """g++ for one file of csrc, or one beside it, whatever it is called."""
    return ["g++", *FLAGS, *options, "-x", "c++", "-c", str(source), "-o", str(target)]


@functools.cache
def emulated() -> Emulated:
    """The kernels of this checkout."""
    return build()


def build(changes: Mapping[str, str] | None = None) -> Emulated:
    """Compile, with `changes` of files of csrc by name, and load."""
    import pybind11

    checkout = {p.name: p.read_text() for p in sorted(CSRC.iterdir()) if p.is_file()}
    changed = checkout | dict(changes or {})
    include = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"]]
    BUILT.mkdir(parents=True, exist_ok=True)

    def compiled(name: str) -> Path:
        # Faults are in kernels and what they include; the host's side stays as it is.
        sources = checkout if name in HOST else changed
        text = "".join(sources[other] for other in sorted(_with_headers(name, sources)))
        target = BUILT / f"{Path(name).stem}-{_digest(text, *FLAGS, *include)}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILT) as folder:
                for other, content in sources.items():
                    Path(folder, other).write_text(content)
                made = Path(folder, "made.o")
                subprocess.run(compile_command(Path(folder, name), made, *include), check=True)
                os.replace(made, target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, (*HOST, *KERNELS)))
    library = BUILT / f"_emulated-{_digest(*map(str, objects))}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(made)], check=True)
        os.replace(made, library)
    return Emulated(_load(library))


def _with_headers(name: str, sources: Mapping[str, str]) -> set[str]:
    """A file and all of csrc that it includes."""
    found, left = set(), [name]
    while left:
        file = left.pop()
        if file not in found and file in sources:
            found.add(file)
            left += re.findall(r'^#include "(.+)"', sources[file], re.M)
    return found


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _load(library: Path) -> ModuleType:
    # pybind11 keeps modules by name and would hand out the first one again.
    spec = importlib.util.spec_from_file_location(f"{library.stem}._emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
