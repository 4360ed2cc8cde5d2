"""A CUDA graph's stand-in on the CPU: the same tensors, written again in the same order.

What a function does is recorded op by op, with the very tensors it read and wrote. A replay does these ops on those
tensors and puts the results where they were. Python does not run again, as with a graph: an input that a run does not
copy to where the tape reads it stays what it was. A capture computes nothing, so what was written while recording is
undone. Tensors never share memory, so it does not stand for a graph's pool: what a graph computed and nobody copied
out in time is known by `outside`, what a tape reads and has not made.

What CUDA refuses while a stream is captured, a tape refuses too: what waits for the device, and copies from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastdit.ops import BACKENDS, OPS
from fastdit.ops.registry import resolve

REFUSED = "operation not permitted when stream is capturing"
#: operators that wait for the device, and what makes a tensor of numbers of the host
WAIT = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "lift_fresh",
}


class Tape(TorchDispatchMode):
    """Records aten ops, and those of fastdit's backends inside :func:`ops_seen`.

    Attributes:
        outside: Storages read or written that no op here has made.
    """

    #: that which records now
    current: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Any:
        Tape.current = self
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        Tape.current = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Tape.current is not self:  # inside an op of a backend
            return func(*args, **kwargs)
        name = func._schema.name.rpartition(":")[2]
        given = tensors((args, kwargs))
        devices = {tensor.device for tensor in given if tensor.ndim}
        if name in WAIT or len(devices) > 1 or (name == "_to_copy" and _moves(given[0], kwargs)):
            raise RuntimeError(f"{REFUSED}: {name}")
        self._see(given)
        if func._schema.is_mutable:
            self._save(given)
        found = func(*args, **kwargs)
        for tensor in tensors(found):
            if storage(tensor) not in self.outside:
                self._made[storage(tensor)] = tensor
        self.ops.append((func, args, kwargs, found))
        return found

    def run(self, function: Callable[..., None], args: Any) -> None:
        """An op of a backend, which torch does not see."""
        given = tensors(args)
        Tape.current = None
        try:
            self._see(given)
            self._save(given)
            function(*args)
        finally:
            Tape.current = self
        self.ops.append((function, args, {}, None))

    def _see(self, given: list[Tensor]) -> None:
        for tensor in given:
            if storage(tensor) not in self._made:
                self.outside.setdefault(storage(tensor), tensor)

    def _save(self, given: list[Tensor]) -> None:
        for tensor in given:
            key = storage(tensor)
            if key in self.outside and key not in self._before:
                whole = tensor.new_empty(0).set_(
                    tensor.untyped_storage(),
                    0,
                    (tensor.untyped_storage().nbytes() // tensor.itemsize,),
                )
                self._before[key] = whole, whole.clone()

    def forget(self) -> None:
        """Undo what was computed while recording: a capture computes nothing."""
        with torch.no_grad():
            for whole, before in self._before.values():
                whole.copy_(before)
            for tensor in self._made.values():
                if tensor.is_floating_point() and not tensor.is_meta:
                    tensor.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.ops:
                found = func(*args, **kwargs)
                if before is None:
                    continue
                for old, new in zip(tensors(before), tensors(found), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Tapes:
    """Stands for `fastdit.runtime.capture.CudaCapture`.

    Attributes:
        tapes: All of them.
        fails: The number of the capture that fails, from 0.
        nbytes: What the pool takes: so many bytes as there were captures.
        most: No more is captured once it takes that.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.fails: int | None = None
        self.nbytes, self.most = 0, 1 << 20

    @property
    def outside(self) -> dict[int, Tensor]:
        """Storages that a tape read and did not make."""
        return {key: tensor for tape in self.tapes for key, tensor in tape.outside.items()}

    @staticmethod
    def serves(device: torch.device) -> bool:
        return True

    def most_bytes(self, device: torch.device) -> int:
        return self.most

    def warm(self, compute: Callable[[], Any], device: torch.device) -> Any:
        return compute()

    def __call__(
        self, compute: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        tape = Tape()
        try:
            with tape:
                output = compute()
            if len(self.tapes) == self.fails:
                raise RuntimeError(REFUSED)
        finally:
            tape.forget()
        self.tapes.append(tape)
        self.nbytes += 1
        return tape.replay, output


@contextmanager
def ops_seen() -> Iterator[None]:
    """Inside it tapes record what programs that are made in it ask of fastdit's backends."""

    def seen(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            if any(isinstance(tensor, FakeTensor) for tensor in tensors(args)):
                return  # there is nothing to read
            if Tape.current is None:
                function(*args)
            else:
                Tape.current.run(function, args)

        return run

    patched = [(b, op) for b in BACKENDS.values() for op in OPS if hasattr(b, op)]
    for backend, op in patched:
        vars(backend)[op] = seen(getattr(backend, op))
    resolve.cache_clear()
    try:
        yield
    finally:
        for backend, op in patched:
            del vars(backend)[op]
        resolve.cache_clear()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _moves(tensor: Tensor, kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != tensor.device.type
