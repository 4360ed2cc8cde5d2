"""Checks of plain arguments; an error names the argument, what was given and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from fastdit.errors import ArgumentError


def is_whole(value: Any) -> bool:
    """True stands for no number."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int = 1) -> int:
    """An int of at least `least` passes; another value is an ArgumentError."""
    if not is_whole(value) or value < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def real(name: str, value: Any, accepted: str, holds: Callable[[float], bool]) -> float:
    """A finite number for which `holds` passes; another is an ArgumentError, in which `accepted` says what would."""
    fits = is_whole(value) or isinstance(value, float)
    if not (fits and math.isfinite(value) and holds(value)):
        raise ArgumentError(f"{name} must be a number {accepted}, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, accepted: Collection[Any]) -> Any:
    """One of the `accepted` values passes; another is an ArgumentError."""
    if value not in accepted:
        raise ArgumentError(f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}")
    return value
