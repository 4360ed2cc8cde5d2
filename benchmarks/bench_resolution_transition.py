"""The transition to the whole grid, 0.3 of a coarse grid being split already, against torch.

Bytes that must move: the tokens read, the noise (fp32) read, the whole grid written. Both take the
noise as given.
"""

from __future__ import annotations

import pytest
import torch

from fastdit import ops
from shapes import selected
from tiling import NUMBERS, WIDTH, finish, tiling


@pytest.mark.parametrize("contender", ["fastdit", "fastdit allocating", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", selected(), ids=lambda s: s.name)
def bench_resolution_transition(measure, shape, dtype, contender):
    tiles = tiling(shape)
    x = torch.randn(*tiles.table.shape[:2], WIDTH, dtype=dtype)
    noise = torch.randn(shape.batch, tiles.side**2, WIDTH)
    out = torch.empty(noise.shape, dtype=dtype)
    out_table = tiles.table.new_empty((*out.shape[:2], 3))
    given = (x, tiles.table, tiles.rows, noise)
    options = NUMBERS | {"raster": tiles.side}
    written = {"out": out, "out_table": out_table}
    functions = {
        "fastdit": lambda: ops.resolution_transition(*given, **options, **written),
        "fastdit allocating": lambda: ops.resolution_transition(*given, **options),
        "eager": lambda: finish(x, noise, tiles),
    }
    case = {"shape": shape.name, "size": list(out.shape), "dtype": str(dtype)}
    measure(functions[contender], x.nbytes + noise.nbytes + out.nbytes, case, contender)
