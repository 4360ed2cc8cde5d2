"""What a small embedded model is made of: the sizes of its parts, and the scenes it learns.

The stages of training take everything that differs between such models from here. It draws and
trains nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .models import TextConfig, TransformerConfig, VaeConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Sizes:
    """A model has parts of these sizes, and its captions are in these words."""

    vae: VaeConfig
    text: TextConfig
    transformer: TransformerConfig
    words: tuple[str, ...]


class Recipe(ABC):
    """A model is trained so. Scenes are frozen dataclasses that ``dataclasses.asdict`` writes out.

    Attributes
    ----------
    name : str
        The package that holds the model.
    sizes : Sizes
        Of its parts.
    teacher : VaeConfig
        Sizes of the autoencoder of the ``vae`` stage, from which the shipped one learns.
    """

    name: str
    sizes: Sizes
    teacher: VaeConfig

    @abstractmethod
    def start_vae(self) -> AutoencoderKL:
        """This builds the autoencoder that the ``vae`` stage begins with."""

    @abstractmethod
    def vae_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """One step of eight of the ``vae`` stage has these square pictures of one size, in [0, 1]."""

    @abstractmethod
    def compact_pictures(self, rng: np.random.Generator, turn: int, batch: int) -> list[np.ndarray]:
        """One step of eight of the ``compact`` stage has these, likewise."""

    @abstractmethod
    def measure_picture(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """This is one of the pictures whose latents are scaled to unit spread."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, single: float) -> Any:
        """This is a train scene; it has one object with the probability ``single``."""

    @abstractmethod
    def render(self, scene: Any, size: int, rng: np.random.Generator) -> np.ndarray:
        """A scene looks like this, float32 ``[size, size, 3]`` in [0, 1]."""

    @abstractmethod
    def caption(self, scene: Any, rng: np.random.Generator, complete: bool, drop: float) -> str:
        """This words a caption; it leaves out parts with a probability that grows with ``drop``."""

    @abstractmethod
    def read(self, written: dict[str, Any]) -> Any:
        """``dataclasses.asdict`` made this of a scene."""
