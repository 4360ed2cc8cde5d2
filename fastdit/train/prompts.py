"""What a training draws: its prompts, checked, and the pipeline's arguments for some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.errors import ArgumentError


def check_prompts(prompts: Any) -> list[Any]:
    """These are the prompts as a list.

    Raises:
        ArgumentError: They are not texts alone, class numbers alone, or mappings alone, at least one.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ArgumentError(
            f"prompts must be a sequence of at least one prompt, got {prompts!r:.80}"
        )
    if not any(all(isinstance(p, form) for p in prompts) for form in (str, int, Mapping)):
        raise ArgumentError(
            "prompts must be all texts, all class numbers, or all mappings of pipeline arguments, "
            f"got {sorted({type(prompt).__name__ for prompt in prompts})}"
        )
    return list(prompts)


def arguments_of(prompts: Sequence[Any], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """The pipeline is given these arguments to draw the prompts together.

    Each image has a generator of its own, so what it is made of depends on its own seed alone.
    """
    return {
        **_joined(prompts),
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }


def _joined(prompts: Sequence[Any]) -> dict[str, Any]:
    first = prompts[0]
    if isinstance(first, Mapping):
        return {
            name: torch.cat([prompt[name] for prompt in prompts])
            if isinstance(value, Tensor)
            else value
            for name, value in first.items()
        }
    return {"prompt" if isinstance(first, str) else "class_labels": list(prompts)}
