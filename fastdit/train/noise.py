"""The noise of a training's runs: all of it belongs to the training's seed, and none to the rest of the program.

Each image has a generator for its first latents, which most pipelines hand on to their scheduler. DiTPipeline does not:
its stochastic samplers draw from torch's global generators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


@contextlib.contextmanager
def own_noise(arguments: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """In here the global generators start from a seed of the run's, and afterwards they are as they were before.

    Runs whose first images have the same seed draw the same noise, so the runs of an estimate differ by their caching
    alone. The seed is that image's plus one: from its own the first step would draw the first latents again. Of several
    processes each has images, and so noise, of its own.
    """
    given = arguments["generator"]
    seed = (given[0] if isinstance(given, list) else given).initial_seed() + 1
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.set_rng_state(torch.Generator(gpu).manual_seed(seed).get_state(), gpu)
        yield
