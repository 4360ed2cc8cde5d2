"""Matrix products that absorb what stands around them, each beside what is launched without.

GELU in the product's epilogue; FLUX's `proj_out` as two products that add up, without the concatenation before it; a
product by 8-bit floats, alone and with the quantising of its rows; and products of as many rows as RAS leaves active,
whose last wave of a GPU's multiprocessors is full or is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.place import Place
from shapes import ALL, TINY, Shape
from timing import race

WAVES = (1024, 1152, 1280, 1408, 1536, 1664)
SHAPES = ("flux-1024", "sd3-medium-1024")
FP8 = torch.float8_e4m3fn
Calls = dict[str, Callable[[], Tensor]]


def fusions(place: Place) -> None:
    """Rows in microseconds; of the waves also TFLOP/s."""
    shapes = TINY if place.rehearsal else tuple(s for s in ALL if s.name in SHAPES)
    made = {"GELU": gelu, "two products": two_products, "8 bits": eight_bits}
    width = 16 * (place.rehearsal or 192)  # of FLUX
    place.promise([f"{what}, {shape.name}" for shape in shapes for what in made])
    place.promise([f"{rows} rows" for rows in WAVES])
    for shape in shapes:
        for what, make in made.items():
            place.attempt(
                f"{what}, {shape.name}",
                lambda shape=shape, make=make: _raced(place, make(place, shape)),
            )
    for rows in WAVES:
        place.attempt(f"{rows} rows", lambda rows=rows: wave(place, rows, width))


def gelu(place: Place, shape: Shape) -> Calls:
    """A feed-forward's first half: four times as wide, with GELU by tanh."""
    x, weight, bias = _operands(place, shape, 4)

    def apart() -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def epilogue() -> Tensor:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    return {"two launches": apart, "epilogue": epilogue}


def two_products(place: Place, shape: Shape) -> Calls:
    """A single block's last product, of attention beside a feed-forward four times as wide."""
    new = {"device": place.device, "dtype": place.dtype}
    rows, width = shape.batch * shape.tokens, _width(place, shape)
    attended, hidden = torch.randn(rows, width, **new), torch.randn(rows, 4 * width, **new)
    weight, bias = torch.randn(width, 5 * width, **new), torch.randn(width, **new)
    left, right = weight[:, :width].t(), weight[:, width:].t()

    def joined() -> Tensor:
        return F.linear(torch.cat([attended, hidden], dim=1), weight, bias)

    def adding() -> Tensor:
        return torch.addmm(bias, attended, left).addmm_(hidden, right)

    return {"concatenated": joined, "two products": adding}


def eight_bits(place: Place, shape: Shape) -> Calls:
    """A product by weights of 8 bits, a scale for each row of both."""
    x, weight, bias = _operands(place, shape, 4)
    quantised, scale = _quantised(weight)
    rows, row_scale = _quantised(x)

    def product(rows: Tensor, row_scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            rows,
            quantised.t(),
            scale_a=row_scale,
            scale_b=scale.t(),
            bias=bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
        )

    return {
        "bf16": lambda: F.linear(x, weight, bias),
        "8 bits": lambda: product(rows, row_scale),
        "8 bits, quantised by torch": lambda: product(*_quantised(x)),
    }


def wave(place: Place, rows: int, width: int) -> dict[str, Any]:
    """A product of so many rows, as wide as FLUX."""
    new = {"device": place.device, "dtype": place.dtype}
    x, weight = torch.randn(rows, width, **new), torch.randn(width, width, **new)
    row = _raced(place, {"product": lambda: F.linear(x, weight)})
    return row | {"tflop_s": 2 * rows * width**2 / row["us"]["product"] / 1e6}


def _operands(place: Place, shape: Shape, times: int) -> tuple[Tensor, Tensor, Tensor]:
    new = {"device": place.device, "dtype": place.dtype}
    width = _width(place, shape)
    x = torch.randn(shape.batch * shape.tokens, width, **new)
    return x, torch.randn(times * width, width, **new), torch.randn(times * width, **new)


def _width(place: Place, shape: Shape) -> int:
    return 48 if place.rehearsal else shape.width  # of 16, as 8-bit products need


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R, D] as 8-bit floats and a scale for each row, [R, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True).float() / torch.finfo(FP8).max
    return (x / scale).to(FP8), scale


def _raced(place: Place, calls: Calls) -> dict[str, Any]:
    contenders = {name: lambda i, call=call: call() for name, call in calls.items()}
    found = race(contenders, 1, place.device, min(place.turns, 7))
    if not found.seconds:
        raise RuntimeError(str(dict(found.failed)))
    return found.asdict()
