"""A labelled grid of pictures: a column per way of drawing, a row per prompt, lines of text under
each picture.

Small pictures are enlarged by whole factors without smoothing, so that what is seen is what was
drawn; large ones are reduced. The layout follows from the text's measured size: nothing overlaps
and the prompts wrap. It knows nothing of what the labels say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, PAD = 24, 16, 6
SMALLEST, LARGEST = 256, 512  # pixels of a picture's longer side in the grid
TITLE, HEADER, BODY, SMALL = 20, 16, 14, 12  # font sizes
INK, SOFT, PAPER, RULE = "#1a1a1a", "#5f6368", "#ffffff", "#d9dce0"


@dataclass(frozen=True)
class Tile:
    """A tile is a picture, [h, w, 3] in [0, 1], over lines of text, which wrap at its width."""

    image: np.ndarray
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row is a line of text over some tiles."""

    title: str
    tiles: tuple[Tile, ...]


def draw_grid(
    title: str, headers: Sequence[tuple[str, str]], rows: Sequence[Row], footer: str
) -> Image.Image:
    """This draws the grid.

    Args:
        title: Over everything.
        headers: (name, second line) of each column.
        rows: One or more, each with one tile per column, all pictures of one shape.
        footer: What the numbers mean; wraps.
    """
    width, height = shown_size(*rows[0].tiles[0].image.shape[:2])
    total = 2 * MARGIN + len(headers) * width + (len(headers) - 1) * GAP
    # A first pass on paper of no height finds how far down everything reaches.
    bottom = _paint(_Paper(total, 1), title, headers, rows, footer, (width, height))
    paper = _Paper(total, bottom)
    _paint(paper, title, headers, rows, footer, (width, height))
    return paper.image


def shown_size(height: int, width: int) -> tuple[int, int]:
    """A picture of `height` x `width` is shown at this (width, height)."""
    longer = max(height, width)
    if longer > LARGEST:
        return max(1, width * LARGEST // longer), max(1, height * LARGEST // longer)
    factor = max(1, -(-SMALLEST // longer))
    return width * factor, height * factor


def to_picture(image: np.ndarray) -> Image.Image:
    """[h, w, 3] in [0, 1] becomes 8-bit RGB, rounded."""
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


class _Paper:
    """Text is written on this image from the top down."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: int, y: int, width: int, text: str, size: int, ink: str = INK, bold: bool = False
    ) -> int:
        """This writes wrapped text and gives where the next line starts."""
        font = _font(size, bold)
        ascent, descent = font.getmetrics()
        for line in _wrap(text, font, width):
            self.draw.text((x, y), line, font=font, fill=ink)
            y += ascent + descent
        return y


def _paint(
    paper: _Paper,
    title: str,
    headers: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    footer: str,
    size: tuple[int, int],
) -> int:
    """This paints everything and gives the height that was needed."""
    width, _ = size
    inner = paper.image.width - 2 * MARGIN
    columns = [MARGIN + i * (width + GAP) for i in range(len(headers))]
    y = paper.text(MARGIN, MARGIN, inner, title, TITLE, bold=True) + GAP
    below = []
    for x, (name, detail) in zip(columns, headers, strict=True):
        under = paper.text(x, y, width, name, HEADER, bold=True)
        below.append(paper.text(x, under, width, detail, BODY, SOFT))
    y = max(below)
    for row in rows:
        y += GAP
        paper.draw.line((MARGIN, y, MARGIN + inner, y), fill=RULE)
        y = paper.text(MARGIN, y + PAD, inner, row.title, BODY, SOFT) + PAD
        y = _paint_tiles(paper, columns, y, row.tiles, size)
    y += GAP
    paper.draw.line((MARGIN, y, MARGIN + inner, y), fill=RULE)
    return paper.text(MARGIN, y + PAD, inner, footer, SMALL, SOFT) + MARGIN


def _paint_tiles(
    paper: _Paper, columns: Sequence[int], top: int, tiles: Sequence[Tile], size: tuple[int, int]
) -> int:
    width, height = size
    below = []
    for x, tile in zip(columns, tiles, strict=True):
        picture = to_picture(tile.image)
        enlarged = width > picture.width
        picture = picture.resize(
            size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        )
        paper.image.paste(picture, (x, top))
        y = top + height + PAD
        for line in tile.lines:
            y = paper.text(x, y, width, line, BODY)
        below.append(y)
    return max(below)


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines break at spaces; a word that is too long for a line is broken anywhere."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
