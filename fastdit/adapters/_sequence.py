"""The joint sequence of Z-Image, [image, padding, text]: where its tokens are, which are read, and its refined text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.blocks.attention import Rotation

#: image and text are each padded to a multiple of so many tokens
MULTIPLE = 32


def behind(length: int) -> int:
    """So many tokens of padding are behind so many others."""
    return -length % MULTIPLE


def angles(
    transformer: Any, call: Any, side: int, lengths: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Rotary angles [B or 1, S, d / 2] complex, and which tokens are read, bool [B, S], or None for all.

    There are no angles where the blocks' own attention has their rotation.
    """
    memory, own = call.memory, call.forward.tokens is not None
    key, read = (own, side, *lengths), None
    if key not in memory:
        turns = _turns(transformer.rope_embedder, _places(call, side, lengths))
        if min(lengths) < max(lengths):
            ends = torch.tensor(lengths, device=turns.device)[:, None] - max(lengths)
            read = torch.arange(-turns.shape[1], 0, device=turns.device) < ends
        memory[key] = (Rotation.of(turns if len(turns) > 1 else turns[0]) if own else turns), read
    turns, read = memory[key]
    if not own:
        return turns, read
    call.forward.scratch |= dict.fromkeys(("noise_", ""), turns)
    return None, read


def _turns(embedder: Any, places: Tensor) -> Tensor:
    """Rotary angles [..., d / 2] complex of places [..., 3]; the model has them in tables, for whole numbers."""
    found = []
    for place, dim in zip(places.double().unbind(-1), embedder.axes_dims, strict=True):
        even = torch.arange(0, dim, 2, dtype=torch.float64, device=places.device)
        found.append(place[..., None] * (1.0 / embedder.theta ** (even / dim)))
    angles = torch.cat(found, dim=-1).float()
    return torch.polar(torch.ones_like(angles), angles)


def refined(
    transformer: Any, prompts: Sequence[Tensor], lengths: Sequence[int], mask: Tensor | None
) -> Tensor:
    """The refined prompts [B, T, D]; what is kept for a run has the form that it has in the model's own."""
    rows = [F.pad(p, (0, 0, 0, n - len(p))) for p, n in zip(prompts, lengths, strict=True)]
    parts = zip(prompts, transformer.cap_embedder(torch.cat(rows)).split(lengths), strict=True)
    longest, pad = max(lengths), transformer.cap_pad_token
    text = torch.stack(
        [torch.cat([x[: len(p)], pad.expand(longest - len(p), -1)]) for p, x in parts]
    )
    turns = _turns(transformer.rope_embedder, _of_text(longest, pad.device))
    for layer in transformer.context_refiner:
        text = layer(text, mask, turns)
    return text


def _of_text(length: int, device: torch.device) -> Tensor:
    """The places [1, T, 3] of a prompt's tokens."""
    return F.pad(torch.arange(1, length + 1, device=device)[None, :, None], (0, 2))


def _places(call: Any, side: int, lengths: Sequence[int]) -> Tensor:
    """Frame, row and column [B or 1, S, 3] of image, padding and text; the prompt's tokens count as frames."""
    layout, latents = call.layout, call.arguments.hidden_states
    if layout is None or layout.name == "full":
        axes = [torch.arange(n // side, device=latents.device) for n in latents.shape[2:]]
        image = F.pad(torch.cartesian_prod(*axes), (1, 0))[None]
    else:
        image = F.pad(layout.places() / 2, (1, 0))
        image = image if len(image) == 1 else image.repeat(len(lengths) // len(image), 1, 1)
    ends = lengths if min(lengths) < max(lengths) else lengths[:1]
    image = image + F.pad(1 + torch.tensor(ends, device=latents.device)[:, None, None], (0, 2))
    padding = image.new_zeros(len(image), behind(call.count), 3)
    text = _of_text(max(lengths), latents.device).to(image.dtype).expand(len(image), -1, -1)
    return torch.cat([image, padding, text], dim=1)
