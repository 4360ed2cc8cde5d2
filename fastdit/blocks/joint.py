"""A block's stream of text and image, which are joined only where its sub-layers read them.

The model's own forward joins them before its blocks. The family's forward of the whole model does not in a step that
reuses everything: that needs no text, and the image's refiner and the blocks behind it are one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdit.blocks.residual import Branch, Gate, joint_normed

if TYPE_CHECKING:
    from fastdit.blocks.forward import Forward

#: a joint stream [B, S, D], or its parts, [B, n, D] each: text and image in their order, or the image alone
Streams = Tensor | tuple[Tensor, ...]


def joined(parts: Sequence[Tensor], apart: bool) -> Streams:
    """Parts [B, n, D] of a stream as blocks are given them: `apart`, or one after the other."""
    return tuple(parts) if apart else parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def parts_of(streams: Streams) -> tuple[Tensor, ...]:
    """The parts that are apart in a stream; one that is not is the only one."""
    return streams if isinstance(streams, tuple) else (streams,)


class Joint:
    """What a block does with its stream, be it one or in parts.

    Args:
        x: What the block is given.
        text_first: The order of the parts.
    """

    def __init__(self, forward: Forward, x: Streams, text_first: bool) -> None:
        self._forward, self._text_first = forward, text_first
        parts, self.apart = parts_of(x), isinstance(x, tuple)
        names = ("image",) if self.apart else ("joint",)
        if len(parts) > 1:
            names = ("text", "image") if text_first else ("image", "text")
        self._streams = {name: forward.enter(h, name) for name, h in zip(names, parts, strict=True)}
        self._text = parts[not text_first].shape[1] if len(parts) > 1 else 0

    def normed(self, norm: nn.Module, scale: Gate) -> Tensor:
        """``norm(h) * (1 + scale)`` [B, S, D] of all of it."""
        streams = list(self._streams.values())
        if len(streams) == 1:
            return streams[0].normed(norm, scale, None)
        return joint_normed(streams, norm, scale, None)

    def add(self, branch: Branch, gate: Gate) -> None:
        """Add ``gate * branch`` to all of it."""
        parts = (branch,)
        if self._text:
            parts = self._forward.parted(branch, self._text, self._text_first)
        for stream, part in zip(self._streams.values(), parts, strict=True):
            stream.add(part, gate)

    def leave(self) -> Streams:
        """The block's output, in the form of its input.

        Behind the last block of a list the image's goes on in the next list, and others are read.
        """
        forward = self._forward
        for name, stream in self._streams.items():
            if forward.ends and name != "image" and not forward._drops(name):
                stream.read()
        return joined([stream.leave() for stream in self._streams.values()], self.apart)
