"""Which linear layers make the modulations of a model's blocks, and nothing else: nobody writes it down.

Each form of block runs once on the meta device as its adapter restates it. The layers that run inside of
:meth:`~fastdit.blocks.forward.Forward.modulation` are those.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.account.skeleton import Macs, Skeleton, Visit, forms, made_once, structure
from fastdit.adapters.base import BATCH, Size
from fastdit.blocks.forward import Forward
from fastdit.errors import UnsupportedModelError

#: image and text tokens of the example that shows them
_SIZE = Size(4, 3)
_paths: dict[Any, Any] = {}


def modulation_layers(
    adapter: Any, transformer: nn.Module
) -> tuple[dict[nn.Module, list[nn.Linear]], bool]:
    """What makes each modulation of the blocks, with its linear layers, and whether these depend on the timestep alone.

    Raises:
        UnsupportedModelError: There are none, or nobody says what they are given.
    """
    model = type(transformer).__name__
    if not adapter.restates:
        raise UnsupportedModelError(
            f"shed_modulations needs an adapter, which says what makes a block's modulations; {model} has none"
        )
    key = structure(adapter, transformer)
    found, told = made_once(_paths, key, lambda: _found(adapter, transformer))
    called = adapter.output_modulators_of(transformer)
    others = {part for module in called for part in module.modules()}
    units: dict[nn.Module, list[nn.Linear]] = {}
    blocks = zip(forms(adapter, transformer), adapter.blocks(transformer), strict=True)
    for form, (_, block) in blocks:
        for path, names in found.get(form, ()):
            layers = [layer for layer in map(block.get_submodule, names) if layer not in others]
            if layers:
                units.setdefault(block.get_submodule(path), []).extend(layers)
    if not units or told is None:
        raise UnsupportedModelError(
            f"shed_modulations needs linear layers in each block that make its modulations alone; the blocks of "
            f"{model} ({adapter.family}) have none, so there is nothing to shed"
        )
    return units, not told


def _found(adapter: Any, transformer: nn.Module) -> tuple[dict[Any, Any], int | None]:
    """What :func:`_of_form` finds in each form of block, and how many tensors make the modulations beside timesteps."""
    skeleton = Skeleton(adapter, transformer)
    example = adapter.example(skeleton.transformer, _SIZE)
    visits = skeleton.run(example).visits
    found = {form: _of_form(adapter, visit) for form, visit in visits.items()}
    inputs = adapter.layer_inputs(skeleton.transformer, (), example, BATCH)
    return found, None if inputs is None else len(inputs.tensors)


class _Noting(Forward):
    """A forward that notes which linear layers run inside of which modulation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(None, [block])
        self.layers: dict[nn.Module, list[nn.Module]] = {}
        self.elsewhere: set[nn.Module] = set()
        self._unit: nn.Module | None = None

    def modulation(self, norm: nn.Module, *given: Any) -> tuple[Tensor, ...]:
        before, self._unit = self._unit, norm
        try:
            return super().modulation(norm, *given)
        finally:
            self._unit = before

    def note(self, layer: nn.Module, *_: Any) -> None:
        if self._unit is None:
            self.elsewhere.add(layer)
        elif layer not in self.layers.setdefault(self._unit, []):
            self.layers[self._unit].append(layer)


def _of_form(adapter: Any, visit: Visit) -> list[tuple[str, list[str]]]:
    """Paths in a block: of what a modulation is made by, and of the linear layers in it that nothing else runs."""
    names = {module: name for name, module in visit.block.named_modules()}
    noting = _Noting(visit.block)
    noting.start_block(0)
    with ExitStack() as stack:
        for layer in names:
            if isinstance(layer, nn.Linear):
                stack.enter_context(layer.register_forward_hook(noting.note))
        for context in (torch.inference_mode(False), torch.no_grad(), Macs()):
            stack.enter_context(context)
        adapter.forwards[visit.kind](visit.block, noting, *visit.args, **visit.kwargs)
    return [
        (names[unit], [names[layer] for layer in layers if layer not in noting.elsewhere])
        for unit, layers in noting.layers.items()
    ]
