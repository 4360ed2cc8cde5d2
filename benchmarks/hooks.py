"""The plain way to cache components: wrappers around modules, inside the block's own forward.

What diffusers' hooks and the papers' repositories do, without their bookkeeping: every norm,
modulation and gated residual of a block still runs, only the wrapped module does not. The baseline
of `bench_step.py`.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from fastdit import Schedule


class HookCache:
    """Run `schedule` on the blocks of a transformer by wrapping the components' forwards."""

    def __init__(
        self, blocks: list[nn.Module], components: tuple[str, ...], schedule: Schedule
    ) -> None:
        self._step = 0
        self._bits = schedule.layers["transformer_blocks"].bits
        self._cache: dict[tuple[int, str], Any] = {}
        self._modules = []
        for index, block in enumerate(blocks):
            for position, component in enumerate(components):
                if getattr(block, component) is not None:
                    self._wrap(getattr(block, component), index, position, component)

    def _wrap(self, module: nn.Module, block: int, position: int, component: str) -> None:
        def forward(wrapped: nn.Module, *args: Any, **kwargs: Any) -> Any:
            key = (block, component)
            if self._bits[self._step, block, position] or key not in self._cache:
                self._cache[key] = type(wrapped).forward(wrapped, *args, **kwargs)
            return self._cache[key]

        module.forward = types.MethodType(forward, module)
        self._modules.append(module)

    def start_step(self, step: int) -> None:
        """Go to `step`; step 0 starts a run."""
        self._step = step
        if step == 0:
            self._cache.clear()

    def remove(self) -> None:
        """Take the wrappers out."""
        for module in self._modules:
            del module.forward
