"""Whole steps that are forecast: the model does not run, its output is extrapolated from the last ones it computed.

That is one launch a step, and asks nothing of the model but that it returns tensors. Each guidance branch has its own
last outputs; at constant guidance a forecast of each is one of the guided velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.errors import UnsupportedModelError
from fastdit.schedules.forecast import last_nodes, weights


class Weights:
    """The weights of a run's forecasts, in the memory of the device that reads them.

    Args:
        levels: The noise level of each step.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = levels
        self._made: dict[Any, Tensor] = {}

    def of(self, step: int, nodes: Sequence[int], device: torch.device) -> Tensor:
        """This gives the weights [nodes] of outputs of the steps `nodes`, fp64 on a CPU and fp32 elsewhere."""
        key = step, tuple(nodes), device
        if key not in self._made:
            found = weights([self.levels[node] for node in nodes], self.levels[step])
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            self._made[key] = torch.tensor(found, dtype=dtype).to(device, non_blocking=True)
        return self._made[key]


class Outputs:
    """The last outputs of the model in one guidance branch.

    Attributes:
        nodes: Their steps, latest first.
    """

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self._values: list[list[Any]] = []
        self._shape: Any = None

    def add(self, step: int, output: Any, levels: Sequence[float], order: int) -> None:
        """Keep what the model gave at a step, and of what there is only what forecasts of `order` are drawn through.

        Raises:
            UnsupportedModelError: It holds no tensors.
        """
        values, shape = tree_flatten(output)
        if not any(isinstance(value, Tensor) for value in values):
            raise UnsupportedModelError(
                f"a forecast needs an output of tensors, this model gives a {type(output).__name__}"
            )
        if shape != self._shape:
            self.nodes, self._values, self._shape = [], [], shape
        # The caller may write into what it gets.
        values = [value.clone() if isinstance(value, Tensor) else value for value in values]
        held = dict(zip((step, *self.nodes), (values, *self._values), strict=True))
        self.nodes = list(last_nodes([*reversed(self.nodes), step], levels, order))
        self._values = [held[node] for node in self.nodes]

    def forecast(self, step: int, order: int, made: Weights) -> Any:
        """This gives the output at a step, as the model would return it.

        Args:
            made: The weights of the run.
            order: 0, 1 or 2; of fewer outputs the forecast is of a lower one.
        """
        used = self._values[: order + 1]
        found = []
        for values in zip(*used, strict=True):
            first = values[0]
            if isinstance(first, Tensor) and first.is_floating_point():
                found.append(_drawn(values, made.of(step, self.nodes[: len(used)], first.device)))
            else:
                found.append(first)
        return tree_unflatten(found, self._shape)


def _drawn(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """This gives the weighted sum of tensors of one shape, rounded once; the caller may write into it."""
    if len(values) == 1:
        return values[0].clone()
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * weights[0].to(wide)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.to(wide) * weight.to(wide)
    return total.to(values[0].dtype)
