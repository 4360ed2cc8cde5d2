"""Every op benchmark runs, at a tiny size and untimed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("op", ["gated_residual", "norm_modulate"])
def test_op_benchmark_runs(op, tmp_path):
    # -P: the folder the command is given in stays off the path.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "not inductor", str(BENCHMARKS / f"bench_{op}.py")]
    environment = {**os.environ, "FASTDIT_BENCH_SHAPES": "tiny"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
