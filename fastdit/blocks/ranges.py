"""Modulations of a stream's tokens in two ranges: those of a picture, and those of the reference pictures behind it.

An op takes a vector for each sample or one for each token. Of two ranges it is run twice, each time on one of them, so
no vector is ever written down for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Range:
    """One of the ranges of a stream; without a `number` it is the whole stream."""

    def __init__(self, number: int | None = None, tokens: slice = slice(None)) -> None:
        self._number, self._tokens = number, tokens

    def rows(self, of_tokens: Any) -> Any:
        """A view of the range's tokens, of [B, n, ...] or of what has `tokens`; None stays None."""
        if self._number is None or of_tokens is None:
            return of_tokens
        if isinstance(of_tokens, Tensor):
            return of_tokens[:, self._tokens]
        return of_tokens.tokens(self._tokens)

    def weights(self, weights: Tensor | None) -> Tensor | None:
        """A forecast's weights [branches], or [branches, B, n] of the range's tokens."""
        if self._number is None or weights is None or weights.ndim == 1:
            return weights
        return weights[:, :, self._tokens].contiguous()

    def vector(self, vector: Any) -> Any:
        """The range's vector."""
        return vector.vectors[self._number] if isinstance(vector, Ranges) else vector


WHOLE = (Range(),)


def ranges_of(vectors: Sequence[Any]) -> Sequence[Range]:
    """The ranges in which an op runs that is given these vectors; they are alike in a stream."""
    found = next((vector for vector in vectors if isinstance(vector, Ranges)), None)
    if found is None:
        return WHOLE
    return Range(0, slice(found.count)), Range(1, slice(found.count, None))


def ranges(index: Tensor, count: int, vectors: Sequence[Tensor]) -> Iterator[Ranges]:
    """Vectors [B, D], two of each kind one after the other, as those of two ranges."""
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return (Ranges(pair, count, index) for pair in pairs)
