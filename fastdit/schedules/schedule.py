"""The static schedule: which component of which block computes at which step, and its file.

``bits[step][block][component]`` is True where the component computes and False where it reuses its last output, the
polarity and the order of the ECAD paper's released files (arXiv 2506.15682). Step 0 always computes: there is nothing
to reuse yet, so False there means True and is stored as True.

``orders`` of the same shape say how what is reused is drawn from the last computed outputs (`forecast.py`): 0 repeats
the last, 1 and 2 extrapolate.

Files are `schedule_file.py`'s; the layout of ECAD's released ones is read too, and written if asked (`ecad_file.py`).
This file knows neither models nor runs: :meth:`Schedule.bind` only compares names and counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fastdit import files
from fastdit.checks import is_whole
from fastdit.errors import ScheduleError
from fastdit.schedules import ecad_file, schedule_file
from fastdit.schedules.layer import (
    Layer,
    check_kinds,
    check_order,
    check_steps,
    make_layer,
    ungrouped,
)
from fastdit.spec import BlockKind, ModelSpec

DEFAULT_KIND = "transformer_blocks"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule for a fixed number of steps. Make one by `from_bits`, `every`, `load` or `from_json`.

    Attributes:
        layers: Block kind (the transformer's attribute, e.g. ``"transformer_blocks"``) -> :class:`Layer`.
        provenance: Free JSON data about its origin; not part of equality or of the hash.
        taken: The other schedule's step that each step was taken from, where it was resampled; else empty.
    """

    layers: Mapping[str, Layer]
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    taken: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        layers = self.layers.values() if isinstance(self.layers, Mapping) else ()
        if not layers or not all(isinstance(layer, Layer) for layer in layers):
            raise ScheduleError(
                "layers must be a mapping of block kinds to Layer, got "
                f"{type(self.layers).__name__}; Schedule.from_bits(bits, components) makes a schedule of bits"
            )

    # ---- construction

    @classmethod
    def from_bits(
        cls,
        bits: Any,
        components: Sequence[str] | Mapping[str, Sequence[str]],
        provenance: Mapping[str, Any] | None = None,
        orders: Any = 0,
    ) -> Schedule:
        """This makes a schedule from ``bits[step][block][component]``, where True computes.

        Args:
            bits: Nested lists, an array or a tensor of bool or 0/1; for a model with several block kinds (FLUX) a
                mapping from kind to such bits.
            components: Names along the last axis, or a mapping from kind to names.
            provenance: Free JSON data about the origin.
            orders: Of the forecasts of what is reused: one for all, or shaped like `bits`, of 0, 1 and 2.

        Raises:
            ScheduleError: Shapes, values or names are not as described.
        """
        several = isinstance(bits, Mapping)
        if several != isinstance(components, Mapping):
            raise ScheduleError(
                "bits and components must both be mappings by block kind, or neither: "
                f"bits is {type(bits).__name__}, components is {type(components).__name__}"
            )
        bits = bits if several else {DEFAULT_KIND: bits}
        components = components if several else {DEFAULT_KIND: components}
        if not isinstance(orders, Mapping):
            orders = dict.fromkeys(bits, 0 if orders is None else orders)
        check_kinds(bits=bits, components=components, orders=orders)
        layers = {
            str(kind): make_layer(str(kind), bits[kind], components[kind], orders[kind])
            for kind in bits
        }
        check_steps("bits", {kind: len(layer.bits) for kind, layer in layers.items()})
        return cls(MappingProxyType(layers), MappingProxyType(dict(provenance or {})))

    @classmethod
    def of_steps(
        cls,
        spec: ModelSpec,
        steps: int,
        computed: Sequence[int],
        order: int | Sequence[int] = 0,
        provenance: Mapping[str, Any] | None = None,
    ) -> Schedule:
        """This computes everything at the steps `computed` of `steps`, and draws the others by `order`, or each by its.

        Of a model without blocks that are known it is for the output.
        """
        computes = np.zeros((steps, 1, 1), dtype=bool)
        computes[list(computed)] = True
        kinds = spec.kinds or (BlockKind(DEFAULT_KIND, 1, ("output",)),)
        bits = {
            kind.name: np.broadcast_to(computes, (steps, kind.count, len(kind.components)))
            for kind in kinds
        }
        components = {kind.name: kind.components for kind in kinds}
        own = order if isinstance(order, int) else np.reshape(order, (steps, 1, 1))
        orders = {kind: np.broadcast_to(own, each.shape) for kind, each in bits.items()}
        return cls.from_bits(bits, components, provenance, orders)

    @staticmethod
    def every(n: int, order: int = 0) -> Every:
        """In this schedule, FORA's, every component computes at steps 0, n, 2n, ... and is reused between.

        It is bound to the model and to the number of steps when a run starts, so it fits any.
        """
        return Every(n, order)

    # ---- facts

    @property
    def steps(self) -> int:
        """It has so many steps."""
        return next(iter(self.layers.values())).bits.shape[0]

    @property
    def reuse_share(self) -> float:
        """This share of all (step, block, component) entries is reused."""
        entries = sum(layer.bits.size for layer in self.layers.values())
        return sum(int((~layer.bits).sum()) for layer in self.layers.values()) / entries

    @property
    def forecasts(self) -> bool:
        """This tells whether it extrapolates what it reuses."""
        return any(layer.orders.any() for layer in self.layers.values())

    @property
    def sha256(self) -> str:
        """This hash is over the content, not the provenance, and equal for equal schedules."""
        return hashlib.sha256(schedule_file.canonical(schedule_file.content(self))).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        kinds = ", ".join(
            f"{kind}: {layer.bits.shape[1]} x ({', '.join(layer.components)})"
            for kind, layer in self.layers.items()
        )
        return f"Schedule({self.steps} steps, {kinds}, {self.reuse_share:.1%} reused)"

    # ---- use

    def with_order(self, order: int) -> Schedule:
        """This is the same schedule with all that it reuses forecast by one order.

        Raises:
            ScheduleError: It is not 0, 1 or 2.
        """
        check_order(order)
        layers = {
            kind: make_layer(kind, layer.bits, layer.components, order)
            for kind, layer in self.layers.items()
        }
        return replace(self, layers=MappingProxyType(layers))

    def separates(self) -> tuple[int, str, int] | None:
        """The first step, block kind and block of which a part is computed and a part reused; None where none is."""
        for kind, layer in self.layers.items():
            apart = layer.bits.any(axis=2) & ~layer.bits.all(axis=2)
            if apart.any():
                step, block = np.argwhere(apart)[0].tolist()
                return step, kind, block
        return None

    def bind(self, spec: ModelSpec, steps: int) -> Schedule:
        """This checks that the schedule fits the model and the number of steps, and gives it in the model's components.

        Raises:
            ScheduleError: Naming what differs.
        """
        self.check(spec)
        if steps != self.steps:
            raise ScheduleError(
                f"the schedule has {self.steps} steps but the run has {steps}; "
                f"use num_inference_steps={self.steps}, or a schedule made for {steps}"
            )
        layers = {
            kind.name: ungrouped(self.layers[kind.name], kind)
            for kind in spec.kinds
            if set(self.layers[kind.name].components) & set(kind.groups)
        }
        if not layers:
            return self
        return replace(self, layers=MappingProxyType({**self.layers, **layers}))

    def resampled(self, taken: Sequence[int]) -> Schedule:
        """Step i of the new schedule is this one's step ``taken[i]``.

        Step 0 computes everything, as everywhere.

        Raises:
            ScheduleError: One of them is no step of this schedule.
        """
        taken = [int(step) for step in taken]
        if not taken or min(taken) < 0 or max(taken) >= self.steps:
            raise ScheduleError(f"taken must be steps 0 to {self.steps - 1}, got {taken}")
        layers = {
            kind: make_layer(kind, layer.bits[taken], layer.components, layer.orders[taken])
            for kind, layer in self.layers.items()
        }
        return replace(self, layers=MappingProxyType(layers), taken=tuple(taken))

    def check(self, spec: ModelSpec) -> None:
        """This checks block kinds, block counts and component names against a model; see :meth:`bind`."""
        expected = {kind.name: kind for kind in spec.kinds}
        if set(self.layers) != set(expected):
            raise ScheduleError(
                f"the schedule is for block kinds {sorted(self.layers)}, the {spec.family} model has {sorted(expected)}"
            )
        for name, layer in self.layers.items():
            kind = expected[name]
            if layer.bits.shape[1] != kind.count:
                raise ScheduleError(
                    f"the schedule has {layer.bits.shape[1]} {name}, the {spec.family} model has {kind.count}"
                )
            if unknown := sorted(set(layer.components) - set(kind.components) - set(kind.groups)):
                raise ScheduleError(
                    f"the schedule names components {unknown} of {name}; "
                    f"those of the {spec.family} family are {list(kind.components)}"
                    + (f" and the groups {list(kind.groups)}" if kind.groups else "")
                )
            named = [c for name in layer.components for c in kind.groups.get(name, (name,))]
            if twice := sorted({c for c in named if named.count(c) > 1}):
                raise ScheduleError(
                    f"the schedule sets components {twice} of {name} twice: by name and in a group"
                )

    # ---- file

    def to_json(self) -> str:
        """This writes the schedule as JSON text, see `schedule_file.py`."""
        return schedule_file.dumps(self.document()) + "\n"

    def document(self) -> dict[str, Any]:
        """This is :meth:`to_json` as JSON data."""
        content = schedule_file.content(self)
        return {**content, "provenance": dict(self.provenance), "sha256": self.sha256}

    def to_ecad_json(self) -> str:
        """This writes the schedule in the layout of ECAD's released files.

        Raises:
            ScheduleError: The layout has no place for a block kind of this schedule.
        """
        return schedule_file.dumps(ecad_file.document(self)) + "\n"

    def save(self, path: str | os.PathLike[str], layout: str = "fastdit") -> None:
        """This writes to `path` in this package's layout, :meth:`to_json`, or with "ecad" in :meth:`to_ecad_json`'s.

        Raises:
            ScheduleError: `layout` is neither, or has no place for a block kind.
        """
        if layout not in ("fastdit", "ecad"):
            raise ScheduleError(f'layout must be "fastdit" or "ecad", got {layout!r}')
        text = self.to_json() if layout == "fastdit" else self.to_ecad_json()
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """This reads a schedule file, of this package's layout or of ECAD's.

        Raises:
            ScheduleError: The file cannot be read, or is not a valid schedule; names the file and what is wrong.
        """
        try:
            text = files.read_text(path, schedule_file.MAX_FILE_BYTES)
        except (OSError, ValueError) as error:  # also bytes that are no text
            raise ScheduleError(f"{path}: not a readable schedule file: {error}") from error
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """This reads JSON text of :meth:`to_json` or of ECAD's layout.

        Raises:
            ScheduleError: It is anything else."""
        if not isinstance(text, str):
            raise ScheduleError(f"text must be a str, got {type(text).__name__}")
        try:
            document = files.parse(text.removeprefix("\ufeff"))
        except ValueError as error:
            raise ScheduleError(f"not valid JSON: {error}") from error
        if isinstance(document, dict) and ecad_file.ROOT in document:
            return cls.from_bits(*ecad_file.parse(document))
        return cls.of_document(document)

    @classmethod
    def of_document(cls, document: Any) -> Schedule:
        """This reads JSON data of :meth:`document`.

        Raises:
            ScheduleError: It is anything else."""
        schedule = cls.from_bits(*schedule_file.parse(document))
        if document["sha256"] != schedule.sha256:
            raise ScheduleError(
                "sha256 does not match the content: the file is damaged or was edited"
            )
        return schedule


@dataclass(frozen=True)
class Every:
    """`Schedule.every(n)` gives this; it is not yet bound to a model or to a number of steps.

    Attributes:
        n: Compute at every n-th step, n >= 1; n = 1 computes always.
        order: Of the forecasts between; 0 repeats.
    """

    n: int
    order: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.n) or self.n < 1:
            raise ScheduleError(f"n must be an int >= 1, got {self.n!r}")
        check_order(self.order)

    @property
    def forecasts(self) -> bool:
        """This tells whether it extrapolates what it reuses."""
        return self.order > 0

    def with_order(self, order: int) -> Every:
        """This is the same with another order."""
        return replace(self, order=order)

    def bind(self, spec: ModelSpec, steps: int) -> Schedule:
        """This is the schedule for `steps` steps of the model."""
        computed = range(0, steps, self.n)
        return Schedule.of_steps(spec, steps, computed, self.order, {"every": self.n})

    def check(self, spec: ModelSpec) -> None:
        """It fits every model."""
