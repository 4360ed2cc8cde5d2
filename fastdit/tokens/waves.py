"""Numbers of active tokens at which the matrix products of a step keep all of a GPU busy to their end.

A product's output is cut into tiles, and as many tiles as the GPU has multiprocessors are computed at a time: a wave.
The last wave takes as long as a full one, however few tiles are in it. FLUX's single blocks have [1536, 3072] outputs
with 1024 of 4096 tokens active: 144 tiles, on the 132 multiprocessors of an H100 two waves that are 55 % full; with 896
they are [1408, 3072], one wave that is full. Wider outputs, as a feed-forward's, are some of these side by side.

Tiles are taken to be 128 rows by 256 columns, the large ones of libraries for GPUs with tensor cores; a library may
choose others for a shape, so this is a rule and no measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

TILE_ROWS, TILE_COLUMNS = 128, 256
#: what counts are rounded to where there are no waves, and are multiples of where there are
UNIT = 64
#: a count moves by at most this share of what was asked for, and only where that fills waves by so much more
MOST_MOVED, LEAST_GAIN = 1 / 8, 1.05


@dataclass(frozen=True)
class Waves:
    """What the blocks of a step ask of a GPU.

    Attributes:
        multiprocessors: The GPU's; 0 for a device that computes no tiles, whose counts are rounded to :data:`UNIT`.
        width: Columns of an output.
        batch: Rows of the transformer's batch.
        beside: For each list of blocks, their number and the tokens that are in one product with the image's.
    """

    multiprocessors: int
    width: int
    batch: int
    beside: tuple[tuple[int, int], ...]

    def fill(self, count: int) -> float:
        """The share of the tiles that all waves have room for which `count` active tokens of an image fill."""
        columns = math.ceil(self.width / TILE_COLUMNS)
        filled = room = 0.0
        for blocks, others in self.beside:
            rows = self.batch * (count + others)
            tiles = math.ceil(rows / TILE_ROWS) * columns
            filled += blocks * rows * self.width / (TILE_ROWS * TILE_COLUMNS)
            room += blocks * math.ceil(tiles / self.multiprocessors) * self.multiprocessors
        return filled / room

    def nearest(self, count: int, tokens: int) -> int:
        """The number of active tokens to compute where `count` of `tokens` were asked for."""
        rounded = min(tokens, max(1, round(count / UNIT)) * UNIT)
        if not self.multiprocessors:
            return rounded
        least, most = count * (1 - MOST_MOVED), min(tokens, count * (1 + MOST_MOVED))
        near = range(math.ceil(least / UNIT) * UNIT, math.floor(most) + 1, UNIT)
        found = max(near, key=lambda k: (self.fill(k), -abs(k - count), k), default=rounded)
        return found if self.fill(found) >= LEAST_GAIN * self.fill(rounded) else rounded


def waves_of(patched: Any, transformer: Any, device: torch.device, batch: int, text: int) -> Waves:
    """The waves of a patched transformer's blocks over `batch` rows with `text` tokens each."""
    adapter, beside = patched.adapter, []
    for kind in patched.spec.kinds:
        parts = {part for name in kind.components for part in adapter.layouts.get(name, ())}
        beside.append((kind.count, text if parts == {"joint"} else 0))
    return Waves(multiprocessors(device), adapter.width(transformer), batch, tuple(beside))


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
