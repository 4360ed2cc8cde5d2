"""The emoji that scenes are made of: 24 names in three styles, from two sheets in the package.

A sheet is a PNG with alpha, a column a name and a row a style. ``render_sprites.py`` made them; it
does not know scenes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

#: name in captions -> name in the three sets
NAMES_IN_SETS: dict[str, str] = {
    "cat": "cat-face",
    "dog": "dog-face",
    "fox": "fox",
    "frog": "frog",
    "panda": "panda",
    "penguin": "penguin",
    "fish": "fish",
    "butterfly": "butterfly",
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "mushroom": "mushroom",
    "pizza": "pizza",
    "donut": "doughnut",
    "car": "automobile",
    "rocket": "rocket",
    "boat": "sailboat",
    "house": "house",
    "tree": "evergreen-tree",
    "sunflower": "sunflower",
    "star": "star",
    "heart": "red-heart",
    "umbrella": "umbrella",
    "ghost": "ghost",
}
NAMES: tuple[str, ...] = tuple(NAMES_IN_SETS)
STYLES: tuple[str, ...] = ("noto", "fluent", "twemoji")
SHEETS = Path(__file__).parent / "assets" / "sprites"
SIDES = (80, 48)  # pixels of an emoji in a sheet


@functools.cache
def _sheet(side: int) -> np.ndarray:
    from PIL import Image

    with Image.open(SHEETS / f"{side}.png") as image:
        return np.asarray(image.convert("RGBA"))


@functools.cache
def sprite(name: str, style: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An emoji has colours times cover ``[side, side, 3]`` and cover ``[side, side, 1]``, float32 in [0, 1].

    Other sides than those of the sheets are resized from the larger multiple, or from the largest.
    """
    from PIL import Image

    own = next((known for known in SIDES if known % side == 0), SIDES[0])
    row, column = STYLES.index(style), NAMES.index(name)
    cut = _sheet(own)[row * own : (row + 1) * own, column * own : (column + 1) * own]
    cover = cut[..., 3:].astype(np.float32) / 255.0
    layers = np.concatenate([cut[..., :3].astype(np.float32) / 255.0 * cover, cover], axis=2)
    if own != side:
        layers = np.stack(
            [
                np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BOX))
                if own % side == 0
                else np.asarray(
                    Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC)
                )
                for layer in np.moveaxis(layers, 2, 0)
            ],
            axis=2,
        )
    layers = np.clip(layers, 0.0, 1.0)
    return layers[..., :3], layers[..., 3:]
