"""A judge by least squares: which emoji does a picture show, and does it show them clearly?

At every place of the grid and for every emoji of either size, the picture is fitted by that emoji
on a ground whose colour is a free plane; what is explained best is found first. Names are compared with
the prompt only afterwards. It does not rate grounds or beauty.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdit.tiny.score import paired, share

from .captions import ParsedObject, parse
from .scenes import CELLS, PLACES, SIZES, STARTS
from .sprites import NAMES, STYLES, sprite

_FIT = 0.5  # share of a window's variance that an emoji must explain to be found at all
_CLEAR_FIT = 0.75  # and to be clear
_CLEAR_MARGIN = 0.15  # what the best emoji of another name must explain less
_SPREAD = 0.18  # of a window, RGB: above it there is more than a ground
_SIDE = 64  # pixels at which pictures are read


@dataclass(frozen=True)
class Found:
    """This emoji was found.

    Attributes
    ----------
    name, style, size, place : str
        As in captions.
    fit : float
        Share of its window's variance that the emoji on such a ground explains.
    margin : float
        How much less the best emoji of another name explains there.
    """

    name: str
    style: str
    size: str
    place: str
    fit: float
    margin: float

    @property
    def clear(self) -> bool:
        """Whether it is one emoji without doubt."""
        return self.fit >= _CLEAR_FIT and self.margin >= _CLEAR_MARGIN


@dataclass(frozen=True)
class Reading:
    """A picture shows these emoji; ``rest`` tells whether there is something else besides."""

    objects: tuple[Found, ...]
    rest: bool

    @property
    def clean(self) -> bool:
        """Whether it shows emoji, each without doubt, and nothing else."""
        return bool(self.objects) and not self.rest and all(one.clear for one in self.objects)


@dataclass(frozen=True)
class ObjectScore:
    """This is the verdict on one named emoji.

    ``right`` means that an emoji of this name was found. ``style``, ``size`` and ``place`` are
    ``None`` where the prompt leaves them open, and ``False`` where no emoji was found.
    """

    prompt: str
    named: ParsedObject
    found: Found | None
    right: bool
    style: bool | None
    size: bool | None
    place: bool | None


@dataclass(frozen=True)
class Score:
    """This is the verdict on a set of pictures.

    Attributes
    ----------
    mean : float
        Share of named emoji that were found.
    style, size, place : float
        Share right among those that a prompt names; 1.0 if no prompt names any.
    clean : float
        Share of pictures that show clear emoji and nothing else.
    chance : float
        What ``mean`` would be for pictures of other prompts with as many emoji.
    objects : tuple of ObjectScore
        In the order of the prompts.
    """

    mean: float
    style: float
    size: float
    place: float
    clean: float
    chance: float
    objects: tuple[ObjectScore, ...]


@dataclass(frozen=True)
class _Templates:
    """All emoji of a size as rows: colours times cover ``[s, 3, n]``, and what is seen of the ground.

    ``ground`` ``[s, 3, n]`` holds orthonormal combinations of 1, x and y times the uncovered share.
    """

    drawn: np.ndarray
    ground: np.ndarray

    @classmethod
    @functools.cache
    def of(cls, cells: int) -> _Templates:
        side = cells * _SIDE // CELLS
        pairs = [sprite(name, style, side) for name in NAMES for style in STYLES]
        drawn = np.stack([d.reshape(-1, 3).T for d, _ in pairs]).astype(np.float64)
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        plane = np.stack([np.ones(side * side), x.ravel(), y.ravel()])
        seen = [(1.0 - cover.ravel()) * plane for _, cover in pairs]
        return cls(drawn, np.stack([np.linalg.qr(one.T)[0].T for one in seen]))

    def errors(self, windows: np.ndarray) -> np.ndarray:
        """Squared errors ``[w, s]`` of the best fits of all emoji to windows ``[w, 3, n]``."""
        cross = np.einsum("wcn,scn->ws", windows, self.drawn, optimize=True)
        left = (windows**2).sum((1, 2))[:, None] - 2.0 * cross + (self.drawn**2).sum((1, 2))
        there = np.einsum("wcn,sgn->wscg", windows, self.ground, optimize=True)
        there -= np.einsum("scn,sgn->scg", self.drawn, self.ground, optimize=True)
        return left - (there**2).sum((2, 3))


def _windows(picture: np.ndarray, cells: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """All places ``(x, y)`` of an emoji of so many cells, and what is there, ``[w, 3, n]``."""
    step, side = _SIDE // CELLS, cells * _SIDE // CELLS
    starts = list(itertools.product(range(CELLS - cells + 1), repeat=2))
    cut = [picture[y * step : y * step + side, x * step : x * step + side] for x, y in starts]
    return starts, np.stack([one.reshape(-1, 3).T for one in cut])


def _place(x: int, y: int, cells: int) -> str:
    gaps = {
        place: sum(
            abs(STARTS[cells][axis] - start) for axis, start in zip(axes, (x, y), strict=True)
        )
        for place, axes in PLACES.items()
    }
    return min(gaps, key=lambda place: gaps[place])


def _resized(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = picture.shape[:2]
    if height == width and height % _SIDE == 0:
        times = height // _SIDE
        return picture.reshape(_SIDE, times, _SIDE, times, 3).mean((1, 3))
    layers = [
        np.asarray(Image.fromarray(layer).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
        for layer in np.moveaxis(picture, 2, 0)
    ]
    return np.stack(layers, axis=2)


def read(picture: np.ndarray, limit: int = 4) -> Reading:
    """This finds the emoji of a picture ``[h, w, 3]`` in [0, 1], at most ``limit``."""
    small = _resized(np.asarray(picture, np.float32)).astype(np.float64)
    options = []  # of explaining a window: (explained, box, cells, fit, emoji, margin)
    spread = []  # of small windows: (spread, box)
    for cells in SIZES.values():
        starts, windows = _windows(small, cells)
        spare = ((windows - windows.mean(2, keepdims=True)) ** 2).sum((1, 2))
        fits = 1.0 - _Templates.of(cells).errors(windows) / np.maximum(spare, 1e-9)[:, None]
        for (x, y), variance, row in zip(starts, spare, fits, strict=True):
            best = int(np.argmax(row))
            others = np.delete(row.reshape(len(NAMES), -1), best // len(STYLES), axis=0)
            box = (x, y, cells)
            margin = float(row[best] - others.max())
            options.append((float(variance * row[best]), box, float(row[best]), best, margin))
            if cells == min(SIZES.values()):
                spread.append((float(np.sqrt(variance / windows[0].size)), box))
    found: list[Found] = []
    taken: list[tuple[int, int, int]] = []
    names = {cells: size for size, cells in SIZES.items()}
    for _, box, fit, best, margin in sorted(options, reverse=True):
        x, y, cells = box
        bright = max(s for s, own in spread if _inside(own, box)) > _SPREAD / 3
        if fit < _FIT or not bright or len(found) == limit or any(_touch(box, o) for o in taken):
            continue
        taken.append(box)
        name, style = NAMES[best // len(STYLES)], STYLES[best % len(STYLES)]
        found.append(Found(name, style, names[cells], _place(x, y, cells), fit, margin))
    rest = any(s > _SPREAD and not any(_touch(box, o) for o in taken) for s, box in spread)
    return Reading(tuple(found), rest)


def _touch(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[2] and b[1] < a[1] + a[2]


def _inside(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return all(b[i] <= a[i] and a[i] + a[2] <= b[i] + b[2] for i in (0, 1))


def _judge(prompt: str, named: tuple[ParsedObject, ...], reading: Reading) -> list[ObjectScore]:
    """This matches names with what was found, each found emoji at most once."""
    # No more candidates than names: a picture gains nothing by showing additional emoji.
    left = list(reading.objects[: len(named)])
    verdicts = []
    for wish in named:
        match = next((one for one in left if one.name == wish.name), None)
        if match is not None:
            left.remove(match)
        told = {
            part: None
            if getattr(wish, part) is None
            else match is not None and getattr(match, part) == getattr(wish, part)
            for part in ("style", "size", "place")
        }
        verdicts.append(ObjectScore(prompt, wish, match, match is not None, **told))
    return verdicts


def score(images: Any, prompts: str | Sequence[str]) -> Score:
    """This judges pictures against their prompts.

    Parameters
    ----------
    images
        PIL images, numpy ``[n, h, w, 3]`` in [0, 1] or torch ``[n, 3, h, w]`` in [0, 1].
    prompts : str or sequence of str
        One per picture, in the words of ``captions.py``.

    Raises
    ------
    ValueError
        If the numbers differ, there are none, or a prompt names no emoji.
    """
    pictures, prompts = paired(images, prompts)
    named = [parse(prompt).objects for prompt in prompts]
    readings = [read(picture) for picture in pictures]
    verdicts = [
        verdict
        for prompt, wishes, reading in zip(prompts, named, readings, strict=True)
        for verdict in _judge(prompt, wishes, reading)
    ]
    return Score(
        mean=share([verdict.right for verdict in verdicts]),
        style=share([verdict.style for verdict in verdicts]),
        size=share([verdict.size for verdict in verdicts]),
        place=share([verdict.place for verdict in verdicts]),
        clean=share([reading.clean for reading in readings]),
        chance=float(np.mean([len(wishes) / len(NAMES) for wishes in named for _ in wishes])),
        objects=tuple(verdicts),
    )
