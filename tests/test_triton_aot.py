"""The compiled Triton kernels, without a GPU: their resources, and what makes a new kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (triton==3.7.1)"
)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder where only the installed package can be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(TOOLS), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.kernels
@needs_triton
def test_every_kernel_is_within_budget(tmp_path):
    done = run(tmp_path, str(TOOLS / "triton_aot.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    budget = json.loads((TOOLS / "triton_budget.json").read_text())
    assert done.stdout.count("ok  ") == len(budget["kernels"])


@needs_triton
def test_arguments_are_as_compiled_and_sizes_make_no_new_kernels(tmp_path):
    """Only D, the dtype and the form of the arguments are compiled in."""
    code = """
import os, re, tempfile, torch
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
from triton_aot import compile_only
from triton_kernels.gated_residual import gated_residual
from triton_kernels.norm_modulate import norm_modulate
with compile_only(90) as compiled:
    for batch, tokens in ((2, 16), (1, 1), (3, 4095)):
        x = torch.empty(batch, tokens, 64, dtype=torch.float16, device="meta")
        gate = torch.empty(batch, 64, dtype=torch.float16, device="meta")
        gated_residual(x, [x], [gate], -1, None, None, x)
        norm_modulate(x, gate, gate, None, None, 1e-6, False, None, None, None, None, x)
gated, norm = compiled[::2], compiled[1::2]
assert len(gated) == len(norm) == 3
# A single sample broadcasts with a stride of 0, which divides by 16 as D does.
assert len({kernel.hash for kernel in gated}) == 1, gated
assert len({kernel.hash for kernel in norm}) == 1, norm

# What a launch unpacks from the nested operands is what the kernel takes, plus Triton's own two.
def flat(types):
    for t in types:
        yield from flat(t) if isinstance(t, tuple) else [t]
for kernel in compiled[:2]:
    given = ["u64" if t[0] == "*" else t.replace("i", "u").replace("fp", "f")
             for t in flat(kernel.src.signature.values()) if t != "constexpr"]
    taken = re.findall(r"\\.param \\.(\\w+)", kernel.asm["ptx"].partition(")")[0])
    assert taken == given + ["u64", "u64"], (taken, given)
"""
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
