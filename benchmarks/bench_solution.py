"""How far ways of many steps end from the solution, on the models in the package.

    python benchmarks/bench_solution.py [--out FILE] [--pictures 4] [--fine 600]

What errors are measured by (`fastdit/search/solution.py`) has an error of its own. It stands here beside the same with
many more steps, which Euler at as many even levels ends next to: the geometric mean over held-out prompts of the
relative distance of the latents.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdit.evaluate.arms import Arm, prepared
from fastdit.evaluate.metrics import away
from fastdit.search.solution import STEPS
from machine import describe_machine

MODELS = ("tiny", "emoji")


def arms_of(fine: int) -> dict[str, Arm]:
    """Name -> arm; the first is what the others are measured by."""
    even = tuple(np.linspace(1, 1 / fine, fine).tolist())
    return {
        f"{fine} even steps of AB2": Arm("solution", fine),
        f"{fine} even steps of Euler": Arm("euler", fine, sigmas=even),
        f"{STEPS} even steps of AB2": Arm("solution", STEPS),
        f"{STEPS // 2} even steps of AB2": Arm("solution", STEPS // 2),
        f"{STEPS} steps of UniPC": Arm("unipc", STEPS),
        "60 steps of Heun": Arm("heun", 60),
        "28 steps of Euler": Arm("stock", 28),
    }


def measure(model: str, pictures: int, fine: int) -> dict[str, float]:
    """Name of an arm -> its distance."""
    package = importlib.import_module(f"fastdit.{model}")
    pipe = package.load_pipeline()
    texts = [t for n in (1, 2) for t in package.prompts(pictures // 2, "test", n, seed=5)]
    found: dict[str, float] = {}
    truth: Any = None
    for name, arm in arms_of(fine).items():
        generators = [torch.Generator().manual_seed(1000 + i) for i in range(len(texts))]
        with prepared(pipe, arm) as arguments:
            given = {"generator": generators, "output_type": "latent", **arguments}
            latents = pipe(texts, **given).images.double().numpy()
        if truth is None:
            truth = latents
            continue
        found[name] = float(np.exp(np.log(away(latents, truth)).mean()))
        print(model, name, f"{found[name]:.4f}", flush=True)
    return found


def main() -> None:
    """Print the distances, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=4, help="held out, an even number")
    parser.add_argument(
        "--fine", type=int, default=600, help="steps that the others are measured by"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"machine": describe_machine(), "pictures": options.pictures, "fine": options.fine}
    result["models"] = {model: measure(model, options.pictures, options.fine) for model in MODELS}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
