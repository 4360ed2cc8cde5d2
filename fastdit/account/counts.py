"""The parts of a model cost what is counted on an example of it; nobody writes it down.

The stock transformer runs on a copy without weights (see `skeleton.py`), and each form of block once more as its
adapter restates it, with each component reused in turn: what is spared then is that component's cost, and what its
slot holds its size. In a family with an adapter all counts are polynomials of the number of image and text tokens,
of second degree since attention is, so a few small examples say what every size costs.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdit.account.skeleton import Macs, Skeleton, Visit, made_once, structure
from fastdit.adapters.base import BATCH, Size
from fastdit.blocks.forward import Forward
from fastdit.schedules.actions import COMPUTE, KEEP, REUSE

#: image and text tokens of the examples; each picture is a square, as DiT wants it
POINTS = tuple(Size(*pair) for pair in ((4, 3), (9, 3), (16, 3), (4, 5), (4, 8), (9, 5)))
_counts: dict[Any, Counts] = {}


def counts_of(adapter: Any, transformer: nn.Module, size: Size) -> Counts:
    """This gives the counts of a transformer, for `size` at least; they are made once for a structure and config."""
    key = structure(adapter, transformer)
    if adapter.restates:
        unit = adapter.token_multiple
        points = [Size(unit * point.image, unit * point.text) for point in POINTS]
        return made_once(_counts, key, lambda: Counts(adapter, transformer, points))

    def make() -> Counts:
        try:
            return Counts(adapter, transformer, (size,), call.hidden_states.shape[0])
        except Exception:  # it needs values, or what a meta device cannot do
            return Estimates(adapter, transformer)

    call = adapter.seen(size)
    if call is None:
        return Estimates(adapter, transformer)
    return made_once(_counts, (*key, call.signature), make)


@dataclass(frozen=True)
class Terms:
    """A count is a polynomial: constant, image, text, image^2, image text, text^2."""

    values: tuple[int, ...]

    def at(self, size: Size) -> int:
        """This is its value for one picture of this size."""
        return sum(a * b for a, b in zip(self.values, _monomials(size), strict=True))


_NOTHING = Terms((0,) * 6)


class Counts:
    """The counts of one structure are per picture of the batch.

    Attributes:
        exact: Whether they are counts, or estimates.
    """

    exact = True

    def __init__(
        self, adapter: Any, transformer: nn.Module, sizes: Any, batch: int = BATCH
    ) -> None:
        skeleton = Skeleton(adapter, transformer)
        self._forms = {key: index for index, key in enumerate(skeleton.times)}
        self._of = [self._forms[key] for key in skeleton.forms]
        found = [self._measured(adapter, skeleton, size, batch) for size in sizes]
        names = sorted(set().union(*found), key=str)
        values = np.array([[one[name] for name in names] for one in found], dtype=np.int64)
        self._terms = dict(zip(names, _fitted(sizes, values), strict=True))

    def keys(self, block: int, size: Size) -> int:
        """A picture has so many elements in a block's keys and values of image tokens."""
        return sum(
            terms.at(size)
            for (what, form, _), terms in self._terms.items()
            if what == "keys" and form == self._of[block] and terms.values[1]
        )

    def of(self, what: str, block: int | None = None, component: str | None = None) -> Terms:
        """This looks up a count of a block's component or of a call.

        `what` is one of "macs", "layers" (macs without products of attention) and "slot" (elements of the kept output)
        of a component; "prompt_key_macs" (of keys and values of the prompt alone) of an attention; "outside" (macs
        outside of all components), "prompt" (those of its projection), "prompt_slot", "prompt_keys" and "modulation"
        (channels) of a call.
        """
        form = None if block is None else self._of[block]
        return self._terms.get((what, form, component), _NOTHING)

    def _measured(self, adapter: Any, skeleton: Skeleton, size: Size, batch: int) -> dict[Any, int]:
        example = skeleton.run(adapter.example(skeleton.transformer, size))
        found: dict[Any, int] = defaultdict(int)
        found["outside", None, None] = example.macs
        found["prompt", None, None] = example.prompt
        found["prompt_slot", None, None] = example.prompt_elements
        for key, times in skeleton.times.items():
            if key not in example.visits:  # the call has nothing for these blocks
                continue
            for (what, component), value in _block(adapter, example.visits[key]).items():
                if what in ("modulation", "prompt_keys"):
                    found[what, None, None] += times * value
                else:
                    found[what, self._forms[key], component] = value
                if what == "macs":
                    found["outside", None, None] -= times * value
        channels = adapter.output_modulation(skeleton.transformer)
        channels += sum(
            shared.linear.out_features
            for shared in adapter.shared_modulations_of(skeleton.transformer)
        )
        found["modulation", None, None] += batch * channels
        return {name: value // batch for name, value in found.items()}


class Estimates(Counts):
    """A model that cannot be counted is estimated by its linear layers, over the image tokens alone."""

    exact = False

    def __init__(self, adapter: Any, transformer: nn.Module) -> None:
        self._terms, self._of = {}, list(range(len(adapter.blocks(transformer))))
        slot = Terms((0, adapter.width(transformer), 0, 0, 0, 0))
        outside = [0] * 6
        for block, component, weights in adapter.linear_weights(transformer):
            if block is None:
                outside[component == "tokens"] = weights
                continue
            macs = Terms((0, weights, 0, 0, 0, 0))
            for what, terms in (("macs", macs), ("layers", macs), ("slot", slot)):
                self._terms[what, block, component] = terms
        self._terms["outside", None, None] = Terms(tuple(outside))


class _Noting(Forward):
    """This is a forward that notes how wide modulations are."""

    width = 0

    def modulation(self, *args: Any) -> tuple[Tensor, ...]:
        found = super().modulation(*args)
        storages = {vector.untyped_storage()._cdata: vector for vector in found}
        sizes = (v.untyped_storage().nbytes() // v.itemsize for v in storages.values())
        self.width += sum(sizes)
        return found


def _block(adapter: Any, visit: Visit) -> dict[Any, int]:
    """These are the counts of the components of a block."""
    kind, block = visit.kind, visit.block
    names = [n for n in adapter.components[kind] if adapter.has_component(kind, block, n)]
    consumers, parts = adapter.consumers.get(kind, {}), adapter.parts(kind, block)
    slots: dict[Any, Any] = {}
    keys: dict[str, int] = defaultdict(int)

    def run(reused: Any) -> tuple[Macs, _Noting]:
        flags = {n: KEEP | (REUSE if n in reused else COMPUTE) for n in names}
        forward = _Noting(None, [block], actions=[flags], slots=slots)
        forward.start_block(0)
        for name, part in parts.items():
            part.__dict__["forward"] = functools.partial(_ask, forward, name, part)
        with torch.inference_mode(False), torch.no_grad(), Macs() as macs:
            adapter.forwards[kind](block, forward, *visit.args, **visit.kwargs)
        return macs, forward

    layers = adapter.prompt_keys_of(kind, block)
    with _noting_keys(block, keys), _noting_layers(layers) as (prompt_keys, prompt_macs):
        full, forward = run(())
    found: dict[Any, int] = {("prompt_key_macs", name): n for name, n in prompt_macs.items()}
    found["prompt_keys", None] = sum(prompt_keys.values())
    found["modulation", None] = forward.width
    for attention, elements in keys.items():
        found["keys", attention] = 2 * elements
    for name in names:
        inputs = {n for n, consumer in consumers.items() if consumer == name}
        with_, without = run(inputs)[0] if inputs else full, run({*inputs, name})[0]
        found["macs", name] = with_.total - without.total
        found["layers", name] = with_.layers - without.layers
        kept = tree_leaves([value for key, value in slots.items() if key[1] == name])
        found["slot", name] = sum(tensor.numel() for tensor in kept if tensor is not None)
    for part in parts.values():
        del part.__dict__["forward"]
    return found


def _ask(forward: Forward, name: str, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward.component(name, lambda: type(part).forward(part, *args, **kwargs))


def _noting_keys(block: nn.Module, keys: dict[str, int]) -> ExitStack:
    """This notes how many elements the keys of each attention have, of both streams where it has two."""
    hooks = ExitStack()
    for path, module in block.named_modules():
        owner, _, name = path.rpartition(".")
        apart = hasattr(block.get_submodule(owner), "to_k")
        if name in (("to_k", "add_k_proj") if apart else ("norm_k",)):

            def note(module: Any, args: Any, output: Tensor, owner: str = owner) -> None:
                keys[owner] += output.numel()

            hooks.enter_context(module.register_forward_hook(note))
    return hooks


@contextmanager
def _noting_layers(
    layers: Iterable[tuple[str, nn.Module]],
) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """This notes how many elements linear layers give, and their macs, by the names they go by."""
    elements: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, layer in layers:

            def note(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                elements[name] += output.numel()
                macs[name] += output.numel() * module.in_features

            hooks.enter_context(layer.register_forward_hook(note))
        yield elements, macs


def _monomials(size: Size) -> tuple[int, ...]:
    n, t = size.image, size.text
    return 1, n, t, n * n, n * t, t * t


def _fitted(sizes: Any, values: np.ndarray) -> list[Terms]:
    """This gives the polynomial through each column of values; a constant where there is one size alone."""
    if len(sizes) == 1:
        return [Terms((int(value), 0, 0, 0, 0, 0)) for value in values[0]]
    table = np.array([_monomials(size) for size in sizes], dtype=np.int64)
    found = np.rint(np.linalg.solve(table.astype(float), values.astype(float))).astype(np.int64)
    if (table @ found != values).any():
        raise ArithmeticError("the cost of a model is no polynomial of its tokens")
    return [Terms(tuple(map(int, column))) for column in found.T]
