"""Scenes of one to three emoji on a coloured ground: what they are, how they are drawn and split.

Everything lies on a grid of 8 x 8 cells, as many as the denoiser has tokens, so that an emoji looks
the same to it wherever it is. Pictures of the emoji come from ``sprites.py``; captions are in
``captions.py``.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from .sprites import NAMES, STYLES, sprite

CELLS = 8  # of a picture, along each side
SIZES: dict[str, int] = {"small": 3, "large": 5}  # cells
COLORS: dict[str, tuple[float, float, float]] = {
    "blue": (0.62, 0.78, 0.95),
    "green": (0.70, 0.88, 0.68),
    "pink": (0.97, 0.76, 0.84),
    "yellow": (0.98, 0.92, 0.66),
    "purple": (0.79, 0.72, 0.93),
    "gray": (0.80, 0.81, 0.83),
}
GROUNDS: tuple[str, ...] = ("background", "gradient", "clouds")
_AXES = ("near", "middle", "far")
PLACES: dict[str, tuple[str, str]] = {  # along x and y
    "center": ("middle", "middle"),
    "left": ("near", "middle"),
    "right": ("far", "middle"),
    "top": ("middle", "near"),
    "bottom": ("middle", "far"),
    "top left": ("near", "near"),
    "top right": ("far", "near"),
    "bottom left": ("near", "far"),
    "bottom right": ("far", "far"),
}
#: the first cell of an emoji along an axis, by its size in cells
STARTS: dict[int, dict[str, int]] = {
    3: {"near": 0, "middle": 2, "far": 5},
    5: {"near": 0, "middle": 1, "far": 3},
}
SPLITS: tuple[str, ...] = ("train", "test")
_TEST_SHARE = 8  # one pair of names in eight is held out, and one single scene in eight


@dataclass(frozen=True)
class SceneObject:
    """An emoji has a name, a style, a size and a place out of ``NAMES``, ``STYLES``, ``SIZES``, ``PLACES``."""

    name: str
    style: str
    size: str
    place: str

    @property
    def box(self) -> tuple[int, int, int]:
        """It has this first column, this first row, and so many cells a side."""
        side = SIZES[self.size]
        x, y = (STARTS[side][axis] for axis in PLACES[self.place])
        return x, y, side


@dataclass(frozen=True)
class Scene:
    """A scene is one to three emoji of different names on a ground of a colour."""

    objects: tuple[SceneObject, ...]
    color: str
    ground: str

    @property
    def split(self) -> str:
        """Two names that are held out together make a scene ``"test"``; a single emoji is by all it is."""
        names = sorted(one.name for one in self.objects)
        keys = [" ".join(pair) for pair in itertools.combinations(names, 2)]
        if not keys:
            (one,) = self.objects
            keys = [" ".join((one.name, one.style, one.size, one.place, self.color, self.ground))]
        return "test" if any(_held_out(key) for key in keys) else "train"


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % _TEST_SHARE == 0


def _choose(rng: np.random.Generator, names: object) -> str:
    options = list(names)  # type: ignore[call-overload]
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, objects: int = 1, split: str = "train") -> Scene:
    """This draws one random scene of a split.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness; the same state gives the same scene.
    objects : int
        1 to 3. Two are never both large and three are small, so that all fit side by side.
    split : str
        ``"train"`` or ``"test"``; a scene belongs to exactly one of them.

    Raises
    ------
    ValueError
        If ``objects`` or ``split`` is not one of the accepted values.
    """
    if objects not in (1, 2, 3):
        raise ValueError(f"objects must be 1, 2 or 3, got {objects!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    while True:
        sizes = ["small"] * objects
        if objects < 3 and rng.random() < 0.7:
            sizes[int(rng.integers(objects))] = "large"
        names = [NAMES[int(i)] for i in rng.choice(len(NAMES), size=objects, replace=False)]
        chosen = tuple(
            SceneObject(name, _choose(rng, STYLES), size, _choose(rng, PLACES))
            for name, size in zip(names, sizes, strict=True)
        )
        if not _apart(chosen):
            continue
        scene = Scene(chosen, _choose(rng, COLORS), _choose(rng, GROUNDS))
        if scene.split == split:
            return scene


def _apart(objects: tuple[SceneObject, ...]) -> bool:
    """This tells whether no emoji has a cell of another's."""
    boxes = [one.box for one in objects]
    return all(
        ax + a <= bx or bx + b <= ax or ay + a <= by or by + b <= ay
        for (ax, ay, a), (bx, by, b) in itertools.combinations(boxes, 2)
    )


def render(scene: Scene, size: int = 128, rng: np.random.Generator | None = None) -> np.ndarray:
    """This draws a scene.

    Parameters
    ----------
    scene : Scene
        What to draw.
    size : int
        Pixels along a side, a multiple of 16.
    rng : numpy.random.Generator, optional
        Chooses the direction of a gradient and the clouds; without it the drawing is always the same.

    Returns
    -------
    numpy.ndarray
        float32, shape ``(size, size, 3)``, values in [0, 1].
    """
    if size % 16:
        raise ValueError(f"size must be a multiple of 16, got {size!r}")
    picture = _ground(scene, size, np.random.default_rng(0) if rng is None else rng)
    cell = size // CELLS
    for one in scene.objects:
        x, y, cells = one.box
        side = cells * cell
        drawn, alpha = sprite(one.name, one.style, side)
        there = picture[y * cell : y * cell + side, x * cell : x * cell + side]
        there[:] = there * (1.0 - alpha) + drawn
    return picture


def _ground(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A ground is plain, falls from light to dark in one of eight directions, or has soft clouds."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = COLORS[scene.color]
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    if scene.ground == "gradient":
        angle = np.pi / 4 * rng.integers(8)
        ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
        picture += 0.32 * ramp[..., None].astype(np.float32)
    elif scene.ground == "clouds":
        picture += 0.09 * _clouds(size, rng)[..., None]
    return np.clip(picture, 0.0, 1.0)


def _clouds(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit spread: cosines of up to two and a half waves a side."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    waves = np.cos(np.pi * np.arange(5)[:, None] * axis[None, :])
    weights = rng.normal(size=(5, 5))
    weights[0, 0] = 0.0
    noise = waves.T @ weights @ waves
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)
