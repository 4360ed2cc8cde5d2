"""The run that is asked about: its steps, its size, and which of its steps a transformer does."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdit.checks import is_whole
from fastdit.errors import ArgumentError
from fastdit.runtime.owners import TRANSFORMERS
from fastdit.schedules.schedule_file import MAX_COUNT

MAX_SIZE = 1 << 16  # of batch, height, width and frames


@dataclass(frozen=True)
class Asked:
    """The run that is asked about has the arguments of :meth:`fastdit.Handle.explain`.

    Raises:
        ArgumentError: A size is not positive.
    """

    height: int | None = None
    width: int | None = None
    batch: int = 1
    steps: int | None = None
    cfg: bool | None = None
    text_tokens: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "height", "width", "frames"):
            value, most = getattr(self, name), MAX_COUNT if name == "steps" else MAX_SIZE
            if value is not None and not (is_whole(value) and 1 <= value <= most):
                raise ArgumentError(f"{name} must be an int from 1 to {most}, got {value!r}")


def default_of(pipeline: Any | None, name: str) -> int | None:
    """The whole number that a pipeline's call takes for an argument that it is not given."""
    given = {} if pipeline is None else inspect.signature(type(pipeline).__call__).parameters
    default = getattr(given.get(name), "default", None)
    return default if isinstance(default, int) else None


def latent_size(transformer: nn.Module, pipeline: Any | None, asked: Asked) -> tuple[int, ...]:
    """Latent height and width, of a video's pipeline with the frames first.

    FLUX has its default size in the pipeline, those of videos in its call, others in the transformer.
    """
    scale = (
        _scale(pipeline, "vae_scale_factor vae_scale_factor_spatial vae_spatial_compression_ratio")
        or 8
    )
    sample = (
        getattr(transformer.config, "sample_size", None)
        or getattr(pipeline, "default_sample_size", None)
        or 128
    )
    sides = []
    for name in ("height", "width"):
        pixels = getattr(asked, name) or default_of(pipeline, name)
        sides.append(pixels // scale if pixels else sample)
    frames = asked.frames or default_of(pipeline, "num_frames")
    scale = _scale(pipeline, "vae_scale_factor_temporal vae_temporal_compression_ratio")
    if frames and scale:
        return (frames - 1) // scale + 1, *sides
    if asked.frames:
        name = type(transformer if pipeline is None else pipeline).__name__
        raise ArgumentError(
            f"frames must be None for {name}, which is no pipeline of videos, got {frames}"
        )
    return tuple(sides)


def _scale(pipeline: Any | None, names: str) -> int | None:
    """How many of a picture's pixels or a video's frames are one of the latents."""
    return next(filter(None, (getattr(pipeline, name, None) for name in names.split())), None)


def turn_of(
    transformer: nn.Module, pipeline: Any | None, timesteps: Any, steps: int
) -> tuple[int, int]:
    """A transformer runs from this step to before that: of two the second does those below the pipeline's boundary."""
    found = [getattr(pipeline, name, None) for name in TRANSFORMERS]
    if None in found:
        return 0, steps
    ratio = getattr(pipeline.config, "boundary_ratio", None)
    least = 0 if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
    first = sum(timestep >= least for timestep in timesteps.of(steps))
    second = getattr(found[1], "_orig_mod", found[1]) is transformer
    return (first, steps) if second else (0, first)
