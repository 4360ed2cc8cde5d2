"""What the wrappers of the CUDA kernels ask of the host, counted without a GPU: the model is on the meta device.

There the module of kernels is a stand-in that counts launches, and nothing has a value or an address. What a launch
costs is fastdit's Python calls beside those of a call without any.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

import fastdit
import tiny_models
from fastdit import Cached, Dense, Schedule
from fastdit.blocks import attention
from fastdit.ops import BACKENDS, checks, registry
from fastdit.runtime import run as run_module

STEPS = 4
METHODS = {"dense": lambda: Dense(), "reused": lambda: Cached(Schedule.every(2))}
#: Python calls of fastdit around a program, and of each launch in it
AROUND, OF_A_LAUNCH = 110, 8
FORMS = ["sd3", "sd3.5", "flux-dev", "pixart-sigma", "dit", "lumina"]


@pytest.fixture
def launched(monkeypatch):
    """Launches by the name of their kernel."""
    found = Counter()

    class Kernels:
        def __getattr__(self, name):
            def launch(*_):
                found[name] += 1

            return launch

    cuda = BACKENDS["cuda"]

    class Cuda(type(cuda)):
        def supports(self, op, device, dtype):
            return None

        def _context(self, x, stored):
            return 0, 0

    monkeypatch.setattr(cuda, "__class__", Cuda)
    monkeypatch.setattr(cuda, "module", Kernels())
    monkeypatch.setattr(attention, "fuses", lambda device: True)
    # What reads a value or an address of a tensor that has none.
    monkeypatch.setattr(checks, "disjoint", lambda *_: None)
    monkeypatch.setattr(torch, "equal", lambda a, b: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(run_module, "value_of", lambda timestep: 0.0)
    registry.choose.cache_clear()
    registry.resolve.cache_clear()
    yield found
    registry.choose.cache_clear()
    registry.resolve.cache_clear()


def counted(call, launched):
    """(fastdit's Python frames, launches) of a call."""
    frames = Counter()

    def profile(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and ("/fastdit/" in file or file == "<a program of fastdit>"):
            frames[f"{file}:{frame.f_code.co_name}"] += 1

    launched.clear()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return frames, sum(launched.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_python_calls_of_a_launch(name, method, launched):
    model = tiny_models.transformer(name).to("meta")
    given = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in tiny_models.call(name, 2).items()
    }
    handle = fastdit.patch(model, METHODS[method](), backend="cuda")
    said = torch.linspace(1000, 1, STEPS).to(given["timestep"].dtype).to("meta")
    found = []
    for _ in range(2):
        with handle.run(said):
            for _ in range(STEPS):
                found.append(counted(lambda: model(**given), launched))
                handle.advance()
    assert handle.last_run().programs >= STEPS - 1  # the first call may make what the others use
    for frames, launches in found[STEPS + 2 :]:
        assert sum(frames.values()) <= AROUND + OF_A_LAUNCH * launches, frames
    assert found[-1][1] >= 2
    assert (found[-1][1] < found[-2][1] / 3) is (method == "reused")
