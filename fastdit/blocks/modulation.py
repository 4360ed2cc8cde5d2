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
from fastdit.observe import unobserved
from fastdit.versions import same, versions

#: as many rows of a product take no longer than reading its weights
FREE_ROWS = 64


def ahead(batch: int, steps: int) -> int:
    """Rows that a layer makes at once of a run of steps of `batch` rows."""
    return batch * min(steps, max(1, FREE_ROWS // batch))


class Table:
    """What was made of a window of steps.

    Attributes:
        rows: By layer a tuple of vectors for each step, [B, ...] or one row for all of the batch; under "inputs" what
            layers are given.
        form: What stands for the layers and shapes of the rows, for who keeps it; None once there are others.
    """

    def __init__(self) -> None:
        self.rows: dict[Any, list[tuple[Tensor, ...]]] = {}
        self.form: Any = None
        self._made: dict[Any, tuple[Tensor, ...]] = {}
        self._packed: Packed | None = None

    def keep(self, key: Any, made: tuple[Tensor, ...], each: int) -> None:
        """The vectors of a layer were made, [steps each, ...]."""
        self.rows[key] = list(zip(*(part.split(each) for part in made), strict=True))
        self._made[key] = made
        self._packed = self.form = None

    def packed(self, each: int) -> Packed:
        """All of it side by side, with so many rows of a step."""
        if self._packed is None:
            self._packed = Packed.of(self._made, each)
        return self._packed

    @property
    def nbytes(self) -> int:
        """What it takes."""
        made = list(self._made.values())
        storages = [part.untyped_storage() for parts in made for part in parts]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Modulations:
    """Of the steps of one CFG branch of a run.

    Args:
        inputs: What makes the layers' inputs.
        timesteps: [S] on the transformer's device, as it is given them.
        batch: Rows of a step.
    """

    #: whether a norm's modulations may be those made ahead
    stands_for = staticmethod(unobserved)

    def __init__(self, inputs: LayerInputs, timesteps: Tensor, batch: int) -> None:
        self._source = inputs
        self._timesteps = timesteps
        self._batch = batch
        self._versions = versions(inputs.tensors)
        self._first = self._count = 0
        self._inputs: tuple[Any, ...] | None = None
        self._making = False
        self._each = batch
        self.table = Table()
        #: which of the window the step is
        self.row = 0

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
            self._open(step)
        self.row = step - self._first
        return True

    def _open(self, step: int) -> None:
        """A window of steps begins with this one."""
        self._first, self._count = step, max(1, FREE_ROWS // self._batch)
        self._inputs = None
        self.table = Table()

    def of(
        self, layer: nn.Module, compute: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Vectors [B, ...] of this step; `compute` makes those of all rows it is given."""
        if layer not in self.table.rows:
            self.table.keep(layer, compute(*self._all_inputs()), self._each)
        return self.table.rows[layer][self.row]

    def given(self) -> tuple[Tensor, ...] | None:
        """[B, ...], the inputs of the layers at this step as the model's forward has them; None while those of the
        window are being made.
        """
        if self._making:
            return None
        if "inputs" not in self.table.rows:
            self.table.keep("inputs", self._all_inputs(), self._each)
        found = self._of_batch(self.table.rows["inputs"][self.row])
        return (torch.cat(found),) if self._source.joins else found

    def _of_batch(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rows of a step [B, ...]."""
        return rows

    def packed(self) -> Packed:
        """All of the window side by side."""
        return self.table.packed(self._each)

    def _all_inputs(self) -> tuple[Any, ...]:
        if self._inputs is None:
            self._making = True
            try:
                self._inputs = self._make()
            finally:
                self._making = False
        return self._inputs

    def _make(self) -> tuple[Any, ...]:
        some = self._timesteps[self._first : self._first + self._count]
        return self._source.make(some.repeat_interleave(self._batch))
