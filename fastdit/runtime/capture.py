"""A CUDA graph captures what one call launches, and holds the rest fixed."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.observe import observed

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)

Replay = Callable[[], None]

#: two captures at once would each see the other's allocations
_capturing = threading.Lock()

#: graphs whose capture failed: some versions of torch give a pool back with one that others never gave back
_abandoned: list[Any] = []


class CudaCapture:
    """It captures what a function launches, on one stream, into one memory pool."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @staticmethod
    def serves(device: torch.device) -> bool:
        """This tells whether it can capture on `device`."""
        return device.type == "cuda"

    def __call__(self, compute: Callable[[], Any], device: torch.device) -> tuple[Replay, Any]:
        """This gives what runs it, and what `compute` returned, which a replay fills."""
        with _capturing, torch.cuda.device(device):
            if self._stream is None:
                torch.cuda.empty_cache()  # blocks that are cached elsewhere do not serve a pool
                self._stream = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), _uncollected():
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = compute()
                    graph.capture_end()
                except BaseException:
                    _abandon(graph, self._pool)
                    raise
            current.wait_stream(self._stream)
        return graph.replay, output


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


def described(leaves: Sequence[Any], spec: Any) -> Any:
    """This is what decides which graph arguments are for: their structure, shapes, dtypes and constants."""
    return (
        repr(spec),
        tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ),
    )


def fingerprint(transformer: nn.Module) -> int:
    """A graph holds fixed where weights lie and how modules are set, which this sums up."""
    found: list[Any] = []
    for module in transformer.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        found += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        processor = getattr(module, "processor", None)
        found += [*_settings(module), id(processor)]
        if processor is not None:
            found += _settings(processor)
    return hash(tuple(found))


def _settings(thing: Any) -> list[Any]:
    """These are a thing's attributes that are plain values, or lists of them."""
    values = getattr(thing, "__dict__", {}).values()
    lists = (tuple(value) for value in values if isinstance(value, (list, tuple)))
    return [value for value in values if isinstance(value, _CONSTANTS)] + [
        value for value in lists if all(isinstance(part, _CONSTANTS) for part in value)
    ]


def why_eager(call: Any, leaves: Sequence[Any]) -> str | None:
    """This says why the run of its first call, which is given `leaves`, cannot be replayed; None where it can."""
    run, transformer, device = call.run, call.transformer, call.transformer.device
    if call.immediate:
        return "since gradients, autocast or the reference backend are wanted"
    if run.steps is None:
        return "since nobody says how many steps it has"
    if run.plan.reuse is not None and run.plan.reuse.taken:
        return "since its schedule is mapped to other timesteps"
    if run.patched.forecasts:
        return "since its outputs are forecast, by weights that may be others in the next run"
    if not CudaCapture.serves(device):
        return f"since the transformer is on {device.type}"
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.device != device:
                return f"since it is given a tensor on {leaf.device.type}"
        elif not isinstance(leaf, _CONSTANTS):
            return f"since it is given a {type(leaf).__name__}"
    hooks = (*transformer._forward_hooks.values(), *transformer._forward_pre_hooks.values())
    if any(getattr(hook, "__self__", None) is not run.patched for hook in hooks):
        return "since somebody else's hooks are on the transformer"
    for name, module in transformer.named_modules():
        if hasattr(module, "base_layer"):
            return f"since {name} carries an adapter whose scale may change"
        if module is not transformer and observed(module):
            return f"since hooks are on {name}"
        if module._compiled_call_impl is not None:
            return f"since {name or 'the transformer'} is compiled"
    registry = transformer.__dict__.get("_diffusers_hook")
    if "_old_forward" in transformer.__dict__ or (registry is not None and registry.hooks):
        return "since offloading or caching hooks are on the transformer"
    return None
