"""What `fastdit train-router` trains on: prompts of a file, or some that suit the model, and a scheduler."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fastdit.cli.loading import PROMPTS, Model, calls, draws_classes
from fastdit.cli.search import prompts_of
from fastdit.errors import ArgumentError
from fastdit.schedules.solvers import flow_settings, matches_flows

SCENES = 64  # of the embedded model's training split, with one object and with two


def training_prompts(model: Model, file: Path | None) -> list[Any]:
    """Prompts are texts, or class numbers for a model that draws classes.

    Raises:
        ArgumentError: The file cannot be read, or the model cannot draw one of its lines.
    """
    if file is not None:
        texts = list(prompts_of(file, model.embedded))
    elif model.embedded:
        from fastdit import tiny

        texts = tiny.prompts(SCENES, "train", 1) + tiny.prompts(SCENES, "train", 2)
    elif draws_classes(model.pipeline):
        return list(range(model.pipeline.transformer.config.num_embeds_ada_norm))
    else:
        texts = list(PROMPTS)
    asked = calls(model.pipeline, texts)
    return [call["class_labels"][0] if "class_labels" in call else call["prompt"] for call in asked]


def swap_scheduler(pipeline: Any, name: str) -> None:
    """A pipeline gets another scheduler of diffusers, with what the old one's settings say to it.

    In the place of a flow-matching one, a solver for noise is told to follow flows.

    Raises:
        ArgumentError: diffusers has no such class, or it cannot follow what the model predicts.
    """
    import diffusers

    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not hasattr(scheduler_class, "from_config"):
        raise ArgumentError(
            f"--scheduler must be a scheduler class of diffusers, such as DDIMScheduler, got {name!r}"
        )
    old, settings = pipeline.scheduler, {}
    flow = matches_flows(type(old)) or old.config.get("prediction_type") == "flow_prediction"
    if flow and not matches_flows(scheduler_class):
        settings = flow_settings(old.config)
    accepted = set(inspect.signature(scheduler_class.__init__).parameters)
    if not set(settings) <= accepted or (matches_flows(scheduler_class) and not flow):
        raise ArgumentError(
            f"--scheduler must follow {'flows' if flow else 'noise'}, which this pipeline's model predicts, as "
            f"{type(old).__name__} does, got {name!r}"
        )
    pipeline.scheduler = scheduler_class.from_config(old.config, **settings)
