"""The JSON layout of the schedule files that ECAD's authors released (arXiv 2506.15682): read and written.

A file holds ``cache_schedule`` and, if it likes, ``config`` and ``metrics``. The schedule is an object per step ("000",
"001", ...), in it one per block ("0", "1", ... and, for FLUX, "single_0", ...), in it one boolean per component: true
computes, false reuses. False at step 0 is published and means true (ECAD spec section 4). Released files that
name a function of the authors' code for a component (their TGATE baselines) are refused: reading executes nothing.

:mod:`fastdit.schedules.schedule` calls this where it meets such a document; what is checked here is the layout alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastdit.errors import ScheduleError
from fastdit.schedules.schedule_file import count_of, expect

if TYPE_CHECKING:
    from fastdit.schedules.schedule import Schedule

ROOT = "cache_schedule"
#: block kind -> (prefix of its blocks' keys, field with their number)
KINDS = {
    "transformer_blocks": ("", "num_blocks"),
    "single_transformer_blocks": ("single_", "num_single_blocks"),
}
REQUIRED = {"num_blocks": int, "num_inference_steps": int, "schedule": dict}
OPTIONAL = {"name": str, "attributes": dict, "num_single_blocks": int}
MAX_STEPS = 1000  # keys have three digits

Bits = dict[str, list[list[list[bool]]]]


def parse(document: Mapping[str, Any]) -> tuple[Bits, dict[str, tuple[str, ...]], dict[str, Any]]:
    """This gives (bits, components, provenance) of a document of this layout.

    Raises:
        ScheduleError: Naming the place and what was expected there.
    """
    if unknown := sorted(set(document) - {ROOT, "config", "metrics"}):
        raise ScheduleError(f"the file may have {ROOT}, config and metrics, got also {unknown}")
    header = document[ROOT]
    if not isinstance(header, dict):
        raise ScheduleError(f"{ROOT} must be an object, got {type(header).__name__}")
    fields = REQUIRED | OPTIONAL
    if missing := sorted(set(REQUIRED) - set(header)):
        raise ScheduleError(f"{ROOT} lacks {missing}")
    if unknown := sorted(set(header) - set(fields)):
        raise ScheduleError(f"{ROOT} has unknown fields {unknown}")
    expect(header, ROOT, {name: fields[name] for name in header})
    steps = count_of(header["num_inference_steps"], f"{ROOT}.num_inference_steps", MAX_STEPS)
    keys = {
        kind: [f"{prefix}{block}" for block in range(count_of(header[field], f"{ROOT}.{field}"))]
        for kind, (prefix, field) in KINDS.items()
        if field in header
    }
    rows = header["schedule"]
    if set(rows) != {f"{step:03d}" for step in range(steps)}:
        raise ScheduleError(
            f'{ROOT}.schedule must have the keys "000" to "{steps - 1:03d}", got {sorted(rows)}'
        )
    components = {kind: _components(rows["000"], names[0]) for kind, names in keys.items()}
    bits: Bits = {kind: [] for kind in keys}
    for step in sorted(rows):
        row, where = rows[step], f"{ROOT}.schedule.{step}"
        _check_blocks(row, keys, where)
        for kind, names in keys.items():
            bits[kind].append(
                [_block(row[name], components[kind], f"{where}.{name}") for name in names]
            )
    about = {name: header[name] for name in ("name", "attributes") if name in header}
    about |= {name: document[name] for name in ("config", "metrics") if name in document}
    return bits, components, {"ecad": about}


def document(schedule: Schedule) -> dict[str, Any]:
    """This writes a schedule in this layout; what :func:`parse` kept as provenance returns to its place.

    Raises:
        ScheduleError: The layout has no place for a block kind, or for so many steps.
    """
    if unknown := sorted(set(schedule.layers) - set(KINDS)):
        raise ScheduleError(f"the ECAD layout has no block kinds {unknown}, only {sorted(KINDS)}")
    if schedule.forecasts:
        raise ScheduleError(
            'the ECAD layout has no place for orders of forecasts; give layout="fastdit"'
        )
    if "transformer_blocks" not in schedule.layers or schedule.steps > MAX_STEPS:
        raise ScheduleError(
            f"the ECAD layout needs transformer_blocks and at most {MAX_STEPS} steps, got {schedule!r}"
        )
    about = schedule.provenance.get("ecad")
    about = about if isinstance(about, Mapping) else {}
    header = {
        "name": about.get("name", schedule.sha256[:12]),
        "attributes": about.get("attributes", {}),
        "num_inference_steps": schedule.steps,
    }
    rows: dict[str, Any] = {f"{step:03d}": {} for step in range(schedule.steps)}
    for kind, (prefix, field) in KINDS.items():
        if kind in schedule.layers:
            layer = schedule.layers[kind]
            header[field] = layer.bits.shape[1]
            for step, row in enumerate(layer.bits.tolist()):
                for block, flags in enumerate(row):
                    rows[f"{step:03d}"][f"{prefix}{block}"] = dict(
                        zip(layer.components, flags, strict=True)
                    )
    found = {ROOT: {**header, "schedule": rows}}
    found |= {name: about[name] for name in ("config", "metrics") if name in about}
    return found


def _components(row: Any, block: str) -> tuple[str, ...]:
    first = row.get(block) if isinstance(row, dict) else None
    if not isinstance(first, dict) or not first:
        raise ScheduleError(f'{ROOT}.schedule.000 must have a block "{block}" with its components')
    return tuple(first)


def _check_blocks(row: Any, keys: Mapping[str, list[str]], where: str) -> None:
    if not isinstance(row, dict):
        raise ScheduleError(f"{where} must be an object, got {type(row).__name__}")
    expected = {name for names in keys.values() for name in names}
    if len(row) != len(expected):
        counts = {kind: len(names) for kind, names in keys.items()}
        raise ScheduleError(
            f"{where} must have {len(expected)} blocks, one per block of {counts}, got {len(row)}"
        )
    if unknown := sorted(set(row) - expected):
        raise ScheduleError(f"{where} has unknown blocks {unknown}")


def _block(given: Any, components: tuple[str, ...], where: str) -> list[bool]:
    if not isinstance(given, dict):
        raise ScheduleError(f"{where} must be an object, got {type(given).__name__}")
    for name, value in given.items():
        if isinstance(value, dict):
            raise ScheduleError(f"{where}.{name} names a function, which is not run")
        if type(value) is not bool:
            raise ScheduleError(f"{where}.{name} must be true or false, got {value!r}")
    if set(given) != set(components):
        raise ScheduleError(
            f"{where} must have the components {list(components)}, got {sorted(given)}"
        )
    return [given[name] for name in components]
