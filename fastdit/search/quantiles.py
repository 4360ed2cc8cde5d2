"""Which components change least from step to step, and schedules that reuse them there.

InvarDiff (arXiv 2512.05134) takes quantiles of the changes that a few unpatched runs show: a component that changes by
less than most do is not computed at that step. Here what it reuses is drawn through its last two outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdit.schedules.schedule import Schedule
from fastdit.search.told import told_of_steps
from fastdit.spec import ModelSpec

#: outputs that are drawn need so many computed ones
FIRST = 2

#: (block kind, block, component) -> how far its output is from the one before, relatively, at each step
Changes = Mapping[tuple[str, int, str], list[float]]


class Watched:
    """The components of a model while a pipeline runs it unpatched.

    Attributes:
        changes: Of each component that is a module of its block; a run's first step has none.
    """

    def __init__(self, spec: ModelSpec, blocks: Iterable[tuple[str, nn.Module]]) -> None:
        """`blocks` are (kind, block) of all kinds in running order."""
        self.changes: dict[tuple[str, int, str], list[float]] = {}
        self._modules: list[tuple[tuple[str, int, str], Any]] = []
        kinds = {kind.name: kind for kind in spec.kinds}
        counts = dict.fromkeys(kinds, -1)
        for kind, block in ((kinds[name], block) for name, block in blocks):
            index = counts[kind.name] = counts[kind.name] + 1
            children = dict(block.named_children())
            for name in kind.components:
                if children.get(name) is not None and (index, name) not in kind.absent:
                    self._modules.append(((kind.name, index, name), children[name]))
        self._before: dict[Any, torch.Tensor] = {}
        self._sums: dict[Any, float] = {}
        self._calls: dict[Any, int] = {}

    @contextmanager
    def running(self, scheduler: Any) -> Iterator[None]:
        """Inside, a run of the pipeline with this scheduler is watched."""
        with ExitStack() as stack:
            for key, module in self._modules:
                hook = module.register_forward_hook(partial(self._hear, key))
                stack.callback(hook.remove)
            stack.enter_context(told_of_steps(scheduler, self._end_step))
            yield
        self._before.clear()

    def _hear(self, key: Any, module: Any, given: Any, output: Any) -> None:
        now = output[0] if isinstance(output, tuple) else output
        call = key, self._calls.get(key, 0)
        self._calls[key] = call[1] + 1
        before = self._before.get(call)
        if before is not None and before.shape == now.shape:
            far = float((now - before).norm() / now.norm())
            self._sums[key] = self._sums.get(key, 0.0) + far
        self._before[call] = now.detach().clone()

    def _end_step(self, *told: Any) -> None:
        for key, _ in self._modules:
            self.changes.setdefault(key, []).append(self._sums.get(key, 0.0))
        self._sums.clear()
        self._calls.clear()


def quantile_schedule(changes: Changes, spec: ModelSpec, steps: int, share: float) -> Schedule:
    """So large a share of the outputs from the third step on is reused: those that change least.

    Args:
        changes: Of several runs, one after the other, as :class:`Watched` has them.
        share: From 0 to 1.
    """
    mean = {key: np.reshape(each, (-1, steps)).mean(axis=0) for key, each in changes.items()}
    least = np.quantile([each[FIRST:] for each in mean.values()], share)
    bits, names = {}, {}
    for kind in spec.kinds:
        bits[kind.name] = np.ones((steps, kind.count, len(kind.components)), dtype=bool)
        names[kind.name] = kind.components
        for block in range(kind.count):
            for place, name in enumerate(kind.components):
                if (kind.name, block, name) in mean:
                    reused = mean[kind.name, block, name] < least
                    bits[kind.name][FIRST:, block, place] = ~reused[FIRST:]
    return Schedule.from_bits(bits, names, {"quantile": share}, 1)
