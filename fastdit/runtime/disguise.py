"""The class of one object is swapped for a subclass of the same name, its disguise, and back.

isinstance, saving and configuration go on as before; a copy, a pickle, and what is made of the class are ordinary.
"""

from __future__ import annotations

from typing import Any

from fastdit.runtime.install import LINK

_MARK = "_fastdit_disguise"


def disguise(base: type, **members: Any) -> type:
    """This makes a subclass of `base` that has `members` and passes for it."""

    def reduce_ex(self: Any, protocol: int) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != LINK}
        return base.__new__, (base,), state

    own = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**own, "__reduce_ex__": reduce_ex, _MARK: True, **members})


def is_ordinary(instance: Any) -> bool:
    """This tells whether an object's class can be swapped: somebody's own may have slots."""
    cls = type(instance)
    slots = any(base.__dict__.get("__slots__") for base in cls.__mro__)
    return bool(cls.__weakrefoffset__ and cls.__dictoffset__ and not slots)


def put_on(instance: Any, made: Any) -> None:
    """The object gets the class ``made(class)``, unless it has it."""
    cls = type(instance)  # read once: another thread may be at the same
    if _MARK not in cls.__dict__:
        object.__setattr__(instance, "__class__", made(cls))


def take_off(instance: Any) -> None:
    """The object gets its own class again."""
    if _MARK in type(instance).__dict__:
        object.__setattr__(instance, "__class__", type(instance).__mro__[1])
    instance.__dict__.pop(LINK, None)
