"""Measuring the tiny model: pictures of held-out prompts, judged by the rules of ``score.py``.

Samples with the pipeline's own defaults unless told otherwise. It trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .captions import prompts
from .score import Score, score

if TYPE_CHECKING:
    from .pipeline import TinySD3Pipeline


def sample(
    pipeline: TinySD3Pipeline, texts: list[str], seed: int = 0, batch: int = 20, **settings: Any
) -> np.ndarray:
    """This draws pictures ``[n, h, w, 3]`` in [0, 1]; picture ``i`` depends on ``seed + i`` alone.

    Parameters
    ----------
    pipeline : TinySD3Pipeline
        Any pipeline with Stable Diffusion 3's call.
    texts : list of str
        Prompts.
    seed : int
        First seed.
    batch : int
        Prompts sampled together.
    settings
        Passed on to the pipeline: ``height``, ``width``, ``guidance_scale`` and so on.
    """
    parts = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        result = pipeline(prompt=some, generator=generators, output_type="np", **settings)
        parts.append(result.images)
    return np.concatenate(parts)


def evaluate(
    pipeline: TinySD3Pipeline, objects: int, count: int = 100, seed: int = 0, **settings: Any
) -> tuple[Score, np.ndarray]:
    """This scores ``count`` held-out prompts; it also gives the pictures."""
    texts = prompts(count, "test", objects, seed)
    pictures = sample(pipeline, texts, seed=1000 + seed, **settings)
    return score(pictures, texts), pictures


def figures(result: Score, count: int) -> dict[str, float | int]:
    """A score becomes plain rounded numbers for a JSON file."""
    return {
        "prompts": count,
        "objects": len(result.objects),
        "shape_and_color": round(result.mean, 4),
        "size": round(result.size, 4),
        "place": round(result.place, 4),
        "background": round(result.background, 4),
        "chance": round(result.chance, 4),
    }


def save_sheet(pictures: np.ndarray, path: str | Path, columns: int = 8) -> None:
    """This writes pictures side by side into one PNG."""
    from PIL import Image

    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.ones((rows * height, columns * width, 3), dtype=np.float32)
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * height, (index % columns) * width
        sheet[top : top + height, left : left + width] = picture
    Image.fromarray((np.clip(sheet, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)).save(path)
