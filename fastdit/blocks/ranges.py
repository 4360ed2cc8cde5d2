"""Modulations of a stream's tokens in two ranges: those of a picture, and those of the reference pictures behind it.

An op takes a vector for each sample or one for each token. Of two ranges it is run twice, each time on one of them, so
no vector is ever written down for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ranges:
    """A gate, scale or shift: a vector for a stream's first tokens, and another one for the others.

    Attributes:
        vectors: [B, D] of each range.
        count: Tokens of the first range.
        index: Which vector each token has, as the model says it, [B, n].
    """

    vectors: tuple[Tensor, Tensor]
    count: int
    index: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.vectors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors[0].dtype

    def spread(self) -> Tensor:
        """A vector for each token [B, n, D], chosen as diffusers does."""
        first, other = (vector.unsqueeze(1) for vector in self.vectors)
        return torch.where(self.index.unsqueeze(-1) == 0, first, other)


@dataclass(frozen=True, eq=False)
class Range:
    """One of the two ranges of a stream.

    Attributes:
        number: Which one.
        tokens: Its tokens.
    """

    number: int
    tokens: slice

    def rows(self, of_tokens: Tensor | None) -> Tensor | None:
        """A view of the range's tokens, of [B, n, D]; None stays None."""
        return None if of_tokens is None else of_tokens[:, self.tokens]

    def weights(self, weights: Tensor | None) -> Tensor | None:
        """A forecast's weights [branches], or [branches, B, n] of the range's tokens."""
        if weights is None or weights.ndim == 1:
            return weights
        return weights[:, :, self.tokens].contiguous()

    def vector(self, vector: Any) -> Any:
        """The range's vector; one of all tokens is that of a range too."""
        return vector.vectors[self.number] if isinstance(vector, Ranges) else vector


def ranges_of(vectors: Sequence[Any]) -> Sequence[Range]:
    """The ranges that an op is run on which is given these vectors; none where all are those of all tokens."""
    for vector in vectors:
        if isinstance(vector, Ranges):
            return Range(0, slice(vector.count)), Range(1, slice(vector.count, None))
    return ()


def in_ranges(vectors: Sequence[Tensor], count: int, index: Tensor) -> tuple[Ranges, ...]:
    """Vectors [B, D], two of each kind one after the other, as those of two ranges."""
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return tuple([Ranges(pair, count, index) for pair in pairs])
