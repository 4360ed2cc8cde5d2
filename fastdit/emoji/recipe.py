"""The recipe of the emoji model: its sizes, its scenes, and crowds for its autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastdit.tiny.models import TextConfig, TransformerConfig, VaeConfig, build_vae
from fastdit.tiny.recipe import Recipe, Sizes

from . import captions, scenes
from .scenes import Scene, SceneObject

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

VAE = VaeConfig(channels=(16, 32, 64, 128), latent_channels=16)
TEXT = TextConfig(max_tokens=captions.MAX_TOKENS)
TRANSFORMER = TransformerConfig(sample_size=16, layers=6, heads=4, head_dim=32)


def start_vae() -> AutoencoderKL:
    """The levels near the pixels begin with the tiny model's weights, which know edges; the others are new."""
    from fastdit import tiny

    given = tiny.load_pipeline().vae.state_dict()
    vae = build_vae(VAE)
    # Its decoder has one level more, at the coarse end, where its count begins.
    moved = {
        name.replace("up_blocks.2", "up_blocks.3"): t
        for name, t in given.items()
        if "up_blocks.2" in name
    }
    moved |= {
        name.replace("up_blocks.1", "up_blocks.2"): t
        for name, t in given.items()
        if "up_blocks.1" in name
    }
    moved |= {name: t for name, t in given.items() if "up_blocks" not in name}
    own = vae.state_dict()
    own |= {n: t for n, t in moved.items() if n in own and own[n].shape == t.shape}
    vae.load_state_dict(own)
    return vae


class Emoji(Recipe):
    """One to three emoji on a coloured ground."""

    name = "emoji"
    sizes = Sizes(VAE, TEXT, TRANSFORMER, captions.VOCABULARY)
    teacher = VAE

    def start_vae(self) -> AutoencoderKL:
        """It is as large as the shipped one, whose decoder later learns to mend latents."""
        return start_vae()

    def vae_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """Of eight steps, five show quarters of scenes at full size, two scenes at half size, and
        one whole scenes (a quarter as many). Most scenes are full of emoji."""
        pictures = []
        for _ in range(max(1, batch // 4) if turn == 7 else batch):
            scene = self.sample(rng, 0.3)
            picture = scenes.render(scene, 64 if turn in (5, 6) else 128, rng)
            if turn < 5:
                x, y = rng.integers(0, 65, size=2)
                picture = picture[y : y + 64, x : x + 64]
            pictures.append(picture)
        return pictures

    def compact_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """The shipped autoencoder goes on with the pictures of the first."""
        return self.vae_pictures(rng, turn, batch)

    def measure_picture(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """One to three emoji take turns, at full size."""
        return scenes.render(scenes.sample_scene(rng, objects=1 + index % 3), 128, rng)

    def sample(self, rng: np.random.Generator, single: float) -> Scene:
        """A train scene has one emoji, or two, or (rarely) three."""
        objects = 1 if rng.random() < single else 2 if rng.random() < 0.85 else 3
        return scenes.sample_scene(rng, objects)

    def render(self, scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
        """Directions of gradients and clouds vary."""
        return scenes.render(scene, size, rng)

    def caption(self, scene: Scene, rng: np.random.Generator, complete: bool, drop: float) -> str:
        """Half of the captions name everything, a quarter the emoji alone."""
        draw = rng.random()
        left_out = 0.0 if complete or draw < 0.5 else 1.0 if draw < 0.75 else drop * 2.0
        return captions.write(scene, rng, left_out)

    def read(self, written: dict[str, Any]) -> Scene:
        """A scene is read back."""
        objects = tuple(SceneObject(**item) for item in written["objects"])
        return Scene(objects, written["color"], written["ground"])


RECIPE = Emoji()
