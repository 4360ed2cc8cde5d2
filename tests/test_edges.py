"""Edges and energies against restatements that look at one pixel after the other.

The detector was compared with OpenCV 5.0 when it was written, on the kinds of pictures below and on
larger ones, and found the same pixels; here it is held to the loop of `canny_by_pixel`.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from fastdit.errors import ArgumentError
from fastdit.tokens import edges
from inputs import generator


def canny_by_pixel(grey: list[list[int]], low: int, high: int) -> set[tuple[int, int]]:
    """(y, x) of the edges."""
    height, width = len(grey), len(grey[0])

    def level(y: int, x: int) -> int:
        return grey[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

    @functools.cache
    def slopes(y: int, x: int) -> tuple[int, int]:
        weights = ((-1, 1), (0, 2), (1, 1))
        dx = sum(w * (level(y + k, x + 1) - level(y + k, x - 1)) for k, w in weights)
        dy = sum(w * (level(y + 1, x + k) - level(y - 1, x + k)) for k, w in weights)
        return dx, dy

    def norm(y: int, x: int) -> int:
        inside = 0 <= y < height and 0 <= x < width
        return sum(map(abs, slopes(y, x))) if inside else 0

    weak, todo = set(), []
    for y in range(height):
        for x in range(width):
            (dx, dy), here = slopes(y, x), norm(y, x)
            if here <= low:
                continue
            tangent, ordinate = 13573 * abs(dx), abs(dy) * 2**15
            if ordinate < tangent:
                ridge = here > norm(y, x - 1) and here >= norm(y, x + 1)
            elif ordinate > tangent + 2**16 * abs(dx):
                ridge = here > norm(y - 1, x) and here >= norm(y + 1, x)
            else:
                side = -1 if (dx < 0) != (dy < 0) else 1
                ridge = here > norm(y - 1, x - side) and here > norm(y + 1, x + side)
            if ridge:
                weak.add((y, x))
                if here > high:
                    todo.append((y, x))
    found = set(todo)
    while todo:
        y, x = todo.pop()
        for near in ((y + r, x + q) for r in (-1, 0, 1) for q in (-1, 0, 1)):
            if near in weak and near not in found:
                found.add(near)
                todo.append(near)
    return found


def pictures(height: int, width: int) -> Tensor:
    """int32 [7, H, W]: noise, two levels, few levels, smooth, a slope, discs, and all black."""
    g = generator(height, width)
    noise = torch.rand(height, width, generator=g)
    smooth = torch.nn.functional.avg_pool2d(noise[None], 5, 1, 2, count_include_pad=False)[0]
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min()).clamp(min=1e-6)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    discs = ((y - 9) ** 2 + (x - 9) ** 2 < 50) * 0.8 + ((y - 14) ** 2 + (x - 17) ** 2 < 40) * 0.2
    slope = ((7 * y + 3 * x) % 64) / 64
    kinds = [noise, noise.round(), (noise * 4).floor() / 4, smooth, slope, discs, 0 * noise]
    return (255 * torch.stack([kind.float() for kind in kinds])).to(torch.int32)


@pytest.mark.parametrize("thresholds", [(100, 200), (30, 90), (0, 0), (400, 400)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 1), (2, 2), (23, 28)])
def test_the_detector_finds_the_pixels_that_a_loop_finds(size, thresholds):
    images = pictures(*size)
    found = edges.canny(images, *thresholds)
    for picture, mask in zip(images, found, strict=True):
        expected = canny_by_pixel(picture.tolist(), *thresholds)
        assert {tuple(at) for at in mask.nonzero().tolist()} == expected


def snake(size: int) -> Tensor:
    """bool [size, size]: one line that turns at every border, of half of all pixels."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[::2] = True
    for i, row in enumerate(range(1, size - 1, 2)):
        mask[row, -1 if i % 2 == 0 else 0] = True
    return mask


@pytest.mark.parametrize("size", [3, 21, 63])
def test_a_weak_line_of_any_length_is_followed(size):
    """From either end; a line apart from it is not. Every round is needed where none is cut short."""
    line = snake(size)
    for end in (0, -1):
        strong = torch.zeros_like(line)
        ends = line.nonzero()
        strong[tuple(ends[end].tolist())] = True
        both = torch.stack([line, line])
        found = edges.connected(both, torch.stack([strong, torch.zeros_like(strong)]))
        assert torch.equal(found[0], line)
        assert not found[1].any()


def test_rounds_are_enough_without_stopping_early(monkeypatch):
    """As on a device, where nothing asks whether it is done: any pixels with any of them strong."""
    monkeypatch.setattr(edges, "settled", lambda before, after: False)
    g = generator(1)
    for share in (0.2, 0.4, 0.6):
        weak = torch.rand(3, 17, 22, generator=g) < share
        weak[2] = False
        weak[2, :17, :17] = snake(17)
        strong = weak & (torch.rand(weak.shape, generator=g) < 0.02)
        strong[2, 16, 0] = True
        reached = strong
        for _ in range(weak[0].numel()):
            grown = torch.nn.functional.max_pool2d(reached.float(), 3, 1, 1) > 0
            reached = weak & grown
        assert torch.equal(edges.connected(weak, strong), reached)


def test_grey_levels_round_down_and_clip():
    colours = torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 1], [1, -1, 0], [3, 3, 3]])
    image = colours.T.reshape(1, 3, 1, 5)
    luma = 0.299 - 0.587
    assert edges.grey_levels(image).flatten().tolist() == [
        0,
        127,
        255,
        int(255 * (luma + 1) / 2),
        255,
    ]
    clipped = edges.grey_levels(image, clipped=True).flatten().tolist()
    assert clipped == [0, 0, 255, 0, 255]
    assert edges.grey_levels(torch.full((1, 3, 1, 1), 0.5), clipped=True).item() == 127


def test_a_dark_edge_is_lost_where_the_range_is_clipped():
    """Black beside dark grey: an edge, and nothing in the released code's range."""
    image = torch.full((1, 3, 32, 64), -1.0)
    image[..., 32:] = -0.1
    cells = (2, 4)
    assert edges.edge_energy(image, cells, clipped=True).sum() == 0
    energy = edges.edge_energy(image, cells).view(2, 4)
    assert energy.sum() == 255 * 32
    assert (energy.sum(0) > 0).tolist() in (
        [False, True, False, False],
        [False, False, True, False],
    )


def test_energies_are_summed_over_the_blocks_of_tokens():
    g = generator(2)
    image = 2 * torch.rand(2, 3, 24, 32, generator=g) - 1
    energy = edges.edge_energy(image, (3, 2))
    masks = edges.canny(edges.grey_levels(image))
    assert energy.dtype == torch.float32
    for b in range(2):
        for i in range(6):
            y, x = 8 * (i // 2), 16 * (i % 2)
            assert energy[b, i] == 255 * masks[b, y : y + 8, x : x + 16].sum()


def test_gradients_by_pixel():
    latents = torch.randn(2, 3, 6, 8, generator=generator(3))
    values = latents.double().tolist()

    def slopes(b: int, c: int, y: int, x: int) -> float:
        def at(r: int, q: int) -> float:
            return values[b][c][min(max(r, 0), 5)][min(max(q, 0), 7)]

        weights = ((-1, 1), (0, 2), (1, 1))
        dx = sum(w * (at(y + k, x + 1) - at(y + k, x - 1)) for k, w in weights)
        dy = sum(w * (at(y + 1, x + k) - at(y - 1, x + k)) for k, w in weights)
        return abs(dx) + abs(dy)

    found = edges.gradient_energy(latents, (3, 4))
    for b in range(2):
        for i in range(12):
            pixels = [(2 * (i // 4) + r, 2 * (i % 4) + q) for r in (0, 1) for q in (0, 1)]
            total = sum(slopes(b, c, y, x) for c in range(3) for y, x in pixels)
            assert found[b, i].item() == pytest.approx(total, rel=1e-5)


def test_variances_by_token():
    latents = torch.randn(2, 3, 6, 8, generator=generator(4))
    found = edges.variance_energy(latents, (3, 4))
    for b in range(2):
        for i in range(12):
            rows = [min(max(2 * (i // 4) + k, 0), 5) for k in range(-1, 3)]
            columns = [min(max(2 * (i % 4) + k, 0), 7) for k in range(-1, 3)]
            total = 0.0
            for c in range(3):
                pixels = [latents[b, c, y, x].item() for y in rows for x in columns]
                mean = math.fsum(pixels) / 16
                total += math.fsum((p - mean) ** 2 for p in pixels) / 16
            assert found[b, i].item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("energy", [edges.gradient_energy, edges.variance_energy])
def test_a_flat_picture_has_no_energy_and_an_edge_between_tokens_has(energy):
    latents = torch.ones(1, 4, 8, 8)
    assert energy(latents, (4, 4)).abs().sum() == 0
    latents[..., 4:] = 3
    found = energy(latents, (4, 4)).view(4, 4)
    assert (found > 0).all(0).tolist() == [False, True, True, False]


def test_the_top_rows_are_sorted_and_ties_go_to_the_first():
    energy = torch.tensor(
        [[0.0, 5, 5, 1, 5, 0], [0, 0, 0, 0, 0, 0], [1, float("nan"), 3, -1, 0, 2]]
    )
    for keep, expected in (
        (2, [[1, 2], [0, 1], [2, 5]]),
        (5, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 3, 4, 5]]),
        (0, [[], [], []]),
    ):
        rows = edges.top_rows(energy, keep)
        assert rows.tolist() == expected
        assert rows.dtype == torch.int32


def test_bad_sizes_are_named():
    with pytest.raises(ArgumentError, match="keep: got 4; accepted is 0 to 3"):
        edges.top_rows(torch.zeros(1, 3), 4)
    with pytest.raises(ArgumentError, match=r"cells: got \(3, 4\)"):
        edges.gradient_energy(torch.zeros(1, 4, 8, 8), (3, 4))
    with pytest.raises(ArgumentError, match=r"cells: got \(2, 32\)"):
        edges.edge_energy(torch.zeros(1, 3, 16, 16), (2, 32))


def test_pictures_of_a_batch_are_apart():
    images = pictures(23, 28)
    together = edges.canny(images)
    for b in range(len(images)):
        assert torch.equal(edges.canny(images[b : b + 1])[0], together[b])
