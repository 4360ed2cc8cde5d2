"""The modulations of a window of steps side by side, so that those of one step are copied by one launch.

They are hundreds of short vectors otherwise, which a CUDA graph would be given one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """What was made of a window of steps.

    Attributes:
        keys: Of what layers, in order.
        tables: For each dtype [steps, B, w].
    """

    keys: tuple[Any, ...]
    tables: tuple[Tensor, ...]
    _places: Mapping[Any, tuple[tuple[int, int, torch.Size], ...]]

    @classmethod
    def of(cls, made: Mapping[Any, tuple[Tensor, ...]], batch: int) -> Packed:
        """`made` has the vectors of each layer, [steps B, ...]."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        ends: dict[torch.dtype, int] = {}
        places = {}
        for key, parts in made.items():
            found = []
            for part in parts:
                flat, start = part.flatten(1), ends.get(part.dtype, 0)
                groups.setdefault(part.dtype, []).append(flat)
                ends[part.dtype] = start + flat.shape[1]
                found.append((list(groups).index(part.dtype), start, part.shape[1:]))
            places[key] = tuple(found)
        tables = (torch.cat(flats, dim=1).unflatten(0, (-1, batch)) for flats in groups.values())
        return cls(tuple(made), tuple(tables), places)

    def rows(self, row: int) -> list[Tensor]:
        """[B, w] of one step."""
        return [table[row] for table in self.tables]

    def parted(self, rows: Sequence[Tensor]) -> dict[Any, tuple[Tensor, ...]]:
        """The vectors of each layer in such rows, wherever those lie."""
        return {
            key: tuple(
                rows[group].narrow(1, start, shape.numel()).unflatten(1, shape)
                for group, start, shape in places
            )
            for key, places in self._places.items()
        }
