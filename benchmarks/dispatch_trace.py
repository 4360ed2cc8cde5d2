"""Count kernels and bytes of a piece of torch code through a dispatch trace, without views.

A kernel is an operator call that makes or changes a tensor's memory. Its bytes are those of its
distinct tensor arguments and results, each counted once per read and once per write. fastdit's ops
show themselves to a dispatch mode, so the same trace counts eager code and fused code. Caches of
the processor are not modelled: this is the traffic a GPU would see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Kernel:
    """One operator call: its name and the bytes it moves, those of large tensors apart."""

    name: str
    bytes: int
    large_bytes: int


@dataclass
class Trace(TorchDispatchMode):
    """``with Trace(large=...) as trace: ...``

    Attributes:
        large: Size in bytes from which a tensor counts as a token tensor.
        kernels: What ran, in order.
    """

    large: int = 0
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def bytes(self) -> int:
        """Bytes moved by all kernels."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def large_bytes(self) -> int:
        """Bytes moved in token tensors only."""
        return sum(kernel.large_bytes for kernel in self.kernels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        written = [
            t
            for argument, value in _arguments(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value)
            if isinstance(t, Tensor)
        ]
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in storages]
        if written or (fresh and "empty" not in func.name()):
            moved = [bytes_of(t) for t in (*_reads(inputs, written, func), *written, *fresh)]
            self.kernels.append(
                Kernel(func.name(), sum(moved), sum(m for m in moved if m >= self.large))
            )
        return result


def _reads(inputs: list[Tensor], written: list[Tensor], func: Any) -> list[Tensor]:
    """Inputs that are read: all but those a destination-passing op only writes."""
    only_written = {id(t) for t in written} if func.namespace == "fastdit" else set()
    read = [t for t in inputs if id(t) not in only_written]
    in_place = [
        t
        for t in written
        if func.namespace == "fastdit" and sum(t is other for other in inputs) > 1
    ]
    unique = {id(t): t for t in (*read, *in_place)}
    return list(unique.values())


def _arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    schema = func._schema.arguments
    named = [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
    return [*zip(schema, args, strict=False), *named]


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the distinct elements: expanded dimensions are read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()
