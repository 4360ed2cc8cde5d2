"""A plain cache of module outputs, the independent truth for schedules.

It knows nothing of fastdit: it puts a wrapper around the forward of the stock block's own
sub-modules (attention, feed-forward, projection), keeps each module's last output per transformer
call within a step, and returns it where the schedule says so. What is kept is the raw output,
before the gate and before any norm behind the module, or, where orders are given, the polynomial
through the last outputs that were computed at distinct sigmas; FLUX's `single_proj_mlp` is the output of that
linear layer, before the GELU; an empty slot computes.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: block list -> component -> the sub-module of the block whose output it is
MODULES: dict[str, dict[str, dict[str, str]]] = {
    "SD3Transformer2DModel": {
        "transformer_blocks": {
            "attn": "attn",
            "attn2": "attn2",
            "ff": "ff",
            "ff_context": "ff_context",
        },
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": {
            "full_attn": "attn",
            "full_ff": "ff",
            "full_ff_context": "ff_context",
        },
        "single_transformer_blocks": {
            "single_attn": "attn",
            "single_proj_mlp": "proj_mlp",
            "single_proj_out": "proj_out",
        },
    },
    "PixArtTransformer2DModel": {
        "transformer_blocks": {"attn1": "attn1", "attn2": "attn2", "ff": "ff"},
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks": {"attn": "attn", "img_mlp": "img_mlp", "txt_mlp": "txt_mlp"},
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": {"attn": "attn", "ff": "ff", "ff_context": "ff_context"},
        "single_transformer_blocks": {"single_attn": "attn"},
    },
    "HunyuanVideo15Transformer3DModel": {
        "transformer_blocks": {"attn": "attn", "ff": "ff", "ff_context": "ff_context"},
    },
    "DiTTransformer2DModel": {"transformer_blocks": {"attn1": "attn1", "ff": "ff"}},
    "LuminaNextDiT2DModel": {
        "layers": {
            "attn1": "attn1",
            "attn2": "attn2",
            "to_out": "attn2.to_out.0",
            "feed_forward": "feed_forward",
        },
    },
    "Lumina2Transformer2DModel": {
        "noise_refiner": {"noise_attn": "attn", "noise_feed_forward": "feed_forward"},
        "layers": {"attn": "attn", "feed_forward": "feed_forward"},
    },
    "WanTransformer3DModel": {"blocks": {"attn1": "attn1", "attn2": "attn2", "ffn": "ffn"}},
    "WanVACETransformer3DModel": {
        "vace_blocks": {"attn1": "attn1", "attn2": "attn2", "ffn": "ffn", "proj_out": "proj_out"},
        "blocks": {"attn1": "attn1", "attn2": "attn2", "ffn": "ffn"},
    },
    "ZImageTransformer2DModel": {
        "noise_refiner": {
            "noise_attention": "attention",
            "noise_feed_forward": "feed_forward",
        },
        "layers": {"attention": "attention", "feed_forward": "feed_forward"},
    },
}

#: components whose output is drawn behind a norm that follows the module: repeated it is the same, drawn it is not
NORMS = {
    "LuminaNextDiT2DModel": {"layers": {"to_out": "norm2", "feed_forward": "ffn_norm2"}},
    "Lumina2Transformer2DModel": {
        "noise_refiner": {"noise_attn": "norm2", "noise_feed_forward": "ffn_norm2"},
        "layers": {"attn": "norm2", "feed_forward": "ffn_norm2"},
    },
    "ZImageTransformer2DModel": {
        "noise_refiner": {
            "noise_attention": "attention_norm2",
            "noise_feed_forward": "ffn_norm2",
        },
        "layers": {"attention": "attention_norm2", "feed_forward": "ffn_norm2"},
    },
}

Bits = Mapping[str, np.ndarray]


def random_bits(
    transformer: nn.Module, steps: int, seed: int, compute: float = 0.4
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """A random schedule of a stock transformer: bits [step, block, component] and component names per block list."""
    generator = np.random.default_rng(seed)
    names = {kind: tuple(parts) for kind, parts in MODULES[type(transformer).__name__].items()}
    bits = {
        kind: generator.random((steps, len(getattr(transformer, kind)), len(parts))) < compute
        for kind, parts in names.items()
    }
    return bits, names


class Oracle:
    """A stock transformer that runs a schedule.

    Args:
        transformer: Not patched.
        bits: Block list -> bool [step, block, component], True = compute.
        calls_per_step: Transformer calls within a step: 2 for sequential guidance.
        first: Step of the first call, for runs that enter the schedule late.
        orders: Like `bits`: how many outputs, less one, a reused one is drawn through; None for one alone.
        sigmas: Where each step is, for `orders` and `whole`.
        whole: Step -> order of the forecast of the model's output there, at which it does not run.
    """

    def __init__(
        self,
        transformer: nn.Module,
        bits: Bits,
        calls_per_step: int = 1,
        first: int = 0,
        orders: Bits | None = None,
        sigmas: Sequence[float] = (),
        whole: Mapping[int, int] | None = None,
    ) -> None:
        self._whole = whole or {}
        self._transformer = transformer
        self._bits = bits
        self._calls_per_step = calls_per_step
        self._first = first
        self._calls = -1
        self._inside = False
        self._orders = orders
        self._sigmas = sigmas
        self._slots: dict[Any, dict[float, Any]] = {}
        self._versions: dict[Any, list[int]] = {}
        self._uses: Counter[Any] = Counter()
        self.computed = 0
        self.reused = 0

    def drop(self) -> None:
        """Empty every slot."""
        self._slots.clear()

    @contextmanager
    def installed(self) -> Iterator[Oracle]:
        """Run the schedule inside the `with`, from its start."""
        modules = [self._transformer, *(module for module, _ in self._components())]
        wrapped = [(module, module.__dict__.get("forward")) for module in modules]
        for module, name in list(self._components()):
            module.forward = self.wrap(module.forward, *name)
        handle = self._transformer.register_forward_pre_hook(self._count)
        self._transformer.forward = self._skipping(self._transformer.forward)
        try:
            yield self
        finally:
            handle.remove()
            for module, before in wrapped:
                del module.forward
                if before is not None:  # a hook's
                    module.forward = before

    def _components(self) -> Iterator[tuple[nn.Module, tuple[str, int, int]]]:
        name = type(self._transformer).__name__
        norms = NORMS.get(name, {}) if self._orders is not None else {}
        for kind, parts in MODULES[name].items():
            parts = {**parts, **norms.get(kind, {})}
            for index, block in enumerate(operator.attrgetter(kind)(self._transformer)):
                for position, attribute in enumerate(parts.values()):
                    if (module := operator.attrgetter(attribute)(block)) is not None:
                        yield module, (kind, index, position)

    def _count(self, module: nn.Module, args: Any) -> None:
        self._calls += 1
        self._uses.clear()

    def _skipping(self, forward: Callable) -> Callable:
        """A ControlNet that shares blocks with the transformer computes them: it is not inside of this."""

        @functools.wraps(forward)  # some look at its arguments
        def skipped(*args: Any, **kwargs: Any) -> Any:
            step, branch = divmod(self._calls, self._calls_per_step)
            computed = self._slots.setdefault(("output", branch), {})
            at = self._sigmas[self._first + step] if self._whole else None
            order = self._whole.get(self._first + step)
            if order is not None and computed:
                return Given((_through(list(computed.items())[-1 - order :], at),))
            self._inside = True
            try:
                found = forward(*args, **kwargs)
            finally:
                self._inside = False
            if self._whole:
                computed.pop(at, None)
                computed[at] = found[0].clone()
            return found

        return skipped

    def wrap(self, forward: Callable, kind: str, block: int, position: int) -> Callable:
        def cached(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                return forward(*args, **kwargs)
            step, branch = divmod(self._calls, self._calls_per_step)
            module = (kind, block, position)
            # A block may call one module on several streams.
            key = (*module, branch, self._uses[module])
            self._uses[module] += 1
            place = self._first + step, block, position
            sigma = self._sigmas[place[0]] if len(self._sigmas) else 0.0
            if self._bits[kind][place] or key not in self._slots:
                self.computed += 1
                found = forward(*args, **kwargs)
                computed = self._slots.setdefault(key, {})
                computed.pop(sigma, None)
                computed[sigma] = found
                self._versions[key] = _versions(found)
                return found
            self.reused += 1
            # A block that wrote into what it was given would find that in place of the module's output.
            assert self._versions[key] == _versions(list(self._slots[key].values())[-1])
            order = 0 if self._orders is None else int(self._orders[kind][place])
            return _through(list(self._slots[key].items())[-1 - order :], sigma)

        return cached


class Given(tuple):
    """What a transformer returns, for those who ask for a tuple and for those who do not."""

    sample = property(lambda self: self[0])


def _versions(value: Any) -> list[int]:
    tensors = (part for part in tree_leaves(value) if isinstance(part, Tensor))
    return [t._version for t in tensors if not t.is_inference()]


def _through(nodes: Sequence[tuple[float, Any]], at: float) -> Any:
    """The polynomial through values at sigmas; itself where there is one."""
    if len(nodes) == 1:
        return nodes[0][1]
    if isinstance(nodes[0][1], tuple):
        parts = zip(*(values for _, values in nodes), strict=True)
        sigmas = [sigma for sigma, _ in nodes]
        return tuple(_through(list(zip(sigmas, part, strict=True)), at) for part in parts)
    if nodes[0][1] is None:
        return None
    total = 0
    for own, value in nodes:
        others = [other for other, _ in nodes if other != own]
        total = total + value * float(np.prod([(at - o) / (own - o) for o in others]))
    return total
