"""Searching caching schedules: NSGA-II over the bits of a schedule (ECAD, arXiv 2506.15682).

:func:`ecad` searches a pipeline; `fastdit search` is the same from the command line. Needs the extra `fastdit[search]`.
It uses the library and is not used by it.
"""

from fastdit.search.evaluator import Work
from fastdit.search.evolve import Search, Settings, State
from fastdit.search.knobs import Knobs
from fastdit.search.nsga2 import Operators
from fastdit.search.run import ecad
from fastdit.search.workers import Workers

__all__ = ["Knobs", "Operators", "Search", "Settings", "State", "Work", "Workers", "ecad"]
