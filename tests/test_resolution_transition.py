"""resolution_transition on every backend, against the same in loops over tokens, and its covariance.

Each `check_*` takes a Runner and raises where the backend is wrong.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from inputs import (
    Guarded,
    Runner,
    Untouched,
    generator,
    misaligned,
    normal,
    padded_rows,
    some_rows,
    unwritten,
)
from tolerance import Mismatch, assert_close, assert_equal

OPTIONS = {"scale": 0.1798, "deviation": 0.9461, "correlation": 0.0177}

# Height and width of the coarse grid, C, tokens to split.
SIZES = ((1, 1, 1, 1), (2, 2, 64, 1), (3, 5, 7, 6), (2, 3, 72, 0), (1, 5, 130, 5), (2, 4, 511, 3))


def coarse(batch: int, height: int, width: int, level: int = 1) -> Tensor:
    """int32 [B, n, 3]: a grid of tokens of one level, in raster order."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([torch.full_like(y, level), y << level, x << level], dim=-1)
    return cells.flatten(0, 1).to(torch.int32).expand(batch, -1, -1)


def layout(table: Tensor, rows: Tensor, raster: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token that comes out: the one it was, its siblings' rows (its own, four times, where
    it was not split), and its place."""
    batch, out = len(table), table.shape[1] + 3 * rows.shape[1]
    parents = torch.zeros(batch, out, dtype=torch.int64)
    siblings = torch.zeros(batch, out, 4, dtype=torch.int64)
    places = torch.zeros(batch, out, 3, dtype=torch.int32)
    for b, (tokens, split) in enumerate(zip(table.tolist(), rows.tolist(), strict=True)):
        groups = [(i, [tokens[i]]) for i in range(len(tokens)) if i not in split]
        for i in split:
            level, y, x = tokens[i]
            half = 2 ** (level - 1)
            corners = [(y + r, x + q) for r in (0, half) for q in (0, half)]
            groups.append((i, [[level - 1, *corner] for corner in corners]))
        compact = 0
        for i, children in groups:
            at = []
            for _, y, x in children:
                at.append(compact if raster is None else y * raster + x)
                compact += 1
            for row, child in zip(at, children, strict=True):
                parents[b, row] = i
                siblings[b, row] = torch.tensor(at * (4 // len(at)))
                places[b, row] = torch.tensor(child)
    return parents, siblings, places


def mixed(x, noise, parents, siblings, scale, deviation, correlation, unsplit, pixelwise=False):
    """In the dtype of x."""
    width = x.shape[-1]
    value = x.gather(1, parents[..., None].expand(-1, -1, width))
    is_split = siblings[..., :1] != siblings[..., 1:2]
    if pixelwise:
        for b, row in is_split[..., 0].nonzero().tolist():
            child = siblings[b, row].tolist().index(row)
            for first in range(0, width, 4):
                value[b, row, first : first + 4] = value[b, row, first + child].clone()
        pixels = [noise[..., k::4].repeat_interleave(4, dim=-1) for k in range(4)]
        mean = (pixels[0] + pixels[1] + pixels[2] + pixels[3]) / 4
    else:
        family = [noise.gather(1, siblings[..., k, None].expand(-1, -1, width)) for k in range(4)]
        mean = (family[0] + family[1] + family[2] + family[3]) / 4
    together = noise + (math.sqrt(1 - 4 * correlation) - 1) * mean
    return scale * value + deviation * torch.where(is_split, together, unsplit * noise)


def compare(
    run: Runner,
    what: str,
    x,
    table,
    rows,
    noise,
    *,
    raster=None,
    unsplit=None,
    pixelwise=False,
    **numbers,
):
    """Calls the backend and compares all that it wrote. Returns that."""
    numbers = OPTIONS | numbers
    out, out_table = run.resolution_transition(
        x, table, rows, noise, **numbers, raster=raster, unsplit=unsplit, pixelwise=pixelwise
    )
    parents, siblings, places = layout(table, rows, raster)
    what = f"resolution_transition on {run.label}, {what}"
    assert_equal(f"{what}, table", out_table, places)
    if unsplit is None:
        unsplit = math.sqrt(1 - numbers["correlation"])
    wide = torch.promote_types(x.dtype, torch.float32)
    numbers |= {"unsplit": unsplit, "pixelwise": pixelwise}
    exact = mixed(x.double(), noise.double(), parents, siblings, **numbers)
    eager = mixed(x.to(wide), noise.to(wide), parents, siblings, **numbers)
    assert_close(what, out, exact, eager.to(x.dtype))
    return out, out_table


def inputs(batch: int, height: int, width: int, channels: int, split: int, dtype, *key: int):
    """x, table, rows, noise of the first transition."""
    g = generator(*key)
    tokens = height * width
    x = normal((batch, tokens, channels), dtype, g)
    rows = some_rows(batch, split, tokens, g, (torch.int32, torch.int64)[split % 2])
    noise = normal((batch, tokens + 3 * split, channels), torch.float32, g)
    return x, coarse(batch, height, width), rows, noise


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for case, (height, width, channels, split) in enumerate(SIZES):
            given = inputs(1 + case % 2, height, width, channels, split, dtype, 1, case)
            compare(run, f"{height} x {width}, {split} split", *given)


def check_pixelwise(run: Runner) -> None:
    """Children that are pixels of their parent: both orders, widths beyond a tile, both transitions."""
    for dtype in run.dtypes():
        for case, (height, width, channels, split) in enumerate(
            (
                (1, 1, 4, 1),
                (2, 2, 64, 1),
                (3, 5, 12, 6),
                (2, 3, 72, 0),
                (1, 5, 132, 5),
                (2, 4, 516, 3),
            )
        ):
            given = inputs(1 + case % 2, height, width, channels, split, dtype, 13, case)
            what = f"pixelwise, {height} x {width}, {split} split"
            x, table = compare(run, what, *given, pixelwise=True)
            left = height * width - split
            rows = torch.arange(left).expand(len(x), left)
            noise = normal((len(x), 4 * height * width, channels), torch.float32, generator(13))
            raster = 2 * width
            compare(run, f"{what}, then all", x, table, rows, noise, raster=raster, pixelwise=True)


def check_a_picture_twice_as_large(run: Runner) -> None:
    """Pixelwise and without noise, splitting all tokens is drawing the picture twice as large."""
    for dtype in run.dtypes():
        picture = normal((2, 3, 4, 6), dtype, generator(14))
        x = picture.unflatten(2, (2, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 1, 3, 5)
        x = x.flatten(3).flatten(1, 2)
        out, _ = run.resolution_transition(
            x,
            coarse(2, 2, 3),
            torch.arange(6).expand(2, -1),
            torch.ones(2, 24, 12),
            scale=1.0,
            deviation=0.0,
            correlation=0.25,
            pixelwise=True,
            raster=6,
        )
        drawn = out.unflatten(1, (4, 6)).unflatten(3, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        large = picture.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert_equal(
            f"resolution_transition on {run.label}, larger", drawn.flatten(4).flatten(2, 3), large
        )


def check_both_transitions(run: Runner) -> None:
    """What the first leaves coarse is split by the second, which ends in raster order."""
    for dtype in run.dtypes():
        for height, width, channels, split in ((2, 3, 16, 2), (1, 4, 64, 4), (2, 2, 9, 0)):
            x, table, rows, noise = inputs(2, height, width, channels, split, dtype, 2, split)
            x, table = compare(run, "first", x, table, rows, noise)
            left = height * width - split
            rows = torch.arange(left).expand(2, left)
            noise = normal((2, 4 * height * width, channels), torch.float32, generator(2))
            raster = 2 * width
            _, table = compare(run, "second", x, table, rows, noise, raster=raster)
            whole = coarse(2, 2 * height, raster, level=0)
            assert_equal(f"resolution_transition on {run.label}, raster", table, whole)


def check_a_published_vector(run: Runner) -> None:
    """2 x 2 tokens, the last one split, then the others: parents and places by hand."""
    for dtype in run.dtypes():
        x = torch.arange(1, 5).view(1, 4, 1).to(dtype)
        options = {"scale": 1.0, "deviation": 0.0, "correlation": 0.25}
        rows = torch.tensor([[3]])
        x, table = run.resolution_transition(
            x, coarse(1, 2, 2), rows, torch.ones(1, 7, 1), **options
        )
        assert x.flatten().tolist() == [1, 2, 3, 4, 4, 4, 4]
        ids = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1.5), (1.5, 1), (1.5, 1.5)]
        assert [(y / 2, x / 2) for _, y, x in table[0].tolist()] == ids
        rows = torch.tensor([[0, 1, 2]])
        x, table = run.resolution_transition(
            x, table, rows, torch.ones(1, 16, 1), **options, raster=4
        )
        expected = [1 + 2 * (row // 2) + column // 2 for row in range(4) for column in range(4)]
        assert x.flatten().tolist() == expected
        cells = [[0, row, column] for row in range(4) for column in range(4)]
        assert table[0].tolist() == cells


def check_larger_tokens(run: Runner) -> None:
    """Of level 3, and of levels that are mixed already; in any order."""
    for dtype in run.dtypes():
        table = torch.tensor([[2, 4, 0], [0, 3, 1], [3, 8, 8], [1, 2, 2], [1, 0, 0]])
        table = table.to(torch.int32).expand(2, -1, -1)
        x = normal((2, 5, 24), dtype, generator(3))
        rows = torch.tensor([[0, 2], [3, 4]])
        compare(run, "levels", x, table, rows, normal((2, 11, 24), torch.float32, generator(4)))


def check_numbers(run: Runner) -> None:
    """Every number by itself; the deviation of what is not split as it is given."""
    for dtype in run.dtypes():
        given = inputs(1, 2, 3, 40, 3, dtype, 5)
        for numbers in (
            {"scale": 0.0},
            {"deviation": 0.0},
            {"correlation": 0.0},
            {"correlation": 0.25},
            {"unsplit": 1.0},
            {"unsplit": 0.0, "scale": -3.0},
        ):
            compare(run, str(numbers), *given, **numbers)


def check_covariance(run: Runner) -> None:
    """Noise in one sibling after the other gives the columns of the root of I - c J."""
    for c in (Fraction(1, 4), Fraction(1, 16), Fraction(0)):
        for dtype in run.dtypes()[:1]:
            x = torch.zeros(1, 1, 4, dtype=dtype)
            root, _ = run.resolution_transition(
                x,
                coarse(1, 1, 1),
                torch.tensor([[0]]),
                torch.eye(4)[None],
                scale=0.0,
                deviation=1.0,
                correlation=float(c),
            )
            found = root[0].double() @ root[0].double().T
            error = (found - torch.eye(4, dtype=torch.float64) + float(c)).abs().max().item()
            if error > 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps):
                raise Mismatch(f"covariance on {run.label}, c {c}: off by {error}")


def check_layouts(run: Runner) -> None:
    """x, noise and rows within wider tensors, misaligned, and written into wider ones."""
    for dtype in run.dtypes():
        x, table, rows, noise = inputs(2, 2, 4, 20, 5, dtype, 6)
        expected, places = compare(run, "plain", x, table, rows, noise)
        wide = torch.zeros(2, 9, dtype=rows.dtype)
        wide[:, 2:7] = rows
        tables = unwritten((2, 10, 5))
        tables[:, 1:9, 1:4] = table
        for name, given in {
            "padded": (padded_rows(x), tables[:, 1:9, 1:4], wide[:, 2:7], padded_rows(noise)),
            "misaligned": (misaligned(x), table, misaligned(rows), misaligned(noise)),
        }.items():
            out = padded_rows(torch.zeros_like(expected))
            out_table = unwritten((2, 25, 4))[:, 1:24, 1:]
            run.resolution_transition(*given, **OPTIONS, out=out, out_table=out_table)
            what = f"resolution_transition on {run.label}, {name}"
            assert_equal(what, out, expected)
            assert_equal(f"{what}, table", out_table, places)


def check_special_values(run: Runner) -> None:
    """NaN and infinity stay in the channel of the token, and of its children, that they are in."""
    for dtype in run.dtypes():
        x, table, rows, noise = inputs(1, 3, 3, 33, 4, dtype, 7)
        split, staying = int(rows[0, 1]), next(i for i in range(9) if i not in rows[0].tolist())
        x[0, split, 3], x[0, staying, 4] = float("nan"), float("inf")
        noise[0, 6, 32] = float("-inf")
        compare(run, "NaN and infinity", x, table, rows, noise)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for raster in (None, 6):
            split = 4 if raster is None else 6
            x, table, rows, noise = inputs(2, 2, 3, 11, split, dtype, 8)
            written = [Guarded(noise.to(dtype)), Guarded(unwritten((2, 6 + 3 * split, 3)))]
            untouched = Untouched(x=x, table=table.clone(), rows=rows, noise=noise)
            untouched = Untouched(**untouched.tensors)
            out, out_table = (guarded.tensor for guarded in written)
            given = (x, untouched.tensors["table"], rows, noise)
            run.resolution_transition(
                *given, **OPTIONS, raster=raster, out=out, out_table=out_table
            )
            untouched.check(f"resolution_transition on {run.label}")
            for guarded in written:
                guarded.assert_intact(f"resolution_transition on {run.label}")


def check_repeats_and_threads(run: Runner) -> None:
    dtype = run.dtypes()[-1]
    given = inputs(2, 12, 12, 130, 60, dtype, 9)
    first = run.resolution_transition(*given, **OPTIONS)
    threads = torch.get_num_threads()
    try:
        for i in range(4):
            torch.set_num_threads(1 + i % 2)
            again = run.resolution_transition(*given, **OPTIONS)
            for a, b in zip(again, first, strict=True):
                assert_equal(f"resolution_transition on {run.label}, repeat {i}", a, b)
    finally:
        torch.set_num_threads(threads)


def check_samples_are_apart(run: Runner) -> None:
    """Each image has rows of its own."""
    for dtype in run.dtypes():
        x, table, rows, noise = inputs(3, 2, 3, 12, 3, dtype, 10)
        out, places = run.resolution_transition(x, table, rows, noise, **OPTIONS)
        if torch.equal(places[0], places[1]):
            raise Mismatch("the samples are not told apart")
        for b in range(3):
            one = slice(b, b + 1)
            alone = run.resolution_transition(x[one], table[one], rows[one], noise[one], **OPTIONS)
            assert_equal(f"resolution_transition on {run.label}, {b} alone", alone[0], out[one])
            assert_equal(f"resolution_transition on {run.label}, {b}", alone[1], places[one])


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        x, table, rows, noise = inputs(2, 2, 2, 4, 1, dtype, 11)
        out, places = run.resolution_transition(x[:0], table[:0], rows[:0], noise[:0], **OPTIONS)
        assert (out.shape, places.shape) == ((0, 7, 4), (0, 7, 3))


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_resolution_transition(check, runner):
    check(runner)


def test_the_noise_after_a_transition_is_white():
    """Monte Carlo. Copies share noise of deviation 1 - e; scaled and mixed, with c, e and the rest
    as published for five times fewer steps, it is white and of deviation 1 - s. Bounds are five
    standard errors of a (co)variance."""
    from fastdit.ops import resolution_transition

    e, c = 0.3, 0.0177
    delta = (1 - e) / math.sqrt(c)
    scale, deviation = 1 / (delta + e), delta / (delta + e)
    assert (round(scale, 3), round(deviation, 3)) == (0.180, 0.946)
    assert scale * (1 - e) == pytest.approx(deviation * math.sqrt(c))
    g, count, channels = generator(12), 4000, 64
    x = (1 - e) * torch.randn(1, count, channels, generator=g)
    rows = torch.arange(count // 2).unsqueeze(0)
    table = coarse(1, 1, count)
    noise = torch.randn(1, count + 3 * (count // 2), channels, generator=g)
    numbers = {"scale": scale, "deviation": deviation, "correlation": c}
    out, _ = resolution_transition(x, table, rows, noise, **numbers)
    staying, split = out[0, : count // 2], out[0, count // 2 :].unflatten(0, (-1, 4))
    samples = split.permute(1, 0, 2).flatten(1) / deviation
    covariance = samples @ samples.T / samples.shape[1]
    error = 5 / math.sqrt(samples.shape[1])
    assert (covariance - torch.eye(4)).abs().max() < math.sqrt(2) * error
    assert abs((staying / deviation).square().mean() - 1) < math.sqrt(2) * error
    published, _ = resolution_transition(x, table, rows, noise, **numbers, unsplit=1.0)
    variance = (published[0, : count // 2] / deviation).square().mean()
    assert abs(variance - 1 - c) < math.sqrt(2) * error
    silent = torch.zeros_like(x)
    z, _ = resolution_transition(silent, table, rows, noise, **numbers | {"deviation": 1.0})
    samples = z[0, count // 2 :].unflatten(0, (-1, 4)).permute(1, 0, 2).flatten(1)
    covariance = samples @ samples.T / samples.shape[1]
    assert (covariance - torch.eye(4) + c).abs().max() < math.sqrt(2) * error
    assert abs(samples.sum(0).square().mean() - 4 * (1 - 4 * c)) < 4 * math.sqrt(2) * error
