"""What a block is told about each of its components, as flags: the words between plans and blocks.

* COMPUTE: run the component. REUSE: read its slot. Neither: nobody reads it at this step, so it does not run at all
  (a FLUX attention whose `proj_out` is reused).
* KEEP: a later step reads the value that is current after this step, so the slot stays; without it the slot is freed.
* DRAWN: some step draws this component's output through several computed ones, so its slot holds the last of them. Then
  the flags also say of which order this step's output is, and how many values stay after it.
"""

from collections.abc import Mapping

COMPUTE, REUSE, KEEP, DRAWN = 1, 2, 4, 8
_ORDER, _KEPT = 4, 6

#: component -> flags, for one block at one step
BlockActions = Mapping[str, int]


def drawn(order: int, kept: int) -> int:
    """These flags say that an output is drawn by `order`, and that `kept` values stay."""
    return DRAWN | order << _ORDER | kept << _KEPT


def order_of(flags: int) -> int:
    """This is the order by which an output is drawn."""
    return flags >> _ORDER & 3


def kept_of(flags: int) -> int:
    """So many values stay."""
    if flags & DRAWN:
        return flags >> _KEPT
    return 1 if flags & KEEP else 0
