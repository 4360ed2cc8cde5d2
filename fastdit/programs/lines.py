"""The lines of a program, and the tensors in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor of a program, by its number; there is one for each."""

    number: int

    def __hash__(self) -> int:  # by which sets have one order
        return self.number


@dataclass(frozen=True)
class Line:
    """One call of a program.

    Attributes:
        function: What is called; None where `name` is an attribute that is read.
        name: The function's own name.
        args, kwargs: What it is given, with a :class:`Ref` for each tensor.
        result: The Refs of what it returns: one, a tuple of them, or None.
        writes: It changes a tensor that it is given, so it may not be left out.
        op: The name of the op of fastdit whose backend's function it is; "" elsewhere.
        written: What an op writes.
    """

    function: Callable[..., Any] | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    writes: bool
    op: str = ""
    written: tuple[Ref, ...] = ()

    @functools.cached_property
    def reads(self) -> frozenset[Ref]:
        """The tensors that it is given."""
        return frozenset(refs_in((self.args, self.kwargs)))

    @functools.cached_property
    def refs(self) -> frozenset[Ref]:
        """These, and what it returns."""
        return self.reads.union(refs_in(self.result))

    @property
    def is_method(self) -> bool:
        """Whether it is a method of the tensor that it is given first."""
        own = bool(self.args) and isinstance(self.args[0], Ref)
        return own and getattr(Tensor, self.name, None) is self.function


def refs_in(value: Any) -> Iterator[Ref]:
    """The Refs in arguments, or in what was returned."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from refs_in(part)
    elif isinstance(value, dict):
        yield from refs_in(tuple(value.values()))
    elif isinstance(value, slice):
        yield from refs_in((value.start, value.stop, value.step))
