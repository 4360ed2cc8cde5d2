"""What `fastdit train-router` trains on: prompts of a file, or some that suit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdit.cli.loading import PROMPTS, Model, calls, draws_classes
from fastdit.cli.search import prompts_of

SCENES = 64  # of the embedded model's training split, with one object and with two


def training_prompts(model: Model, file: Path | None) -> list[Any]:
    """Prompts are texts, or class numbers for a model that draws classes.

    Raises:
        ArgumentError: The file cannot be read, or the model cannot draw one of its lines.
    """
    if file is not None:
        texts = list(prompts_of(file, model.package is not None))
    elif model.package is not None:
        from fastdit import tiny

        texts = tiny.prompts(SCENES, "train", 1) + tiny.prompts(SCENES, "train", 2)
    elif draws_classes(model.pipeline):
        return list(range(model.pipeline.transformer.config.num_embeds_ada_norm))
    else:
        texts = list(PROMPTS)
    asked = calls(model.pipeline, texts)
    return [call["class_labels"][0] if "class_labels" in call else call["prompt"] for call in asked]
