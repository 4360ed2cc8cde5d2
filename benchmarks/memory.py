"""Freed memory stays in the process, as with the allocators that PyTorch's tuning guide advises for CPUs.

glibc gives large blocks back at once, and a fresh one faults page by page: a tensor of 50 MB then costs five times its
copy. That falls on every contender, but not alike, and says nothing about any of them.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on, in this process; whether the C library can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, MOST) == 1 for name in (MMAP_THRESHOLD, TRIM_THRESHOLD)
    )
