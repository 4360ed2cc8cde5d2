"""What stands in a rehearsal for what only a GPU can do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from gpu_sections.order import ROOT
from gpu_sections.place import Place


@contextmanager
def captures(place: Place) -> Iterator[None]:
    """CUDA graphs are captured as ever; without a GPU the tests' tapes are, which do each op again."""
    if not place.rehearsal:
        yield
        return
    place.stands_in("tests/tape.py stands for CUDA graphs")
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    tape = importlib.import_module("tape")
    tapes = tape.Tapes()
    members = {"__new__": lambda cls: tapes, "serves": staticmethod(lambda device: True)}
    stand = patch("fastdit.runtime.capture.CudaCapture", type("Stand", (), members))
    with stand, tape.ops_seen():
        yield
