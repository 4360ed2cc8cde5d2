"""adaLN modulations of several steps in one product for each layer: exact algebra, made ahead.

A modulation is linear(silu(embedding)), one row an image, of an embedding that depends on the timestep and the prompt
alone. A product of so few rows takes as long as reading its weights: 1.4 GB at each step of SD3-medium in 16 bits,
6.4 GB of FLUX. Once a run's timesteps are known, the rows of the steps to come are too, and a layer makes those of a
window of steps at once, inside its block, when it first needs one; so offloaded weights are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.blocks.packed import Packed
from fastdit.versions import same, versions

#: as many rows of a product take no longer than reading its weights
FREE_ROWS = 64


def ahead(batch: int, steps: int) -> int:
    """Rows that a layer makes at once of a run of steps of `batch` rows."""
    return batch * min(steps, max(1, FREE_ROWS // batch))


class Modulations:
    """Of the steps of one CFG branch of a run.

    Args:
        inputs: What makes the layers' inputs.
        timesteps: [S] on the transformer's device, as it is given them.
        batch: Rows of a step.
    """

    def __init__(self, inputs: LayerInputs, timesteps: Tensor, batch: int) -> None:
        self._source = inputs
        self._timesteps = timesteps
        self._batch = batch
        self._versions = versions(inputs.tensors)
        self._first = self._count = 0
        self._inputs: tuple[Any, ...] | None = None
        self._making = False
        self._made: dict[Any, tuple[Tensor, ...]] = {}
        self._packed: Packed | None = None
        #: what was made of the window, by layer a tuple of vectors for each step; under "inputs" what layers are given
        self.tables: dict[Any, list[tuple[Tensor, ...]]] = {}
        #: which of the window the step is
        self.row = 0
        #: what stands for the layers and shapes of the tables, for who keeps it; None once there are others
        self.form: Any = None

    def begin(
        self, step: int, timestep: Tensor, inputs: LayerInputs, batch: int, look: bool
    ) -> bool:
        """Go to a step; False where the model is given something else there than was foreseen.

        `look` compares the timestep's value, which waits for a GPU; the tensors are compared by identity, and whether
        they were written to.
        """
        given, held = inputs.tensors, self._source.tensors
        foreseen = (
            step < len(self._timesteps)
            and batch == self._batch
            and timestep.dtype is self._timesteps.dtype
            and len(given) == len(held)
            and all(a is b for a, b in zip(given, held, strict=True))
            and same(held, self._versions, given)
        )
        if not foreseen:
            return False
        if look and not torch.equal(timestep, self._timesteps[step].expand_as(timestep)):
            return False
        if not self._first <= step < self._first + self._count:
            self._first, self._count = step, max(1, FREE_ROWS // self._batch)
            self._inputs = None
            self.tables, self._made, self._packed, self.form = {}, {}, None, None
        self.row = step - self._first
        return True

    def of(
        self, layer: nn.Module, compute: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Vectors [B, ...] of this step; `compute` makes those of all rows it is given."""
        if layer not in self.tables:
            self._keep(layer, compute(*self._all_inputs()))
        return self.tables[layer][self.row]

    def given(self) -> tuple[Tensor, ...] | None:
        """[B, ...], the inputs of the layers at this step as the model's forward has them; None while those of the
        window are being made.
        """
        if self._making:
            return None
        if "inputs" not in self.tables:
            self._keep("inputs", self._all_inputs())
        found = self.tables["inputs"][self.row]
        return (torch.cat(found),) if self._source.joins else found

    def _keep(self, key: Any, made: tuple[Tensor, ...]) -> None:
        self.tables[key] = list(zip(*(part.split(self._batch) for part in made), strict=True))
        self._made[key] = made
        self._packed = self.form = None

    def packed(self) -> Packed:
        """All of the window side by side."""
        if self._packed is None:
            self._packed = Packed.of(self._made, self._batch)
        return self._packed

    def _all_inputs(self) -> tuple[Any, ...]:
        if self._inputs is None:
            some = self._timesteps[self._first : self._first + self._count]
            self._making = True
            try:
                self._inputs = self._source.make(some.repeat_interleave(self._batch))
            finally:
                self._making = False
        return self._inputs
