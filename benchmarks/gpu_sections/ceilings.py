"""What the device can copy and multiply and the host can launch: the measures of everything else."""

from __future__ import annotations

from typing import Any

import torch

from gpu_sections.clocks import python_seconds
from gpu_sections.place import Place
from timing import Race, race


def ceilings(place: Place) -> None:
    """Rows for copy, matmul, a launch and a call of an empty function; `facts` has the two ceilings."""
    place.promise(["copy", "matmul", "launch", "python"])
    place.attempt("copy", lambda: copy(place))
    place.attempt("matmul", lambda: matmul(place))
    place.attempt("launch", lambda: {"us": place.launch_us})
    place.attempt("python", lambda: {"us": 1e6 * python_seconds()})


def copy(place: Place) -> dict[str, Any]:
    """Bytes read and written."""
    count = 1 << 20 if place.rehearsal else 1 << 29
    a = torch.ones(count, device=place.device, dtype=place.dtype)
    b = torch.empty_like(a)
    found = race({"copy": lambda i: b.copy_(a)}, 1, place.device, place.turns)
    speed = 2 * a.nbytes / found.seconds["copy"] / 1e12
    place.tell(copy_tb_s=speed)
    return {"tb_s": speed} | _checked(found)


def matmul(place: Place) -> dict[str, Any]:
    """Random numbers: zeros would run faster than what a model multiplies."""
    side = 256 if place.rehearsal else 8192
    new = {"device": place.device, "dtype": place.dtype}
    left, right = (torch.randn(side, side, **new) for _ in range(2))
    out = torch.empty_like(left)
    turns = min(place.turns, 9)
    found = race({"mm": lambda i: torch.mm(left, right, out=out)}, 1, place.device, turns)
    speed = 2 * side**3 / found.seconds["mm"] / 1e12
    place.tell(matmul_tflop_s=speed)
    return {"tflop_s": speed} | _checked(found)


def _checked(found: Race) -> dict[str, Any]:
    if found.failed:
        raise RuntimeError(str(found.failed))
    return {"self_check": found.self_check}
