"""fastdit: make the diffusion transformers of Hugging Face diffusers faster, through two verbs.

>>> import fastdit
>>> handle = fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
>>> image = pipe("a red circle").images[0]
>>> fastdit.unpatch(pipe)

`patch` takes a pipeline or a transformer and any methods that compose; the handle it returns explains, reports, pauses
and removes the patch. diffusers itself is imported only where a pipeline is.
"""

from fastdit.errors import (
    ArgumentError,
    BackendError,
    CompositionError,
    DriftError,
    FastDiTError,
    ScheduleError,
    UnsupportedModelError,
)
from fastdit.explain import Explanation
from fastdit.methods.cached import Cached
from fastdit.methods.dense import Dense
from fastdit.methods.ecad import ECAD
from fastdit.methods.harmonica import HarmoniCa
from fastdit.methods.per_stage import PerStage
from fastdit.methods.ralu import RALU
from fastdit.methods.ras import RAS, Linear
from fastdit.patch import Handle, explain, patch, report, unpatch
from fastdit.report import Report
from fastdit.router import Router
from fastdit.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "ECAD",
    "RALU",
    "RAS",
    "ArgumentError",
    "BackendError",
    "Cached",
    "CompositionError",
    "Dense",
    "DriftError",
    "Explanation",
    "FastDiTError",
    "Handle",
    "HarmoniCa",
    "Linear",
    "PerStage",
    "Report",
    "Router",
    "Schedule",
    "ScheduleError",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "patch",
    "report",
    "unpatch",
]
