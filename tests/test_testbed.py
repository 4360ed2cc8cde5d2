"""The testbed: its statistics and its solver against what is known, and that it goes on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import arms
import bed as beds
import fastdit
import testbed
from fastdit import tiny
from fastdit.evaluate.arms import Arm, plain
from fastdit.evaluate.paired import ratio, share
from fastdit.search.ab2 import AB2Scheduler
from fastdit.tiny.captions import parse
from fastdit.tokens import resolution
from subjects import SUBJECTS


def test_ratios_are_paired():
    """Pictures of unlike difficulty: each is twice as far, so all intervals close on 2."""
    others = np.array([1e-4, 1e-2, 1.0, 3.0])
    found = ratio(2 * others, others)
    assert all(value == pytest.approx(2.0) for value in found.values())
    flipped = ratio(np.array([1.0, 1.0, 1.0, 100.0]), np.ones(4))
    assert flipped["median"] == pytest.approx(1.0)
    assert flipped["value"] == pytest.approx(100**0.25)
    assert flipped["low"] == pytest.approx(1.0)
    assert flipped["high"] > 3


def test_shares_are_paired():
    flags = np.array([True] * 8 + [False] * 2)
    found = share(flags, np.array([True] * 5 + [False] * 5))
    assert found["value"] == 0.8
    assert found["less"] == pytest.approx(0.3)
    assert found["low"] < 0.3 < found["high"]
    assert share(flags, flags)["low"] == share(flags, flags)["high"] == 0.0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ab2_integrates_a_line_exactly_after_its_first_step(shift):
    scheduler = AB2Scheduler(shift=shift)
    for _ in range(2):  # and begins anew
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
        sigmas = scheduler.sigmas.double()
        x = torch.zeros(1, dtype=torch.float64)
        for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            x = scheduler.step((3 * sigma + 1).view(1), t, x, return_dict=False)[0]
        first = (sigmas[1] - sigmas[0]) * (3 * sigmas[0] + 1)
        rest = 1.5 * (sigmas[-1] ** 2 - sigmas[1] ** 2) + sigmas[-1] - sigmas[1]
        assert float(x) == pytest.approx(float(first + rest), abs=1e-5)


def test_open_captions_say_shapes_and_leave_the_rest():
    texts = SUBJECTS["tiny"].prompts("open", 32)
    assert len(set(texts)) > 16
    for text in texts:
        objects = parse(text).objects
        assert 1 <= len(objects) <= 2
        assert all(one.size is None and one.place is None for one in objects)
    assert SUBJECTS["tiny"].prompts("open", 16) == texts[:16]
    assert SUBJECTS["tiny"].prompts("full", 16) == SUBJECTS["tiny"].prompts("full", 32)[:16]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    bed = beds.Bed(pipe, "open", 2.5, 32, tmp_path)
    name, arm = plain("unipc", 2)
    whole = bed.latents(name, arm, 32)
    path = next(bed.folder.glob("*.npy"))
    np.save(path, whole[:16])
    seen: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    np.testing.assert_array_equal(bed.latents(name, arm, 32), whole)
    assert len(seen) == 2  # steps of one batch
    assert testbed.away(whole, whole).max() == pytest.approx(1e-9)
    assert bed.arithmetic(arm) == 2.0
    dense = arms.every("euler", 4, 2, 1)
    assert bed.arithmetic(dense) == pytest.approx(2.0, rel=0.05)


def test_a_baseline_takes_no_longer_and_has_the_arms_own_levels():
    """Plain steps cost 1 each and 2 for the rest; the arm's 7.5 are worth 5 of them, and its arithmetic 4."""

    class Stand(beds.Bed):
        def __init__(self):
            self.pipe = pipe

        def arithmetic(self, arm):
            return 4.2

    pipe = tiny.load_pipeline()
    pipe.stock_scheduler = pipe.scheduler
    arm = arms.every("unipc", 8, 2, 1)
    seconds = {"euler 4": 6.0, "euler 20": 22.0, "unipc 8, every 2, V": 7.5}
    found, beside = testbed.baselines({"unipc 8, every 2, V": arm}, Stand(), seconds)
    sides = beside["unipc 8, every 2, V"]
    assert {what: {found[name].steps for name in names} for what, names in sides.items()} == {
        "arithmetic": {4},
        "time": {5},
        "more time": {6},
        "nodes": {4},
    }
    _, untimed = testbed.baselines({"RAS": arms.fixed(None, 8)}, Stand(), {}, sides=("arithmetic",))
    assert untimed == {"RAS": {"arithmetic": ["euler 4", "unipc 4", "ab2 4"]}}
    own = found[sides["nodes"][0]]
    arguments = own.prepare(pipe)
    assert isinstance(pipe.scheduler, AB2Scheduler)
    pipe.scheduler.set_timesteps(sigmas=arguments["sigmas"])
    wanted = fastdit.recommend(stock(), 8).scheduler
    wanted.set_timesteps(8)
    np.testing.assert_allclose(pipe.scheduler.sigmas[:-1], wanted.sigmas[:-1][::2], rtol=1e-6)


def test_what_is_done_once_after_a_patch_is_not_timed(tmp_path, monkeypatch):
    """Nor is the patch; plain steps are timed on the same ops as all others."""
    told = []

    class Stand(beds.Bed):
        def _patched(self, arm):
            told.append(f"patch {arm.method(None, arm.steps).name}")
            return self

        def unpatch(self):
            told.append("unpatch")

        def _called(self, arm, arguments, texts, first):
            told.append(f"draw {len(texts)}")

    def now():
        told.append("clock")
        return float(told.count("draw 2"))

    monkeypatch.setattr(beds.time, "process_time", now)
    monkeypatch.setattr(beds.time, "perf_counter", now)
    pipe = stock()
    pipe.stock_scheduler = pipe.scheduler
    bed = Stand(pipe, "open", 2.5, 64, tmp_path)
    name, arm = arms.dense(4)
    assert bed.seconds({name: arm}) == {name: 1 / 2}
    once = ["patch Dense", "draw 2", "clock", "draw 2", "clock", "unpatch"]
    assert told == once * beds.ROUNDS
    told.clear()
    clock = testbed.timed(bed, {}, tmp_path / "seconds.json")
    assert set(clock["seconds"]) == {"euler 4", "euler 20"}
    assert told.count("patch Dense") == 2 * beds.ROUNDS


def test_the_controls_of_ralu_change_what_they_say(tmp_path):
    """Other noise draws other pictures; corners move the coarse tokens of a mixed stage and nothing else."""
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    bed = beds.Bed(pipe, "full", 2.5, 64, tmp_path)
    some = bed.latents("some", Arm("euler", 1), 16)
    assert np.abs(some - bed.latents("other", Arm("euler", 1, seed=1_000_000), 16)).min() > 0
    table = torch.zeros(1, 3, 3, dtype=torch.int32)
    with arms.corners():
        moved = resolution.Layout((2, 2), table, 1, True, 4)
        assert resolution.Layout.uniform((2, 2), 1, table.device).name == "coarse"
    kept = resolution.Layout((2, 2), table, 1, True, 4)
    assert vars(moved) == vars(kept) | {"centred": False}


def stock():
    return tiny.load_pipeline()


def test_the_judge_finds_no_fault_in_the_truth(tmp_path):
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    bed = beds.Bed(pipe, "full", 2.5, 64, tmp_path)
    latents = bed.latents("some", plain("ab2", 4)[1], 16)
    judge = testbed.Judge(bed, SUBJECTS["tiny"].prompts("full", 16), latents)
    itself = judge.measure(latents)
    assert itself["error"].max() == pytest.approx(1e-9)
    assert abs(itself["frechet"][0]) < 1e-5  # of some 10; roots of rounded eigenvalues
    other = judge.measure(latents[::-1].copy())
    assert other["score"].mean() < itself["score"].mean()
    verdict = testbed.against(other, itself)
    assert verdict["error"]["low"] > 1
    assert verdict["score"]["less"] < 0
    assert abs(verdict["frechet"]["less"]) < 1e-5  # the same pictures in another order
