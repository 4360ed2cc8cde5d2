"""A bank of encoded training scenes, so that the denoiser's training never runs the encoder.

Draws train scenes at half and at full size, encodes them once and keeps latents in
float16 beside the scenes. It does not hold captions: those are worded anew at every use.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fastdit import files
from fastdit.errors import ArgumentError

from .checkpoint import MAX_FILE_BYTES
from .recipe import Recipe
from .shapes import SHAPES_RECIPE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class BankConfig:
    """A bank has so many scenes of each size; ``single`` is the share of one-object scenes."""

    half: int = 24000
    full: int = 6000
    single: float = 0.35
    seed: int = 0


@dataclass(frozen=True)
class Bank:
    """A bank has scaled latents ``[n, c, h, w]`` (float16) with their scenes, by size in pixels."""

    latents: dict[int, torch.Tensor]
    scenes: dict[int, list[Any]]

    @cached_property
    def single(self) -> dict[int, np.ndarray]:
        """The scenes with one object have these indices, by size."""
        return {
            size: np.array([i for i, scene in enumerate(some) if len(scene.objects) == 1])
            for size, some in self.scenes.items()
        }


def draw(
    count: int, size: int, config: BankConfig, recipe: Recipe = SHAPES_RECIPE
) -> tuple[list[Any], np.random.Generator]:
    """This samples ``count`` train scenes; it also gives the generator that draws their jitter."""
    rng = np.random.default_rng((config.seed, 4, size))
    return [recipe.sample(rng, config.single) for _ in range(count)], rng


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Pictures ``[n, h, w, 3]`` in [0, 1] get scaled latents (float32)."""
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2.0 - 1.0
    means = vae.encode(batch).latent_dist.mean
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def build_bank(
    vae: AutoencoderKL,
    config: BankConfig,
    report: Callable[[str], None] = print,
    recipe: Recipe = SHAPES_RECIPE,
) -> Bank:
    """This draws and encodes all scenes of ``config``."""
    vae.eval()
    latents: dict[int, torch.Tensor] = {}
    chosen: dict[int, list[Any]] = {}
    for size, count in ((64, config.half), (128, config.full)):
        chosen[size], rng = draw(count, size, config, recipe)
        parts = []
        for start in range(0, count, 50):
            some = chosen[size][start : start + 50]
            pictures = np.stack([recipe.render(scene, size, rng) for scene in some])
            parts.append(encode(vae, pictures).half())
            if start % 2000 == 0:
                report(f"bank {size} px: {start} of {count}")
        latents[size] = torch.cat(parts)
    return Bank(latents, chosen)


def save_bank(bank: Bank, folder: str | Path) -> None:
    """This writes ``bank.safetensors`` and ``bank.json`` into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not `save_file`, whose files nobody but their owner may read.
    latents = save({str(size): tensor for size, tensor in bank.latents.items()})
    (folder / "bank.safetensors").write_bytes(latents)
    listed = {str(size): [asdict(scene) for scene in some] for size, some in bank.scenes.items()}
    (folder / "bank.json").write_text(json.dumps(listed))


def load_bank(folder: str | Path, recipe: Recipe = SHAPES_RECIPE) -> Bank | None:
    """This reads what :func:`save_bank` wrote, or gives ``None``.

    Raises
    ------
    ArgumentError
        If there is something that cannot be read.
    """
    folder = Path(folder)
    if not (folder / "bank.json").exists():
        return None
    try:
        listed = files.parse(files.read_text(folder / "bank.json", MAX_FILE_BYTES))
        chosen = {
            int(size): [recipe.read(scene) for scene in some] for size, some in listed.items()
        }
        files.check_regular(folder / "bank.safetensors", MAX_FILE_BYTES)
        latents = load_file(str(folder / "bank.safetensors"))
        return Bank({int(size): t for size, t in latents.items()}, chosen)
    # A list where an object belongs, a scene without its background, and so on.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ArgumentError(
            f"{folder} holds no bank that can be read: {type(error).__name__}: {error}"
        ) from error
