"""Families without an adapter: attention and feed-forward modules wrapped as they are.

A block's own forward runs, with its norms, modulations and gated residuals; only the modules that have one of these
roles, by their class or their name, are spared where a schedule reuses them. What is cached is the module's output, so
the semantics are those of an adapter; what is lost are the fused residuals, the skipped norms and partial token sets.
What it costs is counted on the arguments of the last call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of, forward_arguments
from fastdit.adapters.base import Adapter, Call, Size, place_once
from fastdit.adapters.once import module_at
from fastdit.spec import ModelSpec

if TYPE_CHECKING:
    from fastdit.blocks.forward import Forward

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|(^|_)ff(n|_|$)|feed_?forward|glu|moe|^(proj_out|(gate|up|down)_proj)$", re.IGNORECASE
)
_OTHER = re.compile(r"norm|mod(_|$|ulation)|adaln|embed|gate$", re.IGNORECASE)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: arguments of a transformer that hold the image, the time and the conditions, by diffusers' habits
_IMAGES = ("hidden_states", "x", "vision_tokens")
_TIMES = ("timestep", "timesteps", "t", "vision_timesteps")
#: what configs call the channels of latents
_CHANNELS = ("in_channels", "io_channels", "in_visual_dim", "latent_channel")
#: what diffusers calls it where blocks read keys and values that an earlier call left, or leave them alone
_READS_KEYS = ("cached", "read", "skip", "inject")
_CONDITION = re.compile(r"encoder|pooled|class_labels|cap_|text_|embeds|siglip|image_cond")


def _has_role(name: str, module: nn.Module, *roles: re.Pattern[str]) -> bool:
    """Whether a block's child has one of these roles: it has weights, and is called or of a class named so."""
    names = name, type(module).__name__
    return (
        not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and any(True for _ in module.parameters())
        and not any(_OTHER.search(n) for n in names)
        and any(role.search(n) for role in roles for n in names)
    )


def _parts(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The paths of a block's attentions and feed-forwards, also of those in blocks within it, and which are attentions.

    A block may be no more than a wrapper of another, or call the parts of several itself.
    """
    for name, child in block.named_children():
        if _has_role(name, child, _ATTENTION, _FEED_FORWARD):
            yield prefix + name, _has_role(name, child, _ATTENTION)
        elif not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and not _OTHER.search(name):
            within = list(_parts(child, f"{prefix}{name}."))
            if any(attends for _, attends in within):
                yield from within


def block_lists(module: nn.Module, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """This maps paths of lists of blocks with an attention to component names, also in dicts of lists."""
    found: dict[str, tuple[str, ...]] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleDict):
            found |= block_lists(child, f"{prefix}{name}.")
        elif isinstance(child, nn.ModuleList):
            parts = [part for block in child for part in _parts(block)]
            if any(attends for _, attends in parts):
                found[prefix + name] = tuple(dict.fromkeys(path for path, _ in parts))
    return found


def patch_sides(transformer: nn.Module) -> tuple[int, int, int]:
    """Frames, rows and columns of a patch, which a model's config has as one number, as several, or not at all."""
    config = transformer.config
    found = [
        next(filter(None, (getattr(config, name, None) for name in names)), None)
        or (getattr(config, several, None) or [1])[0]
        for names, several in (
            (("patch_size", "latent_patch_size"), "all_patch_size"),
            (("patch_size_t",), "all_f_patch_size"),
        )
    ]
    side, frames = found
    sides = (side, side) if isinstance(side, int) else side
    return (frames, *sides)[-3:]


def _channel_axis(sizes: Sequence[int], channels: int | None) -> int:
    """Which axis of latents, but for the batch's, holds their channels.

    Packed latents are tokens of channels, sound has channels first, as pictures have; videos may have frames before
    them, or channels last, and several videos their number first.
    """
    usual, others = {2: (1, (0,)), 4: (0, (1, 3)), 5: (1, ())}.get(len(sizes), (0, ()))
    if sizes[usual] == channels:
        return usual
    return next((axis for axis in others if sizes[axis] == channels), usual)


def stock_block(block: nn.Module, fw: Forward, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward; its components ask whether they run."""
    output = type(block).forward(block, *args, **kwargs)
    fw.leave_out_idle()
    return output


class Generic(Adapter):
    """The adapter of one transformer class that has none."""

    family = "generic"
    text_tokens = 0
    restates = False

    def __init__(self, transformer: nn.Module, wraps: bool = True) -> None:
        cls, names = type(transformer), _arguments(transformer)
        self.model_classes = (cls.__name__,)
        self.components = block_lists(transformer) if wraps else {}
        self.kinds = {
            name: type(self.block_list(transformer, name)[0]).__name__ for name in self.components
        }
        self.forwards = dict.fromkeys(self.kinds, stock_block)
        self.embeddings_arguments = tuple(filter(_CONDITION.search, names))
        self.image_argument = next(filter(names.__contains__, _IMAGES))
        self.time_argument = next(filter(names.__contains__, _TIMES), "timestep")
        self._seen: Call | None = None
        self._arguments: dict[str, Any] = {}

    def spec(self, transformer: nn.Module) -> ModelSpec:
        """A component that several blocks share could not tell which of them calls it."""
        if not self.kinds:
            return ModelSpec(self.family, ())
        found = super().spec(transformer)
        places: dict[nn.Module, str] = {}
        for index, component, module in self.wrapped(transformer):
            place_once(places, module, f"{component} of block {index}")
        return found

    def has_component(self, kind: str, block: nn.Module, component: str) -> bool:
        """Blocks of one list may differ."""
        return module_at(block, component) is not None

    def parts(self, kind: str, block: nn.Module) -> dict[str, nn.Module]:
        """Every component is wrapped."""
        parts = {name: module_at(block, name) for name in self.components[kind]}
        return {name: part for name, part in parts.items() if part is not None}

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """None: all tokens run."""
        return []

    def tokens(self, transformer: nn.Module, latent_shape: Sequence[int]) -> int:
        """Of pictures, videos and sound as :func:`_channel_axis` says; packed latents are tokens."""
        _, *sizes = latent_shape
        if len(sizes) < 2:
            return 1
        config = transformer.config
        known = (getattr(config, name, None) for name in _CHANNELS)
        del sizes[_channel_axis(sizes, next(filter(None, known), None))]
        if len(sizes) == 1:
            return sizes[0]
        sides = reversed(patch_sides(transformer))
        return math.prod(
            max(1, size // side) for size, side in zip_longest(reversed(sizes), sides, fillvalue=1)
        )

    def patch(self, transformer: nn.Module) -> int:
        """Side of a patch, across."""
        return patch_sides(transformer)[2]

    def output_elements(self, transformer: nn.Module, tokens: int) -> int:
        """As many as the latents have, where the config does not say other channels."""
        config = transformer.config
        channels = (
            getattr(config, "out_channels", None) or getattr(config, "in_channels", None) or 1
        )
        return tokens * math.prod(patch_sides(transformer)) * channels

    def width(self, transformer: nn.Module) -> int:
        """The outputs of a block's last linear layer."""
        return getattr(transformer, "inner_dim", 0)

    # ---- what was seen

    def call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call:
        """The adapter remembers how the model was called, without the values."""
        found = super().call(transformer, args, kwargs)
        given = arguments_of(transformer, args, kwargs)
        found = replace(found, signature=(*found.signature, *use_of_keys(given)))
        if self._seen is None or self._seen.signature != found.signature:
            self._arguments = _without_values(dict(given))
            latents = _without_values(found.hidden_states)
            self._seen = replace(found, hidden_states=latents, timestep=None, embeddings=())
        return found

    def seen(self, size: Size) -> Call | None:
        """This is the last call, if it was of this size; a size without text fits whatever text it had."""
        call = self._seen
        if call is None or call.tokens != size.image or size.text not in (0, call.text):
            return None
        return call

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """The example is the last call."""
        return self._arguments

    def linear_weights(self, transformer: nn.Module) -> Iterator[tuple[int | None, str, int]]:
        """This yields (block, component, weights of linear layers) and (None, "tokens" or "rows", those of the others).

        They are for estimates before there was a call: weights of norms and modulations are taken to meet rows, all
        others tokens.
        """
        components = 0
        for index, name, part in self.wrapped(transformer):
            found = _weights(part)
            components += found
            yield index, name, found
        inside = {layer for *_, part in self.wrapped(transformer) for layer in part.modules()}
        rows = sum(
            layer.weight.numel()
            for path, layer in transformer.named_modules()
            if isinstance(layer, _LINEAR)
            and layer not in inside
            and any(_OTHER.search(name) for name in path.split("."))
        )
        yield None, "tokens", _weights(transformer) - components - rows
        yield None, "rows", rows


def use_of_keys(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call does with keys and values that its blocks keep for later calls, as a part of its signature.

    A call that leaves some must compute everything, and so must the first that reads them: that part is no other's.
    """
    held = {
        name: value for name, value in given.items() if "kv_cache" in name and value is not None
    }
    if not held:
        return ()
    if "kv_caches" in held:  # one of each block, which knows
        mode = held["kv_caches"][0].mode or "skip"
    else:
        mode = held.get("kv_cache_mode")
    return (mode if mode in _READS_KEYS else object(),)


def _weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, _LINEAR))


def _without_values(value: Any) -> Any:
    """An argument with tensors on the meta device, and without objects that somebody else owns.

    Masks, indices and lengths have values, since models read them on the host.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point() and not value.is_complex():
            return value.detach().to("cpu", copy=True)
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_values, value))
    if isinstance(value, dict):
        return {name: _without_values(part) for name, part in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else None


def _arguments(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the transformer's forward, and of those that it may hand them on to."""
    classes = (cls for cls in type(transformer).__mro__ if issubclass(cls, nn.Module))
    names = (name for cls in classes if "forward" in vars(cls) for name in forward_arguments(cls))
    return tuple(dict.fromkeys(names))


def refusal(transformer: nn.Module, wraps: bool = True) -> str:
    """Why a transformer without an adapter cannot be served, as the end of a clause; empty where it can.

    One whose components are not wrapped is for methods that skip whole steps, which asks nothing of blocks.
    """
    if not set(_arguments(transformer)) & set(_IMAGES):
        return f", nor can it be wrapped, since no argument of its forward is {_either(_IMAGES)}"
    if wraps and not block_lists(transformer):
        return ", nor can it be wrapped, since none of its lists of blocks has attentions"
    return ""


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
