"""Which backend serves an op, and how an op becomes visible to torch's tracers.

`resolve` picks the backend of highest priority that supports an op on a device and dtype. A backend
that was named, by argument or by the environment variable FASTDIT_BACKEND, is never replaced: what
it cannot do is a BackendError. The environment is read when ops are bound: `bind()` reads it each
time, the functions of `fastdit.ops` are bound once, at import.

Schemas are defined by `torch.library.Library` and not by `custom_op`, which costs ten times as much
a call. Eager calls do not pass the dispatcher at all (`traced` says when they must).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

import fastdit.backends
from fastdit.backends.base import Backend
from fastdit.discover import discover
from fastdit.errors import ArgumentError, BackendError

F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT = "FASTDIT_BACKEND"
LIBRARY = torch.library.Library("fastdit", "DEF")
BACKENDS: Mapping[str, Backend] = discover(fastdit.backends, "BACKEND")
#: the public function of each op by its name; a file of this folder adds to it by `@op`
OPS: dict[str, Callable[..., Any]] = {}


def op(function: F) -> F:
    """Mark the public function of an op, which `bind` and all that goes over the ops then find."""
    OPS[function.__name__] = function
    return function


def requested_backend(name: str | None = None) -> str | None:
    """The backend named by argument, else by the environment, else None for automatic."""
    name = name or os.environ.get(ENVIRONMENT) or None
    if name is not None and name not in BACKENDS:
        raise BackendError(
            f"backend {name!r} does not exist; there are {', '.join(BACKENDS)} "
            f"(named by argument or by {ENVIRONMENT})"
        )
    return name


_AT_IMPORT = os.environ.get(ENVIRONMENT) or None


def named(name: str | None = None) -> str | None:
    """The backend named by argument, else by the environment at import, else None for automatic."""
    return name or _AT_IMPORT


@functools.cache
def choose(op: str, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend that serves `op`; BackendError where none does or the named one does not."""
    reasons = {b.name: b.supports(op, device, dtype) for b in BACKENDS.values()}
    able = sorted(
        (b for b in BACKENDS.values() if reasons[b.name] is None), key=lambda b: -b.priority
    )
    name = requested_backend(named(name)) if named(name) else None
    if name is None and able:
        return able[0]
    if name is not None and reasons[name] is None:
        return BACKENDS[name]
    what = f"{op} for {str(dtype).removeprefix('torch.')} on {device.type}"
    available = ", ".join(b.name for b in able) or "none"
    if name is None:
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        raise BackendError(f"no backend can run {what} ({why})")
    raise BackendError(
        f"backend {name!r} cannot run {what}: {reasons[name]}; available there: {available}"
    )


@functools.cache
def resolve(
    op: str, device: torch.device, dtype: torch.dtype, name: str | None = None
) -> Callable[..., None]:
    """The backend function that serves `op`: one dictionary look-up a call."""
    return getattr(choose(op, device, dtype, name), op)


def traced() -> bool:
    """Whether torch must see the op itself: while compiling, and under any mode that sees what is called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def checked(op: str, check: Callable[..., Any]) -> Callable[..., None]:
    """What torch.ops calls of an op once a trace runs: `check`, and the backend of its first tensor.

    Both take the arguments of the op's schema but for the last one, the name of a backend.
    """

    def run(*given: Any) -> None:
        *arguments, backend = given
        check(*arguments)
        first = arguments[0]
        resolve(op, first.device, first.dtype, backend)(*arguments)

    return run


#: name in torch.ops -> the op, and what makes its backend's arguments of the schema's
_HANDED: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {}


def handed_over(overload: Any, given: tuple[Any, ...]) -> tuple[str, Callable[..., None], Any]:
    """The op, the backend's function and its arguments that a call of ``torch.ops.fastdit`` comes to, once checked."""
    *arguments, backend = given
    op, order = _HANDED[overload._schema.name.rpartition(":")[2]]
    first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
    return op, resolve(op, first.device, first.dtype, backend), order(*arguments)


#: functions in Python that set something for a while, and so are asked for as a whole, see :func:`whole`
WHOLE: set[Any] = set()


def whole(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a mode which sees torch's calls is shown as one of them, and not what it calls."""

    @functools.wraps(func)
    def shown(*given: Any) -> Any:
        if torch._C._len_torch_function_stack():
            some = [value for value in given if isinstance(value, torch.Tensor)]
            return torch.overrides.handle_torch_function(shown, some, *given)
        return func(*given)

    WHOLE.add(shown)
    return shown


def _as_they_are(*given: Any) -> tuple[Any, ...]:
    return given


def define(
    schema: str,
    run: Callable[..., None],
    op: str | None = None,
    order: Callable[..., tuple[Any, ...]] = _as_they_are,
) -> None:
    """Declare `fastdit::<schema>`, served by `run` on every device and invisible to autograd.

    It is another form of `op`, if that has another name, whose backends take what `order` makes of the arguments.
    """
    name = schema.partition("(")[0]
    _HANDED[name] = op or name, order
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    LIBRARY.impl(name, functools.partial(_below_autograd, name), "Autograd")
    # Destination-passing: shapes and dtypes are those of the tensors given, nothing is returned.
    torch.library.register_fake(f"fastdit::{name}", lambda *args: None, lib=LIBRARY)


def _below_autograd(name: str, *args) -> None:
    if torch.is_grad_enabled() and requires_grad(*args):
        raise ArgumentError(
            f"torch.ops.fastdit.{name} writes in place and has no gradient: "
            "call the function of fastdit.ops, or use torch.no_grad()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        getattr(torch.ops.fastdit, name).default(*args)


def new_like(t: torch.Tensor) -> torch.Tensor:
    """New memory for an output shaped like `t`."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def requires_grad(*values) -> bool:
    """Whether any tensor among values, or in lists among them, requires a gradient."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and requires_grad(*value):
            return True
    return False


def refuse_gradients(names: str, *values) -> None:
    """Of an op that writes in place only: nothing it is given may require a gradient while grad is enabled."""
    if torch.is_grad_enabled() and requires_grad(*values):
        raise ArgumentError(
            f"{names}: got a tensor that requires a gradient; accepted is none (the op writes in "
            "place: use torch.no_grad())"
        )
