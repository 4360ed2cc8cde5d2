"""What a call asks of torch and of the ops is recorded while it runs: the lines of a program.

Only functions written in C are recorded, by a mode that sees every call of torch's API. A function written in Python is
run with the mode on, so that those below it are seen. What reads shapes, dtypes or strides is a constant of a kind of
call; what reads values is not, and ends the recording: such a call stays as it is. So does whatever a recorder does not
know: a tensor that comes from nowhere, an argument of an unknown class, random numbers.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdit.ops.registry import WHOLE, handed_over
from fastdit.programs.lines import Line, Ref
from fastdit.programs.state import Moment

#: attributes and methods of tensors, and functions, that say what a tensor is and not what it holds
_FACTS = set(
    """
    shape dtype device ndim layout names itemsize nbytes requires_grad is_leaf grad grad_fn
    is_cpu is_cuda is_meta is_quantized is_sparse is_mkldnn is_mps is_xpu
    size dim ndimension stride storage_offset is_contiguous numel nelement element_size get_device
    is_floating_point is_complex is_inference is_signed is_conj is_neg promote_types result_type __hash__
    """.split()  # noqa: SIM905
)
#: arguments that stand in a program as they are
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    type(Ellipsis),
)
_IN_PLACE_OPERATORS = set(
    """
    __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__ __imatmul__
    """.split()  # noqa: SIM905
)


class Recorder(TorchFunctionMode):
    """It records what goes on inside ``with recorder:``.

    Attributes:
        lines: What was called, in order.
        inputs: Where the tensors come from that were not made here.
        why: Why there is no program; None as long as there may be one.

    Args:
        origin: Tells where a tensor is that comes from outside; None where it does not know.
    """

    def __init__(self, origin: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.inputs: dict[Ref, Any] = {}
        self._origin = origin
        self.why: str | None = None
        # Tensors are not kept alive: while a call is recorded its memory is that of any other.
        self._known: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        self._count = 0
        self._inside: list[Any] = []

    def __enter__(self) -> Recorder:
        if not self._inside:
            self._dice, self._settings = _dice(), _settings()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if not self._inside and not all(map(torch.equal, self._dice, _dice())):
            self.stop("it draws random numbers")

    def stop(self, why: str) -> None:
        """There will be no program; the first reason counts."""
        if self.why is None:
            self.why = why

    # ---- tensors

    def known(self, tensor: Tensor) -> Ref | None:
        """This tells which tensor of the program it is; None for one that comes from nowhere."""
        found = self._made(tensor)
        if found is None:
            origin = self._origin(tensor)
            if origin is not None:
                found = self._new(tensor)
                self.inputs[found] = origin
        return found

    def _made(self, tensor: Tensor) -> Ref | None:
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _new(self, tensor: Tensor) -> Ref:
        ref = Ref(self._count)
        self._count += 1
        self._known[id(tensor)] = weakref.ref(tensor), ref
        return ref

    # ---- calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            func, name = None, func.__self__.__name__
        if self.why is not None or name in _FACTS:
            return _called(func, name, args, kwargs)
        if isinstance(func, FunctionType) and func not in WHOLE:
            if func not in self._inside:
                return self._look_into(func, args, kwargs)
            below = _underneath(func)  # which goes by the same name
        else:
            below = func
        versions = [_version(t) for t in _tensors((args, kwargs))]
        try:
            result = _called(below, name, args, kwargs)
        except TypeError:
            self.stop(f"nobody knows what {name} calls")
            return _called(func, name, args, kwargs)
        try:
            self._record(below, name, args, kwargs, result, versions)
        except _Unknown as unknown:
            self.stop(f"{name} {unknown}")
        return result

    def _look_into(self, func: FunctionType, args: tuple[Any, ...], kwargs: Any) -> Any:
        self._inside.append(func)
        try:
            with self:
                return _without_overrides(func)(*args, **kwargs)
        finally:
            self._inside.pop()

    def _record(
        self, func: Any, name: str, args: Any, kwargs: Any, result: Any, versions: list[Any]
    ) -> None:
        if _settings() != self._settings:
            raise _Unknown("runs under other settings of torch than the call")
        given = list(_tensors((args, kwargs)))
        op, written = "", ()
        if isinstance(func, torch._ops.OpOverload):
            if func.namespace != "fastdit":
                raise _Unknown("is an operator of somebody else's")
            written = tuple(self._refs(list(_written(func, args))))
            op, func, args = handed_over(func, args)
            writes = True
        else:
            writes = (
                (name.endswith("_") and not name.endswith("__"))
                or name == "__setitem__"
                or name in _IN_PLACE_OPERATORS
                or kwargs.get("out") is not None
                or versions != [_version(t) for t in given]
            )
        if not writes and isinstance(result, Tensor) and any(result is t for t in given):
            return  # a cast to the same dtype, a view of the same shape
        args, kwargs = self._refs(args), self._refs(kwargs)
        if result is None:
            made = None
        elif isinstance(result, Tensor):
            made = self.known(result) or self._new(result) if writes else self._fresh(result)
        elif isinstance(result, (tuple, list)) and all(isinstance(t, Tensor) for t in result):
            made = tuple(self._fresh(t) for t in result)
        else:
            raise _Unknown(f"gives a {type(result).__name__}, not a tensor")
        if made is None and not writes:
            raise _Unknown("gives nothing")
        self.lines.append(Line(func, name, args, kwargs, made, writes, op, written))

    def _fresh(self, tensor: Tensor) -> Ref:
        if self.known(tensor) is not None:
            raise _Unknown("gives a tensor that was there before")
        return self._new(tensor)

    def _refs(self, value: Any) -> Any:
        """An argument with a Ref for each tensor."""
        if isinstance(value, Tensor):
            found = self.known(value)
            if found is None:
                raise _Unknown(f"is given a tensor {list(value.shape)} that comes from nowhere")
            return found
        if type(value) is Moment:
            raise _Unknown("is given the number of a step")
        if isinstance(value, _PLAIN):
            return value
        if type(value) in (tuple, list):
            return type(value)(map(self._refs, value))
        if isinstance(value, torch.Size):
            return tuple(value)
        if type(value) is dict:
            return {key: self._refs(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._refs, (value.start, value.stop, value.step)))
        raise _Unknown(f"is given a {type(value).__name__}")


class _Unknown(Exception):
    """Something is not known to a recorder."""


def _called(func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    return getattr(args[0], name) if func is None else func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _written(func: Any, args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes, of those that it is given."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if value is not None and argument.alias_info is not None and argument.alias_info.is_write:
            yield value


def _version(tensor: Tensor) -> int:
    """How often it was written to; nobody counts that of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def _dice() -> list[Tensor]:
    """The states of the generators that draw without being asked for."""
    found = [torch.random.get_rng_state()]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.get_rng_state())
    return found


def _settings() -> tuple[Any, ...]:
    """What a call may set for a while that decides how functions compute: a program would not."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch.get_default_dtype(),
    )


@functools.cache
def _without_overrides(func: FunctionType) -> FunctionType:
    """The same function, which asks no more whether somebody overrides it, nor do its private helpers."""
    space = dict(func.__globals__)
    for name in func.__code__.co_names:
        helper = space.get(name)
        if name.startswith("has_torch_function"):
            space[name] = _never
        elif name.startswith("_") and isinstance(helper, FunctionType) and helper is not func:
            space[name] = _without_overrides(helper)
    copy = FunctionType(
        func.__code__,
        space,
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _underneath(func: FunctionType) -> Callable[..., Any]:
    """The function written in C that one of the same name in Python calls."""
    name = func.__name__
    method = getattr(Tensor, name, None) is func
    return getattr(torch._C.TensorBase if method else torch._C._VariableFunctions, name)


def _never(*_: Any) -> bool:
    return False
