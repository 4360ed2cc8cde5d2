"""What the driver tells a section's process, and the file in which that answers.

No import of torch, as in `sections.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: exit status of a fork that cannot use the GPU, since what it was forked from did
BAD_FORK = 17


@dataclass(frozen=True)
class Order:
    """What to measure.

    Attributes:
        section: Its name.
        function: What makes its rows, as module:function.
        seconds: After so many nothing new is begun.
        file: Where the rows go.
        rehearsal: Without a GPU, at sizes that mean nothing.
        chosen: MODEL:ARM of the section "rows".
        wheels: A folder of wheels that the machine lacks.
        quick: A rehearsal of the fewest arms that go every way, on models of few blocks.
    """

    section: str
    function: str
    seconds: float
    file: Path
    rehearsal: bool
    chosen: tuple[str, ...] = ()
    wheels: Path | None = None
    quick: bool = False


@dataclass
class Answer:
    """What a section came to.

    Attributes:
        state: "begun", "done", "failed", or by the driver "skipped" or "out of time".
        why: What failed, or why it was skipped.
        promised: Names of the rows that it is to make.
        rows: Those that were made; each has a name, and "skipped", "absent" or "error" in place of figures.
        facts: What is no row.
        machine: What it ran on.
    """

    state: str = "begun"
    why: str = ""
    promised: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def unmade(self) -> list[str]:
        """Promised rows without figures, but for those of what is not installed."""
        made = {row["name"] for row in self.rows if not {"error", "skipped"} & set(row)}
        return [name for name in self.promised if name not in made]

    def write(self, file: Path) -> None:
        """Whole or not at all: the driver may read at any time, and end the process."""
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(vars(self)) + "\n")
        os.replace(beside, file)

    @classmethod
    def read(cls, file: Path) -> Answer:
        """What a process wrote so far; nothing where it did not come to that."""
        return cls(**json.loads(file.read_text())) if file.exists() else cls()
