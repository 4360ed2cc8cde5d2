"""A saved pipeline's folder is looked at before anything of it is loaded: what it holds may not run as code.

diffusers takes classes from Python files of a folder: where the index names them, and in older versions also where a
file is called None.py or as a library. transformers does where a configuration has an `auto_map`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdit import files
from fastdit.errors import ArgumentError

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
MAX_FILE_BYTES = 16 << 20


def index_of(folder: Path) -> dict[str, Any]:
    """This reads the index of a folder without code, whose pipeline is one of diffusers and its parts of `LIBRARIES`.

    Raises:
        ArgumentError: Naming the folder and what is in the way.
    """
    try:
        if code := sorted((*folder.glob("*.py"), *folder.glob("*/*.py"))):
            raise ValueError(
                f"no code of a folder is run, and it holds {code[0].relative_to(folder)}"
            )
        index = _object(folder / INDEX)
        _check_class(index.get("_class_name"))
        for name, part in index.items():
            if not name.startswith("_"):
                _check_part(name, part)
        for path in sorted(folder.glob("*/*config.json")):
            if "auto_map" in _object(path):
                raise ValueError(
                    f"no code of a folder is run, and {path.relative_to(folder)} has an auto_map"
                )
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder} could not be loaded: {error}") from error
    return index


def _object(path: Path) -> dict[str, Any]:
    # diffusers saves a DPM-Solver's lambda_min_clipped as -Infinity.
    content = files.parse(files.read_text(path, MAX_FILE_BYTES), infinite=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must be an object, got {type(content).__name__}")
    return content


def _check_class(name: Any) -> None:
    import diffusers

    if not isinstance(name, str) or not name.isidentifier() or not hasattr(diffusers, name):
        raise ValueError(f"{INDEX} must name a pipeline class of diffusers, got {name!r}")


def _check_part(name: str, part: Any) -> None:
    """A part is [library, class], [None, None] if it is absent, or a setting, which is neither text nor a list."""
    if not isinstance(part, (str, list)) or part == [None, None]:
        return
    if not (isinstance(part, list) and len(part) == 2 and part[0] in LIBRARIES):
        raise ValueError(
            f"part {name!r} of {INDEX} must be a class of {' or '.join(LIBRARIES)}, got {part!r}"
        )
    if not isinstance(part[1], str) or not part[1].isidentifier():
        raise ValueError(f"part {name!r} of {INDEX} must name a class, got {part[1]!r}")
