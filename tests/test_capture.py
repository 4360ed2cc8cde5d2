"""A CUDA graph that cannot be captured leaves torch as it was; torch's own parts are stood in for."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from fastdit.runtime import capture
from fastdit.runtime.capture import CudaCapture

DEVICE = torch.device("cuda", 0)


class Generator:
    """A generator that may not draw while its state takes part in a capture."""

    def __init__(self):
        self.state = SimpleNamespace(captures=False)

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.state = other.state


class Torch:
    """What a capture changes in torch: `refuses` is the driver's word at its end."""

    def __init__(self):
        self.refuses = False
        self.pools = []
        self.generator = Generator()
        self.emptied = 0
        self.reserved = 0
        self.workspaces = []
        self.streams = 0

    def begin(self, pool, capture_error_mode):
        self.pools.append(pool)
        self.generator.state.captures = True

    def end(self):
        if self.refuses:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        self.end_pool(0, self.pools[-1])
        self.generator.state.captures = False

    def end_pool(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def graph(self):
        return SimpleNamespace(capture_begin=self.begin, capture_end=self.end, replay=lambda: None)

    def empty_cache(self):
        self.emptied += 1

    def stream(self):
        self.streams += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    def clear_workspaces(self):
        """Whether memory came from a pool then."""
        self.workspaces.append(bool(self.pools))


@pytest.fixture
def cuda(monkeypatch):
    made = Torch()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    members = {
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": made.stream,
        "memory_reserved": lambda: made.reserved,
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": made.graph,
        "default_generators": (made.generator,),
        "empty_cache": made.empty_cache,
    }
    for name, member in members.items():
        monkeypatch.setattr(torch.cuda, name, member)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end_pool, raising=False)
    clear = made.clear_workspaces
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    monkeypatch.setattr(capture, "streams", {})
    return made


def broken():
    raise ValueError("no")


@pytest.mark.parametrize("refuses", [False, True], ids=["a valid capture", "an invalid capture"])
def test_what_fails_is_ended(cuda, refuses):
    """The pool takes no more memory, random numbers may be drawn, and the error is that of the function."""
    capture = CudaCapture()
    cuda.refuses = refuses
    with pytest.raises(ValueError, match="no"):
        capture(broken, DEVICE)
    assert cuda.pools == []
    assert not cuda.generator.state.captures
    cuda.refuses = False
    assert capture(lambda: 5, DEVICE)[1] == 5
    assert cuda.pools == []
    assert cuda.emptied == 1, "before the first capture"


def test_a_capture_that_the_driver_gives_up_at_its_end(cuda):
    """A function that synchronised and caught the driver's error returns as if nothing were."""
    cuda.refuses = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaCapture()(lambda: 5, DEVICE)
    assert cuda.pools == []
    assert not cuda.generator.state.captures


@pytest.mark.parametrize("compute", [lambda: gc.isenabled(), broken], ids=["whole", "failing"])
def test_no_garbage_is_collected_meanwhile(cuda, compute):
    """What collects destroys graphs, which a capture does not survive."""
    before = gc.isenabled()
    gc.enable()
    try:
        found = None
        with contextlib.suppress(ValueError):
            found = CudaCapture()(compute, DEVICE)[1]
        assert not found
        assert gc.isenabled()
        gc.disable()
        CudaCapture()(lambda: None, DEVICE)
        assert not gc.isenabled(), "who had switched it off finds it so"
    finally:
        (gc.enable if before else gc.disable)()


def test_one_stream_warms_up_and_captures_for_all(cuda):
    """What is made ready for a stream, such as a workspace, is there when it is captured."""
    first, second = CudaCapture(), CudaCapture()
    assert first.warm(lambda: 4, DEVICE) == 4
    for each in (first, second):
        each(lambda: 5, DEVICE)
        each.warm(lambda: 5, DEVICE)
    assert cuda.streams == 1


@pytest.mark.parametrize("compute", [lambda: 5, broken], ids=["whole", "failing"])
def test_workspaces_lie_in_the_pool_and_go_with_it(cuda, compute):
    """They are let go before a capture, so that it makes its own, and after it, outside of the pool's allocation."""
    with contextlib.suppress(ValueError):
        CudaCapture()(compute, DEVICE)
    assert cuda.workspaces == [False, False]


def test_what_a_pool_takes_is_known(cuda):
    made = CudaCapture()

    def compute():
        cuda.reserved += 3

    for _ in range(2):
        made(compute, DEVICE)
    assert made.nbytes == 6
    assert CudaCapture().nbytes == 0
