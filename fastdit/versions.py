"""Whether tensors still hold what they held.

Torch counts the writes to a tensor, but not to one made under `torch.inference_mode`. Of such a tensor a copy is kept
and compared, which waits for its device; of others nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None where nobody counts them."""
    return None if tensor.is_inference() else tensor._version


class Seen:
    """Some tensors as they are now.

    Example:
        >>> seen = Seen([prompt])
        >>> seen.unwritten()  # before what was made of `prompt` is used again
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._note(tensors)

    def _note(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._versions = tuple(map(version, self._tensors))
        self._copies = tuple(t.clone() if t.is_inference() else t for t in self._tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same objects, whatever they hold."""
        return len(tensors) == len(self._tensors) and all(
            a is b for a, b in zip(tensors, self._tensors, strict=True)
        )

    def unwritten(self) -> bool:
        """Whether the tensors hold what they held."""
        return self.equal(self._tensors)

    def equal(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these hold what the tensors held: the same ones, unwritten since, or equal ones.

        Waits for a device, once, for those in other memory and for inference tensors. Equal ones take the places of
        the tensors, so that a caller who goes on with them is not compared again.
        """
        if len(tensors) != len(self._tensors) or self._versions != tuple(
            map(version, self._tensors)
        ):
            return False
        pairs = [pair for pair in zip(self._copies, tensors, strict=True) if pair[0] is not pair[1]]
        if not all(_alike(*pair) for pair in pairs) or not _equal(pairs):
            return False
        if not self.are(tensors):
            self._note(tensors)
        return True


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.device == b.device


def _equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of each pair hold the same; waits once for each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for a, b in pairs:
        found.setdefault(a.device, []).append((a == b).all())
    return all(bool(torch.stack(masks).all()) for masks in found.values())
