"""A held layer is a linear layer whose weights lie elsewhere: in host memory, or in a file that is mapped into it.

The object stays what it was, in its place: its class is another, and its parameters are no parameters of the model
meanwhile. It computes what it did, and moves the weights to its input for that. Whoever asks for the weights, replaces
them or casts them has the plain layer back before, with its own parameters: adapters of peft, `load_state_dict`,
`to(dtype)`, layerwise casting. A move of the model to another device leaves them where they are.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.errors import UnsupportedModelError

#: instance attribute under which a layer holds its weights
HELD = "_fastdit_held"
#: where they may lie
PLACES = ("host", "disk")

Weights = dict[str, nn.Parameter | None]


@dataclass(eq=False)
class Held:
    """What stands for a layer's parameters.

    Attributes:
        weights: The layer's own dict of them, in the place of which it has an empty one.
        home: Where they go when they come back.
        mapped: Whether they lie in a file.
    """

    weights: Weights
    home: torch.device
    mapped: bool

    def moved(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on a device; a copy, unless they lie there."""
        return self._on(self.weights["weight"], device), self._on(self.weights["bias"], device)

    def _on(self, weight: Any, device: torch.device) -> Any:
        # What is mapped begins at any byte of a page, and products of a CPU may round by that.
        if weight is None or (weight.device == device and not self.mapped):
            return weight
        return weight.to(device, non_blocking=True, copy=True)


class _Resident(threading.local):
    """The weights of held layers that this thread has at hand."""

    def __init__(self) -> None:
        self.weights: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}


_resident = _Resident()


class Returns:
    """So many layers of this process have got their weights back: as long as it stays, none has."""

    count = 0


class HeldLinear(nn.Linear):
    """A linear layer whose weights are held; :func:`put_away` makes one of a plain layer."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., out], by weights moved to where x is."""
        held = self.__dict__.get(HELD)
        if held is None:  # it is plain again, and somebody still holds on to this function
            return nn.Linear.forward(self, x)
        weights = _resident.weights.get(self) or held.moved(x.device)
        return F.linear(x, *weights)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and HELD in self.__dict__:
            _return(self)
            return self._parameters[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and HELD in self.__dict__:
            _return(self)
        nn.Linear.__setattr__(self, name, value)  # whose instance it may be now

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        held = self.__dict__[HELD]
        dtype = held.weights["weight"].dtype
        probe = fn(torch.empty(0, dtype=dtype, device=held.home))
        if probe.dtype is dtype and probe.device.type != "meta":
            held.home = probe.device
            return self
        _return(self)
        return self._apply(fn, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, weight in self.__dict__[HELD].weights.items():
            if weight is not None:
                destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        _return(self)
        self._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """What a plain layer says, and where its weights are."""
        held = self.__dict__[HELD]
        bias, place = held.weights["bias"] is not None, PLACES[held.mapped]
        return f"{self.in_features}, {self.out_features}, bias={bias}, weights on {place}"


def weights_of(layer: nn.Module) -> Mapping[str, Any]:
    """A layer's own parameters by name, wherever they lie."""
    held = layer.__dict__.get(HELD)
    return layer._parameters if held is None else held.weights


def is_held(layer: nn.Module) -> bool:
    """Whether the weights are elsewhere."""
    return HELD in layer.__dict__


def bytes_of(layer: nn.Module) -> int:
    """Bytes of these."""
    return sum(weight.nbytes for weight in weights_of(layer).values() if weight is not None)


def check_holdable(layer: nn.Module, name: str) -> None:
    """Refuse a layer that is not plain, or whose weights are not at hand.

    Raises:
        UnsupportedModelError: Naming it, and what it is.
    """
    why, weights = "", weights_of(layer)
    if type(layer) not in (nn.Linear, HeldLinear):
        why = f"is a {type(layer).__qualname__} of {type(layer).__module__.partition('.')[0]}"
    elif "forward" in layer.__dict__ or "_diffusers_hook" in layer.__dict__:
        why = "has a forward that somebody replaced, such as offloading, which is to come after the patch"
    elif layer._forward_hooks or layer._forward_pre_hooks:
        why = "has hooks"
    elif {type(weight) for weight in weights.values()} - {nn.Parameter, type(None)}:
        why = "has weights of a class of their own"
    elif any(weight is not None and weight.is_meta for weight in weights.values()):
        why = "has its weights on the meta device"
    if why:
        raise UnsupportedModelError(
            f"shed_modulations takes the weights of plain linear layers, but {name} {why}"
        )


@torch.inference_mode(False)
@torch.no_grad()
def put_away(layer: nn.Linear, place: str) -> None:
    """Take a plain layer's weights to a place: pinned host memory, or a file in TMPDIR that nobody else sees."""
    weights: Weights = layer._parameters
    present = {name: weight for name, weight in weights.items() if weight is not None}
    home, mapped = layer.weight.device, place == "disk"
    found = _mapped(present) if mapped else {n: _on_host(w.data) for n, w in present.items()}
    for name, weight in present.items():
        if found[name] is not weight.data:
            weight.data = found[name]
    layer.__dict__[HELD] = Held(weights, home, mapped)
    layer.__dict__["_parameters"] = {}
    layer.__class__ = HeldLinear


@torch.inference_mode(False)
@torch.no_grad()
def give_back(layer: nn.Module) -> None:
    """Undo :func:`put_away`: the layer is plain, with its own parameters at home. Nothing happens to a plain one."""
    held = layer.__dict__.get(HELD)
    if held is None:
        return
    Returns.count += 1
    present = {name: weight for name, weight in held.weights.items() if weight is not None}
    found = {name: held._on(weight.data, held.home) for name, weight in present.items()}
    for name, weight in present.items():
        if found[name] is not weight.data:
            weight.data = found[name]
    layer.__dict__["_parameters"] = held.weights
    layer.__class__ = nn.Linear
    layer.__dict__.pop(HELD, None)


@contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The weights of the module's held layers are at hand on a device: moved once for several calls in the `with`."""
    before, own = _resident.weights, {}
    for layer in module.modules():
        held = layer.__dict__.get(HELD)
        if held is not None:
            own[layer] = held.moved(device)
    _resident.weights = {**before, **own}
    try:
        yield
    finally:
        _resident.weights = before


def _return(layer: nn.Module) -> None:
    warnings.warn(
        "weights of modulation layers came back to the model, since they were asked for, loaded or cast; "
        "call fastdit.patch again to shed them",
        stacklevel=4,
    )
    give_back(layer)


def _on_host(weight: Tensor) -> Tensor:
    if not torch.cuda.is_available():
        return weight.cpu()
    pinned = torch.empty_like(weight, device="cpu", pin_memory=True)
    return pinned.copy_(weight)


def _mapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same out of a file, which has no name any more once it is mapped: nothing of it stays, however this ends."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="fastdit-") as folder:
        path = Path(folder) / "modulation.safetensors"
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, path)
        return load_file(path)
