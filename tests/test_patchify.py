"""patchify and unpatchify on every backend, against loops over tokens and their pixels; bit for bit.

Each `check_*` takes a Runner and raises where the backend is wrong.
"""

from __future__ import annotations

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
    poisoned,
    unwritten,
)
from tolerance import assert_equal

# gh, gw, ph, pw, C: patches of latents, packed tokens as patches of one pixel, odd ones.
SHAPES = ((2, 2, 2, 2, 4), (6, 8, 1, 1, 64), (8, 4, 2, 2, 16), (4, 12, 1, 3, 5), (4, 4, 3, 1, 1))


def tiling(height: int, width: int, split: int, level: int, g: torch.Generator) -> Tensor:
    """int32 [n, 3] over the whole grid in any order: squares of `level`, `split` of them in four."""
    side = 2**level
    squares = [(level, y, x) for y in range(0, height, side) for x in range(0, width, side)]
    for number in torch.randperm(len(squares), generator=g)[:split].tolist():
        _, y, x = squares[number]
        half = side // 2
        squares[number] = (level - 1, y, x)
        squares += [(level - 1, y + r, x + q) for r, q in ((0, half), (half, 0), (half, half))]
    order = torch.randperm(len(squares), generator=g)
    return torch.tensor(squares, dtype=torch.int32)[order]


def tables(batch: int, height: int, width: int, split: int, level: int, *key: int) -> Tensor:
    """int32 [B, n, 3], another one for each image."""
    return torch.stack(
        [tiling(height, width, split, level, generator(b, *key)) for b in range(batch)]
    )


def in_order(token: Tensor, patch: torch.Size, channels_last: bool) -> Tensor:
    """[D] as [ph, pw, C]."""
    height, width, channels = patch
    if channels_last:
        return token.reshape(height, width, channels)
    return token.reshape(channels, height, width).permute(1, 2, 0)


def read(field: Tensor, table: Tensor, channels_last: bool = False) -> Tensor:
    """The tokens, one after the other: every second, fourth, ... pixel of the square they cover."""
    height, width, _ = field.shape[3:]
    picture = field.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    tokens = field.new_zeros(*table.shape[:2], field.shape[3:].numel())
    for b, places in enumerate(table.tolist()):
        for i, (level, y, x) in enumerate(places):
            side = 2**level
            patch = picture[
                b,
                y * height : (y + side) * height : side,
                x * width : (x + side) * width : side,
            ]
            tokens[b, i] = (patch if channels_last else patch.permute(2, 0, 1)).flatten()
    return tokens


def drawn(tokens: Tensor, table: Tensor, field: Tensor, channels_last: bool = False) -> Tensor:
    """A copy of the field with the tokens in it, cell by cell: each a part of the token drawn larger."""
    field = field.clone()
    for b, places in enumerate(table.tolist()):
        for i, (level, y, x) in enumerate(places):
            height, width, _ = field.shape[3:]
            patch = in_order(tokens[b, i], field.shape[3:], channels_last)
            patch = patch.repeat_interleave(2**level, 0).repeat_interleave(2**level, 1)
            for r in range(2**level):
                for q in range(2**level):
                    line, column = r * height, q * width
                    field[b, y + r, x + q] = patch[line : line + height, column : column + width]
    return field


def compare(run: Runner, what: str, field: Tensor, table: Tensor, channels_last: bool) -> None:
    """Both ways, from the same field."""
    what = f"on {run.label}, {what}, channels_last {channels_last}"
    tokens = run.patchify(field, table, channels_last=channels_last)
    assert_equal(f"patchify {what}", tokens, read(field, table, channels_last))
    others = normal(tokens.shape, tokens.dtype, generator(3))
    out = torch.empty_strided(field.shape, field.stride(), dtype=field.dtype).fill_(7)
    expected = drawn(others, table, out, channels_last)
    assert run.unpatchify(others, table, out, channels_last=channels_last) is out
    assert_equal(f"unpatchify {what}", out, expected)


def check_sizes(run: Runner) -> None:
    """Levels 0 to 2, no squares split, some, all."""
    for dtype in run.dtypes():
        for case, (height, width, *patch) in enumerate(SHAPES):
            field = normal((1 + case % 3, height, width, *patch), dtype, generator(1, case))
            for level in (0, 1, 2):
                side = 2**level
                if height % side or width % side:
                    continue
                squares = (height // side) * (width // side)
                for split in sorted({0, squares // 3, squares} if level else {0}):
                    table = tables(len(field), height, width, split, level, case)
                    what = f"level {level}, {split} split"
                    compare(run, what, field, table, bool(split % 2))


def check_orders(run: Runner) -> None:
    for dtype in run.dtypes():
        field = normal((2, 4, 6, 2, 3, 5), dtype, generator(2))
        for channels_last in (False, True):
            compare(run, "order", field, tables(2, 4, 6, 2, 1, 2), channels_last)


def check_layouts(run: Runner) -> None:
    """Views of latents and of packed tokens, and odd strides."""
    batch, height, width, p, channels = 2, 4, 6, 2, 4
    table = tables(batch, height, width, 2, 1, 4)
    for dtype in run.dtypes():
        plain = normal((batch, height, width, p, p, channels), dtype, generator(4))
        latents = plain.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height * p, width * p)
        packed = plain.permute(0, 1, 2, 5, 3, 4).reshape(batch, height * width, channels * p * p)
        wide = poisoned((batch, height + 1, width + 2, p, p, channels + 3), dtype)
        wide[:, 1:, 1:-1, ..., 2:-1] = plain
        views = {
            "latents": latents.unflatten(2, (height, p))
            .unflatten(4, (width, p))
            .permute(0, 2, 4, 3, 5, 1),
            "packed": packed.unflatten(2, (channels, p, p))
            .unflatten(1, (height, width))
            .permute(0, 1, 2, 4, 5, 3),
            "padded": wide[:, 1:, 1:-1, ..., 2:-1],
            "misaligned": misaligned(plain),
            "transposed": plain.transpose(1, 2).contiguous().transpose(1, 2),
        }
        for name, view in views.items():
            assert torch.equal(view, plain)
            compare(run, name, view, table, name == "padded")


def check_strided_tokens_and_tables(run: Runner) -> None:
    """Tokens within wider ones, a table within a wider one, and one table for all images."""
    for dtype in run.dtypes():
        field = normal((3, 4, 4, 2, 2, 3), dtype, generator(5))
        one = tiling(4, 4, 1, 1, generator(5))
        wide = unwritten((3, len(one) + 2, 5))
        wide[:, 1:-1, 1:4] = one
        expected = read(field, one.expand(3, -1, -1))
        for name, table in (("expanded", one.expand(3, -1, -1)), ("wide", wide[:, 1:-1, 1:4])):
            out = padded_rows(torch.zeros_like(expected))
            run.patchify(field, table, out=out)
            assert_equal(f"patchify on {run.label}, {name} table", out, expected)
            back = run.unpatchify(padded_rows(expected), table, torch.zeros_like(field))
            want = drawn(expected, one.expand(3, -1, -1), torch.zeros_like(field))
            assert_equal(f"unpatchify on {run.label}, {name} table", back, want)


def check_other_cells_stay(run: Runner) -> None:
    """Tokens over a part of the grid, of which one is at its last cell."""
    for dtype in run.dtypes():
        table = torch.tensor([[[1, 1, 2], [0, 4, 6], [0, 0, 0]], [[0, 4, 6], [1, 3, 3], [0, 0, 5]]])
        table = table.to(torch.int32)
        tokens = normal((2, 3, 12), dtype, generator(6))
        field = poisoned((2, 5, 7, 2, 2, 3), dtype)
        expected = drawn(tokens, table, field)
        run.unpatchify(tokens, table, field)
        assert_equal(f"unpatchify on {run.label}, a part", field, expected)


def check_bits_are_kept(run: Runner) -> None:
    """NaN with their payloads, infinities, subnormals and the sign of zero."""
    for dtype in run.dtypes():
        width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
        limits, g = torch.iinfo(width), generator(7)
        numbers = torch.randint(limits.min, limits.max, (1, 4, 4, 2, 2, 8), generator=g)
        field = numbers.to(width).view(dtype)
        field[0, 0, 0, 0] = torch.tensor([float("nan"), -0.0], dtype=dtype)[:, None]
        compare(run, "any bits", field, tables(1, 4, 4, 2, 1, 7), False)


def check_there_and_back(run: Runner) -> None:
    """Tokens that are drawn and read again are the same ones."""
    for dtype in run.dtypes():
        for channels_last in (False, True):
            table = tables(2, 8, 8, 5, 1, 8)
            tokens = normal((2, table.shape[1], 16), dtype, generator(8))
            field = poisoned((2, 8, 8, 2, 2, 4), dtype)
            run.unpatchify(tokens, table, field, channels_last=channels_last)
            again = run.patchify(field, table, channels_last=channels_last)
            assert_equal(f"patchify of unpatchify on {run.label}", again, tokens)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        table = Guarded(tables(2, 4, 4, 1, 1, 9))
        field = Guarded(normal((2, 4, 4, 2, 2, 3), dtype, generator(9)))
        tokens = Guarded(normal((2, table.tensor.shape[1], 12), dtype, generator(9, 1)))
        inputs = Untouched(field=field.tensor, table=table.tensor)
        run.patchify(field.tensor, table.tensor, out=tokens.tensor)
        inputs.check(f"patchify on {run.label}")
        inputs = Untouched(tokens=tokens.tensor, table=table.tensor)
        run.unpatchify(tokens.tensor, table.tensor, field.tensor)
        inputs.check(f"unpatchify on {run.label}")
        for guarded in (table, field, tokens):
            guarded.assert_intact(f"patchify on {run.label}")


def check_many_tokens(run: Runner) -> None:
    """More than one thread takes, and more than one block."""
    for dtype in run.dtypes()[:1]:
        field = normal((1, 30, 30, 1, 1, 64), dtype, generator(10))
        table = tables(1, 30, 30, 200, 1, 10)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            compare(run, "many", field, table, False)
        finally:
            torch.set_num_threads(threads)


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for batch, count in ((0, 4), (2, 0)):
            table, field = unwritten((batch, count, 3)), torch.ones(batch, 2, 2, 1, 1, 4).to(dtype)
            tokens = run.patchify(field, table)
            assert tokens.shape == (batch, count, 4)
            assert torch.equal(run.unpatchify(tokens, table, field), torch.ones_like(field))


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_patchify(check, runner):
    check(runner)
