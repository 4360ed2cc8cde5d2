"""Tensors that depend on no input of a call are made once, with its program.

Such are the frequencies of a timestep's embedding. What anything writes to, or keeps, is made anew each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastdit.programs.lines import Line, Ref

#: elements up to which a tensor is held
MOST = 1 << 16
_FACTORIES = {"tensor", "as_tensor", "scalar_tensor", "arange", "zeros", "ones", "full", "linspace"}


def fold(
    lines: Sequence[Line], inputs: Mapping[Ref, Any], kept: Iterable[Ref]
) -> tuple[list[Line], dict[Ref, Tensor]]:
    """The lines that are left, and the tensors that the others made."""
    values = {ref: value for ref, value in inputs.items() if isinstance(value, Tensor)}
    sources: dict[Ref, frozenset[Ref]] = {}
    for line in lines:
        if _folds(line, values):
            made = _evaluated(line, values)
            if isinstance(made, Tensor) and made.numel() <= MOST:
                values[line.result] = made
                sources[line.result] = line.reads.union(
                    *(sources.get(ref, ()) for ref in line.reads)
                )
    spoilt = {ref for line in lines if line.writes for ref in line.refs} | set(kept)
    spoilt |= {source for ref in spoilt for source in sources.get(ref, ())}
    found = {ref: values[ref] for ref, parts in sources.items() if not spoilt & {ref, *parts}}
    return [line for line in lines if line.writes or line.result not in found], found


def _folds(line: Line, values: Mapping[Ref, Tensor]) -> bool:
    if line.writes or not isinstance(line.result, Ref) or "empty" in line.name:
        return False
    made = bool(line.reads) or line.name in _FACTORIES
    return made and all(ref in values for ref in line.reads)


def _evaluated(line: Line, values: Mapping[Ref, Tensor]) -> Any:
    def held(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value]
        if type(value) in (tuple, list):
            return type(value)(map(held, value))
        if type(value) is dict:
            return {key: held(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(*map(held, (value.start, value.stop, value.step)))
        return value

    args, kwargs = held(line.args), held(line.kwargs)
    return getattr(args[0], line.name) if line.function is None else line.function(*args, **kwargs)
