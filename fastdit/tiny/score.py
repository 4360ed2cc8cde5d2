"""A rule-based judge: does a picture show the objects its prompt names?

Finds the objects of a picture without looking at the prompt (background by the border,
objects by connected regions, colour by the nearest palette entry, shape by the best
overlap with drawn templates) and then compares. It does not rate beauty or realism.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import scenes
from .captions import ParsedObject, ParsedPrompt, parse

_FOREGROUND = 0.22  # distance in RGB from the background at which a pixel is an object's
_MIN_AREA = 0.006  # smallest region, as a share of the shorter side squared
_MIN_OVERLAP = 0.72  # below this overlap with every template a region has no shape
_RADIUS_CUT = 0.134  # between the radii of small and large objects


@dataclass(frozen=True)
class Found:
    """This object was found in a picture; ``shape`` is ``None`` if it looks like no shape."""

    shape: str | None
    color: str
    size: str
    place: str


@dataclass(frozen=True)
class ObjectScore:
    """This is the verdict on one named object.

    ``right`` means shape and colour are right. ``size`` and ``place`` are ``None`` where
    the prompt leaves them open, and ``False`` where no found object was matched.
    """

    prompt: str
    named: ParsedObject
    found: Found | None
    right: bool
    size: bool | None
    place: bool | None


@dataclass(frozen=True)
class Score:
    """This is the verdict on a set of pictures.

    Attributes
    ----------
    mean : float
        Share of named objects whose shape and colour are right.
    size, place, background : float
        Share right among those that a prompt names; 1.0 if no prompt names any.
    chance : float
        What ``mean`` would be for pictures of other prompts: a picture with ``n`` objects
        out of the possible shape and colour pairs shows a given pair with ``n / pairs``.
    objects : tuple of ObjectScore
        In the order of the prompts.
    """

    mean: float
    size: float
    place: float
    background: float
    chance: float
    objects: tuple[ObjectScore, ...]


def as_pictures(images: Any) -> list[np.ndarray]:
    """This brings pictures into a list of float32 ``[h, w, 3]`` arrays in [0, 1].

    Parameters
    ----------
    images
        One or a sequence of PIL images, a numpy array ``[n, h, w, 3]`` in [0, 1] or a torch
        tensor ``[n, 3, h, w]`` in [0, 1].

    Raises
    ------
    ValueError
        If an array has another shape.
    """
    if hasattr(images, "convert"):
        images = [images]
    if hasattr(images, "detach"):
        images = images.detach().float().cpu().numpy()
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images as tensor must be [n, 3, h, w], got {images.shape}")
        images = images.transpose(0, 2, 3, 1)
    pictures = []
    for image in images:
        if hasattr(image, "convert"):
            image = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
        picture = np.asarray(image, dtype=np.float32)
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"images as arrays must be [n, h, w, 3], got one of {picture.shape}")
        pictures.append(picture)
    return pictures


def _nearest(color: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    names = list(palette)
    distances = [float(np.linalg.norm(color - np.asarray(palette[name]))) for name in names]
    return names[int(np.argmin(distances))]


def _border_color(picture: np.ndarray) -> np.ndarray:
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(border, axis=0)


def label_regions(mask: np.ndarray) -> list[np.ndarray]:
    """This splits a boolean ``[h, w]`` mask into its 4-connected regions, largest first."""
    height, width = mask.shape
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(height, width), 0)
    while True:
        grown = np.pad(labels, 1)
        # Every pixel takes the largest label around it until nothing changes.
        spread = np.maximum.reduce(
            [labels, grown[:-2, 1:-1], grown[2:, 1:-1], grown[1:-1, :-2], grown[1:-1, 2:]]
        )
        spread = np.where(mask, spread, 0)
        # Following the label's own label shortens long ways.
        spread = np.where(mask, np.maximum(spread, spread.ravel()[spread - 1]), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    names, counts = np.unique(labels[labels > 0], return_counts=True)
    return [labels == names[index] for index in np.argsort(-counts, kind="stable")]


def _cover(picture: np.ndarray, region: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, str]:
    """This tells how much of each pixel the object covers, around its region, and its colour."""
    distances = np.linalg.norm(picture - ground, axis=2) * region
    core = region & (distances >= np.quantile(distances[region], 0.4))
    mean = np.median(picture[core], axis=0)
    step = mean - ground
    along = ((picture - ground) @ step) / max(float(step @ step), 1e-6)
    near = region.copy()
    near[1:] |= region[:-1]
    near[:-1] |= region[1:]
    near[:, 1:] |= region[:, :-1]
    near[:, :-1] |= region[:, 1:]
    return np.clip(along, 0.0, 1.0) * near, _nearest(mean, scenes.COLORS)


def _template(shape: str, x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    """This is the cover of a shape of given area whose centre of mass is at the origin."""
    unit_area = {"circle": np.pi, "square": 3.24, "diamond": 2.0 * 1.22**2, "cross": 2.7056}
    if shape == "triangle":
        radius = np.sqrt(area / (2.1**2 / np.sqrt(3.0)))
        # A triangle's centre of mass lies a third of its height above its floor.
        y = y + (2.1 / 3.0 - 1.05) * -radius
    else:
        radius = np.sqrt(area / unit_area[shape])
    return np.clip(0.5 - scenes.shape_distance(shape, x, y, float(radius)), 0.0, 1.0)


def _best_shape(cover: np.ndarray) -> str | None:
    rows, columns = np.indices(cover.shape, dtype=np.float32)
    area = float(cover.sum())
    x = columns - float((columns * cover).sum()) / area
    y = rows - float((rows * cover).sum()) / area
    overlaps = {}
    for shape in scenes.SHAPES:
        template = _template(shape, x, y, area)
        overlaps[shape] = np.minimum(cover, template).sum() / np.maximum(cover, template).sum()
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= _MIN_OVERLAP else None


def find_objects(picture: np.ndarray, limit: int = 4) -> tuple[list[Found], str]:
    """A picture ``[h, w, 3]`` has these objects, largest first, and a background of this name."""
    ground = _border_color(picture)
    background = _nearest(ground, scenes.BACKGROUNDS)
    height, width = picture.shape[:2]
    side = min(height, width)
    mask = np.linalg.norm(picture - ground, axis=2) > _FOREGROUND
    found = []
    for region in label_regions(mask)[:limit]:
        if region.sum() < _MIN_AREA * side * side:
            break
        cover, color = _cover(picture, region, ground)
        rows, columns = np.nonzero(region)
        # The middle of the bounding box, since that is what scenes place.
        x = (columns.min() + columns.max() + 1) / 2.0 / width
        y = (rows.min() + rows.max() + 1) / 2.0 / height
        gaps = {n: np.hypot(x - px, y - py) for n, (px, py) in scenes.PLACES.items()}
        radius = np.sqrt(float(cover.sum()) / 3.0) / side
        found.append(
            Found(
                shape=_best_shape(cover),
                color=color,
                size="small" if radius < _RADIUS_CUT else "large",
                place=min(gaps, key=lambda name: gaps[name]),
            )
        )
    return found, background


def _agreement(named: ParsedObject, found: Found | None) -> tuple[bool, int]:
    """This tells whether shape and colour are right, and how many attributes agree at all."""
    if found is None:
        return False, 0
    same = [
        getattr(named, part) in (None, getattr(found, part))
        for part in ("shape", "color", "size", "place")
    ]
    return same[0] and same[1], sum(same)


def _judge(prompt: str, parsed: ParsedPrompt, found: list[Found]) -> list[ObjectScore]:
    """This matches named to found objects so that the most are right, and lists the verdicts."""
    named = parsed.objects
    # No more candidates than names: a picture gains nothing by showing additional objects.
    candidates: list[Found | None] = [*found[: len(named)]]
    candidates += [None] * (len(named) - len(candidates))

    def worth(order: tuple[Found | None, ...]) -> tuple[int, int]:
        verdicts = [_agreement(n, f) for n, f in zip(named, order, strict=True)]
        return sum(right for right, _ in verdicts), sum(agree for _, agree in verdicts)

    best = max(itertools.permutations(candidates), key=worth)
    scores = []
    for wish, match in zip(named, best, strict=True):
        size = None if wish.size is None else match is not None and match.size == wish.size
        place = None if wish.place is None else match is not None and match.place == wish.place
        scores.append(ObjectScore(prompt, wish, match, _agreement(wish, match)[0], size, place))
    return scores


def share(flags: Sequence[bool | None]) -> float:
    """The part of the flags that are true, of those that say anything; 1 where none does."""
    told = [flag for flag in flags if flag is not None]
    return sum(told) / len(told) if told else 1.0


def paired(images: Any, prompts: str | Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """This gives pictures as :func:`as_pictures` does, and the prompt of each.

    Raises
    ------
    ValueError
        If the numbers differ or there are none.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pictures = as_pictures(images)
    if len(pictures) != len(prompts) or not prompts:
        raise ValueError(
            f"images and prompts must be equally many, at least one; "
            f"got {len(pictures)} images and {len(prompts)} prompts"
        )
    return pictures, prompts


def score(images: Any, prompts: str | Sequence[str]) -> Score:
    """This judges pictures against their prompts.

    Parameters
    ----------
    images
        PIL images, numpy ``[n, h, w, 3]`` in [0, 1] or torch ``[n, 3, h, w]`` in [0, 1].
    prompts : str or sequence of str
        One per picture, in the words of ``captions.py``.

    Returns
    -------
    Score
        The share of objects with right shape and colour, and the verdict on each object.

    Raises
    ------
    ValueError
        If the numbers differ, there are none, or a prompt names no shape.
    """
    pictures, prompts = paired(images, prompts)
    verdicts: list[ObjectScore] = []
    grounds: list[bool | None] = []
    chances: list[float] = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        parsed = parse(prompt)
        found, background = find_objects(picture)
        verdicts += _judge(prompt, parsed, found)
        grounds.append(None if parsed.background is None else background == parsed.background)
        count = len(parsed.objects)
        chances += [count / (len(scenes.SHAPES) * len(scenes.COLORS))] * count
    return Score(
        mean=share([verdict.right for verdict in verdicts]),
        size=share([verdict.size for verdict in verdicts]),
        place=share([verdict.place for verdict in verdicts]),
        background=share(grounds),
        chance=float(np.mean(chances)),
        objects=tuple(verdicts),
    )
