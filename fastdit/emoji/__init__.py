"""A second small model: it draws one to three emoji on a coloured ground.

A Stable Diffusion 3 pipeline of stock diffusers classes, like ``fastdit.tiny``, with whose stages
it was trained. Its captions may be terse ("a cat"), which many pictures fit, so its trajectories
curve as those of large models do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdit import tiny

from .captions import prompts
from .score import ObjectScore, Score, score

if TYPE_CHECKING:
    import torch

    from fastdit.tiny.pipeline import TinySD3Pipeline

__all__ = ["ObjectScore", "Score", "assets_path", "load_pipeline", "prompts", "score"]

ASSETS = Path(__file__).parent / "assets"


def assets_path() -> Path:
    """The shipped model is in this folder, in the layout of ``DiffusionPipeline.save_pretrained``."""
    return ASSETS


def load_pipeline(
    folder: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    progress_bar: bool = False,
) -> TinySD3Pipeline:
    """This loads the emoji model from a folder: no network, no code execution.

    Parameters
    ----------
    folder : str or Path, optional
        What ``export`` wrote; the package's own folder if not given.
    torch_dtype : torch.dtype, optional
        Type of the weights in memory; float32 if not given (files hold float16).
    progress_bar : bool
        Whether the pipeline shows diffusers' progress bar while it samples.

    Returns
    -------
    TinySD3Pipeline
        On the CPU. Its defaults are 128 x 128 pixels and 28 steps.

    Raises
    ------
    FileNotFoundError
        If the folder holds no weights.
    DependencyError
        If transformers, of the extra "cli", is not installed.
    """
    folder = ASSETS if folder is None else Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no weights of the emoji model: python -m fastdit.emoji.train all makes them"
        )
    return tiny.load_pipeline(folder, torch_dtype, progress_bar)
