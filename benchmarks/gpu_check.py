"""What a GPU says of fastdit, in two calls of at most 300 seconds each; see docs/gpu-check.md.

    python benchmarks/gpu_check.py --call 1 [--wheels FOLDER] [--out FILE]
    python benchmarks/gpu_check.py --call 2 --rows "flux:RAS 0.25, graphs" ...
    python benchmarks/gpu_check.py --rehearse            # every section on the CPU, at sizes that mean nothing

Each section (`gpu_sections/sections.py`) is a process with its own limit of time, so what fails or takes too long costs
one section, whose rows so far are kept. The result is written after each. What does not fit into the time that is left
is skipped by name. Processes are forks of one that has imported torch and diffusers, which takes longer than most
sections.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_sections.build import build, paths
from gpu_sections.order import BAD_FORK, ROOT, Answer, Order
from gpu_sections.sections import NAMES, SECTIONS, Section, chosen, limit

#: a section that has begun something may finish it for so many seconds after its limit
GRACE = 6.0
#: of a call, for starting and writing
RESERVE = 5.0
#: a rehearsal's sections are given so many times the seconds of a GPU's
PATIENCE = 20
PRELOAD = ("gpu_sections.preload", "gpu_sections.place")


@dataclass
class Check:
    """One call of the device machine.

    Attributes:
        seconds: For all sections together.
        out: The result.
        settings: Of every order.
        preload: Modules imported once for all sections.
        package: What stands for fastdit: "built", "installed" for a rehearsal, or what else had to do.
        machine: What all was measured on.
        answers: By section.
        method: How processes begin: "spawn" where forks turned out to be of no use.
    """

    seconds: float
    out: Path
    settings: dict[str, Any]
    preload: Sequence[str] = PRELOAD
    package: str = "installed"
    machine: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    method: str = "forkserver"

    def __post_init__(self) -> None:
        _import_from([str(ROOT / "benchmarks")])
        self._start = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-check-")

    def left(self) -> float:
        """Seconds."""
        return self.seconds - RESERVE - (time.monotonic() - self._start)

    def run(self, sections: Sequence[Section]) -> None:
        """Each in turn; the result is written after each."""
        for index, section in enumerate(sections):
            print(f"== {section.name}: {section.what}", flush=True)
            start = time.monotonic()
            seconds = limit(section, sections[index + 1 :], self.left())
            if seconds is None:
                why = f"it needs {section.least:.0f} s, and {self.left():.0f} s are left"
                answer = Answer("skipped", why)
            else:
                order = Order(
                    section.name,
                    section.function,
                    seconds,
                    Path(self._folder.name) / f"{section.name}.json",
                    **self.settings,
                )
                answer = self._answer(order)
            self.machine = self.machine or answer.machine
            self.answers[section.name] = answer
            answer.facts["seconds"] = round(time.monotonic() - start, 1)
            print(f"== {section.name}: {answer.state} {answer.why[-300:]}", flush=True)
            self._write()

    def _answer(self, order: Order) -> Answer:
        if order.section == "build":
            answer = build(order)
            self.package, found = paths(answer, order)
            _import_from(found)
            return answer
        status = self._process(order)
        if status == BAD_FORK and self.method != "spawn":
            print("  forks are of no use here: each section imports for itself", flush=True)
            self.method = "spawn"
            status = self._process(order)
        answer = Answer.read(order.file)
        if status is None and answer.state != "done":
            answer.state = "out of time"
        elif answer.state == "begun":
            answer.state, answer.why = "failed", f"its process ended with {status}"
        return answer

    def _process(self, order: Order) -> int | None:
        """The exit status of a section's process, `BAD_FORK` where none could begin; None where it had to be ended."""
        context = multiprocessing.get_context(self.method)
        if self.method == "forkserver":
            context.set_forkserver_preload(list(self.preload))
        process = context.Process(target=_work, args=(order,))
        try:
            process.start()
        except (EOFError, OSError):  # what it is to be a fork of is no more
            return BAD_FORK
        end = time.monotonic() + max(1.0, self.left() + RESERVE)
        while process.is_alive() and not order.file.exists() and time.monotonic() < end:
            process.join(0.05)  # a section's time begins with its place, which writes that file
        process.join(max(0.0, min(order.seconds + GRACE, end - time.monotonic())))
        ended = process.exitcode is None
        if ended:
            _end(process.pid)
            process.join()
        return None if ended else process.exitcode

    def _write(self) -> None:
        sections = {
            name: {
                "state": answer.state,
                "why": answer.why,
                "unmade": answer.unmade(),
                **answer.facts,
                "rows": answer.rows,
            }
            for name, answer in self.answers.items()
        }
        result = {
            "format": 2,
            "rehearsal": self.settings["rehearsal"],
            "machine": self.machine,
            "package": self.package,
            "seconds": round(time.monotonic() - self._start, 1),
            "sections": sections,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(result, indent=1) + "\n")

    def faults(self) -> list[str]:
        """What went wrong: sections that failed, rows that did, and in a rehearsal any that was not made."""
        found = [f"{n}: {a.state}" for n, a in self.answers.items() if a.state == "failed"]
        for name, answer in self.answers.items():
            failed = [row["name"] for row in answer.rows if "error" in row]
            rows = answer.unmade() if self.settings["rehearsal"] else failed
            found += [f"{name}: no row {row!r}" for row in rows]
        return found


def _import_from(folders: list[str]) -> None:
    """Processes that start from now on import from these folders first; what they are forks of knows no `sys.path`."""
    sys.path[:0] = folders
    found = (*folders, os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))


def _work(order: Order) -> None:
    """A section's process."""
    from gpu_sections.place import work

    work(order)


def _end(pid: int) -> None:
    """A section's process with all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to have a group of its own
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--call", type=int, choices=(1, 2), help="the sections of one call")
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=(), metavar="NAME")
    parser.add_argument("--seconds", type=float, help="for all sections together, by default 300")
    parser.add_argument(
        "--rows", nargs="+", default=(), metavar="MODEL:ARM", help="of section rows"
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the machine lacks")
    parser.add_argument("--out", type=Path, help="by default in $OUT, else in benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; figures mean nothing")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal of the fewest arms, of few blocks"
    )
    parser.add_argument("--list", action="store_true", help="say what sections there are")
    given = parser.parse_args()
    if given.list:
        for section in SECTIONS:
            call = section.call or "1, 2"
            print(f"{section.name:10} call {call!s:5} {section.seconds:4.0f} s  {section.what}")
        return 0
    if given.call is None and not given.sections and not given.rehearse:
        parser.error("say --call 1, --call 2, --sections NAME ... or --rehearse")
    settings = {
        "rehearsal": given.rehearse,
        "chosen": tuple(given.rows),
        "wheels": given.wheels,
        "quick": given.quick,
    }
    sections = chosen(given.call, given.sections)
    if given.rehearse:  # what a busy machine takes says nothing
        sections = [replace(section, seconds=PATIENCE * section.seconds) for section in sections]
    seconds = given.seconds or (math.inf if given.rehearse else 300.0)
    check = Check(seconds, given.out or _out(given), settings)
    check.run(sections)
    for name, answer in check.answers.items():
        unmade = f", without {', '.join(answer.unmade())}" if answer.unmade() else ""
        print(f"{name}: {answer.state} in {answer.facts['seconds']:.0f} s{unmade}")
    print(f"written to {check.out}" + (" (a rehearsal: no GPU)" if given.rehearse else ""))
    return int(bool(check.faults()))


def _out(given: argparse.Namespace) -> Path:
    call = f"-call{given.call}" if given.call else ""
    if given.rehearse:
        return ROOT / "build" / f"gpu-check-rehearsal{call}.json"
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return folder / f"gpu-check-{_gpu()}{call}.json"


def _gpu() -> str:
    """The GPU's name for that of a file."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        name = ""
    return re.sub(r"\W+", "-", name.strip().lower()) or "unnamed"


if __name__ == "__main__":
    sys.exit(main())
