"""fastdit: make the diffusion transformers of Hugging Face diffusers faster, through two verbs.

>>> import fastdit
>>> handle = fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
>>> image = pipe("a red circle").images[0]
>>> fastdit.unpatch(pipe)

`patch` takes a pipeline or a transformer and any methods that compose; the handle it returns explains, reports, pauses
and removes the patch. diffusers itself is imported only where a pipeline is.
"""

from fastdit.account.explain import Explanation
from fastdit.account.report import Report
from fastdit.errors import (
    ArgumentError,
    BackendError,
    CompositionError,
    DriftError,
    FastDiTError,
    ScheduleError,
    UnsupportedModelError,
)
from fastdit.handle import Handle
from fastdit.methods import methods as _methods
from fastdit.methods.ras import Linear
from fastdit.patch import explain, patch, report, unpatch
from fastdit.schedules.book import PlanBook
from fastdit.schedules.router import Router
from fastdit.schedules.schedule import Schedule
from fastdit.schedules.solvers import Advice, recommend

__version__ = "0.1.0"

# Dense, Cached, RAS and the others: a file in `methods/` is all that a method needs.
_exported = {method.__name__: method for method in _methods().values()}
globals().update(_exported)

__all__ = [
    "Advice",
    "ArgumentError",
    "BackendError",
    "CompositionError",
    "DriftError",
    "Explanation",
    "FastDiTError",
    "Handle",
    "Linear",
    "PlanBook",
    "Report",
    "Router",
    "Schedule",
    "ScheduleError",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "patch",
    "recommend",
    "report",
    "unpatch",
    *_exported,
]
