"""Modulations may be shed: the layers that make them hold their weights elsewhere, and a table stands for them.

In families with adaLN layers in each block a quarter to a third of all weights only turn timestep and pooled prompt
into vectors. Where all timesteps of a run are known these are made at its first call, layer by layer: the weights of
one are moved to the device, and go. What they give is a table, which later runs find again by what the layers were
given; those used last stay, up to :data:`KEPT_BYTES`.

On the `reference` backend a table is made by products of as many rows as the model's own, since one product of all
steps rounds otherwise. Whatever is not foreseen the layers compute themselves, exactly, at the price of moving their
weights in each call. What cannot be looked at without waiting for the device is noted there, and read at the run's end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.account.modulators import modulation_layers
from fastdit.blocks.held import (
    Returns,
    bytes_of,
    check_holdable,
    give_back,
    is_held,
    put_away,
    resident,
    weights_of,
)
from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.blocks.modulation import Modulations, Table
from fastdit.errors import UnsupportedModelError
from fastdit.observe import unobserved_where_called
from fastdit.versions import Watched

#: bytes of the tables that are kept, those of runs in progress among them; a run that needs more makes its own in parts
KEPT_BYTES = 2**30


def at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


@dataclass(eq=False, repr=False)
class Shed:
    """The modulation layers of a patched model, whose weights lie elsewhere, and the tables that stand for them.

    Attributes:
        place: "host" or "disk".
        exact: Whether tables are made by products of as many rows as the model's own.
        alike: Whether modulations depend on the timestep alone, so that those of a batch are one row.
        units, layers: What each modulation is made by, and the linear layers in these.
        made, found: How many tables were made, and how often one was found again.
    """

    place: str
    exact: bool
    alike: bool
    units: tuple[nn.Module, ...]
    layers: tuple[nn.Linear, ...]
    made: int = 0
    found: int = 0

    def __post_init__(self) -> None:
        self._kept: list[_Kept] = []
        self._seen: tuple[list[nn.Module], Watched] | None = None

    # ---- in and out

    def put_away(self) -> None:
        """The weights leave the model."""
        for layer in self.layers:
            put_away(layer, self.place)

    def give_back(self) -> None:
        """They come back; a second time makes up what the first left."""
        self._kept = []
        for layer in self.layers:
            give_back(layer)

    def another(self, memo: dict[int, Any]) -> Shed:
        """The same of a copied model."""
        units, layers = copy.deepcopy((self.units, self.layers), memo)
        return Shed(self.place, self.exact, self.alike, units, layers)

    @property
    def held(self) -> int:
        """Bytes of the weights that are away."""
        return sum(map(bytes_of, filter(is_held, self.layers)))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a step, at most."""
        first = weights_of(self.layers[0])["weight"]
        return sum(layer.out_features for layer in self.layers) * first.itemsize

    # ---- tables

    def rows(self, batch: int, steps: int) -> int:
        """A table of a run of steps of `batch` rows has so many rows."""
        each = 1 if self.alike else batch
        return each * min(steps, self.most_steps(each))

    def most_steps(self, each: int) -> int:
        """A table may have so many steps of `each` rows."""
        return max(1, KEPT_BYTES // (each * self.row_bytes))

    @property
    def kept(self) -> list[Table]:
        """The tables that later runs may find, the one used last at the end."""
        return [kept.table for kept in self._kept]

    def table(self, inputs: tuple[Any, ...], fresh: Table) -> Table:
        """The table of layers that are given `inputs`: one that was kept, or the fresh one, which is from now on.

        The tensors are compared, which waits for their device. Once a layer of these is another, or has its weights
        back, nothing is kept.
        """
        if not self._is_still():
            self._kept = []
            self.made += 1
            return fresh
        where = _stream(inputs[0])
        for kept in self._kept[::-1]:
            if kept.where == where and kept.fits(inputs):
                self._keep(kept)
                self.found += 1
                return kept.table
        self.made += 1
        self._keep(_Kept(where, inputs, fresh, len(inputs[0]) * self.row_bytes))
        return fresh

    def _keep(self, used: _Kept) -> None:
        """A table goes to the end; those that were not used for longest go where there is no room."""
        kept = [*(one for one in self._kept if one is not used), used]
        while len(kept) > 1 and sum(one.nbytes for one in kept) > KEPT_BYTES:
            kept.pop(0)
        self._kept = kept

    def _is_still(self) -> bool:
        modules = [module for unit in self.units for module in unit.modules()]
        if self._seen is None:
            self._seen = modules, Watched([weights_of(module) for module in modules])
        before, watched = self._seen
        known = len(modules) == len(before) and all(
            a is b for a, b in zip(modules, before, strict=True)
        )
        return known and not watched.changed() and all(map(is_held, self.layers))

    def __str__(self) -> str:
        held, kept = self.held, list(self.kept)
        away = sum(map(is_held, self.layers))
        back = f", {len(self.layers) - away} layers are back" if away < len(self.layers) else ""
        size = sum(table.nbytes for table in kept)
        return (
            f"{held / 2**20:.1f} MiB of weights on {self.place}, {away} layers{back}; kept tables: {len(kept)}, "
            f"{size / 2**20:.1f} of at most {KEPT_BYTES / 2**20:.0f} MiB; {self.made} made, {self.found} found again"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Kept:
    """A table with what its layers were given, on which stream of a device."""

    where: Any
    inputs: tuple[Any, ...]
    table: Table
    expected: int

    @property
    def nbytes(self) -> int:
        """What the table takes, or will."""
        return max(self.expected, self.table.nbytes)

    def fits(self, inputs: tuple[Any, ...]) -> bool:
        pairs = list(zip(self.inputs, inputs, strict=True))
        alike = all(a.shape == b.shape and a.dtype is b.dtype for a, b in pairs)
        return alike and all(torch.equal(a, b) for a, b in pairs)


def _stream(tensor: Tensor) -> Any:
    """Where a tensor is made; one stream must not read what another may still be writing."""
    if tensor.device.type != "cuda":
        return tensor.device
    return tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream


def find_shed(adapter: Any, transformer: nn.Module, place: str, exact: bool) -> Shed:
    """The modulation layers of a transformer; nothing is moved yet.

    Raises:
        UnsupportedModelError: It has none in its blocks, or one whose weights cannot be taken.
    """
    units, alike = modulation_layers(adapter, transformer)
    names = {module: name for name, module in transformer.named_modules()}
    for part in (part for unit in units for part in unit.modules()):
        if hasattr(part, "base_layer"):
            raise UnsupportedModelError(
                f"shed_modulations takes the weights of plain linear layers, but {names[part]} carries an adapter of "
                "peft; fuse or unload it, or load it after the patch"
            )
    layers = tuple(dict.fromkeys(layer for several in units.values() for layer in several))
    for layer in layers:
        check_holdable(layer, names[layer])
    return Shed(place, exact, alike, tuple(units), layers)


# ---- a run


class ShedModulations(Modulations):
    """The modulations of the steps of one CFG branch of a run, whose layers hold their weights elsewhere.

    Args:
        shed: Whose.
        doubts: Collects steps and tensors on the device that tell whether something else was given than foreseen.
        unforeseen: Collects steps of which that is known.
    """

    stands_for = staticmethod(unobserved_where_called)

    def __init__(
        self,
        shed: Shed,
        doubts: list[tuple[int, Tensor]],
        unforeseen: set[int],
        inputs: LayerInputs,
        timesteps: Tensor,
        batch: int,
    ) -> None:
        super().__init__(inputs, timesteps, batch)
        self._shed, self._doubts, self._unforeseen = shed, doubts, unforeseen
        self._each = 1 if shed.alike and not shed.exact else batch
        self._returns, self._step = Returns.count, 0
        self._compared: tuple[Any, bool] | None = None
        self._looks = True

    def begin(
        self, step: int, timestep: Tensor, inputs: LayerInputs, batch: int, look: bool
    ) -> bool:
        """As for others; False too where a layer has its weights back meanwhile."""
        if self._returns != Returns.count or not super().begin(step, timestep, inputs, batch, look):
            return False
        self._step, self._compared = step, None
        if not look:
            self._doubts.append((step, (timestep != self._timesteps[step]).any()))
        return True

    def is_given(self, given: Sequence[Any]) -> bool:
        """Whether a layer is given what was foreseen: asked where the model embeds the step's conditions by itself.

        The first time it waits for the device.
        """
        if self._compared is None or self._compared[0] is not given[0]:
            rows = slice(self.row * self._batch, (self.row + 1) * self._batch)
            pairs = [(a, b[rows]) for a, b in zip(given, self._all_inputs(), strict=True)]
            alike = all(a.shape == b.shape and a.dtype is b.dtype for a, b in pairs)
            if alike and (self._looks or at_hand(given[0])):
                alike, self._looks = all(torch.equal(a, b) for a, b in pairs), False
            elif alike:
                self._doubts += [(self._step, (a != b).any()) for a, b in pairs]
            if not alike:
                self._unforeseen.add(self._step)
            self._compared = given[0], alike
        return self._compared[1]

    def of(
        self, layer: nn.Module, compute: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Vectors [B or 1, ...] of this step."""
        inputs = self._all_inputs()
        if layer not in self.table.rows and self._shed.exact:
            self.table.keep(layer, *self._by_step(layer, compute, inputs))
        return super().of(layer, compute)

    def given(self) -> tuple[Tensor, ...] | None:
        """[B, ...], the inputs of the layers at this step."""
        if not self._making:
            self._all_inputs()
        return super().given()

    def _of_batch(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.expand(self._batch, *part.shape[1:]) for part in rows)

    def _open(self, step: int) -> None:
        """A window is the whole run, or as much of it as may be kept."""
        steps = self._shed.most_steps(self._each)
        whole = steps >= len(self._timesteps)
        self._first, self._count = (0, len(self._timesteps)) if whole else (step, steps)
        self._inputs, self.table = None, Table()

    def _all_inputs(self) -> tuple[Any, ...]:
        if self._inputs is None:
            found = super()._all_inputs()
            self.table = self._shed.table(found, self.table)
        return self._inputs

    def _make(self) -> tuple[Any, ...]:
        some = self._timesteps[self._first : self._first + self._count]
        if not self._shed.exact:
            return self._source.make(some.repeat_interleave(self._each))
        made = [self._source.make(step.repeat(self._batch)) for step in some]
        return tuple(map(torch.cat, zip(*made, strict=True)))

    def _by_step(
        self, unit: nn.Module, compute: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], int]:
        """The vectors of all steps, made by a call for each, and how many rows of a step there are."""
        with resident(unit, inputs[0].device):
            steps = [compute(*rows) for rows in self._steps(inputs)]
        made = tuple(map(torch.cat, zip(*steps, strict=True)))
        if self._shed.alike and all(
            torch.equal(part, _first_rows(part, self._batch)) for part in made
        ):
            return tuple(part[:: self._batch].clone() for part in made), 1
        return made, self._batch

    def _steps(self, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        return zip(*(part.split(self._batch) for part in inputs), strict=True)


def _first_rows(part: Tensor, batch: int) -> Tensor:
    """The first row of each step in place of all of them."""
    return part[::batch].repeat_interleave(batch, dim=0)


def modulations_of(run: Any, inputs: LayerInputs, timesteps: Tensor, batch: int) -> Modulations:
    """Those of a branch of a run; arguments as of :class:`~fastdit.blocks.modulation.Modulations`."""
    shed = run.patched.shed
    if shed is None:
        return Modulations(inputs, timesteps, batch)
    return ShedModulations(shed, run.doubts, run.unforeseen, inputs, timesteps, batch)
