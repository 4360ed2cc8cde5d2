"""fastdit raises these exceptions on purpose.

Every message names the argument, what was given, what is accepted, and where it helps the next step. All derive from
:class:`FastDiTError`, and each also from the builtin a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 800


class FastDiTError(Exception):
    """This is the base of every error that fastdit raises on purpose.

    What a message quotes may come from a file, so one of more than MAX_MESSAGE characters loses its middle.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*map(_shortened, arguments))


def _shortened(argument: Any) -> Any:
    if not isinstance(argument, str) or len(argument) <= MAX_MESSAGE:
        return argument
    return f"{argument[: MAX_MESSAGE - 205]} ... {argument[-200:]}"


class ArgumentError(FastDiTError, ValueError):
    """An argument has the wrong type, dtype, device, shape or value."""


class BackendError(FastDiTError, RuntimeError):
    """A backend that was asked for by name cannot serve an op here."""


class UnsupportedModelError(FastDiTError, TypeError):
    """The pipeline, transformer or block is of a class no adapter knows, or was altered in a way it cannot follow."""


class DriftError(FastDiTError, RuntimeError):
    """A block of the installed diffusers does not compute what its adapter restates."""


class ScheduleError(FastDiTError, ValueError):
    """A caching schedule is malformed, or does not fit the model or the run."""


class CompositionError(FastDiTError, ValueError):
    """Two methods were given that cannot run together."""


class SearchError(FastDiTError, RuntimeError):
    """A search cannot start, go on or resume."""


class DependencyError(FastDiTError, ImportError):
    """A package that belongs to an optional extra is not installed."""
