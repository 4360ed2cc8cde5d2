"""Latents of 16 channels to tokens of two sizes and back, against torch's gather and pixel shuffle.

Bytes that must move: to tokens, the tokens read and written; back, the tokens read and the latents
written.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected
from tiling import CHANNELS, PATCH, WIDTH, draw, field_of, read, tiling


@pytest.mark.parametrize("contender", ["fastdit", "eager"])
@pytest.mark.parametrize("way", ["to tokens", "to latents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_patchify(measure, shape, dtype, way, contender):
    tiles = tiling(shape)
    size = (shape.batch, CHANNELS, PATCH * tiles.side, PATCH * tiles.side)
    latents = torch.randn(size, dtype=dtype)
    field, table = field_of(latents), tiles.table
    tokens = torch.randn(*table.shape[:2], WIDTH, dtype=dtype)
    functions = {
        ("to tokens", "fastdit"): lambda: ops.patchify(field, table, out=tokens),
        ("to tokens", "eager"): lambda: read(latents, tiles),
        ("to latents", "fastdit"): lambda: ops.unpatchify(tokens, table, field),
        ("to latents", "eager"): lambda: draw(tokens, tiles),
    }
    moved = tokens.nbytes + (tokens if way == "to tokens" else latents).nbytes
    case = {"shape": shape.name, "size": size, "dtype": str(dtype), "way": way}
    measure(functions[way, contender], moved, case, contender)
