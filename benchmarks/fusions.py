"""What the fusions around matrix products gain on the GPU at hand, each beside what stock torch runs there.

    python benchmarks/fusions.py [--out FILE]

`project`: FLUX's output projection, by a concatenation or as two products. `gelu`: a product and its GELU, apart or
with the GELU on the way out, at the shapes of feed-forwards. The products alone are the floor of both. `waves`:
microseconds of a product [rows, D] x [D, D] by rows, beside the waves that `align="wave"` counts on.
Without a GPU the same code runs at tiny sizes, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.blocks import products, segments
from fastdit.tokens.waves import Waves, multiprocessors
from machine import describe_machine
from timing import race

#: (name, rows, width), rows of the batch together, and whether FLUX's projection has them
SHAPES = (
    ("FLUX joint", 4608, 3072, True),
    ("FLUX joint, RAS 0.25", 1536, 3072, True),
    ("FLUX joint, 896 active", 1408, 3072, True),
    ("FLUX image", 4096, 3072, False),
    ("SD3 medium image", 8192, 1536, False),
    ("SD3 medium image, RAS 0.25", 2048, 1536, False),
    ("PixArt-Sigma image", 8192, 1152, False),
)
TINY = (("tiny", 24, 64, True), ("tiny, fewer", 16, 64, False))
#: rows of the products of FLUX's single blocks and of SD3's with around a fourth of the tokens active
ROWS = {3072: range(1280, 1793, 64), 1536: range(1792, 2305, 128)}


def measure(device: torch.device, turns: int = 31) -> list[dict[str, Any]]:
    """A row for each comparison."""
    real = device.type == "cuda"
    found = []
    for name, rows, width, projects in SHAPES if real else TINY:
        if projects:
            found.append({"what": "project", "shape": name} | project(rows, width, device, turns))
        found.append({"what": "gelu", "shape": name} | gelu(rows, width, device, turns))
    for width, counts in (ROWS if real else {64: range(16, 33, 16)}).items():
        for rows in counts:
            found.append(
                {"what": "waves", "shape": f"{rows} x {width}"} | waves(rows, width, device, turns)
            )
    return found


def waves(rows: int, width: int, device: torch.device, turns: int) -> dict[str, Any]:
    """A product of as many columns as its input has, and how full its waves are taken to be."""
    x, layer = _random(rows, width, device), _linear(width, width, device)
    fill = Waves(multiprocessors(device) or 1, width, 1, ((1, 0),)).fill(rows)
    return {"fill": fill} | race({"product": lambda i: layer(x)}, 1, device, turns).asdict()


def project(rows: int, width: int, device: torch.device, turns: int) -> dict[str, Any]:
    """FLUX's output projection, from attention and what the GELU is taken of."""
    module, gelu = _linear(5 * width, width, device), nn.GELU(approximate="tanh")
    attention, mlp = _random(rows, width, device), _random(rows, 4 * width, device)
    joint = torch.cat([attention, mlp], dim=2)
    return race(
        {
            "stock": lambda i: segments.project(module, attention, gelu, mlp),
            "two products": lambda i: products.project(module, attention, gelu, mlp),
            "the product alone": lambda i: module(joint),
        },
        1,
        device,
        turns,
    ).asdict()


def gelu(rows: int, width: int, device: torch.device, turns: int) -> dict[str, Any]:
    """The first product of a feed-forward, and the GELU behind it."""
    module, gelu = _linear(width, 4 * width, device), nn.GELU(approximate="tanh")
    x = _random(rows, width, device)
    return race(
        {
            "stock": lambda i: gelu(module(x)),
            "fused": lambda i: products.activated(module, gelu, x),
            "the product alone": lambda i: module(x),
        },
        1,
        device,
        turns,
    ).asdict()


def _linear(width: int, out: int, device: torch.device) -> nn.Linear:
    return nn.Linear(width, out, device=device, dtype=torch.bfloat16).requires_grad_(False)


def _random(rows: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(1, rows, width, device=device, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file to write, beside what is printed")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    found = measure(torch.device("cuda" if gpu else "cpu"), 31 if gpu else 2)
    for row in found:
        fill = f"  {row['fill']:.0%} full" if "fill" in row else ""
        times = ", ".join(f"{name} {us:.1f} us" for name, us in row["us"].items())
        print(f"{row['what']:8} {row['shape']:28} {times}{fill}")
    if arguments.out:
        content = {"machine": describe_machine(), "rehearsal": not gpu, "rows": found}
        arguments.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
