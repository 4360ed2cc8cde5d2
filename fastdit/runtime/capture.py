"""A CUDA graph captures what one call launches, and holds the rest fixed."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Replay = Callable[[], None]

#: two captures at once would each see the other's allocations
_capturing = threading.Lock()

#: graphs whose capture failed: some versions of torch give a pool back with one that others never gave back
_abandoned: list[Any] = []


#: device -> the stream of all that is captured there, or warms up for it
streams: dict[torch.device, Any] = {}


class CudaCapture:
    """It captures what functions launch, into one memory pool.

    Attributes:
        nbytes: What the allocator reserved meanwhile.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self.nbytes = 0

    @staticmethod
    def serves(device: torch.device) -> bool:
        """This tells whether it can capture on `device`."""
        return device.type == "cuda"

    @staticmethod
    def most_bytes(device: torch.device) -> int:
        """No more is captured once the pool takes so much: an eighth of the device's memory."""
        return torch.cuda.get_device_properties(device).total_memory // 8

    def warm(self, compute: Callable[[], Any], device: torch.device) -> Any:
        """What `compute` returns, run where captures are: what is made ready for a stream is for that one."""
        with _capturing, torch.cuda.device(device):
            stream, current = _stream(device), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                output = compute()
            current.wait_stream(stream)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)
        return output

    def __call__(self, compute: Callable[[], Any], device: torch.device) -> tuple[Replay, Any]:
        """This gives what runs it, and what `compute` returned, which a replay fills."""
        with _capturing, torch.cuda.device(device):
            if self._pool is None:
                torch.cuda.empty_cache()  # blocks that are cached elsewhere do not serve a pool
                self._pool = torch.cuda.graph_pool_handle()
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            stream, reserved = _stream(device), torch.cuda.memory_reserved()
            stream.wait_stream(current)
            with torch.cuda.stream(stream), _uncollected(), _own_workspaces():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = compute()
                    graph.capture_end()
                except BaseException:
                    _abandon(graph, self._pool)
                    raise
            current.wait_stream(stream)
            self.nbytes += max(0, torch.cuda.memory_reserved() - reserved)
        return graph.replay, output


def _stream(device: torch.device) -> Any:
    if device not in streams:
        streams[device] = torch.cuda.Stream()
    return streams[device]


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS works in the pool meanwhile, so that its memory goes with that; it keeps one for each stream otherwise."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage waits: a graph that is destroyed meanwhile would break the capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _abandon(graph: Any, pool: Any) -> None:
    """A capture that failed is ended, in what torch leaves open too where the driver had given it up already.

    Then `capture_end` raises before the allocator takes memory from elsewhere again, and before random numbers may be
    drawn again (pytorch/pytorch 180395, 190308).
    """
    device = torch.cuda.current_device()
    for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(device, pool)):
        with contextlib.suppress(RuntimeError):  # of the driver, or because it has ended
            end()
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    _abandoned.append(graph)


def why_eager(call: Any) -> str | None:
    """This says why the run of its first call cannot be replayed; None where it can."""
    run, device = call.run, call.arguments.hidden_states.device
    patched, model = run.patched, call.run.model
    if call.immediate:
        return "since gradients, autocast or the reference backend are wanted"
    if not CudaCapture.serves(device):
        return f"since the transformer is on {device.type}"
    if patched.programs is None:
        return "since this model's calls are not recorded as programs"
    if call.model is None:
        return f"since {(model and model.why) or 'somebody looks at its calls'}"
    return None
