"""Every case of every op against eager, torch.compile and every backend of the device; microseconds of a call."""

from __future__ import annotations

from typing import Any

from gpu_sections.ceilings import copy
from gpu_sections.place import Place
from op_cases import Case, cases
from shapes import ALL, TINY
from timing import race, sets_needed

#: seconds that compiling an expression may take
COMPILING = 4.0
SHAPES = ("flux-1024", "sd3-medium-1024", "pixart-1024")


def ops(place: Place) -> None:
    """All without torch.compile first, then the widest shape against it: to compile takes longer than to measure."""
    shapes = TINY if place.rehearsal else tuple(s for n in SHAPES for s in ALL if s.name == n)
    speed = copy(place)["tb_s"] * 1e12
    found = [case for shape in shapes for case in cases((shape,))]
    place.promise([_name(case) for case in found])
    for case in found:
        place.attempt(_name(case), lambda case=case: _row(place, case, False, speed))
    widest = [case for case in found if case.shape is shapes[0]]
    if place.rehearsal:  # one shows the way there
        widest = [] if place.order.quick else widest[:1]
    for case in widest:
        if place.left() > COMPILING:
            place.attempt(_name(case), lambda case=case: _row(place, case, True, speed))


def _name(case: Case) -> str:
    return f"{case.op}, {case.name}, {case.shape.name}"


def _row(place: Place, case: Case, against: bool, speed: float) -> dict[str, Any]:
    moved = case.bytes_moved(place.dtype)
    sets = sets_needed(moved, place.device, most=16)
    contenders = case.contenders(place.device, sets, place.dtype)
    if not against:
        contenders.pop("compile", None)
    found = race(contenders, sets, place.device, place.turns)
    share = {name: moved / seconds / speed for name, seconds in found.seconds.items()}
    row = {"op": case.op, "case": case.name, "shape": case.shape.name, "bytes": moved}
    row |= found.asdict() | {"share_of_copy": share}
    print(f"  {_name(case):60} us: {row['us']}", flush=True)
    return row
