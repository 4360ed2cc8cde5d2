"""The real shapes: B samples (CFG counts twice), N image tokens, width D, of the published models."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The hidden state of one model at one picture size."""

    name: str
    batch: int
    tokens: int
    width: int


ALL = (
    Shape("dit-xl-2-256", 2, 256, 1152),
    Shape("pixart-256", 2, 256, 1152),
    Shape("pixart-512", 2, 1024, 1152),
    Shape("pixart-1024", 2, 4096, 1152),
    Shape("sd3-medium-1024", 2, 4096, 1536),
    Shape("sd3.5-large-1024", 2, 4096, 2432),
    Shape("flux-1024", 1, 4096, 3072),
)

# What a small CPU measures in minutes: one that fits a cache, one that does not.
DEFAULT = tuple(s for s in ALL if s.name in ("pixart-256", "pixart-1024"))

TINY = (Shape("tiny", 2, 3, 40),)


def selected() -> tuple[Shape, ...]:
    """FASTDIT_BENCH_SHAPES: default, all, tiny (a smoke test), or one shape's name."""
    name = os.environ.get("FASTDIT_BENCH_SHAPES", "default")
    groups = {"default": DEFAULT, "all": ALL, "tiny": TINY}
    found = groups.get(name) or tuple(s for s in ALL if s.name == name)
    if not found:
        known = ", ".join([*groups, *(s.name for s in ALL)])
        raise ValueError(f"FASTDIT_BENCH_SHAPES={name!r}; there are {known}")
    return found
