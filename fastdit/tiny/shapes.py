"""The recipe of the tiny model: scenes of flat shapes, and confetti for its autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import captions, scenes
from .models import TEACHER, TextConfig, TransformerConfig, VaeConfig, build_vae
from .recipe import Recipe, Sizes
from .scenes import Scene, SceneObject

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def confetti(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A square picture is crowded with shapes in random places, float32 ``[size, size, 3]``.

    Scenes are mostly background; an autoencoder that sees only scenes is slow to care for
    the colours of what little is on them.
    """
    names = list(scenes.COLORS.values())
    grounds = list(scenes.BACKGROUNDS.values())
    axis = np.arange(size, dtype=np.float32) + 0.5
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = rng.random(3) if rng.random() < 0.3 else grounds[int(rng.integers(4))]
    for _ in range(int(rng.integers(3, 9))):
        shape = scenes.SHAPES[int(rng.integers(len(scenes.SHAPES)))]
        color = rng.random(3) if rng.random() < 0.2 else names[int(rng.integers(len(names)))]
        x, y = rng.uniform(0, size, size=2).astype(np.float32)
        radius = float(rng.uniform(5.0, 20.0))
        distance = scenes.shape_distance(shape, axis[None, :] - x, axis[:, None] - y, radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
        picture = picture * (1.0 - cover) + cover * np.asarray(color, np.float32)
    return picture


class Shapes(Recipe):
    """One or two flat shapes on a plain background."""

    name = "tiny"
    sizes = Sizes(VaeConfig(), TextConfig(), TransformerConfig(), captions.VOCABULARY)
    teacher = TEACHER

    def start_vae(self) -> AutoencoderKL:
        """The larger autoencoder is trained first; the shipped one learns from it."""
        return build_vae(TEACHER)

    def vae_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """Of eight steps, five show confetti, two whole scenes at half size, and one whole scenes
        at full size (a quarter as many)."""
        pictures = []
        for _ in range(max(1, batch // 4) if turn == 7 else batch):
            if turn < 5:
                pictures.append(confetti(rng))
                continue
            scene = scenes.sample_scene(rng, objects=int(rng.integers(1, 3)))
            pictures.append(scenes.render(scene, 128 if turn == 7 else 64, rng))
        return pictures

    def compact_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """Of eight steps, six show whole scenes at half size, one at full size (a quarter as many),
        one confetti."""
        pictures = []
        for _ in range(max(1, batch // 4) if turn == 3 else batch):
            if turn == 7:
                pictures.append(confetti(rng))
                continue
            scene = scenes.sample_scene(rng, objects=1 if rng.random() < 0.2 else 2)
            pictures.append(scenes.render(scene, 128 if turn == 3 else 64, rng))
        return pictures

    def measure_picture(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """One and two shapes take turns, at half size."""
        return scenes.render(scenes.sample_scene(rng, objects=1 + index % 2), 64, rng)

    def sample(self, rng: np.random.Generator, single: float) -> Scene:
        """A train scene has one shape or two."""
        return scenes.sample_scene(rng, 1 if rng.random() < single else 2)

    def render(self, scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
        """Places and radii vary a little."""
        return scenes.render(scene, size, rng)

    def caption(self, scene: Scene, rng: np.random.Generator, complete: bool, drop: float) -> str:
        """Half of the captions name everything, as the prompts of a test split do."""
        left_out = 0.0 if complete or rng.random() < 0.5 else drop * 2.0
        return captions.write(scene, rng, left_out, synonyms=0.04)

    def read(self, written: dict[str, Any]) -> Scene:
        """A scene is read back."""
        objects = tuple(SceneObject(**item) for item in written["objects"])
        return Scene(objects, written["background"])


SHAPES_RECIPE = Shapes()
