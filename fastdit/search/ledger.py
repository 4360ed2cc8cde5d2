"""The ledger: every measurement as one line of JSON, so that a search that was killed goes on where it was.

The first line says what was searched; a search with other settings is refused. Each further line is one measurement,
written and flushed as it arrives. A last line that was cut off is dropped; any other damage is refused with
its line number. The order of lines carries no meaning: the search replays itself from the first generation and finds
its answers here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None

from fastdit.errors import SearchError

FORMAT = "fastdit.search-ledger"
VERSION = 1


class Ledger:
    """Measurements by candidate, in memory and in a file.

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
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open until `close`)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def add_losses(self, key: str, first: int, last: int, losses: list[float]) -> None:
        """Write down the losses of items `first` to before `last`."""
        self._write({"key": key, "first": first, "last": last, "losses": losses})

    def add_costs(self, key: str, costs: Mapping[str, float]) -> None:
        """Write down a candidate's costs by objective, if there is one that is not known."""
        known = self.costs.get(key, {})
        if new := {name: value for name, value in costs.items() if name not in known}:
            self._write({"key": key, "costs": new})

    def add_generation(self, number: int, facts: Mapping[str, Any]) -> None:
        """Write down a generation that is done, or check that it is the one written down before.

        Raises:
            SearchError: The generation drew other candidates when the ledger was written.
        """
        known = self.generations.get(number)
        if known is None:
            self._write({"generation": number, **facts})
        elif known["candidates"] != facts["candidates"]:
            raise SearchError(
                f"{self.path}: generation {number} has other candidates than when it was written; "
                "was it made by another version of pymoo or numpy?"
            )

    def close(self) -> None:
        """Close the file."""
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
        if self.dropped_bytes:
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        header = {"format": FORMAT, "version": VERSION, "identity": self.identity}
        if not lines:
            self._write(header)
            return
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check_header(entry)
                else:
                    self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SearchError(f"{self.path}, line {number} is damaged: {error}") from error

    def _check_header(self, entry: Mapping[str, Any]) -> None:
        if entry["format"] != FORMAT or entry["version"] != VERSION:
            raise SearchError(f"{self.path} is not a ledger of version {VERSION}")
        found = entry["identity"]
        if different := sorted(
            name for name in {*found, *self.identity} if found.get(name) != self.identity.get(name)
        ):
            name = different[0]
            raise SearchError(
                f"{self.path} belongs to another search: {', '.join(different)} differ, "
                f"e.g. {name} was {found.get(name)!r:.200} and is {self.identity.get(name)!r:.200}; "
                "give another folder, or the same settings"
            )

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        if "format" not in entry:
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "generation" in entry:
            self.generations[int(entry["generation"])] = entry
        elif "losses" in entry:
            losses = [float(loss) for loss in entry["losses"]]
            first, last = int(entry["first"]), int(entry["last"])
            if len(losses) != last - first:
                raise ValueError(f"{len(losses)} losses for {last - first} pictures")
            self.losses[str(entry["key"]), first, last] = losses
        else:
            costs = {str(name): float(value) for name, value in entry["costs"].items()}
            self.costs.setdefault(str(entry["key"]), {}).update(costs)
