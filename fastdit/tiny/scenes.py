"""Scenes of one or two flat shapes: what they are, how they are drawn, how they are split.

A scene is a set of attributes (shape, colour, size and place of each object, and a
background). This file samples scenes, draws them anti-aliased with numpy and decides by a
stable hash of the attributes which scenes are held out. It does not deal with captions
(``captions.py``) and does not judge pictures (``score.py``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.16, 0.32, 0.88),
    "yellow": (0.97, 0.86, 0.12),
    "purple": (0.56, 0.20, 0.72),
    "orange": (0.97, 0.51, 0.10),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "gray": (0.58, 0.58, 0.58),
    "black": (0.07, 0.07, 0.07),
    "tan": (0.83, 0.72, 0.56),
}
SIZES: dict[str, float] = {"small": 0.105, "large": 0.17}  # radius, in units of the shorter side
_NEAR, _MIDDLE, _FAR = 0.21, 0.5, 0.79
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y) as fractions of width and height
    "center": (_MIDDLE, _MIDDLE),
    "left": (_NEAR, _MIDDLE),
    "right": (_FAR, _MIDDLE),
    "top": (_MIDDLE, _NEAR),
    "bottom": (_MIDDLE, _FAR),
    "top left": (_NEAR, _NEAR),
    "top right": (_FAR, _NEAR),
    "bottom left": (_NEAR, _FAR),
    "bottom right": (_FAR, _FAR),
}
SPLITS: tuple[str, ...] = ("train", "test")
_TEST_SHARE = 8  # one scene in eight is held out
_REACH = 1.28  # how far the longest shape, drawn largest, extends, in radii
_MARGIN = 0.02  # what two centres may move towards each other


@dataclass(frozen=True)
class SceneObject:
    """An object has names out of ``SHAPES``, ``COLORS``, ``SIZES`` and ``PLACES``."""

    shape: str
    color: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A scene is one or two objects on a background named in ``BACKGROUNDS``."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def key(self) -> str:
        """Canonical attributes become text; the order of the objects does not matter."""
        parts = sorted(f"{o.shape},{o.color},{o.size},{o.place}" for o in self.objects)
        return "|".join([*parts, self.background])

    @property
    def split(self) -> str:
        """The held-out eighth of all scenes is ``"test"``, the others are ``"train"``."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def _choose(rng: np.random.Generator, names: object) -> str:
    options = list(names)  # type: ignore[call-overload]
    return options[int(rng.integers(len(options)))]


def _sample_object(rng: np.random.Generator) -> SceneObject:
    return SceneObject(
        shape=_choose(rng, SHAPES),
        color=_choose(rng, COLORS),
        size=_choose(rng, SIZES),
        place=_choose(rng, PLACES),
    )


def _compatible(first: SceneObject, second: SceneObject) -> bool:
    """This tells whether two objects differ in look and keep clear of each other."""
    if (first.shape, first.color) == (second.shape, second.color):
        return False
    (ax, ay), (bx, by) = PLACES[first.place], PLACES[second.place]
    distance = float(np.hypot(ax - bx, ay - by))
    return distance >= _REACH * (SIZES[first.size] + SIZES[second.size]) + _MARGIN


def check_split(split: str) -> None:
    """This raises ``ValueError`` unless ``split`` names a known split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def check_objects(objects: int) -> None:
    """This raises ``ValueError`` unless ``objects`` is a supported number of objects."""
    if objects not in (1, 2):
        raise ValueError(f"objects must be 1 or 2, got {objects!r}")


def sample_scene(rng: np.random.Generator, objects: int = 1, split: str = "train") -> Scene:
    """This draws one random scene of a split.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness; the same state gives the same scene.
    objects : int
        1 or 2. Two objects never overlap and never share both shape and colour.
    split : str
        ``"train"`` or ``"test"``; a scene belongs to exactly one of them.

    Raises
    ------
    ValueError
        If ``objects`` or ``split`` is not one of the accepted values.
    """
    check_objects(objects)
    check_split(split)
    while True:
        chosen = tuple(_sample_object(rng) for _ in range(objects))
        if objects == 2 and not _compatible(*chosen):
            continue
        scene = Scene(objects=chosen, background=_choose(rng, BACKGROUNDS))
        if scene.split == split:
            return scene


def shape_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """This is the signed distance (negative inside) from points to the outline of a shape at the origin.

    Parameters
    ----------
    shape : str
        One of ``SHAPES``.
    dx, dy : numpy.ndarray
        Coordinates relative to the centre, y pointing down, any common shape.
    radius : float
        Radius of the circle; other shapes are scaled to a similar area.
    """
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.9 * radius
    if shape == "diamond":
        return (ax + ay - 1.22 * radius) / np.sqrt(2.0)
    if shape == "cross":
        long, short = 1.08 * radius, 0.38 * radius
        return np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
    if shape == "triangle":
        # Upright and equilateral: two slanted sides and a floor, centred on its bounding box.
        half_height = 1.05 * radius
        slope = np.sqrt(3.0)
        slanted = (slope * ax - (dy + half_height)) / 2.0
        return np.maximum(slanted, dy - half_height)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """This normalises ``size`` to ``(height, width)``."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 16 or width < 16:
        raise ValueError(f"size must be at least 16 pixels on both sides, got {size!r}")
    return height, width


def render(
    scene: Scene, size: int | tuple[int, int] = 128, rng: np.random.Generator | None = None
) -> np.ndarray:
    """This draws a scene.

    Parameters
    ----------
    scene : Scene
        What to draw.
    size : int or tuple of int
        Pixels: one number for a square picture, or ``(height, width)``.
    rng : numpy.random.Generator, optional
        If given, centres and radii vary a little; without it the drawing is exact.

    Returns
    -------
    numpy.ndarray
        float32, shape ``(height, width, 3)``, values in [0, 1].
    """
    height, width = image_size(size)
    side = min(height, width)
    rows = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    columns = (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        x, y = PLACES[item.place]
        scale = 1.0
        if rng is not None:
            x, y = np.array([x, y]) + rng.uniform(-0.01, 0.01, size=2)
            scale = rng.uniform(0.95, 1.05)
        distance = shape_distance(
            item.shape, columns - x * width, rows - y * height, SIZES[item.size] * scale * side
        )
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
        picture = picture * (1.0 - cover) + cover * np.asarray(COLORS[item.color], np.float32)
    return picture
