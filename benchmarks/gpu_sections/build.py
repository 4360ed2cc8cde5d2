"""The package built for the GPU at hand, and what its machine lacks: where nothing can be downloaded.

The driver does this itself, before anything can be imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_sections.order import ROOT, Answer, Order

BUILT = ROOT / "build" / "gpu"
WHEELS = ROOT / "build" / "wheels"
STAMP = "digest"
#: what the package is built from
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "tools/_backend.py")
FOLDERS = ("csrc", "fastdit", "triton_kernels")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q")
OFFLINE = ("--no-index", "--no-deps", "--upgrade", "--target")


def build(order: Order) -> Answer:
    """Rows for the wheels of a folder and for the package, built anew where its sources are others than before."""
    answer = Answer(promised=["package"])
    try:
        if order.wheels is not None:
            answer.promised.insert(0, "wheels")
            answer.rows.append({"name": "wheels", "unpacked": _unpack(order.wheels)})
        start = time.monotonic()
        row = _rehearsed(answer) if order.rehearsal else _built(order.seconds)
        answer.rows.append({"name": "package", **row, "seconds": time.monotonic() - start})
        answer.state = "done"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        answer.state, answer.why = "failed", f"{type(error).__name__}: {error}"
    return answer


def paths(answer: Answer, order: Order) -> tuple[str, list[str]]:
    """(what stands for the package, where the sections import from, the first first)."""
    wheels = [str(WHEELS)] if order.wheels is not None else []
    if order.rehearsal:
        return "installed", wheels
    if answer.state == "done":
        return "built", [str(BUILT), *wheels]
    return "the checkout, without compiled kernels", [*wheels, str(ROOT)]


def _unpack(folder: Path) -> list[str]:
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise RuntimeError(f"--wheels {folder}: there is no wheel in it")
    shutil.rmtree(WHEELS, ignore_errors=True)
    shell((*PIP, *OFFLINE, str(WHEELS), *map(str, wheels)), 60)
    return [wheel.name for wheel in wheels]


def _rehearsed(answer: Answer) -> dict[str, object]:
    answer.facts["stand-ins"] = ["the fastdit that is installed stands for one that is built"]
    return {"built": False}


def _built(seconds: float) -> dict[str, object]:
    command = (sys.executable, str(ROOT / "tools" / "gpu_arch.py"))
    arch = shell(command, seconds).strip()
    digest = _digest(arch)
    stamp = BUILT / STAMP
    if stamp.exists() and stamp.read_text() == digest:
        return {"built": False, "arch": arch}
    shutil.rmtree(BUILT, ignore_errors=True)
    options = (*OFFLINE, str(BUILT), "--no-build-isolation", str(ROOT))
    shell((*PIP, *options), seconds, FASTDIT_CUDA_ARCHS=arch)
    stamp.write_text(digest)
    return {"built": True, "arch": arch}


def _digest(arch: str) -> str:
    files = [ROOT / name for name in SOURCES]
    files += [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*"))]
    digest = hashlib.sha256(f"{arch} {sys.version}".encode())
    for path in files:
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            digest.update(f"{path.relative_to(ROOT)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def shell(command: tuple[str, ...], seconds: float, **environment: str) -> str:
    """What it printed.

    Raises:
        RuntimeError: It failed.
        subprocess.TimeoutExpired: It took too long.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # compilers too
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors[-2000:]}")
    return output
