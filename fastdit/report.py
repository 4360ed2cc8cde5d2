"""What a run did, from the session's record."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """The last run.

    Attributes:
        methods: Names of the methods patched in.
        steps: Steps executed.
        tokens_per_step: Image tokens through the blocks at each executed step, per batch row.
        computed, reused: Components run and reused, over all steps and calls.
        seconds: Wall time from the run's start to its last step, on the host.
        peak_cache_bytes: Most bytes held by caches at once.
        live: False when a method that should have reused something reused nothing.
    """

    methods: tuple[str, ...]
    steps: int
    tokens_per_step: tuple[int, ...]
    computed: int
    reused: int
    seconds: float
    peak_cache_bytes: int
    live: bool

    @property
    def reuse_share(self) -> float:
        """Share of the components that were reused."""
        return self.reused / max(1, self.reused + self.computed)

    def __str__(self) -> str:
        if not self.steps:
            return "fastdit: no run yet"
        state = "live" if self.live else "INERT: nothing was reused"
        return (
            f"fastdit {' + '.join(self.methods)}: {state}\n"
            f"  steps {self.steps}, tokens per step {_ranges(self.tokens_per_step)}\n"
            f"  components: {self.computed} computed, {self.reused} reused ({self.reuse_share:.1%})\n"
            f"  {self.seconds:.2f} s, caches at most {self.peak_cache_bytes / 2**20:.1f} MiB"
        )


def report_session(session: Any) -> Report:
    """The report of a session's last run; warns when a method did nothing."""
    names = tuple(method.name for method in session.methods)
    run = session.run
    records = [] if run is None else [run.records[step] for step in sorted(run.records)]
    reused = sum(record.reused for record in records)
    acts = any(method.writes for method in session.methods)
    live = reused > 0 or not acts
    if records and not live:
        warnings.warn(
            f"fastdit {' + '.join(names)} reused nothing in the last run: the pictures are right, but nothing "
            "was saved. Does the schedule reuse anything at this number of steps?",
            stacklevel=3,
        )
    return Report(
        names,
        len(records),
        tuple(record.tokens for record in records),
        sum(record.computed for record in records),
        reused,
        run.seconds if run is not None else 0.0,
        run.peak_bytes if run is not None else 0,
        live,
    )


def _ranges(tokens: tuple[int, ...]) -> str:
    """(256, 256, 64) -> '2 x 256, 1 x 64'."""
    parts: list[list[int]] = []
    for count in tokens:
        if parts and parts[-1][1] == count:
            parts[-1][0] += 1
        else:
            parts.append([1, count])
    return ", ".join(f"{times} x {count}" for times, count in parts)
