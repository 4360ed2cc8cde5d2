"""Training of the emoji model: ``python -m fastdit.emoji.train STAGE``, on one core.

What the two embedded models share is in ``fastdit.tiny``; this file only says with which settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdit.tiny.bank import BankConfig
from fastdit.tiny.compact_vae import CompactTraining
from fastdit.tiny.evaluate import sample
from fastdit.tiny.train import Course
from fastdit.tiny.train import main as train
from fastdit.tiny.train_transformer import TransformerTraining
from fastdit.tiny.train_vae import VaeTraining

from . import ASSETS
from .captions import prompts
from .recipe import RECIPE
from .score import Score, score


def figures(result: Score) -> dict[str, float]:
    """A score becomes plain rounded numbers for a JSON file."""
    names = ("mean", "style", "size", "place", "clean", "chance")
    return {name: round(getattr(result, name), 4) for name in names}


def measure(pipeline: Any, count: int, report: Callable[[str], None]) -> dict[str, Any]:
    """These are figures on ``count`` held-out prompts of one, two and three emoji each."""
    measured = {}
    for objects in (1, 2, 3):
        texts = prompts(count, "test", objects, seed=1)
        found = figures(score(sample(pipeline, texts, seed=1000), texts))
        measured[f"objects_{objects}"] = {"prompts": count, **found}
        report(f"{objects} emoji: {found}")
    return measured


COURSE = Course(
    RECIPE,
    VaeTraining(minutes=18.0, batch=8, rate=2e-3, kl=1e-4, consistency=0.1, bfloat16=True),
    CompactTraining(minutes=10.0, batch=8, rate=1e-3, disturbance=0.1, bfloat16=True),
    BankConfig(half=1000, full=16000, single=0.4),
    TransformerTraining(
        minutes=80.0,
        half_share=0.08,
        simple_until=0.3,
        simple_share=0.5,
        half_batch=64,
        full_batch=64,
        time_mean=0.9,
        bfloat16=True,
        log_every=25,
        save_every=100,
    ),
    measure,
    ASSETS,
)


def main(arguments: list[str] | None = None) -> None:
    """This parses ``arguments`` (the process's own if not given) and runs the stage they name."""
    train(arguments, COURSE)


if __name__ == "__main__":
    main()
