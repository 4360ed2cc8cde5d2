"""Planted faults: each is a wrong Triton kernel that one named check must find.

A fault (triton_faults.py) is a textual change of a kernel file that matches exactly once. The
changed copy is executed in the interpreter behind a backend of its own, and given to the check that
the table names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fastdit import ops
from fastdit.backends.triton import Triton
from inputs import Runner, checks_of
from interpreter import INTERPRETED

if not INTERPRETED:
    pytest.skip(
        "run by test_triton_interpreter.py, in a process with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import test_triton_kernels
import triton_kernels
from triton_faults import FAULTS, FP16, Fault


class Planted(Triton):
    """The triton backend with one of its kernels replaced, for one dtype."""

    name = "planted"

    def __init__(self, fault: Fault, module: ModuleType):
        self.fault, self.module = fault, module

    def supports(self, op, device, dtype):
        return None if dtype == self.fault.dtype else "another dtype finds this fault"

    def kernel(self, name: str, file: str | None = None) -> Callable[..., None]:
        planted = (file or name) == self.fault.op
        return getattr(self.module, name) if planted else super().kernel(name, file)


def planted(fault: Fault, folder: Path) -> Planted:
    """A backend that runs the changed copy of the kernel file."""
    source = Path(triton_kernels.__path__[0], f"{fault.op}.py").read_text()
    for old, new in fault.changes:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    path = folder / f"planted_{fault.op}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Planted(fault, module)


def check_of(fault: Fault) -> Callable[[Runner], None]:
    return (checks_of(fault.op) | test_triton_kernels.CHECKS)[fault.check]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, tmp_path):
    fault = FAULTS[name]
    backend = planted(fault, tmp_path)
    with pytest.raises(Exception) as found:
        check_of(fault)(Runner(backend, name))
    # A Mismatch or assertion of the check, or one of a debug build: not a kernel that cannot run.
    assert isinstance(found.value, AssertionError) or "AssertionError" in str(found.value)


@pytest.mark.parametrize("op", ops.FILES)
def test_a_copy_without_fault_passes(op, tmp_path):
    for fault in {f.check: f for f in FAULTS.values() if f.op == op}.values():
        control = Fault(op, (), fault.check, FP16)
        check_of(fault)(Runner(planted(control, tmp_path), "copy"))
