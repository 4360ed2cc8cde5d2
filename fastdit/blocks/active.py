"""A part of the tokens: which of them a call computes, and what was kept of all.

Slots hold references to module outputs, copies only in a lower precision. Where a step computes some tokens, a slot has
to outlive that: the first such step copies it, and the rows of this and later steps are written into the copy, which
nobody else holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CachedRows:
    """A kept output of all tokens, [B, N, D], of which the active rows [B, K] are meant; the residual reads them there.

    `index` [B K] are these rows in the samples laid end to end.
    """

    whole: Tensor
    rows: Tensor
    index: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, *self.whole.shape[2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def gathered(self) -> Tensor:
        """A copy of the rows."""
        return self.whole.flatten(0, 1).index_select(0, self.index).view(self.shape)

    def renewed(self, fresh: Tensor, owned: bool) -> Tensor:
        """All tokens with the rows replaced, in place where `whole` is `owned`: made by this, so contiguous."""
        tokens, fresh = self.whole.flatten(0, 1), fresh.to(self.dtype).flatten(0, 1)
        if not owned:
            return tokens.index_copy(0, self.index, fresh).view(self.whole.shape)
        tokens.index_copy_(0, self.index, fresh)
        return self.whole


@dataclass(eq=False, repr=False)
class ActiveTokens:
    """Which image tokens a call computes, and where the keys and values of all of them live.

    Attributes:
        count: Image tokens, N.
        rows: [B, K] active ones, or None for all.
        texts: [B] text tokens before each image in a joint stream whose texts are unlike long, see `take_texts`; None
            where all are as long.
        keys: Attention -> its keys and values; None where no later call reads them.
        ops: The ops that stand for modules in attention; None where only modules will do.
        memory: Free space of the adapter that lives as long as the keys: "rotation".
        key_bias: [1, N], added to every query's products with the image's keys; None where all keys count alike.
        ages: When the tokens of components were computed, see `token_nodes.py`; it lives as long as the slots.
        text_first: Whether in a joint stream the text comes before the image, or behind it.
    """

    count: int
    rows: Tensor | None
    keys: dict[Any, Any] | None
    memory: dict[Any, Any]
    ops: Any
    ages: dict[Any, Any] = field(default_factory=dict)
    key_bias: Tensor | None = None
    text_first: bool = True
    texts: Tensor | None = field(default=None, init=False)
    _joint: dict[int, Tensor] = field(default_factory=dict, init=False)
    _biases: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)
    _index: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)

    @property
    def active(self) -> int:
        """Image tokens that pass."""
        return self.count if self.rows is None else self.rows.shape[1]

    def take_texts(self, mask: Tensor) -> Tensor:
        """Note how long texts are, by a mask [B, S] of this call's [text, image, padding], and give the keys'."""
        if self.rows is None:
            return mask
        self.texts = mask.sum(dim=1) - self.active
        places = torch.arange(mask.shape[1] - self.active + self.count, device=mask.device)
        return places < self.texts[:, None] + self.count

    def joint_rows(self, text: int) -> Tensor | None:
        """Rows of a joint stream that are active: all text, [B, text + K]; and all padding, where there is any."""
        if self.rows is None:
            return None
        if text not in self._joint and not self.text_first:
            behind = torch.arange(self.count, self.count + text, device=self.rows.device)
            behind = behind.to(self.rows.dtype).expand(len(self.rows), -1)
            self._joint[text] = torch.cat([self.rows, behind], dim=1)
        elif text not in self._joint:
            active = self.active
            places = torch.arange(text + active, device=self.rows.device)
            image = (places - (text if self.texts is None else self.texts[:, None])).expand(
                self.rows.shape[0], -1
            )
            chosen = self.rows.gather(1, image.clamp(0, active - 1)) + places - image
            behind = torch.where(image < active, chosen, places - active + self.count)
            self._joint[text] = torch.where(image < 0, places, behind)
        return self._joint[text]

    def weighed(
        self, mask: Tensor | None, text: int = 0, text_first: bool | None = None
    ) -> Tensor | None:
        """An attention's mask with the weights of its keys: the image's and `text` others, before or behind them.

        Args:
            mask: Added to the products, or which of them count, [B, 1 or Q, S]; None for all.
            text_first: Where these are; None for as in joint streams.
        """
        if self.key_bias is None:
            return mask
        sides = (text, 0) if (self.text_first if text_first is None else text_first) else (0, text)
        if sides not in self._biases:
            self._biases[sides] = F.pad(self.key_bias, sides).unsqueeze(1)
        bias = self._biases[sides]
        if mask is None:
            return bias
        return torch.where(mask, bias, -math.inf) if mask.dtype is torch.bool else mask + bias

    def stored(self, held: Any, layout: Sequence[str]) -> Any:
        """A component's kept output for this call's tokens."""
        if isinstance(held, (tuple, list)):
            return tuple(self._stored(h, part) for h, part in zip(held, layout, strict=False))
        return self._stored(held, layout[0])

    def renewed(self, held: Any, value: Any, layout: Sequence[str], owned: bool) -> Any:
        """A component's kept output with its active rows replaced, in place where it is `owned`."""
        if isinstance(held, (tuple, list)):
            parts = zip(self.stored(held, layout), value, strict=False)
            return tuple(_renewed(part, fresh, owned) for part, fresh in parts)
        return _renewed(self.stored(held, layout), value, owned)

    def rows_of(self, part: str, count: int) -> Tensor | None:
        """Active rows of a stream of `count`, "image" or "joint"; None for all."""
        return self.rows if part == "image" else self.joint_rows(count - self.count)

    def index(self, part: str, whole: Tensor) -> Tensor:
        """Where these rows of [B, count, ...] lie in the samples laid end to end, [B K]."""
        batch, count = whole.shape[:2]
        if (part, count) not in self._index:
            rows = self.rows_of(part, count)
            places = torch.arange(batch * count, device=whole.device)
            if rows is not None:
                places = (places[::count, None] + rows).flatten()
            self._index[part, count] = places
        return self._index[part, count]

    def _stored(self, held: Tensor | None, part: str) -> Tensor | CachedRows | None:
        if held is None or part == "text":  # all text is active
            return held
        return CachedRows(held, self.rows_of(part, held.shape[1]), self.index(part, held))


def _renewed(held: Any, fresh: Tensor | None, owned: bool) -> Tensor | None:
    return held.renewed(fresh, owned) if isinstance(held, CachedRows) else fresh
