"""The static schedule: which component of which block computes at which step, and its file.

``bits[step][block][component]`` is True where the component computes and False where it reuses its last output, the
polarity and the order of the ECAD paper's released files (arXiv 2506.15682). Step 0 always computes: there is nothing
to reuse yet, so False there means True and is stored as True.

The file is JSON, written for people and diffs: one string of 0 and 1 per step and block kind, in [block][component]
order, with a version, free provenance and a SHA-256 over the content. The layout of ECAD's released files is read too,
and written if asked (`schedules/ecad_file.py`). Reading executes nothing; a file that is malformed, truncated, altered
or made for something else is refused with a :class:`~fastdit.errors.ScheduleError`.
This file knows neither models nor runs: :meth:`Schedule.bind` only compares names and counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fastdit import files
from fastdit.errors import ScheduleError
from fastdit.schedules import ecad_file
from fastdit.spec import BlockKind, ModelSpec

FORMAT = "fastdit.schedule"
VERSION = 1
DEFAULT_KIND = "transformer_blocks"
MAX_FILE_BYTES = 64 << 20
MAX_COUNT = 1 << 14
MAX_KINDS = 64
MAX_BITS = 1 << 26


class Bindable(Protocol):
    """Anything that becomes a :class:`Schedule` once model and number of steps are known."""

    def bind(self, spec: ModelSpec, steps: int) -> Schedule: ...


@dataclass(frozen=True, eq=False)
class Layer:
    """The bits of one block kind: ``bits`` is a read-only bool array [steps, blocks, components]."""

    components: tuple[str, ...]
    bits: np.ndarray


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule for a fixed number of steps. Make one by `from_bits`, `every`, `load` or `from_json`.

    Attributes:
        layers: Block kind (the transformer's attribute, e.g. ``"transformer_blocks"``) -> :class:`Layer`.
        provenance: Free JSON data about its origin; not part of equality or of the hash.
        rows: Where it was resampled, the other schedule's step that each step was taken from; else empty.
    """

    layers: Mapping[str, Layer]
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    rows: tuple[int, ...] = ()

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
    ) -> Schedule:
        """Make a schedule from ``bits[step][block][component]``, True = compute.

        Args:
            bits: Nested lists, an array or a tensor of bool or 0/1; for a model with several block kinds (FLUX) a
                mapping from kind to such bits.
            components: Names along the last axis, or a mapping from kind to names.
            provenance: Free JSON data about the origin.

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
        if not bits or set(bits) != set(components):
            raise ScheduleError(
                f"bits has block kinds {sorted(map(str, bits))}, components has {sorted(map(str, components))}; "
                "they must be the same and not empty"
            )
        layers = {str(kind): _layer(str(kind), bits[kind], components[kind]) for kind in bits}
        steps = {kind: layer.bits.shape[0] for kind, layer in layers.items()}
        if len(set(steps.values())) > 1:
            raise ScheduleError(
                f"bits must have the same number of steps for every block kind, got {steps}"
            )
        return cls(MappingProxyType(layers), MappingProxyType(dict(provenance or {})))

    @staticmethod
    def every(n: int) -> Every:
        """The FORA-style schedule: every component computes at steps 0, n, 2n, ... and is reused between.

        It is bound to the model and to the number of steps when a run starts, so it fits any.
        """
        return Every(n)

    # ---- facts

    @property
    def steps(self) -> int:
        """Number of steps."""
        return next(iter(self.layers.values())).bits.shape[0]

    @property
    def reuse_share(self) -> float:
        """Share of all (step, block, component) cells that are reused."""
        cells = sum(layer.bits.size for layer in self.layers.values())
        return sum(int((~layer.bits).sum()) for layer in self.layers.values()) / cells

    @property
    def sha256(self) -> str:
        """Hash of the content (not of the provenance), equal for equal schedules."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        kinds = ", ".join(
            f"{kind}: {layer.bits.shape[1]} x ({', '.join(layer.components)})"
            for kind, layer in self.layers.items()
        )
        return f"Schedule({self.steps} steps, {kinds}, {self.reuse_share:.1%} reused)"

    # ---- use

    def bind(self, spec: ModelSpec, steps: int) -> Schedule:
        """Check that the schedule fits the model and the number of steps, and return it in the model's components.

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
            kind.name: _ungrouped(self.layers[kind.name], kind)
            for kind in spec.kinds
            if set(self.layers[kind.name].components) & set(kind.groups)
        }
        if not layers:
            return self
        return replace(self, layers=MappingProxyType({**self.layers, **layers}))

    def resampled(self, rows: Sequence[int]) -> Schedule:
        """The schedule whose step i is this one's step ``rows[i]``.

        Step 0 computes everything, as everywhere.

        Raises:
            ScheduleError: A row is not one of this schedule's steps.
        """
        rows = [int(row) for row in rows]
        if not rows or min(rows) < 0 or max(rows) >= self.steps:
            raise ScheduleError(f"rows must be steps 0 to {self.steps - 1}, got {rows}")
        layers = {
            kind: _layer(kind, layer.bits[rows], layer.components)
            for kind, layer in self.layers.items()
        }
        return replace(self, layers=MappingProxyType(layers), rows=tuple(rows))

    def check(self, spec: ModelSpec) -> None:
        """Check block kinds, block counts and component names against a model; see :meth:`bind`."""
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
        """The schedule as JSON text; see the module's description."""
        content = self._content()
        document = {**content, "provenance": dict(self.provenance), "sha256": self.sha256}
        return _dumps(document)

    def to_ecad_json(self) -> str:
        """The schedule in the layout of ECAD's released files.

        Raises:
            ScheduleError: The layout has no place for a block kind of this schedule.
        """
        return _dumps(ecad_file.document(self))

    def save(self, path: str | os.PathLike[str], layout: str = "fastdit") -> None:
        """Write to `path` in this package's layout, :meth:`to_json`, or with "ecad" in :meth:`to_ecad_json`'s.

        Raises:
            ScheduleError: `layout` is neither, or has no place for a block kind.
        """
        if layout not in ("fastdit", "ecad"):
            raise ScheduleError(f'layout must be "fastdit" or "ecad", got {layout!r}')
        text = self.to_json() if layout == "fastdit" else self.to_ecad_json()
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a schedule file, of this package's layout or of ECAD's.

        Raises:
            ScheduleError: The file cannot be read, or is not a valid schedule; names the file and what is wrong.
        """
        try:
            text = files.read_text(path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:  # also bytes that are no text
            raise ScheduleError(f"{path}: not a readable schedule file: {error}") from error
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Parse JSON text of :meth:`to_json` or of ECAD's layout. Raises ScheduleError on anything else."""
        if not isinstance(text, str):
            raise ScheduleError(f"text must be a str, got {type(text).__name__}")
        try:
            document = files.parse(text.removeprefix("\ufeff"))
        except ValueError as error:
            raise ScheduleError(f"not valid JSON: {error}") from error
        return cls._from_document(document)

    @classmethod
    def _from_document(cls, document: Any) -> Schedule:
        if isinstance(document, dict) and ecad_file.ROOT in document:
            return cls.from_bits(*ecad_file.parse(document, MAX_COUNT))
        schedule = _parse(document)
        if document["sha256"] != schedule.sha256:
            raise ScheduleError(
                "sha256 does not match the content: the file is damaged or was edited"
            )
        return schedule

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "steps": self.steps,
            "blocks": {
                kind: {
                    "count": layer.bits.shape[1],
                    "components": list(layer.components),
                    "bits": [
                        "".join("01"[bit] for bit in row.ravel().astype(int)) for row in layer.bits
                    ],
                }
                for kind, layer in sorted(self.layers.items())
            },
        }


@dataclass(frozen=True)
class Every:
    """`Schedule.every(n)`: not yet bound to a model or to a number of steps.

    Attributes:
        n: Compute at every n-th step, n >= 1; n = 1 computes always.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ScheduleError(f"n must be an int >= 1, got {self.n!r}")

    def bind(self, spec: ModelSpec, steps: int) -> Schedule:
        """The schedule for `steps` steps of the model."""
        computes = np.arange(steps) % self.n == 0
        bits = {
            kind.name: np.broadcast_to(
                computes[:, None, None], (steps, kind.count, len(kind.components))
            )
            for kind in spec.kinds
        }
        components = {kind.name: kind.components for kind in spec.kinds}
        return Schedule.from_bits(bits, components, {"every": self.n})

    def check(self, spec: ModelSpec) -> None:
        """Fits every model."""


def _ungrouped(layer: Layer, kind: BlockKind) -> Layer:
    """The layer with every group replaced by its components."""
    parts = [
        (component, layer.bits[:, :, index])
        for index, name in enumerate(layer.components)
        for component in kind.groups.get(name, (name,))
    ]
    bits = np.stack([bits for _, bits in parts], axis=-1)
    return _layer(kind.name, bits, tuple(name for name, _ in parts))


def check_names(kind: Any, components: Any) -> tuple[str, ...]:
    """The component names of a block kind.

    Raises:
        ScheduleError: They, or the kind, are no names: distinct strings of characters that can be printed.
    """
    if isinstance(components, str) or not isinstance(components, Sequence):
        raise ScheduleError(
            f"components of {kind!r} must be a sequence of names, got {components!r}"
        )
    names = tuple(components)
    if (
        not names
        or not all(isinstance(name, str) and name and name.isprintable() for name in (kind, *names))
        or len(set(names)) < len(names)
    ):
        raise ScheduleError(
            f"components of {kind!r} must be distinct non-empty strings of printable characters, and so must the "
            f"block kind, got {names!r}"
        )
    return names


def _layer(kind: str, bits: Any, components: Any) -> Layer:
    names = check_names(kind, components)
    try:
        array = np.asarray(bits)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"bits of {kind!r} must be a regular [step][block][component] array: {error}"
        ) from error
    if array.dtype != bool and not (
        np.issubdtype(array.dtype, np.integer) and array.size and np.isin(array, (0, 1)).all()
    ):
        raise ScheduleError(
            f"bits of {kind!r} must be bool or 0/1, got {array.dtype} with shape {array.shape}"
        )
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != len(names):
        raise ScheduleError(
            f"bits of {kind!r} must have shape [steps, blocks, {len(names)}] without empty axes, got {array.shape}"
        )
    array = array.astype(bool)
    array[0] = True  # there is nothing to reuse at the first step
    array.setflags(write=False)
    return Layer(names, array)


def _dumps(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ScheduleError(f"provenance must be plain JSON data: {error}") from error


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def expect(document: Any, where: str, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse what is no object with exactly these fields of these types.

    Raises:
        ScheduleError: Naming the place and the field.
    """
    if not isinstance(document, dict):
        raise ScheduleError(f"{where} must be an object, got {type(document).__name__}")
    if set(document) != set(fields):
        raise ScheduleError(
            f"{where} must have exactly the fields {sorted(fields)}, got {sorted(document)}"
        )
    for name, kinds in fields.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(document[name]) not in kinds:
            raise ScheduleError(
                f"{where}.{name} must be {' or '.join(kind.__name__ for kind in kinds)}, "
                f"got {type(document[name]).__name__}"
            )


def _count(value: int, where: str) -> int:
    if not 1 <= value <= MAX_COUNT:
        raise ScheduleError(f"{where} must be from 1 to {MAX_COUNT}, got {value}")
    return value


def _parse(document: Any) -> Schedule:
    header = {
        "format": str,
        "version": int,
        "steps": int,
        "blocks": dict,
        "provenance": dict,
        "sha256": str,
    }
    if isinstance(document, dict) and document.get("format", FORMAT) != FORMAT:
        raise ScheduleError(f"format must be {FORMAT!r}, got {document['format']!r}")
    expect(document, "schedule", header)
    if document["version"] != VERSION:
        raise ScheduleError(
            f"version must be {VERSION}, got {document['version']}; a newer fastdit may read it"
        )
    steps = _count(document["steps"], "steps")
    if len(document["blocks"]) > MAX_KINDS:
        raise ScheduleError(
            f"blocks may have at most {MAX_KINDS} block kinds, got {len(document['blocks'])}"
        )
    bits, components = {}, {}
    for kind, entry in document["blocks"].items():
        expect(entry, f"blocks.{kind}", {"count": int, "components": list, "bits": list})
        count = _count(entry["count"], f"blocks.{kind}.count")
        width = count * _count(len(entry["components"]), f"number of blocks.{kind}.components")
        if steps * width > MAX_BITS:
            raise ScheduleError(
                f"blocks.{kind}: {steps * width} bits, at most {MAX_BITS} are accepted"
            )
        rows = entry["bits"]
        if len(rows) != steps:
            raise ScheduleError(
                f"blocks.{kind}.bits must have {steps} rows, one per step, got {len(rows)}"
            )
        for step, row in enumerate(rows):
            if not isinstance(row, str) or len(row) != width or row.strip("01"):
                raise ScheduleError(
                    f"blocks.{kind}.bits[{step}] must be a string of {width} characters 0 or 1"
                )
        flat = np.frombuffer("".join(rows).encode(), dtype=np.uint8) == ord("1")
        bits[kind] = flat.reshape(steps, count, -1)
        components[kind] = entry["components"]
    return Schedule.from_bits(bits, components, document["provenance"])
