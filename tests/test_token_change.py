"""token_change on every backend and instruction set, against the same in fp64 and in stock torch.

Each `check_*` takes a Runner and raises where the backend is wrong. What is copied, `last` and `level`, and whatever
belongs to a token that was not computed, is compared bit by bit; rates and scores by the one rule of tolerance.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from inputs import Guarded, Runner, Untouched, generator, misaligned, normal
from tolerance import Mismatch, assert_close, assert_equal

GRIDS = ((1, 1), (1, 7), (8, 8), (15, 17), (1, 1031))
LEVELS = (0.75, 0.625)  # of the step that is done, and of the next


@dataclass
class Case:
    """The tensors of one call."""

    velocity: Tensor
    last: Tensor
    rate: Tensor
    level: Tensor
    levels: Tensor
    inverse: Tensor | None

    def copy(self) -> Case:
        values = (None if t is None else t.clone() for t in vars(self).values())
        return Case(*values)

    def at(self, samples: slice) -> Case:
        """Some of the samples."""
        parts = {n: None if t is None else t[samples] for n, t in vars(self).items()}
        return Case(**parts | {"levels": self.levels})


def case(shape, dtype, seed: int, share: float = 0.5, levels=LEVELS) -> Case:
    """Velocities that changed, and earlier levels; about `share` of the tokens were computed, None for all of them."""
    g = generator(20, seed)
    batch, tokens = shape[0], shape[1] * shape[2]
    velocity, last = normal(shape, dtype, g), normal(shape, dtype, g)
    rate = torch.rand(batch, tokens, generator=g)
    level = 0.75 + 0.25 * (1 + torch.randint(4, (batch, tokens), generator=g))
    inverse = None
    if share is not None:
        computed = torch.rand(batch, tokens, generator=g) < share
        inverse = torch.where(computed, computed.cumsum(1) - 1, -1).int()
    return Case(velocity, last, rate, level, torch.tensor(levels), inverse)


def results(given: Case, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """last, rate, level and score, the arithmetic in `kind`."""
    now, coming = given.levels.to(kind)
    computed = given.inverse >= 0 if given.inverse is not None else given.rate == given.rate
    change = given.velocity.to(kind) - given.last.to(kind)
    distance = change.square().flatten(3).sum(-1).flatten(1).sqrt()
    gap = (now - given.level.to(kind)).abs()
    rate = torch.where(computed & (gap > 0), distance / gap, given.rate.to(kind))
    level = torch.where(computed, given.levels[0], given.level)
    patches = computed.view(*given.velocity.shape[:3], 1, 1, 1)
    last = torch.where(patches, given.velocity, given.last)
    return last, rate, level, rate * (coming - level.to(kind)).abs()


def compare(run: Runner, what: str, given: Case) -> Case:
    """Calls the backend on a copy and compares all that it wrote. Returns what it wrote into."""
    made = given.copy()
    score = run.token_change(**vars(made))
    held_to(run, what, given, made, score)
    return made


def held_to(run: Runner, what: str, given: Case, made: Case, score: Tensor) -> None:
    """Raises unless `made`, once `given`, and its score are what they should be."""
    last, exact_rate, level, exact_score = results(given, torch.float64)
    _, rate, _, eager = results(given, torch.float32)
    what = f"token_change on {run.label}, {what}"
    assert_equal(f"{what}, last", made.last, last)
    assert_equal(f"{what}, level", made.level, level)
    assert_close(f"{what}, rate", made.rate, exact_rate, rate)
    assert_close(f"{what}, score", score, exact_score, eager)
    if given.inverse is not None:
        kept = given.inverse < 0
        assert_equal(f"{what}, rates that stay", made.rate[kept], given.rate[kept])


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for i, (gh, gw) in enumerate(GRIDS):
            for share in (None, 0.5):
                compare(run, f"{gh} x {gw}", case((1 + i % 3, gh, gw, 2, 2, 4), dtype, i, share))


def check_patches(run: Runner) -> None:
    """Pixels and channels of every count."""
    for dtype in run.dtypes():
        for patch in ((1, 1, 1), (1, 1, 64), (3, 3, 2), (2, 1, 33), (4, 4, 16), (2, 2, 5)):
            compare(run, f"patches {patch}", case((2, 3, 7, *patch), dtype, 1))


def layouts(t: Tensor) -> dict[str, Tensor]:
    """A field as views of latents [B, C, H, W], of packed tokens [B, N, C p p], and of odd strides."""
    batch, gh, gw, p, _, channels = t.shape
    latents = t.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, gh * p, gw * p)
    packed = t.permute(0, 1, 2, 5, 3, 4).reshape(batch, gh * gw, channels * p * p)
    wide = torch.full((batch, gh + 1, gw + 2, p, p, channels + 3), float("nan"), dtype=t.dtype)
    wide[:, 1:, 1:-1, ..., 2:-1] = t
    found = {
        "latents": latents.unflatten(2, (gh, p)).unflatten(4, (gw, p)).permute(0, 2, 4, 3, 5, 1),
        "packed": packed.unflatten(2, (channels, p, p))
        .unflatten(1, (gh, gw))
        .permute(0, 1, 2, 4, 5, 3),
        "padded": wide[:, 1:, 1:-1, ..., 2:-1],
        "misaligned": misaligned(t),
        "transposed": t.transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert all(torch.equal(view, t) for view in found.values())
    return found


def check_layouts(run: Runner) -> None:
    """The velocity in one layout, what is kept of it in another."""
    for dtype in run.dtypes():
        given = case((2, 6, 10, 2, 2, 16), dtype, 2)
        names = list(layouts(given.velocity))
        for i, name in enumerate(names):
            for other in (name, names[i - 1]):
                made = given.copy()
                made.velocity = layouts(given.velocity)[name]
                made.last = layouts(given.last)[other]
                score = run.token_change(**vars(made))
                held_to(run, f"{name} and {other}", given, made, score)


def check_strided_tables(run: Runner) -> None:
    """Tables that are parts of wider ones, which stay as they are."""
    for dtype in run.dtypes():
        given = case((3, 4, 7, 2, 2, 4), dtype, 3)
        buffers = {name: torch.full((3, 31), -7.0) for name in ("rate", "level", "score")}
        buffers["inverse"] = torch.full((3, 31), -7, dtype=torch.int32)
        views = {name: buffer[:, 2:30] for name, buffer in buffers.items()}
        made = given.copy()
        for name in ("rate", "level", "inverse"):
            views[name].copy_(getattr(given, name))
            setattr(made, name, views[name])
        score = run.token_change(**vars(made), score=views["score"])
        held_to(run, "strided tables", given, made, score)
        for name, view in views.items():
            view.fill_(-7)
            assert_equal(
                f"token_change on {run.label}, beside {name}",
                buffers[name],
                torch.full_like(buffers[name], -7),
            )


def check_tokens_that_were_left_out(run: Runner) -> None:
    """Their velocity is not looked at, and they age by the levels that went by since."""
    for dtype in run.dtypes():
        given = case((2, 5, 6, 2, 2, 4), dtype, 4)
        left_out = given.inverse < 0
        given.velocity[left_out.view(2, 5, 6)] = float("nan")
        made = compare(run, "left out", given)
        if not made.last.isfinite().all() or not made.rate.isfinite().all():
            raise Mismatch(f"token_change on {run.label}: a token that was left out was read")
        given.inverse.fill_(-1)
        compare(run, "all left out", given)


def check_equal_levels(run: Runner) -> None:
    """A value at the level of the last one replaces it and leaves the rate."""
    for dtype in run.dtypes():
        given = case((2, 4, 6, 2, 2, 4), dtype, 5, None)
        given.level[:, ::2] = LEVELS[0]
        made = compare(run, "equal levels", given)
        assert_equal(
            f"token_change on {run.label}, rates at equal levels",
            made.rate[:, ::2],
            given.rate[:, ::2],
        )


def check_first_values(run: Runner) -> None:
    """No score before the second value, of whatever tokens."""
    for dtype in run.dtypes():
        given = case((2, 4, 6, 2, 2, 4), dtype, 6)
        given.rate.fill_(float("inf"))
        given.level.fill_(float("nan"))
        made = given.copy()
        for levels in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25)):
            known = made.copy()
            known.levels = torch.tensor(levels)
            known.velocity = known.velocity * (1 + levels[0])
            made = known.copy()
            score = run.token_change(**vars(made))
            held_to(run, f"first values at {levels[0]}", known, made, score)
            twice = (given.inverse >= 0) & (levels[0] < 1.0)
            if not torch.equal(score.isfinite(), twice):
                raise Mismatch(f"token_change on {run.label}: a score at {levels[0]}, or none")


def check_rising_levels(run: Runner) -> None:
    """Some families count the other way: distances have no sign."""
    for dtype in run.dtypes():
        given = case((2, 4, 6, 2, 2, 4), dtype, 7, levels=(2.5, 2.75))
        compare(run, "rising levels", given)


def check_small_changes(run: Runner) -> None:
    """A change of a few units of values that are large: |a|^2 - 2 ab + |b|^2 has no digit left."""
    for dtype in run.dtypes():
        offset = 2**14 if dtype.itemsize > 2 else 64
        given = case((2, 4, 8, 2, 2, 4), dtype, 8)
        g = generator(21)
        for t in (given.velocity, given.last):
            t.copy_(offset + torch.randint(7, t.shape, generator=g))
        compare(run, f"offset {offset}", given)


def check_special_values(run: Runner) -> None:
    """NaN and infinity reach the score of their own token only."""
    for dtype in run.dtypes():
        given = case((1, 4, 8, 2, 2, 5), dtype, 9, None)
        for index, (name, value) in {
            3: ("velocity", "nan"),
            9: ("velocity", "inf"),
            20: ("last", "-inf"),
            31: ("last", "nan"),
        }.items():
            getattr(given, name)[0, index // 8, index % 8, index % 2, 1, -1] = float(value)
        compare(run, "NaN and infinity", given)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for gh, gw in ((1, 1), (3, 5), (5, 13)):
            given = case((2, gh, gw, 2, 2, 3), dtype, 10)
            inputs = Untouched(velocity=given.velocity, levels=given.levels, inverse=given.inverse)
            written = {name: Guarded(getattr(given, name)) for name in ("last", "rate", "level")}
            written["score"] = Guarded(torch.zeros_like(given.rate))
            made = given.copy()
            made.velocity, made.levels, made.inverse = given.velocity, given.levels, given.inverse
            for name in ("last", "rate", "level"):
                setattr(made, name, written[name].tensor)
            score = run.token_change(**vars(made), score=written["score"].tensor)
            what = f"token_change on {run.label}"
            inputs.check(what)
            for table in written.values():
                table.assert_intact(what)
            held_to(run, "between guards", given, made, score)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        given = case((2, 15, 68, 2, 2, 16), dtype, 11)
        first = given.copy()
        score = run.token_change(**vars(first))
        threads = torch.get_num_threads()
        try:
            for i in range(run.repeats(6)):
                torch.set_num_threads(1 + i % 2)
                again = given.copy()
                found = run.token_change(**vars(again))
                for a, b in ((found, score), (again.rate, first.rate), (again.last, first.last)):
                    assert_equal(f"token_change on {run.label}, repeat {i}", a, b)
        finally:
            torch.set_num_threads(threads)


def check_samples_are_apart(run: Runner) -> None:
    """A sample is as if it were alone."""
    for dtype in run.dtypes():
        given = case((3, 5, 6, 2, 2, 4), dtype, 12)
        whole = given.copy()
        score = run.token_change(**vars(whole))
        for b in range(3):
            alone = given.at(slice(b, b + 1)).copy()
            found = run.token_change(**vars(alone))
            what = f"token_change on {run.label}, sample {b} alone"
            assert_equal(what, found, score[b : b + 1])
            assert_equal(what, alone.last, whole.last[b : b + 1])


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        given = case((0, 2, 3, 2, 2, 4), dtype, 13)
        assert run.token_change(**vars(given)).shape == (0, 6)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_token_change(check, runner):
    check(runner)
