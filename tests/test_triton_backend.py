"""The triton backend's words and the launch table: what needs neither triton nor a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from fastdit.backends.triton import BACKEND
from fastdit.errors import BackendError
from fastdit.ops import BACKENDS, bind
from triton_kernels import launch as table
from triton_kernels.launch import BUCKETS, Launch, bucket, launch_for, programs

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (triton==3.7.1)"
)


def test_it_is_found_and_ranks_above_reference_only():
    assert BACKENDS["triton"] is BACKEND
    assert BACKENDS["reference"].priority < BACKEND.priority < BACKENDS["cpu"].priority


def test_fastdit_works_where_triton_cannot_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastdit, fastdit.ops\n"
        "backend = fastdit.ops.BACKENDS['triton']\n"
        "reason = backend.supports('gated_residual', torch.device('cuda'), torch.bfloat16)\n"
        "assert 'not installed' in reason, reason\n"
        "x = torch.zeros(1, 2, 8)\n"
        "fastdit.ops.gated_residual(x, [x.clone()], [None])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_kernels_are_imported_at_first_use_only(tmp_path):
    code = (
        "import sys, torch, fastdit, fastdit.ops\n"
        "for backend in fastdit.ops.BACKENDS.values():\n"
        "    backend.supports('gated_residual', torch.device('cpu'), torch.bfloat16)\n"
        "assert not [name for name in sys.modules if name.startswith('triton_kernels')]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_tensors_only_where_kernels_are_interpreted(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in BACKEND.supports("norm_modulate", CPU, dtype)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.supports("norm_modulate", CPU, dtype) is None


def test_fp64_is_refused():
    assert "not float64" in BACKEND.supports("norm_modulate", CUDA, torch.float64)


def test_a_missing_triton_is_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in BACKEND.supports("gated_residual", CUDA, torch.float32)


@needs_triton
def test_without_a_device_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in BACKEND.supports("gated_residual", CUDA, torch.float32)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in BACKEND.supports("gated_residual", CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "has 7.5" in BACKEND.supports("gated_residual", CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert BACKEND.supports("gated_residual", CUDA, torch.float32) is None


@needs_triton
def test_naming_it_on_a_cpu_is_an_error_and_never_a_fallback(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 8)
    with pytest.raises(BackendError, match="'triton' cannot run gated_residual"):
        bind("triton").gated_residual(x, [x], [None])


@pytest.mark.parametrize("width", [1, 7, 64, 255, 257, 768, 1151, *range(1152, 8192, 128)])
def test_the_rules_cover_every_width(width):
    for op, rule in table.RULES.items():
        launch = rule(width)
        assert launch == launch_for(op, width, 4096, 0)
        assert launch.rows * launch.cols >= 32 * launch.warps
    whole = table.whole_rows(width)
    pieces = -(-width // whole.cols)
    assert pieces <= 6
    assert pieces * whole.cols <= 48 * 32 * whole.warps // whole.rows or width < 1152
    assert whole.rows == 1 or width < 1152


@pytest.mark.parametrize("width", [1152, 1536, 2304, 2432, 3072])
def test_the_rules_idle_few_lanes_at_the_models_widths(width):
    for rule in table.RULES.values():
        padded = -(-width // rule(width).cols) * rule(width).cols
        assert padded - width <= padded / 8


def test_buckets_and_programs():
    assert [bucket(rows) for rows in (1, 256, 257, 16384, 10**9)] == [256, 256, 1024, 16384, 16384]
    assert list(BUCKETS) == sorted(BUCKETS)
    assert [programs(total, 4) for total in (1, 4, 5)] == [1, 1, 2]
    with pytest.raises(ValueError, match="rows: got 2147483647"):
        programs(2**31 - 1, 1)


@pytest.mark.parametrize("sizes", [(3, 16, 4), (1, 0, 4), (1, 16, -4)])
def test_a_launch_refuses_what_triton_cannot_tile(sizes):
    with pytest.raises(ValueError, match="power of two"):
        Launch(*sizes)
