"""A CUDA graph's stand-in on the CPU: the same tensors, written again in the same order.

What a function does is recorded op by op, with the very tensors it read and wrote. A replay does these ops on those
tensors and puts the results where they were. Python does not run again, as with a graph: an input that a run does not
copy to where the tape reads it stays what it was. Tensors never share memory, so it does not stand for a graph's pool;
`outside` has what a pool could not vouch for: what is read and no earlier tape has written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tape(TorchDispatchMode):
    """Records aten and fastdit ops.

    Attributes:
        outside: Storages read that no op before has written.
    """

    def __init__(self, written: set[int]) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, Tensor] = {}
        self._written = written
        self._before = set(written)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors((args, kwargs)):
            if storage(tensor) not in self._written:
                self.outside[storage(tensor)] = tensor
        found = func(*args, **kwargs)
        self._written.update(map(storage, tensors(found)))
        self.ops.append((func, args, kwargs, found))
        return found

    def forget(self) -> None:
        """Spoil what was computed while recording: a capture computes nothing."""
        for tensor in tensors([found for *_, found in self.ops]):
            known = storage(tensor) in self._before or storage(tensor) in self.outside
            if tensor.is_floating_point() and not known:
                tensor.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.ops:
                found = func(*args, **kwargs)
                for old, new in zip(tensors(before), tensors(found), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Tapes:
    """Stands for `fastdit.runtime.capture.CudaCapture`.

    Attributes:
        tapes: All of them.
        outside: Storages that a tape read and none before it wrote.
        fails: The number of the capture that fails, from 0.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.outside: dict[int, Tensor] = {}
        self.fails: int | None = None
        self._written: set[int] = set()

    def __call__(
        self, compute: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        tape = Tape(self._written)
        with tape:
            output = compute()
        if len(self.tapes) == self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.tapes.append(tape)
        self.outside |= tape.outside
        tape.forget()

        return tape.replay, output


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
