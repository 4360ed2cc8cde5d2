"""What a search varies beside a schedule: how many steps a run has, how many tokens RAS computes, which solver, and how
many of the steps RALU takes at half the resolution.

A knob has a list of values, the first that of the uncached run, and one bit less than values: it stands at the value
whose place in the list is the number of its bits that are set. So any bits mean something, and one that flips is one
place further.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.errors import ArgumentError

if TYPE_CHECKING:
    from fastdit.methods.ralu import RALU
    from fastdit.methods.ras import RAS

MOVE_SHARE = 0.25  # of a step's moves: a knob is turned instead
#: tokens of RAS are computed by so many, which suits small pictures too
ALIGN = 8
RATIOS = (1.0, 0.75, 0.5, 0.25)
COARSE = (0.0, 0.3, 0.5)
OWN = "own"


@dataclass(frozen=True)
class Run:
    """A run is made so.

    Attributes:
        steps: How many; None for what the search says of all.
        ratio: Of the tokens in a sparse step of RAS; 1 runs without it.
        solver: A scheduler by name, as in `Work`, or "own" for the pipeline's; None for what the search says of all.
        coarse: Of the steps in RALU's coarse stage; 0 runs without it.
    """

    steps: int | None = None
    ratio: float = 1.0
    solver: str | None = None
    coarse: float = 0.0

    @property
    def ras(self) -> RAS | None:
        """RAS with the rule that was best on the model in the package; None where all tokens are computed."""
        if self.ratio == 1:
            return None
        from fastdit.methods.ras import RAS

        return RAS(ratio=self.ratio, metric="change", align=ALIGN)

    def coarse_steps(self, steps: int) -> int:
        """So many of `steps` steps are at half the resolution, of which one is left at the whole."""
        return min(steps - 1, max(1, round(self.coarse * steps))) if self.coarse else 0

    def ralu(self, steps: int) -> RALU | None:
        """RALU of `steps` steps, as in its preset "late"; None where all are at the whole resolution."""
        count = self.coarse_steps(steps)
        if not count:
            return None
        from fastdit.methods.ralu import RALU

        return RALU.preset("late", steps=(count, 0, steps - count))

    def arguments(self, steps: int) -> dict[str, dict[str, Any]]:
        """Of RAS and RALU, where a run of `steps` steps has them, as plain data."""
        found: dict[str, dict[str, Any]] = {}
        if self.ras is not None:
            found["ras"] = {name: getattr(self.ras, name) for name in ("ratio", "metric", "align")}
        ralu = self.ralu(steps)
        if ralu is not None:
            found["ralu"] = {
                name: list(getattr(ralu, name)) for name in ("steps", "ends", "shifts")
            }
            found["ralu"] |= {"noise": ralu.noise, "lift": ralu.lift}
        return found


@dataclass(frozen=True)
class Knobs:
    """These values are searched, of each the uncached run's first.

    Attributes:
        steps: Numbers of steps, falling; empty for the search's own alone.
        ratios: Shares of the tokens that RAS computes, falling from 1, which is without RAS.
        solvers: Schedulers by name, as in `Work`, or "own" for the pipeline's; empty for the search's own alone.
        coarse: Shares of the steps in RALU's coarse stage, rising from 0, which is without it. It leads the pipeline's
            own scheduler alone, so such runs have no other solver where several are searched.
    """

    steps: tuple[int, ...] = ()
    ratios: tuple[float, ...] = (1.0,)
    solvers: tuple[str, ...] = ()
    coarse: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("ratios", 0)):
            values = tuple(getattr(self, name))
            falling = all(a > b for a, b in itertools.pairwise(values))
            if not falling or any(value < least or value == 0 for value in values):
                raise ArgumentError(
                    f"{name} must fall and be {f'at least {least}' if least else 'above 0'}, got {values!r}"
                )
            object.__setattr__(self, name, values)
        object.__setattr__(self, "solvers", tuple(self.solvers))
        object.__setattr__(self, "coarse", tuple(self.coarse))
        rising = all(a < b for a, b in itertools.pairwise(self.coarse))
        if not rising or not self.coarse or self.coarse[0] != 0 or self.coarse[-1] >= 1:
            raise ArgumentError(f"coarse must rise from 0 and be below 1, got {self.coarse!r}")
        if not self.ratios or self.ratios[0] != 1:
            raise ArgumentError(f"ratios must begin with 1, without RAS, got {self.ratios!r}")
        if len(set(self.solvers)) < len(self.solvers):
            raise ArgumentError(f"solvers must be distinct, got {self.solvers!r}")

    @cached_property
    def values(self) -> tuple[tuple[Any, ...], ...]:
        """Of each knob, in the order of :class:`Run`."""
        return self.steps or (None,), self.ratios, self.solvers or (None,), self.coarse

    @property
    def size(self) -> int:
        """So many bits are theirs."""
        return sum(len(values) - 1 for values in self.values)

    def runs(self) -> Iterator[Run]:
        """All there are, the uncached run's first."""
        found = itertools.starmap(Run, itertools.product(*self.values))
        return iter(dict.fromkeys(map(self._legal, found)))

    def places(self, bits: np.ndarray) -> np.ndarray:
        """Bits, bool [..., size], have each knob at this place of its values, int [..., 4]."""
        parts = np.split(bits, self._cuts(), axis=-1)
        return np.stack([part.sum(axis=-1) for part in parts], axis=-1)

    def read(self, bits: np.ndarray) -> Run:
        """Bits, bool [size], stand for this run."""
        places = self.places(bits)
        return self._legal(Run(*(v[p] for v, p in zip(self.values, places, strict=True))))

    def write(self, run: Run) -> np.ndarray:
        """A run has these bits, bool [size].

        Raises:
            ArgumentError: It has a value that is not searched.
        """
        found = []
        for (name, value), values in zip(asdict(run).items(), self.values, strict=True):
            if value not in values:
                raise ArgumentError(f"{name} {value!r} is not searched, which has {list(values)}")
            found.append(np.arange(len(values) - 1) < values.index(value))
        return np.concatenate(found)

    def columns(self, bits: np.ndarray) -> np.ndarray:
        """Bits, bool [n, size], have a one for each knob that is turned, in the value's column: float [n, size]."""
        shown = [
            np.arange(1, len(values)) == place[:, None]
            for values, place in zip(self.values, self.places(bits).T, strict=True)
        ]
        return np.concatenate(shown, axis=1).astype(float)

    def turn(self, bits: np.ndarray, rng: np.random.Generator) -> None:
        """A random knob is set to another of its values, in place."""
        places, counts = self.places(bits), [len(values) for values in self.values]
        knob = rng.choice([k for k, count in enumerate(counts) if count > 1])
        other = rng.choice([p for p in range(counts[knob]) if p != places[knob]])
        np.split(bits, self._cuts())[knob][:] = np.arange(counts[knob] - 1) < other

    def cross(
        self, one: np.ndarray, other: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Two settings, bool [size], exchange each knob with a probability of one half; they stay as they are."""
        lengths = [len(values) - 1 for values in self.values]
        swapped = np.repeat(rng.random(len(lengths)) < 0.5, lengths)
        return np.where(swapped, other, one), np.where(swapped, one, other)

    def described(self) -> dict[str, Any]:
        """JSON data describe them so."""
        found = {name: list(values) for name, values in asdict(self).items()}
        if len(self.coarse) == 1:  # as before there was this knob
            del found["coarse"]
        return found

    def _legal(self, run: Run) -> Run:
        """A run in stages has the pipeline's own solver."""
        if not run.coarse or not self.solvers:
            return run
        return replace(run, solver=OWN if OWN in self.solvers else self.solvers[0])

    def _cuts(self) -> Sequence[int]:
        return np.cumsum([len(values) - 1 for values in self.values])[:-1]
