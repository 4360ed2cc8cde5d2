"""Files and folders that others chose or made are opened, read, parsed and written with bounds.

Everything here raises OSError or ValueError, which the reader of a format turns into its own error; only the functions
about folders name an argument themselves.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from fastdit.errors import ArgumentError

#: most digits of a whole number: those of the largest float
MAX_DIGITS = 308


def check_regular(path: str | os.PathLike[str], most: int) -> None:
    """This refuses what is no regular file, such as a pipe or a device, and one of more than `most` bytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if found.st_size > most:
        raise OSError(f"it has {found.st_size} bytes, at most {most} are read")


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """This reads a regular file of at most `most` bytes."""
    check_regular(path, most)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:  # some files of the system do not tell their size
        raise OSError(f"it has more than {most} bytes, at most {most} are read")
    return content


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """This reads such a file as text in UTF-8, without the mark that some editors begin it with."""
    return read(path, most).decode("utf-8-sig")


def parse(text: str, infinite: bool = False) -> Any:
    """This parses JSON, and refuses a key that is there twice, NaN, infinities and what no float can hold.

    With `infinite` the words NaN, Infinity and -Infinity are taken, as Python's own `json` writes and reads them.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=float if infinite else _number,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_folder(path: str | os.PathLike[str], argument: str) -> None:
    """This refuses, before the work, a folder that could not be made or written into after it.

    Raises:
        ArgumentError: Naming the argument and what is in the way.
    """
    place = Path(path).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ArgumentError(f"{argument} must be a folder, got {path}: {place} is none")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArgumentError(f"{argument} {path} cannot be written: permission denied in {place}")


def make_folder(path: str | os.PathLike[str], argument: str) -> None:
    """This makes a folder and those above it, where they are not there.

    Raises:
        ArgumentError: Naming the argument and why it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{argument} {path} cannot be made: {error.strerror}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a number that is accepted")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits, at most {MAX_DIGITS} are accepted")
    return int(text)
