"""Copies that only lay a tensor out anew are left out of a program where their reader takes any layout.

SD3's forward copies the embedded patches, which come out transposed, before the blocks; the first op that reads them
does not mind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastdit.programs.lines import Line, Ref, refs_in


def without_copies(lines: Sequence[Line], kept: Iterable[Ref]) -> list[Line]:
    """The lines without copies that nobody needs."""
    stay, found = set(kept), list(lines)
    for number, line in enumerate(lines):
        if line.name != "contiguous" or line.kwargs or line.result in stay:
            continue
        source, copy = line.args[0], line.result
        readers = [n for n, other in enumerate(found) if copy in other.reads]
        between = found[number + 1 : readers[-1]] if readers else []
        if any(other.writes for other in between):  # perhaps into what was copied
            continue
        if all(_takes_any_layout(found[n], copy) for n in readers):
            for n in readers:
                args = tuple(source if arg == copy else arg for arg in found[n].args)
                found[n] = replace(found[n], args=args)
    return found


def _takes_any_layout(line: Line, tensor: Ref) -> bool:
    """Whether a line gives the same, in the same layout, for a tensor of any strides in its first place."""
    if not line.args or line.args[0] != tensor or tensor in refs_in((line.args[1:], line.kwargs)):
        return False
    if line.name == "empty_like":
        return "memory_format" in line.kwargs
    return line.op == "gated_residual"
