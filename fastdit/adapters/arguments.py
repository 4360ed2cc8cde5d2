"""Where an argument of a transformer's call is, by name, however it was given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@functools.cache
def forward_arguments(cls: type) -> tuple[str, ...]:
    """Names of the arguments of ``cls.forward``, without self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def place_of(
    transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> tuple[Any, Any]:
    """Where an argument of the transformer is: (args or kwargs, its key there), or (None, None)."""
    if name in kwargs:
        return kwargs, name
    names = forward_arguments(type(transformer))
    position = names.index(name) if name in names else len(args)
    return (args, position) if position < len(args) else (None, None)


def arguments_of(
    transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call of the transformer by name, as far as they were given."""
    if not args:
        return kwargs
    return {**dict(zip(forward_arguments(type(transformer)), args, strict=False)), **kwargs}


@contextmanager
def scaled_adapters(transformer: nn.Module, told: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside it LoRA layers have the scale of these attention arguments, as in diffusers' forwards."""
    scale = (told or {}).get("scale", 1.0)
    if scale == 1.0:
        yield
        return
    from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

    if USE_PEFT_BACKEND:
        scale_lora_layers(transformer, scale)
    try:
        yield
    finally:
        if USE_PEFT_BACKEND:
            unscale_lora_layers(transformer, scale)
