"""A skeleton is a copy of a transformer without weights, whose example call shows what the blocks are given.

The copy has the structure of the model and nothing else: no hooks, no compilers, no other attention backend, and one
module for all blocks of one form. So it costs milliseconds, needs no device and no memory, and whatever is done to the
weights (offloading, quantization, casting) does not matter.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdit.blocks.held import is_held, weights_of
from fastdit.runtime.install import LINK

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: what instances carry that is not structure
_ADDED = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl", LINK)
_KEPT = 64
#: what a new tensor of an operation is like, by that and its arguments
_outputs: dict[Any, tuple[bool, list[tuple[Any, ...]]]] = {}
_PLAIN = (int, float, str, bool, tuple)


class Macs(TorchDispatchMode):
    """This counts multiply-accumulates of the operations inside the `with`, as torch counts FLOPs.

    What has values, since a model reads them on the host, loses them where it meets what has none.

    Attributes:
        layers, products: Those of layers with weights, and of products of activations.
    """

    def __init__(self) -> None:
        # Only here, since it imports triton where there is one.
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.layers = self.products = 0
        self._macs = flop_registry

    @property
    def total(self) -> int:
        """This is the sum of both."""
        return self.layers + self.products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (func is torch.ops.aten.index.Tensor and args[0].is_meta):  # a mask says how many
            args, kwargs = _on_one_device((args, kwargs))
        out = output_of(func, args, kwargs)
        name = func.overloadpacket
        if name in self._macs:
            macs = self._macs[name](*args, **kwargs, out_val=out) // 2
            if str(name) in ("aten.mm", "aten.addmm", "aten.convolution"):
                self.layers += macs
            else:
                self.products += macs
        return out


def output_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives: a new tensor without values is made like the one that the same operation gave before,
    since torch works out its shape in Python, for longer than all else takes.
    """
    given = func, torch.get_default_dtype(), args, kwargs
    key = _told(given) if _is_functional(func) else None
    if key is None:
        return func(*args, **kwargs)
    known = _outputs.get(key)
    if known is None:
        out = func(*args, **kwargs)
        new = out if type(out) is tuple else (out,)
        if all(type(part) is Tensor and part.is_meta for part in new):
            made_once(_outputs, key, lambda: (type(out) is tuple, [*map(_like, new)]), 4096)
        return out
    several, likes = known
    made = tuple(
        torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        for shape, stride, dtype in likes
    )
    return made if several else made[0]


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


@functools.cache
def _is_functional(func: Any) -> bool:
    """Whether an operation's output has memory of its own, and depends on nothing but its arguments."""
    arguments, returns = func._schema.arguments, func._schema.returns
    alone = not any(given.alias_info for given in (*arguments, *returns))
    return alone and func.namespace == "aten" and "view" not in func.name()


def _told(given: Any) -> Any:
    """What a shape depends on, as a key; None where there is something else, such as a tensor with values."""
    if isinstance(given, Tensor):
        plain = type(given) in (Tensor, nn.Parameter) and given.is_meta
        return _like(given) if plain else None
    if isinstance(given, (tuple, list, dict)):
        parts = given.items() if isinstance(given, dict) else given
        told = [_told(part) for part in parts]
        return None if None in told else (type(given), *told)
    return type(given), given


def _on_one_device(given: Any) -> Any:
    """The arguments of an operation, all of them on the meta device where one is."""
    metas = {tensor.is_meta for tensor in _tensors(given)}
    return tree_map_only(Tensor, lambda t: t.to("meta"), given) if len(metas) > 1 else given


def _tensors(given: Any) -> Iterator[Tensor]:
    """Those of an operation's arguments."""
    for part in given.values() if isinstance(given, dict) else given:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (tuple, list, dict)):
            yield from _tensors(part)


@dataclass
class Visit:
    """A visit is what the blocks of one form are given in a call.

    Attributes:
        kind, block: Their list's name, and the copy that stands for all of them.
        args, kwargs: Their arguments, on the meta device.
        macs: Multiply-accumulates of one of them.
    """

    kind: str
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    macs: int = 0


@dataclass
class Example:
    """An example is what a call of a skeleton did.

    Attributes:
        visits: Form of a block -> what such blocks are given.
        macs: Multiply-accumulates of the whole call.
        prompt, prompt_elements: Those of the projections of the prompt alone, and the size of their outputs.
    """

    visits: dict[Any, Visit] = field(default_factory=dict)
    macs: int = 0
    prompt: int = 0
    prompt_elements: int = 0


def form(module: nn.Module) -> tuple[Any, ...]:
    """A form tells modules apart whose skeletons differ."""
    return tuple(
        (
            name,
            type(part),
            *(None if p is None else p.shape for p in part._parameters.values()),
            *((k, v) for k, v in part.__dict__.items() if isinstance(v, _PLAIN) and k[0] != "_"),
        )
        for name, part in module.named_modules()
    )


def forms(adapter: Any, transformer: nn.Module) -> list[Any]:
    """Each block has a kind and a form, which those that cost the same share."""
    return [(kind, form(block)) for kind, block in adapter.blocks(transformer)]


def structure(adapter: Any, transformer: nn.Module) -> tuple[Any, ...]:
    """A structure tells transformers apart whose skeletons differ."""
    outside = tuple((name, type(module)) for name, module in transformer.named_children())
    config = repr(transformer.config)
    return adapter.family, type(transformer), config, outside, *forms(adapter, transformer)


def made_once(kept: dict[Any, Any], key: Any, make: Callable[[], Any], most: int = _KEPT) -> Any:
    """This keeps what `make` made under a key the first time; the oldest of many are forgotten."""
    if key not in kept:
        while len(kept) >= most:
            kept.pop(next(iter(kept)), None)
        kept[key] = make()
    return kept[key]


class Skeleton:
    """Equal blocks are one module, which runs once in a call; the others get its outputs.

    Attributes:
        forms, times: The form of each block, and how many have each form.
    """

    def __init__(self, adapter: Any, transformer: nn.Module) -> None:
        self._adapter, self._dtype = adapter, transformer.dtype
        self._made: dict[Any, nn.Module] = {}
        blocks = adapter.blocks(transformer)
        self.forms = forms(adapter, transformer)
        self.times = Counter(self.forms)
        self._twins = {id(block): key for key, (_, block) in zip(self.forms, blocks, strict=True)}
        self.transformer = self._copy(transformer)

    def run(self, arguments: dict[str, Any]) -> Example:
        """The copy is called with arguments on the meta device."""
        found, counter = Example(), Macs()
        spared = 0

        def visit(key: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal spared
            block = self._made[key]
            if key in found.visits:
                spared += found.visits[key].macs
                return found.visits[key].output
            before = counter.total
            here = found.visits[key] = Visit(key[0], block, args, kwargs)
            here.output = type(block).forward(block, *args, **kwargs)
            here.macs = counter.total - before
            return here.output

        def project(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = counter.total
            output = type(module).forward(module, *args, **kwargs)
            found.prompt += counter.total - before
            found.prompt_elements += output.numel()
            return output

        for key in self.times:
            _bind(self._made[key], visit, key)
        for module in self._adapter.prompt_projections_of(self.transformer):
            _bind(module, project, module)
        with torch.inference_mode(False), torch.no_grad(), counter:
            self.transformer(**arguments)
        found.macs = counter.total + spared
        return found

    def _copy(self, module: nn.Module) -> nn.Module:
        key = self._twins.get(id(module), id(module))
        if key not in self._made:
            linear = self._linear(module)
            if linear is None:
                self._other(key, module)
            else:
                self._made[key] = linear
        return self._made[key]

    def _linear(self, module: nn.Module) -> nn.Module | None:
        """A plain layer stands for one that may keep its weights in another form."""
        if not isinstance(module, nn.Linear):
            return None
        held = weights_of(module) if is_held(module) else None
        weight, bias = held.values() if held else (module.weight, module.bias)
        dtype = weight.dtype if weight.dtype in FLOATS else self._dtype
        sizes = module.in_features, module.out_features, bias is not None
        return nn.Linear(*sizes, device="meta", dtype=dtype)

    def _other(self, key: Any, module: nn.Module) -> None:
        made = self._made[key] = object.__new__(type(module))
        place, bare = type(module).__module__, nn.Module().__dict__ | {"training": False}
        own = module.__dict__.keys() - bare.keys() - set(_ADDED)
        state = bare | {name: self._attribute(module.__dict__[name], place) for name in own}
        state |= {"_chunk_size": None} if "_chunk_size" in state else {}
        state |= {"fused_projections": False} if "fused_projections" in state else {}
        made.__dict__.update(state)
        for part in ("_parameters", "_buffers"):
            getattr(made, part).update((k, self._meta(v)) for k, v in getattr(module, part).items())
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else self._copy(child)
        if getattr(module, "processor", None) is not None:
            made._modules.pop("processor", None)
            made.__dict__["processor"] = self._processor(module)

    def _attribute(self, value: Any, place: str) -> Any:
        """What a module holds beside modules and weights; nothing that its call may change is the model's own.

        Tables of rotations lie in lists and dicts, or in objects of classes of the model's own file, its `place`, which
        move them to where they are called, here the meta device.
        """
        if isinstance(value, Tensor):
            return self._meta(value)
        if isinstance(value, nn.Module):
            return self._copy(value)
        if type(value) in (list, tuple, set):
            return type(value)(self._attribute(part, place) for part in value)
        if type(value) is dict:
            return {key: self._attribute(part, place) for key, part in value.items()}
        if type(value).__module__ != place or not hasattr(value, "__dict__"):
            return value
        made = copy.copy(value)
        for name, part in vars(value).items():
            made.__dict__[name] = self._attribute(part, place)
        return made

    def _meta(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        odd = value.is_floating_point() and value.dtype not in FLOATS
        dtype = self._dtype if odd else value.dtype
        return torch.empty(value.shape, dtype=dtype, device="meta")

    def _processor(self, module: nn.Module) -> Any:
        """A family has attention processors of its own, which run on torch's own attention here."""
        names = self._adapter.processors
        own = getattr(type(module), "_default_processor_cls", None)
        if getattr(own, "__name__", "") in names:
            return own()
        for place in (
            sys.modules[type(module).__module__],
            importlib.import_module("diffusers.models.attention_processor"),
        ):
            for name in names:
                if hasattr(place, name):
                    return getattr(place, name)()
        processor = module.processor
        if isinstance(processor, nn.Module):
            return self._copy(processor)
        processor = copy.copy(processor)
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(processor, name):
                setattr(processor, name, None)
        return processor


def _bind(module: nn.Module, function: Callable[..., Any], first: Any) -> None:
    module.__dict__["forward"] = lambda *args, **kwargs: function(first, *args, **kwargs)
