"""docs/faults.md says of every planted fault where it is planted and which check finds it.

PYTHONPATH=tests python tests/test_fault_docs.py     # writes the tables anew
"""

from __future__ import annotations

import re
from pathlib import Path

import test_cuda_faults
import test_emulation
import test_faults
import triton_faults

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "faults.md"
KERNELS = ROOT / "triton_kernels"
HEAD = "| Fault | Planted in | Found by |\n|---|---|---|\n"


def words(name: str) -> str:
    """SwappedScale or swapped_scale as `swapped scale`."""
    return (
        re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).replace("_", " ").lower()
    )


def tables() -> dict[str, list[str]]:
    """Heading -> rows."""
    python = [
        f"| {words(fault.__name__)} | `{op}` of a backend in Python | {_names(checks)} |"
        for op, faults in test_faults.FAULTS.items()
        for fault, checks in faults.items()
    ]
    triton = [
        f"| {name} | `triton_kernels/{fault.op}.py` | {_names([fault.check])} |"
        for name, fault in triton_faults.FAULTS.items()
    ]
    cuda = [
        f"| {name} | `csrc/{fault.file}` | {_names([fault.check])} |"
        for name, fault in test_cuda_faults.FAULTS.items()
    ]
    emulator = [
        f"| {words(name)} | `tests/emulation_probe.cu` | {_names([test.__name__])} |"
        for test, names in test_emulation.FAULTS.items()
        for name in names
    ]
    return {
        "The checks themselves": python,
        "Triton kernels": triton,
        "CUDA kernels": cuda,
        "The emulator of CUDA kernels": emulator,
    }


def _names(checks) -> str:
    return ", ".join(f"`{check}`" for check in checks)


def render() -> str:
    """The tables with their headings."""
    return "\n".join(
        f"## {heading}\n\n{HEAD}" + "".join(f"{row}\n" for row in rows)
        for heading, rows in tables().items()
    )


def test_every_planted_fault_fits_its_source():
    """Only `make kernels` plants them."""
    for fault in test_cuda_faults.FAULTS.values():
        test_cuda_faults.planted(fault)
    for fault in triton_faults.FAULTS.values():
        source = (KERNELS / f"{fault.op}.py").read_text()
        for old, new in fault.changes:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
            source = source.replace(old, new)


def test_every_planted_fault_is_in_the_docs():
    assert DOCS.read_text().endswith(render()), (
        "run PYTHONPATH=tests python tests/test_fault_docs.py"
    )


if __name__ == "__main__":
    text = DOCS.read_text()
    DOCS.write_text(text[: text.index("## ")] + render())
