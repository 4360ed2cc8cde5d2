"""The ledger: every measurement as one line of JSON, so that a search that was killed goes on where it was.

The first line says what was searched; a search with other settings is refused. Each further line is one measurement,
written and flushed as it arrives, and ends with a checksum of the rest. A last line that was cut off is dropped, with a
warning; any other damage is refused with its line number. The order of lines carries no meaning: the search replays
itself from the first generation and finds its answers here.

Ledgers of version 1, which had no checksums, are read and continued.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None

from fastdit import files
from fastdit.errors import SearchError
from fastdit.schedules.schedule_file import expect

FORMAT = "fastdit.search-ledger"
VERSION = 2
UNSEALED = 1  # the version without checksums
#: where a ledger says nothing of it
EARLIER = {
    "orders": [0],
    "scheduler": None,
    "knobs": {"steps": [], "ratios": [1.0], "solvers": []},
    "judgement": {"mean": "arithmetic"},
}
#: where a ledger says nothing of it, it may have been anything
UNSAID = ("samplers",)
MAX_FILE_BYTES = 1 << 30
_SEAL = re.compile(rb',"crc":"([0-9a-f]{8})"}$')
_NUMBER = (int, float)


class Ledger:
    """A ledger has measurements by candidate, in memory and in a file.

    Args:
        path: Created if it does not exist.
        identity: What has to be equal for a measurement to be worth anything: JSON data.

    Raises:
        SearchError: The file is damaged, belongs to another search, or is in use.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.losses: dict[tuple[str, int, int], list[float]] = {}
        self.costs: dict[str, dict[str, float]] = {}
        self.generations: dict[int, dict[str, Any]] = {}
        self.dropped_bytes = 0
        self._unsealed = False
        try:
            if self.path.exists():
                files.check_regular(self.path, MAX_FILE_BYTES)
            self._file = open(self.path, "a+b")  # noqa: SIM115 (open until `close`)
        except OSError as error:
            raise SearchError(f"{self.path} cannot be opened: {error}") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def add_losses(self, key: str, first: int, last: int, losses: list[float]) -> None:
        """This writes down the losses of items `first` to before `last`."""
        self._write({"key": key, "first": first, "last": last, "losses": losses})

    def add_costs(self, key: str, costs: Mapping[str, float]) -> None:
        """This writes down a candidate's costs by objective, if there is one that is not known."""
        known = self.costs.get(key, {})
        if new := {name: value for name, value in costs.items() if name not in known}:
            self._write({"key": key, "costs": new})

    def add_generation(self, number: int, facts: Mapping[str, Any]) -> None:
        """This writes down a generation that is done, or checks that it is the one written down before.

        Of an earlier one the file is only asked which candidates it had: the rest was found again.

        Raises:
            SearchError: The generation drew other candidates when the ledger was written.
        """
        known = self.generations.get(number)
        if known is None:
            self._write({"generation": number, **facts})
        elif known["candidates"] != facts["candidates"]:
            raise SearchError(
                f"{self.path}: generation {number} has other candidates than when it was written; "
                "was it made by another version of fastdit, pymoo or numpy?"
            )
        self.generations[number] = {"generation": number, **facts}

    def close(self) -> None:
        """This closes the file."""
        self._file.close()

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SearchError(f"{self.path} is in use by another search") from None

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self.dropped_bytes = len(content) - whole
        lines = content[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                body, sealed = _opened(line)
                entry = files.parse(body.decode())
                if number == 1:
                    self._check_header(entry)
                if not (sealed or self._unsealed):
                    raise ValueError("it has no checksum")
                if number > 1:
                    self._take(entry)
            except ValueError as error:
                raise SearchError(f"{self.path}, line {number} is damaged: {error}") from error
        if self.dropped_bytes:
            self._file.truncate(whole)
            warnings.warn(
                f"{self.path}: its last line was cut off and is dropped, {self.dropped_bytes} bytes: what it held is "
                "measured again",
                stacklevel=4,
            )
        if not lines:
            self._write({"format": FORMAT, "version": VERSION, "identity": self.identity})

    def _check_header(self, entry: Any) -> None:
        expect(entry, "the header", {"format": str, "version": int, "identity": dict})
        if entry["format"] != FORMAT or entry["version"] not in (UNSEALED, VERSION):
            raise SearchError(
                f"{self.path} is not a ledger of version {UNSEALED} or {VERSION}, it says {entry['format']!r} "
                f"{entry['version']}; a newer fastdit may read it"
            )
        self._unsealed = entry["version"] == UNSEALED
        found = entry["identity"]
        unsaid = {name: self.identity[name] for name in UNSAID if name in self.identity}
        found, own = {**EARLIER, **unsaid, **found}, {**EARLIER, **self.identity}
        if different := sorted(name for name in {*found, *own} if found.get(name) != own.get(name)):
            name = min(different, key=lambda each: len(repr(own.get(each))))
            raise SearchError(
                f"{self.path} belongs to another search: {', '.join(different)} differ, "
                f"e.g. {name} was {found.get(name)!r:.200} and is {own.get(name)!r:.200}; "
                "give another folder, or the same settings"
            )

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            body = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode()
        except ValueError as error:
            raise SearchError(
                f"a measurement must be finite numbers, got {entry!r:.200}: what judges the pictures made another"
            ) from error
        self._file.write(body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body))
        self._file.flush()
        if "format" not in entry:
            self._take(json.loads(body))

    def _take(self, entry: Any) -> None:
        if isinstance(entry, dict) and "generation" in entry:
            named = {name: entry.get(name) for name in ("generation", "candidates")}
            expect(named, "a generation", {"generation": int, "candidates": str})
            self.generations[entry["generation"]] = entry
        elif isinstance(entry, dict) and "losses" in entry:
            fields = {"key": str, "first": int, "last": int, "losses": list}
            expect(entry, "a measurement", fields)
            losses, first, last = entry["losses"], entry["first"], entry["last"]
            if len(losses) != last - first or not all(type(loss) in _NUMBER for loss in losses):
                raise ValueError(
                    f"{last - first} pictures must have as many numbers as losses, got {losses!r:.200}"
                )
            self.losses[entry["key"], first, last] = [float(loss) for loss in losses]
        else:
            expect(entry, "a measurement", {"key": str, "costs": dict})
            expect(entry["costs"], "costs", dict.fromkeys(entry["costs"], _NUMBER))
            costs = {name: float(value) for name, value in entry["costs"].items()}
            self.costs.setdefault(entry["key"], {}).update(costs)


def _opened(line: bytes) -> tuple[bytes, bool]:
    """A line gives (the entry, whether it had a checksum), which fits."""
    seal = _SEAL.search(line)
    if seal is None:
        return line, False
    body = line[: seal.start()] + b"}"
    if int(seal[1], 16) != zlib.crc32(body):
        raise ValueError("its checksum does not fit: it was edited, or the disk lost some of it")
    return body, True
