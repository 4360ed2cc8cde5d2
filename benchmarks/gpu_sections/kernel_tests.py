"""The kernel tests on the device, all of them or as many as the time allows, and some under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_sections.order import ROOT
from gpu_sections.place import Place

FILE = ROOT / "tests" / "test_gpu.py"
CHECKS = ("memcheck", "racecheck", "synccheck")
#: the exit status of compute-sanitizer where it found something
FOUND = 86


def tests(place: Place) -> None:
    """One row, in as many processes as there are cores: Triton compiles hundreds of forms."""
    place.promise(["kernel tests"])
    chosen = "cuda or triton or repeat"
    if place.rehearsal:
        chosen = "mirrored and check_empty"
        place.stands_in("a mirrored backend on the CPU stands for kernels")
    parallel = ("-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal")
    status, output = _pytest(
        chosen, place.left(), parallel=("-v", *(() if place.rehearsal else parallel))
    )
    outcomes = _outcomes(output)
    if "PASSED" not in outcomes.values():
        raise RuntimeError(output[-1500:])
    failures = sorted(n for n, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    if status is not None and status:
        place.answer.why = f"{len(failures)} kernel tests failed"
    place.add(
        "kernel tests",
        outcomes=dict(Counter(outcomes.values())),
        failures=failures,
        finished=status is not None,
        output=re.findall(r"^E  .*", output, re.M)[:200] if failures else [],
    )


def sanitizer(place: Place) -> None:
    """Addresses, races and barriers of the CUDA kernels."""
    place.promise(CHECKS)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    chosen = "cuda and (check_inputs_and_guards or check_cache)"
    if place.rehearsal:
        place.stands_in("no compute-sanitizer: the tests that it would watch are collected")
        _, output = _pytest(chosen, place.left(), parallel=("--collect-only", "-q"))
        found = re.findall(r"^\S+::\S+", output, re.M)
        for check in CHECKS:
            place.add(check, collected=len(found), summary=_last_line(output))
        return
    if not Path(tool).exists():
        for check in CHECKS:
            place.lack(check, "compute-sanitizer is not installed")
        return
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for number, check in enumerate(CHECKS):
        if place.left() < 5:
            place.skip(check, "the time is up")
            continue
        seconds = place.left() / (len(CHECKS) - number)
        before = (tool, "--tool", check, "--error-exitcode", str(FOUND))
        status, output = _pytest(chosen, seconds, before, environment=uncached)
        clean = "ERROR SUMMARY: 0 errors" in output
        place.add(check, clean=clean, finished=status is not None, summary=_last_line(output))
        if status == FOUND:
            place.answer.why = f"{check} found something"


def _pytest(
    chosen: str,
    seconds: float,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    parallel: Sequence[str] = ("-q",),
) -> tuple[int | None, str]:
    """(status, None where the time was up; what it printed)."""
    command = [*before, sys.executable, "-m", "pytest", *parallel, "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as workers do
        process = subprocess.Popen(
            [*command, "-k", chosen, str(FILE)],
            cwd=ROOT / "tests",
            env=os.environ | dict(environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status: int | None = process.wait(max(1.0, seconds - 2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        output.seek(0)
        return status, output.read()


def _outcomes(output: str) -> dict[str, str]:
    """Outcomes by test, of one process's lines or of several's, each test once."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    found = re.findall(rf"(\S+::\S+) ({words})\b", output)
    found += [(name, word) for word, name in re.findall(rf"\b({words}) (\S+::\S+)", output)]
    return dict(found)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
