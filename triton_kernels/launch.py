"""How large a tile is and how many warps work on it: a frozen table, and a rule where it is silent.

`benchmarks/tune.py` measures candidates on a GPU and writes the winners between the two markers
below, keyed by op, width D, bucket of rows and architecture. Nothing is tuned at run time: the same
call launches the same kernel on every run. The rule is by reasoning, for a memory-bound kernel:

* 16-byte accesses: 8 elements of bf16 a thread, so 256 columns a warp.
* gated_residual, blend, collapse and swiglu have no reduction over a row, so their tile is 1024
  elements for 4 warps, as wide as the width allows without idling more than an eighth of the lanes,
  over adjacent rows.
* norm_modulate keeps whole rows in registers: one row a program from D = 1152 on (several below),
  in at most 6 pieces, which is at most 48 fp32 registers a thread for the row. Up to D = 1536 one
  warp holds a row and the reduction needs no barrier.

Bytes in flight, from the registers in tools/triton_budget.json: gated_residual's 32 (one branch)
leave all 64 warps of a processor resident, 32 KiB for each tensor it reads. norm_modulate's 64 to
96 leave 20 to 32 warps with up to 6 loads each, 60 KiB and more. An H200 asks for about 25 KiB:
4.8 TB/s times 0.7 us of latency over 132 processors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

BUCKETS = (256, 1024, 4096, 16384)  # rows of a call, B times K; the last one holds all above
MAX_PROGRAM_ROWS = 2**31 - 1  # rows are counted in int32 inside the kernels
# What a part of a tile costs beside its keys, in blocks of 64: 128 rows of fp32 written and read again
# at 4.3 TB/s, where a block is multiplied at 400 TFLOP/s.
SHARING = 3


@dataclass(frozen=True)
class Launch:
    """Rows and columns of one program's tile, powers of two, and what runs it."""

    rows: int
    cols: int
    warps: int
    stages: int = 1  # depth of pipelined loops; the kernels so far are straight-line code

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value}; accepted is a power of two")


# op, D, bucket of rows, 10 * major + minor of the architecture; for sparse_attention, where an entry
# says that the launch beats torch, op, d, B, H, G, Q, S and architecture.
Key = tuple[str | int, ...]

# tuned: begin
TABLE: Mapping[Key, Launch] = MappingProxyType({})
# tuned: end


@functools.cache
def launch_for(op: str, width: int, rows: int, architecture: int) -> Launch:
    """The tuned launch of this op at this width and number of rows, else the rule's."""
    tuned = TABLE.get((op, width, bucket(rows), architecture))
    return tuned or RULES[op](width)


def faster_than_torch(q: Tensor, k: Tensor) -> Launch | None:
    """The launch of sparse_attention that was measured to beat torch's attention at these very sizes.

    Args:
        q, k: [B, Q, H, d] and [B, S, G, d]. Measured are 16-bit dtypes, which take equally long.
    """
    if q.itemsize != 2:
        return None
    return TABLE.get(attention_key(q.shape, k.shape, arch(q.device)))


def attention_key(q: Sequence[int], k: Sequence[int], architecture: int) -> Key:
    """The entry of the table for q [B, Q, H, d] and k [B, S, G, d]."""
    batch, queries, heads, dim = q
    return ("sparse_attention", dim, batch, heads, k[2], queries, k[1], architecture)


def waves(tiles: int, blocks: int, slots: int) -> tuple[int, int]:
    """How to keep `slots` programs busy to the end with tiles of `blocks` equal pieces of work each.

    Returns:
        How many tiles one program does whole, full waves of them, and how many programs share each
        other tile: as many as give the shortest time, or 1 where sharing gains nothing.
    """
    whole = tiles // slots * slots
    last = tiles - whole
    if last == 0:
        return tiles, 1

    def time(parts: int) -> int:
        """In pieces of work."""
        return -(-last * parts // slots) * (-(-blocks // parts) + (SHARING if parts > 1 else 0))

    parts = min(range(1, blocks + 1), key=time)
    return (tiles, 1) if parts == 1 else (whole, parts)


def bucket(rows: int) -> int:
    """The entry of BUCKETS that stands for this many rows."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


def programs(total: int, rows: int) -> int:
    """Programs that cover `total` rows, `rows` each."""
    if total + rows > MAX_PROGRAM_ROWS:
        raise ValueError(f"rows: got {total} in one call; accepted are {MAX_PROGRAM_ROWS - rows}")
    return -(-total // rows)


@functools.cache
def arch(device: torch.device) -> int:
    """10 * major + minor of a CUDA device, 0 for anything else."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def streaming(width: int) -> Launch:
    """1024 elements for 4 warps: the widest columns that idle at most an eighth of the lanes."""
    cols = min(1024, max(16, _power_of_two(width)))
    while cols > 128 and 8 * (-width % cols) > width + (-width % cols):
        cols //= 2
    return Launch(1024 // cols, cols, 4)


def whole_rows(width: int) -> Launch:
    """Whole rows in at most 6 pieces (beyond 16 warps, in more)."""
    if width <= 256:
        cols = max(16, _power_of_two(width))
    else:
        cols = min(4096, max(256, _power_of_two(-(-width // 6))))
    rows = 1 if width >= 1152 else max(1, 1024 // cols)
    return Launch(rows, cols, max(1, rows * cols // 256))


RULES = MappingProxyType(
    {
        "blend": streaming,
        "collapse": streaming,
        "gated_residual": streaming,
        "norm_modulate": whole_rows,
        "swiglu": streaming,
    }
)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
