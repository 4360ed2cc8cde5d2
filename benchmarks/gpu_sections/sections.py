"""The sections of a GPU check: what each measures, in which call, and the seconds it is given.

No import of torch: the driver reads this before there is anything built to import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One section, which runs in a process of its own.

    Attributes:
        name: As it is chosen and as its results are filed.
        call: The call of the device machine, 1 or 2, that it belongs to; 0 for both.
        seconds: What it is planned to take.
        least: With fewer seconds left it is not begun.
        function: What makes its rows, as module:function.
        what: What it measures, for people.
    """

    name: str
    call: int
    seconds: float
    least: float
    function: str
    what: str


SECTIONS = (
    Section(
        "build", 0, 60, 20, "gpu_sections.build:build", "the package built for the GPU at hand"
    ),
    Section(
        "ceilings",
        0,
        15,
        5,
        "gpu_sections.ceilings:ceilings",
        "copy, matmul, a launch, Python itself",
    ),
    Section(
        "graphs",
        1,
        20,
        10,
        "gpu_sections.tiny_graphs:graphs",
        "the packaged model, replays and kernels",
    ),
    Section("flux", 1, 110, 40, "gpu_sections.runs:flux", "whole runs of FLUX.1-dev"),
    Section("sd3", 1, 40, 15, "gpu_sections.runs:sd3", "whole runs of SD3 medium"),
    Section("pixart", 1, 30, 15, "gpu_sections.runs:pixart", "whole runs of PixArt-Sigma"),
    Section(
        "rows",
        2,
        90,
        30,
        "gpu_sections.runs:chosen",
        "the rows named by --rows, with their baselines",
    ),
    Section(
        "attention",
        2,
        20,
        5,
        "gpu_sections.attentions:attention",
        "attention backends at our shapes",
    ),
    Section(
        "fusions",
        2,
        15,
        5,
        "gpu_sections.fusions:fusions",
        "products that absorb what stands around them",
    ),
    Section(
        "host", 2, 30, 10, "gpu_sections.runs:host", "host time of a call: real depth, no width"
    ),
    Section(
        "ops",
        2,
        40,
        10,
        "gpu_sections.op_rows:ops",
        "every op against eager, torch.compile, backends",
    ),
    Section(
        "arms",
        2,
        30,
        20,
        "gpu_sections.runs:remaining",
        "whole runs by the other methods and rivals",
    ),
    Section("tests", 2, 30, 20, "gpu_sections.kernel_tests:tests", "the kernel tests"),
    Section(
        "sanitizer",
        2,
        20,
        15,
        "gpu_sections.kernel_tests:sanitizer",
        "kernels under compute-sanitizer",
    ),
)
NAMES = tuple(section.name for section in SECTIONS)


def chosen(call: int | None, names: Sequence[str]) -> list[Section]:
    """The sections of a call, or those named and the build, in the order of `SECTIONS`; all where neither is given."""
    if names:
        return [section for section in SECTIONS if section.name in ("build", *names)]
    return [section for section in SECTIONS if call is None or section.call in (0, call)]


def limit(section: Section, later: Sequence[Section], left: float) -> float | None:
    """The seconds that a section may take of those that are left; None where it does not fit.

    What the sections before it spared is its own, as far as those after it do not need it.
    """
    spare = left - sum(other.seconds for other in later)
    seconds = min(left, max(section.seconds, spare if left < math.inf else 0.0))
    return seconds if seconds >= section.least else None
