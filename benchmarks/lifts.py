"""How near the latents of a half-size picture, enlarged in each of RALU's ways, come to those of the picture itself.

    python benchmarks/lifts.py

A VAE that were the same at both sizes would tell the low half of a fine picture's cosine transform from the coarse one.
Scenes of the model in the package are drawn at both of its sizes and encoded. Errors are relative L2 distances over all
of them: of the latents, of the low half of their cosine transform, and of the decoded pictures from those drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import RALU, tiny
from fastdit.adapters import find_adapter
from fastdit.tiny import scenes
from fastdit.tokens import lift
from machine import describe_machine

COUNT, SEED = 96, 3
RESULT = Path(__file__).parent / "results" / "lifts.json"


def pictures(size: int) -> Tensor:
    """These are scenes [COUNT, 3, size, size], -1 to 1, half of them of two objects, alike at every size."""
    rng = np.random.default_rng(SEED)
    drawn = [scenes.sample_scene(rng, 1 + i % 2) for i in range(COUNT)]
    images = np.stack([scenes.render(scene, size) for scene in drawn])
    return torch.from_numpy(images).float().permute(0, 3, 1, 2) * 2 - 1


def away(found: Tensor, wanted: Tensor) -> float:
    """This is a relative L2 distance."""
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    pipe = tiny.load_pipeline()
    adapter = find_adapter(pipe.transformer)
    large, small = pictures(128), pictures(64)
    fine, coarse = (adapter.encode(some, pipe.vae) for some in (large, small))
    redrawn = F.interpolate(adapter.decode(coarse, pipe.vae), scale_factor=2, mode="bicubic")
    ways = {
        "its own": fine,
        "pixels": coarse.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "spectrum": lift.enlarged(coarse),
        "picture": adapter.encode(redrawn.clamp(-1, 1), pipe.vae),
    }
    height, width = coarse.shape[-2:]

    def low(latents: Tensor) -> Tensor:
        return lift.transformed(latents)[..., :height, :width]

    result = {
        "scenes": COUNT,
        "machine": describe_machine(),
        "new_power": lift.new_power(fine),
        "latest_end": RALU.latest_end(fine),
        "ways": {
            name: {
                "latents": away(latents, fine),
                "low": away(low(latents), low(fine)),
                "pictures": away(adapter.decode(latents, pipe.vae), large),
            }
            for name, latents in ways.items()
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ways"], indent=1), result["latest_end"])


if __name__ == "__main__":
    main()
