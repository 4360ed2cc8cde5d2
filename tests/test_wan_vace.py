"""Wan's VACE, whose control has blocks and a stream of its own; its pipeline is in test_given_pictures.py."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanVACETransformer3DModel

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits, within_contract
from fastdit import RALU, RAS, ArgumentError, Cached, Schedule, UnsupportedModelError
from oracle import Oracle, random_bits
from ras_oracle import RowOracle, random_rows
from test_given_pictures import drawn, vace
from test_ras import Chosen, chosen  # noqa: F401
from test_wan import DTYPES, as_double
from tiny_models import randomise

pytestmark = pytest.mark.diffusers
STEPS = 6


def model(dtype=torch.float32):
    given = {name: value for name, value in tiny_models.wan(4).config.items() if name[0] != "_"}
    names = WanVACETransformer3DModel.__init__.__wrapped__.__code__.co_varnames
    given |= {"vace_layers": [0, 2], "vace_in_channels": 12}
    made = WanVACETransformer3DModel(**{k: v for k, v in given.items() if k in names})
    return randomise(made).to(dtype)


def calls(dtype, steps=STEPS):
    """Two videos with hints of unlike strength."""
    for step in range(steps):
        given = tiny_models.call("wan", 2, dtype, step=step)
        draw = torch.Generator().manual_seed(9)
        shape = 2, 12, *given["hidden_states"].shape[2:]
        control = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        scales = torch.tensor([0.5, 1.5], dtype=dtype)
        yield given | {
            "control_hidden_states": control,
            "control_hidden_states_scale": scales,
        }


@torch.no_grad()
def run(made, given):
    return [made(**one)[0] for one in given]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_own_bits_in_every_dtype(dtype):
    made, given = model(dtype), list(calls(dtype))
    stock = run(made, given)
    bits, names = random_bits(made, STEPS, 2)
    with Oracle(made, bits).installed():
        cached = run(made, given)
    for methods, expected in (((), stock), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(made, *methods, backend="reference")
        with handle.run(range(STEPS)):
            for found, wanted in zip(run(made, given), expected, strict=True):
                same_bits(found, wanted)
        handle.unpatch()


def test_a_schedule_is_exact_in_fp64():
    """Also where all of a step is reused, and what is kept of it is sums."""
    with tiny_models.fp64_throughout():
        made, given = model(torch.float64), list(calls(torch.float64))
        bits, names = random_bits(made, STEPS, 3)
        for each in bits.values():
            each[0], each[2:4] = True, False
        with Oracle(made, bits).installed():
            expected = run(made, given)
        handle = fastdit.patch(made, Cached(Schedule.from_bits(bits, names)))
        for _ in range(2):
            with handle.run(range(STEPS)):
                for found, wanted in zip(run(made, given), expected, strict=True):
                    within_contract(found, wanted, bound=FORWARD_FP64)
        assert handle.last_run().programs >= STEPS - 1


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_fast_path_errs_at_most_twice_as_much_as_stock(dtype):
    made, given = model(dtype), list(calls(dtype))
    stock = torch.cat(run(made, given))
    with tiny_models.fp64_throughout():
        truth = torch.cat(run(model(dtype).double(), map(as_double, given)))
    fastdit.patch(made)
    within_contract(torch.cat(run(made, given)), stock, truth)


def test_another_control_makes_caches_anew():
    made = model()
    one, other = list(calls(torch.float32, 2))
    other["control_hidden_states"] = 2 * other["control_hidden_states"]
    expected = run(made, [other])[0]
    handle = fastdit.patch(made, Cached(Schedule.every(2)), backend="reference")
    with handle.run(range(2)):
        run(made, [one])
        same_bits(run(made, [other])[0], expected)


def test_rows_equal_the_row_oracle(chosen):  # noqa: F811
    """Beside a random schedule, of blocks of both kinds."""
    with tiny_models.fp64_throughout():
        pipe, given = vace(torch.float64)
        counts = {1: 24, 2: 16, 4: 40}
        rows = random_rows(counts, 48, 1)
        bits, names = random_bits(pipe.transformer, 5, 4)
        oracle = RowOracle(pipe, rows, calls_per_step=2, bits=bits)
        with oracle.installed():
            expected = drawn(pipe, given)
        schedule = Cached(Schedule.from_bits(bits, names))
        handle = fastdit.patch(pipe, Chosen(rows, counts), schedule)
        within_contract(drawn(pipe, given), expected)
    assert handle.report().tokens_per_step == (48, 24, 16, 48, 40)


def test_a_control_of_fewer_frames_beside_rows():
    made = model()
    handle = fastdit.patch(made, RAS(start=1, ratio=0.5, align=1, resets=()))
    refused = pytest.raises(ArgumentError, match="control_hidden_states must have as many frames")
    with refused, handle.run(range(STEPS)):
        for one in calls(torch.float32):
            one["control_hidden_states"] = one["control_hidden_states"][:, :, :1]
            run(made, [one])
            handle.advance()


def test_two_resolutions_are_refused_by_name():
    pipe, _ = vace()
    with pytest.raises(UnsupportedModelError, match="WanVACETransformer3DModel cannot change its"):
        fastdit.patch(pipe, RALU.preset("flux-4x", family=None))


def test_the_hints_count():
    """Else the tests here could not fail."""
    made, (given,) = model(), list(calls(torch.float32, 1))
    plain = given | {"control_hidden_states_scale": torch.zeros(2)}
    assert distance(run(made, [given])[0], run(made, [plain])[0]) > 0.01
