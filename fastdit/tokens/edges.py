"""Where a picture has detail: an energy for each token, and the tokens with the most of it.

Four energies, each fp32 [B, N] over tokens in raster order: `edge_energy` counts Canny edges of a
decoded image, `gradient_energy` and `variance_energy` look at latents and need no decoder,
`change_energy` compares velocities. `energy` is the one of a picture that RALU's selector names, and
`top_rows` turns it into the rows of the K tokens to refine.

`canny` finds the pixels that OpenCV's detector finds (8-bit grey, Sobel 3 x 3 with a replicated
border, L1 norm), pixel for pixel: integers throughout, its test of tan 22.5 degrees in 15-bit fixed
point, its asymmetric comparisons in non-maximum suppression, zeros around the magnitudes, and weak
pixels kept where they are 8-connected to a strong one.

Everything is torch on the tensors' own device, a fixed sequence of launches for a given size:
nothing waits for the host, so it can be captured into a CUDA graph. It runs once an image, for
selecting regions in mixed-resolution sampling (RALU, arXiv 2507.08422).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.tokens.clip import of_frames

TAN_22 = 13573  # tan(22.5 degrees) in units of 2^-15
SHIFT = 15
LUMA = (0.299, 0.587, 0.114)


def grey_levels(image: Tensor, clipped: bool = False) -> Tensor:
    """int32 [B, H, W], 0 to 255, of an image [B, 3, H, W] with values from -1 to 1.

    clipped: as the released code of the paper, which does not shift the range to [0, 1] first: all
    that is darker than mid-grey becomes black, and edges within it are lost.
    """
    red, green, blue = image.float().unbind(1)
    grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    if not clipped:
        grey = (grey + 1) / 2
    return (grey.clamp(0, 1) * 255).to(torch.int32)


def canny(grey: Tensor, low: int = 100, high: int = 200) -> Tensor:
    """bool [B, H, W]: edges of grey levels, int32 [B, H, W] from 0 to 255, as OpenCV finds them.

    low, high: a pixel along a ridge of the gradient is an edge where the L1 norm is above `high`, or
    above `low` and connected to such a one.
    """
    dx, dy = sobel(grey.float().unsqueeze(1))
    dx, dy = (d.squeeze(1).to(torch.int32) for d in (dx, dy))
    norm = dx.abs() + dy.abs()
    ridge = _is_ridge(norm, dx, dy) & (norm > low)
    return connected(ridge, ridge & (norm > high))


def energy(
    selector: str,
    latents: Tensor,
    cells: tuple[int, int],
    decode: Callable[[Tensor], Tensor],
    clipped: bool,
    frames: int = 1,
) -> Tensor:
    """The detail in each token of clean latents [B, C, H, W], fp32 [B F, N] of F frames of a clip.

    Args:
        selector: "edges", of the decoded picture, or "gradient" or "variance", of the latents.
        cells: rows and columns of tokens, of a frame.
        decode: is given one image after the other, so that each decides in a batch as it would alone.
        clipped: as for `grey_levels`.
        frames: that lie below each other in latents and picture; no detail is seen across their borders.
    """
    if selector == "edges":
        pictures = (of_frames(decode(image), frames) for image in latents.split(1))
        return torch.cat([edge_energy(picture, cells, clipped) for picture in pictures])
    of_latents = {"gradient": gradient_energy, "variance": variance_energy}[selector]
    return of_latents(of_frames(latents, frames), cells)


def edge_energy(image: Tensor, cells: tuple[int, int], clipped: bool = False) -> Tensor:
    """255 for each edge pixel, summed over each token's block of an image [B, 3, H, W].

    Args:
        image: floating, values from -1 to 1.
        cells: rows and columns of tokens; H and W are multiples of them.
        clipped: as for `grey_levels`.
    """
    edges = canny(grey_levels(image, clipped))
    return 255 * _by_token(edges.float().unsqueeze(1), cells).flatten(2).sum(-1)


def gradient_energy(latents: Tensor, cells: tuple[int, int]) -> Tensor:
    """The L1 norm of the Sobel gradient of latents [B, C, H, W], summed over channels and tokens."""
    dx, dy = sobel(latents.float())
    return _by_token(dx.abs() + dy.abs(), cells).flatten(2).sum(-1)


def variance_energy(latents: Tensor, cells: tuple[int, int]) -> Tensor:
    """The variance of latents [B, C, H, W] over each token and one pixel around it, the mean of C.

    The pixel around it tells an edge between two tokens.
    """
    values = _by_token(latents.float(), cells, around=1).flatten(3)  # [B, N, C, pixels]
    return values.var(-1, unbiased=False).mean(-1)


def change_energy(before: Tensor, now: Tensor) -> Tensor:
    """How far the velocity of each token moved in a step, squared, of tokens [B, N, C]."""
    return (now.float() - before.float()).square().sum(-1)


def top_rows(energy: Tensor, keep: int) -> Tensor:
    """int32 [B, K], ascending: the tokens of the largest energies [B, N], of equals the first ones.

    A NaN counts as less than everything.
    """
    if not 0 <= keep <= energy.shape[1]:
        raise ArgumentError(f"keep: got {keep}; accepted is 0 to {energy.shape[1]}")
    energy = torch.where(energy.isnan(), -torch.inf, energy)
    order = energy.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values.to(torch.int32)


def sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """d/dx and d/dy of a floating [B, C, H, W], each channel by itself, the border replicated."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]


def _is_ridge(norm: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Whether the norm is largest along the gradient, whose direction is one of four."""
    around = F.pad(norm, (1, 1, 1, 1))

    def at(y: int, x: int) -> Tensor:
        return around[:, 1 + y : 1 + y + norm.shape[1], 1 + x : 1 + x + norm.shape[2]]

    tangent, ordinate = dx.abs() * TAN_22, dy.abs() << SHIFT
    across = (norm > at(0, -1)) & (norm >= at(0, 1))
    along = (norm > at(-1, 0)) & (norm >= at(1, 0))
    falling = (norm > at(-1, -1)) & (norm > at(1, 1))
    rising = (norm > at(-1, 1)) & (norm > at(1, -1))
    diagonal = torch.where((dx ^ dy) < 0, rising, falling)
    steep = ordinate > tangent + (dx.abs() << (SHIFT + 1))
    return torch.where(ordinate < tangent, across, torch.where(steep, along, diagonal))


def connected(weak: Tensor, strong: Tensor) -> Tensor:
    """The pixels of `weak` with a way of 8 neighbours through `weak` to one of `strong`.

    Trees of pixels with labels that fall towards the root, all strong pixels under root 0. In a
    round every tree hangs itself under the smallest root next to it, and all are made flat again. A
    tree that has neighbours is hung under one, or gets one, or has a smaller neighbour afterwards
    and is hung in the next round: so two rounds halve their number, and 2 log2(pixels) are enough
    for any picture. On the CPU it stops where nothing changes.
    """
    batch, height, width = weak.shape
    pixels = height * width
    nobody = pixels + 1
    label = torch.arange(1, nobody, device=weak.device).view(1, height, width)
    label = torch.where(strong, 0, torch.where(weak, label, nobody)).flatten(1)
    roots = torch.arange(pixels + 2, device=weak.device).repeat(batch, 1)
    halvings = max(pixels - 1, 1).bit_length()
    for round_ in range(2 * halvings):
        nearest = _smallest_around(label.unflatten(1, (height, width))).flatten(1)
        nearest = torch.where(label == nobody, nobody, nearest)
        parent = roots.scatter_reduce(1, label, nearest, "amin")
        for _ in range(max(1, halvings - round_ // 2)):  # a chain holds each tree at most once
            before, parent = parent, parent.gather(1, parent)
            if settled(before, parent):
                break
        before, label = label, parent.gather(1, label)
        if settled(before, label):
            break
    return (label == 0).unflatten(1, (height, width))


def settled(before: Tensor, after: Tensor) -> bool:
    """Only where there is no device to wait for."""
    return after.device.type == "cpu" and torch.equal(before, after)


def _smallest_around(label: Tensor) -> Tensor:
    """Of each pixel [B, H, W] and its 8 neighbours."""
    for dim in (1, 2):
        size = label.shape[dim]
        smallest = label.clone()
        for to, source in ((0, 1), (1, 0)):
            part = smallest.narrow(dim, to, size - 1)
            torch.minimum(part, label.narrow(dim, source, size - 1), out=part)
        label = smallest
    return label


def _by_token(image: Tensor, cells: tuple[int, int], around: int = 0) -> Tensor:
    """[B, C, H, W] as [B, N, C, h, w], with so many pixels more on each side, replicated."""
    height, width = (size / count for size, count in zip(image.shape[2:], cells, strict=True))
    if height != int(height) or width != int(width) or min(height, width) < 1:
        raise ArgumentError(
            f"cells: got {cells} for a picture of {list(image.shape[2:])}; accepted are divisors"
        )
    padded = F.pad(image, (around,) * 4, mode="replicate") if around else image
    for dim, size in ((2, int(height)), (3, int(width))):
        padded = padded.unfold(dim, size + 2 * around, size)
    return padded.flatten(2, 3).transpose(1, 2)
