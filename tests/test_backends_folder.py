"""A backend is one file: put beside the others it is found by the tests of the ops that it serves, and by no others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastdit

HERE = Path(__file__).parent
TOY = '''
"""gated_residual in fp64, rounded once."""
import torch
from fastdit.backends.base import Backend
from fastdit.backends.reference import gather_rows, per_token, scatter_rows

class Toy(Backend):
    name = "toy"
    priority = -1

    def supports(self, op, device, dtype):
        if op != "gated_residual":
            return f"it has gated_residual, not {op}"
        return None if dtype is torch.float32 else f"it has float32, not {dtype}"

    def gated_residual(self, x, branches, gates, fresh, cache, rows, out, weights=None):
        if cache is not None:
            scatter_rows(cache, rows, branches[fresh])
        total = x.double()
        for i, (branch, gate) in enumerate(zip(branches, gates)):
            if rows is not None and i != fresh:
                branch = gather_rows(branch, rows)
            if weights is not None:
                branch = branch.double() * (weights[i] if weights.ndim == 1 else weights[i][..., None])
            total = total + branch.double() * (1.0 if gate is None else per_token(gate).double())
        out.copy_(total)

BACKEND = Toy()
'''


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_a_new_file_is_a_new_backend(wrong, tmp_path):
    package = Path(fastdit.__file__).parent
    shutil.copytree(package, tmp_path / "fastdit", ignore=shutil.ignore_patterns("assets"))
    text = TOY.replace("branch.double() *", "branch.double() * 1.001 *") if wrong else TOY
    (tmp_path / "fastdit" / "backends" / "toy.py").write_text(text)
    files = [str(HERE / f"test_{op}.py") for op in ("gated_residual", "collapse")]
    options = ["-q", "-p", "no:cacheprovider", "-rs", "-k", "toy and (sizes or cache or rows)"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "it has gated_residual, not collapse" in done.stdout, done.stdout + done.stderr
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    if wrong:
        assert "Mismatch: gated_residual on toy" in done.stdout
        assert counts["failed"] >= 1
    else:
        assert done.returncode == 0, done.stdout
        assert counts["passed"] >= 5
        assert counts["skipped"] >= 1
