"""The budgets of the compiled kernels: what they cover and allow, and that they bind."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit import ops

TOOLS = Path(__file__).parents[1] / "tools"
ROOT = TOOLS.parent
#: where each budget's kernels are; those of an op have its name
SOURCES = {
    "cuda": (ROOT / "csrc").glob("*.cu"),
    "triton": (ROOT / "triton_kernels").glob("*.py"),
}
OPS = {name: {p.stem for p in found} & set(ops.FILES) for name, found in SOURCES.items()}


@pytest.fixture
def tool(monkeypatch):
    """tools/<name>.py as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def budget(name: str) -> dict[str, dict[str, int]]:
    return json.loads((TOOLS / f"{name}_budget.json").read_text())["kernels"]


@pytest.mark.slow
@pytest.mark.kernels
def test_every_cuda_kernel_is_within_budget(tool, tmp_path):
    aot = tool("cuda_aot")
    if aot.nvcc() is None:
        pytest.skip("nvcc is not installed")
    if tool("budget").cuobjdump() is None:
        pytest.skip("triton is not installed, whose cuobjdump reads the kernels")
    paths = (str(TOOLS), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(TOOLS / "cuda_aot.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == len(budget("cuda"))


@pytest.mark.parametrize("name", OPS)
def test_it_covers_every_op_on_every_architecture(name, tool):
    for architecture in tool(f"{name}_aot").ARCHITECTURES:
        for op in OPS[name]:
            assert any(k.startswith(op) and k.endswith(f"sm_{architecture}") for k in budget(name))


@pytest.mark.parametrize("name", OPS)
def test_it_allows_no_spill_and_no_stack(name):
    for kernel, allowed in budget(name).items():
        assert allowed["spills"] == allowed["stack"] == 0, kernel


def test_only_the_row_index_is_read_in_small_pieces():
    for kernel, allowed in budget("triton").items():
        # These read words one by one: they are few, and a view has any strides. So does what adds
        # parts up: of attention two words for each of its rows, of a gradient one for each block.
        # And of weights one for each branch.
        few = ("token_change", "token_select", "patchify", "resolution_transition")
        adds = any(name in kernel for name in ("added_parts", "sum_kernel", "weights"))
        if not kernel.startswith(few) and not adds:
            # In fp8 each of the six pieces of a row is written in narrower ones, and a number a row.
            fp8 = 7 if "to fp8" in kernel else 0
            assert allowed["narrow"] <= 2 + fp8, kernel
    for kernel, allowed in budget("cuda").items():
        # gated_residual's other form, for a transposed x, is in the same kernel.
        # In fp32 a vector of qkv_prologue has two pairs: 8 bytes of cos and sin.
        wide = kernel.startswith("norm_modulate") or (
            kernel.startswith("qkv_prologue") and "fp32" not in kernel
        )
        if wide and "aligned" in kernel:
            # In fp8 half as many bytes are written as are read, once a vector, and a number a row.
            fp8 = 1 + int(kernel.split()[2][1:]) if kernel.partition("to fp8")[1] else 0
            assert allowed["narrow"] <= 2 + fp8, kernel


@pytest.mark.parametrize("field", ["registers", "stack", "shared", "spills", "narrow"])
def test_one_more_than_the_budget_fails(field, tool):
    held_to = tool("budget")
    name = "gated_residual bf16 sm_90a"
    found = held_to.Usage(registers=32, stack=0, shared=0, spills=0, narrow=0)
    allowed = {"kernels": {name: dataclasses.asdict(found)}}
    assert held_to.complaints(name, found, allowed, True) == []
    more = dataclasses.replace(found, **{field: getattr(found, field) + 1})
    assert field in held_to.complaints(name, more, allowed, True)[0]
    held = field not in ("registers", "shared")
    assert bool(held_to.complaints(name, more, allowed, False)) == held


def test_a_kernel_without_budget_fails(tool):
    held_to = tool("budget")
    found = held_to.Usage(32, 0, 0, 0, 0)
    assert "no budget" in held_to.complaints("new sm_90", found, {"kernels": {}}, True)[0]


def test_more_shared_memory_than_the_device_has_fails(tool):
    held_to = tool("budget")
    name, found = "large sm_80", held_to.Usage(32, 0, 200_000, 0, 0)
    allowed = {"kernels": {name: dataclasses.asdict(found)}}
    assert "200000 > 166912" in held_to.complaints(name, found, allowed, True)[0]
