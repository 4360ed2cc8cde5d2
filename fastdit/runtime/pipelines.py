"""An enclosed pipeline tells where its calls begin and end; an interrupted one frees caches before it decodes.

The instance's class is swapped, as the scheduler's is (`disguise.py`).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn

from fastdit.runtime import owners
from fastdit.runtime.disguise import disguise, put_on, take_off
from fastdit.runtime.install import LINK

#: decoder that is hooked -> the enclosed pipelines that decode by it, by id: request-scoped ones share it
_decoders: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[int, Any]] = (
    weakref.WeakKeyDictionary()
)


def enclose(pipeline: Any, patched: Any) -> None:
    """From now on an ordinary pipeline tells of its calls, for `patched`. A second time does nothing."""
    followers = pipeline.__dict__.setdefault(LINK, [])
    if not any(follower is patched for follower in followers):
        followers.append(patched)
    put_on(pipeline, _enclosed)
    decoder = _decoder(pipeline)
    if decoder is not None:
        _decoders.setdefault(decoder, weakref.WeakValueDictionary())[id(pipeline)] = pipeline
        if before_decoding not in list(decoder._forward_pre_hooks.values()):
            decoder.register_forward_pre_hook(before_decoding)


def release(pipeline: Any, patched: Any) -> None:
    """This undoes :func:`enclose`; without its last follower the pipeline is as it was."""
    followers = pipeline.__dict__.get(LINK, [])
    followers[:] = [follower for follower in followers if follower is not patched]
    if not followers:
        _unhook(pipeline)
        take_off(pipeline)


def _unhook(pipeline: Any) -> None:
    """The decoders that no other pipeline has lose their hooks, also one that it had before, or as a copy."""
    own = _decoder(pipeline)
    for decoder in {own, *(found() for found in _decoders.keyrefs())} - {None}:
        users = _decoders.get(decoder, {})
        if users.pop(id(pipeline), None) is None and decoder is not own:
            continue
        if not any(True for _ in users.values()):
            hooks = decoder._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is before_decoding]:
                del hooks[key]
            _decoders.pop(decoder, None)


class _Interrupt:
    """It stands for a pipeline's `_interrupt`: once a callback has set it, the run needs its caches no more."""

    def __get__(self, pipeline: Any, owner: type) -> Any:
        if pipeline is None or "_interrupt" not in pipeline.__dict__:
            raise AttributeError("_interrupt")
        return pipeline.__dict__["_interrupt"]

    def __set__(self, pipeline: Any, value: Any) -> None:
        pipeline.__dict__["_interrupt"] = value
        if value:  # where another thread sets it, the caches go when the pipeline decodes
            _drop_caches(next((c for c in owners.thread.calls if c.pipeline is pipeline), None))


def _drop_caches(call: owners.PipelineCall | None) -> None:
    for run in () if call is None else call.runs.values():
        if run is not None:
            run.drop_caches()


def before_decoding(decoder: nn.Module, args: Any) -> None:
    """This frees the caches of an interrupted run whose pipeline decodes; a preview in a callback needs them still."""
    for call in reversed(owners.thread.calls):
        if _decoder(call.pipeline) is decoder:
            if getattr(call.pipeline, "_interrupt", False):
                _drop_caches(call)
            return


def _decoder(pipeline: Any) -> nn.Module | None:
    found = getattr(getattr(pipeline, "vae", None), "decoder", None)
    return found if isinstance(found, nn.Module) else None


@functools.cache
def _enclosed(base: type) -> type:
    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = owners.PipelineCall(self)
        try:
            try:
                call.begin()
                output = base.__call__(self, *args, **kwargs)
                call.check()
                return output
            finally:
                call.end()
        finally:
            call.end()  # does something only where the first was interrupted

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    return disguise(base, __call__=__call__, __init__=__init__, _interrupt=_Interrupt())
