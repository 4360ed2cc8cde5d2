"""The file of a schedule: JSON, written for people and diffs.

One string of 0 and 1 per step and block kind, in [block][component] order, with a version, free provenance and a
SHA-256 over the content; version 2, where outputs are forecast, has a second one of their orders. Reading executes
nothing; a file that is malformed, truncated or altered is refused with a :class:`~fastdit.errors.ScheduleError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.errors import ScheduleError

if TYPE_CHECKING:
    from fastdit.schedules.schedule import Schedule

FORMAT = "fastdit.schedule"
VERSIONS = (1, 2)  # without and with orders
MAX_FILE_BYTES = 64 << 20
MAX_COUNT = 1 << 14
MAX_KINDS = 64
MAX_BITS = 1 << 26


def content(schedule: Schedule) -> dict[str, Any]:
    """This is what a file says of a schedule, and its hash is over."""
    forecasts = schedule.forecasts
    return {
        "format": FORMAT,
        "version": VERSIONS[forecasts],
        "steps": schedule.steps,
        "blocks": {
            kind: {
                "count": layer.bits.shape[1],
                "components": list(layer.components),
                "bits": _digits(layer.bits),
                **({"orders": _digits(layer.orders)} if forecasts else {}),
            }
            for kind, layer in sorted(schedule.layers.items())
        },
    }


def _digits(values: np.ndarray) -> list[str]:
    return ["".join(map(str, row.ravel().astype(int))) for row in values]


def dumps(document: Mapping[str, Any], indent: int | None = 1) -> str:
    """The document becomes text, of one line without `indent`; provenance that is no plain data is a ScheduleError."""
    try:
        return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ScheduleError(f"provenance must be plain JSON data: {error}") from error


def canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def expect(document: Any, where: str, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """This raises ScheduleError, naming place and field, for what is no object of exactly these fields and types."""
    if not isinstance(document, dict):
        raise ScheduleError(f"{where} must be an object, got {type(document).__name__}")
    if set(document) != set(fields):
        raise ScheduleError(
            f"{where} must have exactly the fields {sorted(fields)}, got {sorted(document)}"
        )
    for name, types in fields.items():
        types = types if isinstance(types, tuple) else (types,)
        if type(document[name]) not in types:
            raise ScheduleError(
                f"{where}.{name} must be {' or '.join(each.__name__ for each in types)}, "
                f"got {type(document[name]).__name__}"
            )


def count_of(value: int, where: str, most: int = MAX_COUNT) -> int:
    """A number from 1 to `most` passes; ScheduleError names the place of another."""
    if not 1 <= value <= most:
        raise ScheduleError(f"{where} must be from 1 to {most}, got {value}")
    return value


def parse(document: Any) -> tuple[Any, ...]:
    """This gives the arguments of `Schedule.from_bits` that a document says.

    Raises:
        ScheduleError: Naming the place and what was expected there.
    """
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
    if document["version"] not in VERSIONS:
        raise ScheduleError(
            f"version must be {VERSIONS[0]} or {VERSIONS[1]}, got {document['version']}; a newer fastdit may read it"
        )
    steps = count_of(document["steps"], "steps")
    if len(document["blocks"]) > MAX_KINDS:
        raise ScheduleError(
            f"blocks may have at most {MAX_KINDS} block kinds, got {len(document['blocks'])}"
        )
    fields = ("bits",) if document["version"] == 1 else ("bits", "orders")
    found: dict[str, dict[str, Any]] = {name: {} for name in ("components", "bits", "orders")}
    for kind, given in document["blocks"].items():
        lists = dict.fromkeys(("components", *fields), list)
        expect(given, f"blocks.{kind}", {"count": int, **lists})
        count = count_of(given["count"], f"blocks.{kind}.count")
        width = count * count_of(len(given["components"]), f"number of blocks.{kind}.components")
        if steps * width > MAX_BITS:
            raise ScheduleError(
                f"blocks.{kind}: {steps * width} bits, at most {MAX_BITS} are accepted"
            )
        for field in fields:
            where = f"blocks.{kind}.{field}"
            values = _values(
                given[field], where, (steps, width), "01" if field == "bits" else "012"
            )
            found[field][kind] = values.reshape(steps, count, -1)
        found["components"][kind] = given["components"]
    return found["bits"], found["components"], document["provenance"], found["orders"] or None


def _values(strings: list[Any], where: str, shape: tuple[int, int], digits: str) -> np.ndarray:
    """This reads [steps, width] digits."""
    steps, width = shape
    if len(strings) != steps:
        raise ScheduleError(f"{where} must have {steps} strings, one per step, got {len(strings)}")
    for step, string in enumerate(strings):
        if not isinstance(string, str) or len(string) != width or string.strip(digits):
            raise ScheduleError(
                f"{where}[{step}] must be a string of {width} characters {', '.join(digits[:-1])} or {digits[-1]}"
            )
    return np.frombuffer("".join(strings).encode(), dtype=np.uint8) - ord("0")
