"""The embedded default: a small trained text-to-image model, its data and its judge.

A Stable Diffusion 3 pipeline of stock diffusers classes that draws one or two flat shapes
from a prompt, trained by this package on scenes drawn by this package, and shipped in it.
Importing this is cheap: diffusers and transformers load with the first pipeline. It does
not know any acceleration method.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdit.errors import DependencyError

from . import captions, scenes
from .captions import prompts
from .score import ObjectScore, Score, score

if TYPE_CHECKING:
    import torch

    from .pipeline import TinySD3Pipeline

__all__ = [
    "ObjectScore",
    "Score",
    "assets_path",
    "captions",
    "load_pipeline",
    "prompts",
    "scenes",
    "score",
]


def assets_path() -> Path:
    """The shipped model is in this folder, in the layout of ``DiffusionPipeline.save_pretrained``."""
    return Path(__file__).parent / "assets"


def load_pipeline(
    folder: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    progress_bar: bool = False,
) -> TinySD3Pipeline:
    """This loads the tiny model, from the package alone: no network, no code execution.

    Parameters
    ----------
    folder : str or Path, optional
        A saved pipeline; the shipped one if not given.
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
        If ``folder`` holds no saved pipeline.
    ArgumentError
        If loading ``folder`` would run code of it.
    DependencyError
        If transformers, of the extra "cli", is not installed.
    """
    import torch

    try:
        import transformers
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the model in the package needs transformers, which is not installed: "
            "pip install fastdit[cli]"
        ) from error

    # diffusers pulls in picture processors that this model does not use, and transformers
    # would warn that their optional packages are missing.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        from .pipeline import load_pipeline as load
    finally:
        transformers.logging.set_verbosity(verbosity)
    return load(folder, torch_dtype or torch.float32, progress_bar)
