"""What the result files of `gpu_check.py` say, whichever of its two formats they have.

The first format had a section for each key, and runs by model; the second has sections with rows. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
#: sections of the second format that hold whole runs
RUNS = ("flux", "sd3", "pixart", "rows", "arms")
#: models in the order of tables, the largest first
ORDER = ("FLUX", "SD3.5", "SD3", "PixArt")

Result = dict[str, Any]


def results() -> list[Result]:
    """All measurements in the folder of results, the newest first.

    Rehearsals measure nothing, and a checkout whose build failed measures something else.
    """
    found = []
    for path in sorted(FOLDER.glob("gpu-check-*.json")):
        result = json.loads(path.read_text())
        if not result["rehearsal"] and result.get("package", "built") == "built":
            found.append(result)
    return sorted(found, key=lambda result: result["machine"]["date"], reverse=True)


def ceilings(result: Result) -> dict[str, float] | None:
    """`copy_tb_s` and `matmul_tflop_s`, where both were measured."""
    section = result.get("ceilings") or result.get("sections", {}).get("ceilings", {})
    names = ("copy_tb_s", "matmul_tflop_s")
    return {name: section[name] for name in names} if all(n in section for n in names) else None


def rows(result: Result, section: str) -> list[dict[str, Any]]:
    """Rows with figures of a section of the second format, or of "ops", "attention", "pictures" of the first."""
    found = result.get("sections", result).get(section, {}).get("rows", [])
    return [row for row in found if not {"skipped", "absent", "error"} & set(row)]


def absent(result: Result, section: str) -> list[tuple[str, str]]:
    """(row, why) of what a section did not measure."""
    found = result.get("sections", {}).get(section, {}).get("rows", [])
    said = [(row, row.get("absent") or row.get("skipped")) for row in found]
    return [(row["name"], why) for row, why in said if why]


def runs(result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, {section, steps, rounds, rows}) of whole runs, by the process that made them, the largest model first."""
    found: list[tuple[str, dict[str, Any]]] = []
    for model, old in result.get("runs", {}).items():
        if isinstance(old, dict) and old.get("rows"):
            found.append((model, old))
    for section in RUNS:
        made = rows(result, section)
        for model in dict.fromkeys(row["model"] for row in made):
            own = [row for row in made if row["model"] == model]
            steps, rounds = own[0]["steps"], max(row["rounds"] for row in own)
            made_here = {"section": section, "steps": steps, "rounds": rounds, "rows": own}
            found.append((model, made_here))

    def place(entry: tuple[str, Any]) -> int:
        return next((i for i, name in enumerate(ORDER) if entry[0].startswith(name)), len(ORDER))

    yield from sorted(found, key=place)


def tests(result: Result) -> dict[str, Any]:
    """`outcomes` and `failures` of the kernel tests; empty where they did not run."""
    if "tests" in result:
        return result["tests"]
    made = rows(result, "tests")
    return made[0] if made else {}
