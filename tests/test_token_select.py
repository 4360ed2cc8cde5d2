"""token_select on every backend and instruction set, against a plain sort of Python numbers.

Each `check_*` takes a Runner and raises where the backend is wrong. Metrics may differ in their last
bit between backends, so a selection is compared where the metrics on both sides of a cut are well
apart, or where they are exact in fp32 whatever the order of the sums.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from inputs import Guarded, Runner, Untouched, generator, misaligned, normal, unwritten
from tolerance import Mismatch, assert_equal

GRIDS = ((1, 1), (1, 7), (8, 8), (15, 17), (32, 32), (1, 4099))
APART = 1e-5  # between the scores on both sides of a cut, relative


def exact_metric(velocity: Tensor, metric: str) -> np.ndarray:
    """fp64 [B, N]; NaN or infinite where an element is."""
    values = velocity.double().numpy()
    with np.errstate(invalid="ignore"):
        if metric == "l2norm":
            pixels = np.sqrt((values**2).sum(-1))
        elif values.shape[-1] == 1:
            pixels = np.where(np.isfinite(values), 0.0, np.nan)[..., 0]
        else:
            pixels = values.std(-1, ddof=1)
        return pixels.mean((3, 4)).reshape(len(values), -1)


class Expected:
    """One call restated: the tables after it, and how near the selection was to another one."""

    def __init__(
        self,
        velocity,
        drops,
        keep,
        *,
        age=None,
        high=0,
        starvation=0.1,
        metric="std",
        max_age=None,
    ):
        self.apart = float("inf")
        metrics, before = exact_metric(velocity, metric), drops.tolist()
        dropped = []
        for b, values in enumerate(metrics):
            tokens = range(len(values))
            forced = [max_age is not None and int(age[b, i]) >= max_age for i in tokens]
            late = [(forced[i], not np.isfinite(values[i])) for i in tokens]
            down = self._scores(values, before[b], -starvation)
            up = self._scores(values, before[b], starvation)
            order = sorted(tokens, key=lambda i: (*late[i], -down[i], -i))
            first = self._cut(order, high, late, down)
            order = sorted(set(tokens) - first, key=lambda i: (*late[i], up[i], i))
            dropped.append(first | self._cut(order, len(values) - keep - high, late, up))
        kept = [[i for i in range(metrics.shape[1]) if i not in gone] for gone in dropped]
        self.rows = torch.tensor(kept, dtype=torch.int32).view(len(kept), keep)
        self.inverse = torch.full(drops.shape, -1, dtype=torch.int32)
        self.drops, self.age = drops + 1, None if age is None else age + 1
        for b, active in enumerate(kept):
            self.inverse[b, active] = torch.arange(keep, dtype=torch.int32)
            self.drops[b, active] = drops[b, active]
            if age is not None:
                self.age[b, active] = 0

    @staticmethod
    def _scores(values, drops, rate) -> list[float]:
        """In fp32, as the op says; what is not finite counts as infinity."""
        with np.errstate(all="ignore"):
            factor = np.exp(np.float64(np.float32(rate)) * np.array(drops)).astype(np.float32)
            scores = values.astype(np.float32) * factor
        return [float(s) if np.isfinite(s) else float("inf") for s in scores]

    def _cut(self, order, count, late, scores) -> set[int]:
        if 0 < count < len(order):
            last, following = order[count - 1], order[count]
            if late[last] == late[following] == (False, False):
                gap = abs(scores[last] - scores[following])
                self.apart = min(self.apart, gap / max(scores[last], scores[following], 1e-30))
        return set(order[:count])


def compare(run: Runner, what: str, velocity, drops, keep, *, age=None, **options) -> Tensor:
    """Calls the backend on copies of the tables and compares all that it wrote. Returns rows."""
    want = Expected(velocity, drops, keep, age=age, **options)
    drops, age = drops.clone(), None if age is None else age.clone()
    rows, inverse = run.token_select(velocity, drops, keep, age=age, **options)
    what = f"token_select on {run.label}, {what}"
    assert_equal(f"{what}, rows", rows, want.rows)
    assert_equal(f"{what}, inverse", inverse, want.inverse)
    assert_equal(f"{what}, drops", drops, want.drops)
    if age is not None:
        assert_equal(f"{what}, age", age, want.age)
    return rows


def counts(batch: int, tokens: int, most: int, g) -> Tensor:
    return torch.randint(most + 1, (batch, tokens), generator=g, dtype=torch.int32)


def inputs_apart(shape, dtype, keep: int, *key: int, **options) -> tuple[Tensor, Tensor]:
    """velocity and drops with which no cut falls between two scores that are nearly equal."""
    for seed in range(20):
        g = generator(*key, seed)
        velocity = normal(shape, dtype, g)
        drops = counts(shape[0], shape[1] * shape[2], 3, g)
        if Expected(velocity, drops, keep, **options).apart > APART:
            return velocity, drops
    raise Mismatch("no inputs that are well apart")


def exact_field(
    levels: Tensor, dtype: torch.dtype, metric: str, pixels: int = 2, offset: int = 2
) -> Tensor:
    """[B, gh, gw] whole numbers -> a field whose metric is a multiple, exact in any order of sums."""
    pattern = torch.tensor([1, -1, 0, 1, -1] if metric == "std" else [4, 0, -3, 0, 0])
    offset = offset if metric == "std" else 0  # a deviation does not see it
    shape = (*levels.shape, pixels, pixels, 5)
    values = levels.view(*levels.shape, 1, 1, 1) * pattern + offset
    return values.to(dtype).expand(shape).contiguous()


def splits(tokens: int) -> list[tuple[int, int]]:
    """Every kind of keep and high."""
    keeps = sorted({1, max(1, tokens // 2), max(1, tokens - 1), tokens})
    return [
        (keep, high) for keep in keeps for high in sorted({0, (tokens - keep) // 3, tokens - keep})
    ]


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for gh, gw in GRIDS:
            tokens = gh * gw
            chosen = splits(tokens)
            if tokens > 300:
                chosen = (chosen[2::3] + chosen[1:2])[: 3 if dtype is run.dtypes()[0] else 1]
            for case, (keep, high) in enumerate(chosen):
                shape = (1 + case % 3, gh, gw, 2, 2, 1 + (5 * case) % 17)
                shape = (*shape[:5], 16) if shape[5] == 1 else shape
                options = {"high": high, "metric": ("std", "l2norm")[case % 2]}
                velocity, drops = inputs_apart(shape, dtype, keep, 1, case, tokens, **options)
                compare(run, f"K {keep} high {high}", velocity, drops, keep, **options)


def check_patches(run: Runner) -> None:
    """Pixels and channels of every count; a single channel has no deviation."""
    for dtype in run.dtypes():
        for height, width, channels in ((1, 1, 4), (3, 3, 2), (2, 1, 33), (4, 4, 16), (2, 2, 1)):
            for metric in ("std", "l2norm"):
                shape = (2, 3, 7, height, width, channels)
                options = {"high": 4, "metric": metric}
                if channels == 1 and metric == "std":
                    velocity, drops = (
                        normal(shape, dtype, generator(2)),
                        counts(2, 21, 3, generator(2)),
                    )
                else:
                    velocity, drops = inputs_apart(shape, dtype, 9, 2, channels, **options)
                compare(run, "patches", velocity, drops, 9, **options)


def check_layouts(run: Runner) -> None:
    """A view of latents [B, C, H, W], one of packed tokens [B, N, C p p], and odd strides."""
    batch, gh, gw, p, channels = 2, 6, 10, 2, 16
    for dtype in run.dtypes():
        velocity, drops = inputs_apart((batch, gh, gw, p, p, channels), dtype, 25, 3, high=7)
        want = Expected(velocity, drops, 25, high=7)
        latents = velocity.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, gh * p, gw * p)
        packed = velocity.permute(0, 1, 2, 5, 3, 4).reshape(batch, gh * gw, channels * p * p)
        wide = torch.full((batch, gh + 1, gw + 2, p, p, channels + 3), float("nan"), dtype=dtype)
        wide[:, 1:, 1:-1, ..., 2:-1] = velocity
        views = {
            "latents": latents.unflatten(2, (gh, p))
            .unflatten(4, (gw, p))
            .permute(0, 2, 4, 3, 5, 1),
            "packed": packed.unflatten(2, (channels, p, p))
            .unflatten(1, (gh, gw))
            .permute(0, 1, 2, 4, 5, 3),
            "padded": wide[:, 1:, 1:-1, ..., 2:-1],
            "misaligned": misaligned(velocity),
            "transposed": velocity.transpose(1, 2).contiguous().transpose(1, 2),
        }
        for name, view in views.items():
            assert torch.equal(view, velocity)
            rows, inverse = run.token_select(view, drops.clone(), 25, high=7)
            assert_equal(f"token_select on {run.label}, {name}, rows", rows, want.rows)
            assert_equal(f"token_select on {run.label}, {name}, inverse", inverse, want.inverse)


def check_strided_tables(run: Runner) -> None:
    """Tables that are parts of wider ones, which stay as they are."""
    for dtype in run.dtypes():
        batch, keep, high = 3, 11, 6
        velocity, drops = inputs_apart((batch, 4, 7, 2, 2, 4), dtype, keep, 4, high=high)
        age = counts(batch, 28, 5, generator(4))
        options = {"high": high, "max_age": 5}
        want = Expected(velocity, drops, keep, age=age, **options)
        buffers = [unwritten((batch, 31)) for _ in range(4)]
        tables = [buffer[:, 2:30] for buffer in buffers[:3]] + [buffers[3][:, 2 : 2 + keep]]
        tables[0].copy_(drops)
        tables[1].copy_(age)
        run.token_select(
            velocity, tables[0], keep, age=tables[1], inverse=tables[2], rows=tables[3], **options
        )
        expected = (want.drops, want.age, want.inverse, want.rows)
        for name, buffer, table, value in zip(
            ("drops", "age", "inverse", "rows"), buffers, tables, expected, strict=True
        ):
            assert_equal(f"token_select on {run.label}, strided {name}", table, value)
            table.fill_(-0x7F7F7F7F)
            assert_equal(f"token_select on {run.label}, beside {name}", buffer, unwritten((3, 31)))


def check_all_equal(run: Runner) -> None:
    """High drops the last ones, low the first ones."""
    for dtype in run.dtypes():
        for gh, gw in ((1, 7), (15, 17), (11, 100)):
            tokens = gh * gw
            keep = tokens // 2
            velocity = torch.ones(2, gh, gw, 2, 2, 4, dtype=dtype)
            velocity[..., 0] = 3
            drops = torch.zeros(2, tokens, dtype=torch.int32)
            for high, first in ((tokens - keep, 0), (0, tokens - keep), (2, tokens - keep - 2)):
                rows = compare(run, f"equal, high {high}", velocity, drops, keep, high=high)
                wanted = torch.arange(first, first + keep, dtype=torch.int32).expand(2, keep)
                assert_equal(f"token_select on {run.label}, equal", rows, wanted)


def check_ties(run: Runner) -> None:
    """Few levels, so that most cuts fall among equals, whose order is that of their index."""
    for dtype in run.dtypes():
        for gh, gw in ((8, 8), (15, 17), (33, 63)):
            for metric in ("std", "l2norm"):
                for levels, most in ((2, 0), (5, 3)):
                    tokens, g = gh * gw, generator(5, gh, levels)
                    if tokens > 300 and (metric == "l2norm" or most == 0):
                        continue
                    level = torch.randint(levels, (2, gh, gw), generator=g)
                    velocity = exact_field(level, dtype, metric)
                    drops = counts(2, tokens, most, g)
                    for keep, high in ((tokens // 2, tokens // 5), (1, 0), (tokens - 3, 2)):
                        options = {"high": high, "metric": metric, "starvation": 0.5}
                        compare(run, f"{levels} levels", velocity, drops, keep, **options)


def check_offset_fields(run: Runner) -> None:
    """A mean of 2^14 and deviations of a few: E[x^2] - m^2 has no digit left."""
    for dtype in run.dtypes():
        level = torch.randint(7, (2, 8, 8), generator=generator(15))
        offset = 2**14 if dtype.itemsize > 2 else 64
        velocity = exact_field(level, dtype, "std", offset=offset)
        drops = torch.zeros(2, 64, dtype=torch.int32)
        for keep, high in ((32, 12), (16, 0), (20, 44)):
            compare(run, f"offset {offset}", velocity, drops, keep, high=high)


def check_one_side_of_a_tie(run: Runner) -> None:
    """Equals at both cuts at once: those that high took are not counted again."""
    for dtype in run.dtypes():
        level = torch.tensor([5, 5, 1, 5, 3, 3, 5, 1, 3, 5]).view(1, 2, 5)
        velocity = exact_field(level, dtype, "std")
        drops = torch.zeros(1, 10, dtype=torch.int32)
        for high in range(8):
            for keep in range(1, 11 - high):
                compare(run, f"K {keep} high {high}", velocity, drops, keep, high=high)


def check_special_values(run: Runner) -> None:
    """NaN and infinity are dropped last, in one token only, and by index among themselves."""
    for dtype in run.dtypes():
        for metric in ("std", "l2norm"):
            for channels in (1, 5):
                g = generator(6, channels)
                level = torch.randint(1, 9, (2, 4, 8), generator=g)
                velocity = exact_field(level, dtype, metric)[..., :channels].contiguous()
                for index, value in ((3, "nan"), (9, "inf"), (20, "-inf"), (31, "nan")):
                    velocity[0, index // 8, index % 8, index % 2, 1, -1] = float(value)
                velocity[1, :, :5] = float("nan")
                drops = counts(2, 32, 2, g)
                for keep, high in ((28, 4), (28, 0), (13, 9), (2, 30), (2, 0), (31, 1)):
                    options = {"high": high, "metric": metric}
                    compare(run, "NaN and infinity", velocity, drops, keep, **options)


def check_starvation(run: Runner) -> None:
    """Factors that round, vanish, overflow, or turn the order around."""
    for dtype in run.dtypes():
        g = generator(7)
        level = torch.randint(0, 4, (2, 8, 8), generator=g)
        velocity = exact_field(level, dtype, "std")
        for starvation, most in (
            (0.0, 9),
            (0.1, 40),
            (1.0, 3),
            (0.1, 3000),
            (-0.2, 900),
            (1e30, 1),
        ):
            drops = counts(2, 64, most, g)
            for keep, high in ((32, 12), (16, 0), (20, 44)):
                what = f"starvation {starvation}"
                compare(run, what, velocity, drops, keep, high=high, starvation=starvation)


def check_max_age(run: Runner) -> None:
    for dtype in run.dtypes():
        velocity, drops = inputs_apart((2, 6, 8, 2, 2, 4), dtype, 16, 8, high=9)
        for most in (0, 4, 5, 9):
            # Up to 4 nobody is forced, up to 9 half are; at 4 and more all of the second sample.
            age = counts(2, 48, most, generator(8, most))
            age[1] += most // 5 * 5
            for keep, high in ((16, 9), (16, 0), (16, 32), (40, 3), (1, 20)):
                options = {"high": high, "max_age": 5}
                compare(run, f"age {most}", velocity, drops, keep, age=age, **options)
            compare(run, "age without a limit", velocity, drops, 16, age=age, high=9)
        velocity[0, :, 3] = float("nan")
        age = counts(2, 48, 6, generator(8, 100))
        for keep, high in ((20, 14), (5, 43), (5, 0)):
            options = {"high": high, "max_age": 5}
            compare(run, "age and NaN", velocity, drops, keep, age=age, **options)


def check_many_tokens(run: Runner, gh: int = 130, gw: int = 131) -> None:
    """More than any kernel looks at in one go, equal in part."""
    for dtype in run.dtypes()[:1]:
        g, tokens = generator(9), gh * gw
        level = torch.randint(40, (1, gh, gw), generator=g)
        velocity = exact_field(level, dtype, "l2norm", pixels=1)
        drops = counts(1, tokens, 2, g)
        options = {"high": tokens // 7, "metric": "l2norm"}
        compare(run, "many", velocity, drops, tokens // 2, **options)


def check_inputs_and_guards(run: Runner) -> None:
    for dtype in run.dtypes():
        for gh, gw, keep, high in ((1, 1, 1, 0), (3, 5, 7, 4), (5, 13, 64, 1), (5, 13, 1, 0)):
            velocity, drops = inputs_apart((2, gh, gw, 2, 2, 3), dtype, keep, 10, high=high)
            age = counts(2, gh * gw, 3, generator(10))
            tables = [Guarded(drops), Guarded(age), Guarded(unwritten((2, keep)))]
            tables.append(Guarded(unwritten((2, gh * gw))))
            inputs = Untouched(velocity=velocity)
            d, a, rows, inverse = (table.tensor for table in tables)
            run.token_select(velocity, d, keep, age=a, high=high, rows=rows, inverse=inverse)
            what = f"token_select on {run.label}"
            inputs.check(what)
            for table in tables:
                table.assert_intact(what)
            want = Expected(velocity, drops, keep, age=age, high=high)
            assert_equal(f"{what}, rows between guards", rows, want.rows)


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        g = generator(11)
        velocity = exact_field(torch.randint(3, (2, 15, 68), generator=g), dtype, "std")
        drops = counts(2, 1020, 1, g)
        first = run.token_select(velocity, drops.clone(), 500, high=100)
        threads = torch.get_num_threads()
        try:
            for i in range(run.repeats(10)):
                torch.set_num_threads(1 + i % 2)
                again = run.token_select(velocity, drops.clone(), 500, high=100)
                for a, b in zip(again, first, strict=True):
                    assert_equal(f"token_select on {run.label}, repeat {i}", a, b)
        finally:
            torch.set_num_threads(threads)


def check_samples_are_apart(run: Runner) -> None:
    """A sample is selected as if it were alone."""
    for dtype in run.dtypes():
        velocity, drops = inputs_apart((3, 9, 11, 2, 2, 4), dtype, 40, 12, high=20)
        rows, inverse = run.token_select(velocity, drops.clone(), 40, high=20)
        if torch.equal(rows[0], rows[1]) or torch.equal(rows[1], rows[2]):
            raise Mismatch("the samples are not told apart")
        for b in range(3):
            one = slice(b, b + 1)
            alone = run.token_select(velocity[one], drops[one].clone(), 40, high=20)
            assert_equal(f"token_select on {run.label}, rows of {b} alone", alone[0], rows[one])
            assert_equal(f"token_select on {run.label}, inverse of {b}", alone[1], inverse[one])


def check_every_token_is_kept(run: Runner) -> None:
    """Over 50 steps of a field that does not change, whoever was dropped comes back."""
    dtype = run.dtypes()[-1]
    g = generator(13)
    size = 0.5 + torch.rand(1, 6, 8, 1, 1, 1, generator=g)
    velocity = normal((1, 6, 8, 2, 2, 4), dtype, g) * size.to(dtype)
    for high in (0, 8, 24):
        drops = torch.zeros(1, 48, dtype=torch.int32)
        age, oldest = torch.zeros_like(drops), 0
        kept = torch.zeros(48, dtype=torch.int32)
        for _ in range(50):
            rows, _ = run.token_select(velocity, drops, 24, high=high, age=age)
            kept[rows[0].long()] += 1
            oldest = max(oldest, int(age.max()))
        if int(kept.min()) == 0 or oldest > 45:
            raise Mismatch(f"token_select on {run.label}, high {high}: a token never came back")
        if not torch.equal(kept + drops[0], torch.full_like(kept, 50)):
            raise Mismatch(f"token_select on {run.label}: drops and kept do not add up to 50")


def check_a_bounded_age(run: Runner) -> None:
    """With max_age = 3 and half of the tokens kept, no token is dropped four times in a row."""
    dtype = run.dtypes()[-1]
    velocity = normal((2, 6, 8, 2, 2, 4), dtype, generator(14))
    drops = torch.zeros(2, 48, dtype=torch.int32)
    age = torch.zeros_like(drops)
    for _ in range(12):
        run.token_select(velocity, drops, 24, high=24, starvation=0.0, age=age, max_age=3)
        if int(age.max()) > 3:
            raise Mismatch(f"token_select on {run.label}: age {int(age.max())}, the limit is 3")


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        drops = torch.zeros(0, 6, dtype=torch.int32)
        rows, inverse = run.token_select(torch.zeros(0, 2, 3, 2, 2, 4, dtype=dtype), drops, 4)
        assert rows.shape == (0, 4)
        assert inverse.shape == (0, 6)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_token_select(check, runner):
    check(runner)
