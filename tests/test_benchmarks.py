"""Every benchmark runs, at a tiny size and untimed; what a GPU would measure is rehearsed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("op", ["gated_residual", "norm_modulate", "qkv_prologue", "token_select"])
def test_op_benchmark_runs(op, tmp_path):
    # -P: the folder the command is given in stays off the path.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "not inductor", str(BENCHMARKS / f"bench_{op}.py")]
    environment = {**os.environ, "FASTDIT_BENCH_SHAPES": "tiny"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def run(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks, which finds its neighbours and the installed package only."""
    environment = os.environ | {"PYTHONPATH": _path(BENCHMARKS)}
    command = [sys.executable, "-P", str(BENCHMARKS / script), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _path(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """The file that a whole `gpu_check` writes on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run("gpu_check.py", folder, "--out", str(folder / "result.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "result.json"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="not a rehearsal: a GPU is here")
def test_what_a_gpu_would_measure_is_rehearsed(rehearsed, monkeypatch):
    result = json.loads(rehearsed.read_text())
    assert result["rehearsal"] is True
    assert result["tests"]["passed"]
    assert not [name for name, found in result.items() if name != "rehearsal" and "error" in found]
    for row in result["ops"]["rows"]:
        assert set(row["us"]) >= {"eager", "cpu"}, row
        assert not set(row["failed"]) - {"compile"}, row
    assert len(result["steps"]["rows"]) == 5
    for row in result["steps"]["rows"]:
        assert "fastdit every(2), a reused step" in row["ms"]
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "tools"))
    lines = importlib.import_module("readme").gpu(result)
    assert sum(line.startswith("| gated_residual") for line in lines) == 3
    assert sum(line.startswith("| FLUX.1-dev") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="not a rehearsal: a GPU is here")
def test_a_rehearsal_is_not_taken_for_a_measurement(rehearsed, tmp_path):
    done = run("roofline.py", tmp_path, "--results", str(rehearsed))
    assert done.returncode != 0
    assert "rehearsal" in done.stderr


@pytest.mark.slow
def test_the_benchmark_of_ras_runs(tmp_path):
    out = tmp_path / "ras.json"
    sizes = ["--depth", "1", "--tokens", "256", "--pairs", "1"]
    done = run("bench_ras.py", tmp_path, "--out", str(out), *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["active"] for row in result["rows"]] == [128, 64, 64]
    assert result["rows"][0]["flop_speedup"] == pytest.approx(1.63, abs=0.01)


@pytest.mark.slow
def test_roofline_counts_what_public_models_cost(tmp_path):
    """TFLOP of a dense step, counted by others with a dispatch trace of stock diffusers."""
    done = run("roofline.py", tmp_path)
    assert done.returncode == 0, done.stderr
    dense = dict(re.findall(r"\| ([^|]+) \| dense \| ([\d.]+) ", done.stdout))
    counted = {"FLUX.1-dev 1024": 74.4, "SD3 medium 1024": 17.8, "SD3.5 large 1024": 62.2}
    counted |= {"PixArt-Sigma 1024": 13.3, "DiT-XL/2 512": 2.10}
    assert set(dense) == set(counted)
    for model, tflop in counted.items():
        assert float(dense[model]) == pytest.approx(tflop, rel=0.01), model


def test_a_race_times_each_contender_and_checks_itself():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from timing import race
    finally:
        sys.path.pop(0)
    calls: dict[str, list[int]] = {"a": [], "b": []}

    def broken(i: int) -> None:
        raise RuntimeError("no kernel")

    contenders = {"a": calls["a"].append, "b": calls["b"].append, "broken": broken}
    found = race(contenders, 3, torch.device("cpu"), turns=4)
    assert set(found.seconds) == {"a", "b"}
    assert found.failed == {"broken": "RuntimeError: no kernel"}
    assert found.self_check is not None
    # Warm-up, then a turn that is not counted and four that are; `a` runs twice in each.
    assert calls["b"] == [0, 1, 2] * 6
    assert calls["a"] == [0, 1, 2] * 12
