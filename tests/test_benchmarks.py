"""Every benchmark runs, at a tiny size and untimed; `test_gpu_check.py` rehearses what a GPU would measure."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdit
import tiny_models
from fastdit import ops, tiny
from fastdit.evaluate.frechet import distance

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_op_benchmarks_run(tmp_path):
    # -P: the folder the command is given in stays off the path.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rA", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "not inductor"]
    command += [str(BENCHMARKS / f"bench_{op}.py") for op in ops.FILES]
    environment = {**os.environ, "FASTDIT_BENCH_SHAPES": "tiny"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert {op for op in ops.FILES if f"bench_{op}.py::" in done.stdout} == set(ops.FILES)


def run(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks, which finds its neighbours and the installed package only."""
    environment = os.environ | {"PYTHONPATH": _path(BENCHMARKS)}
    command = [sys.executable, "-P", str(BENCHMARKS / script), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _path(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def test_a_gpu_would_measure_every_op(monkeypatch):
    """Attention, whose sizes are others, has a section of its own (`attention.py`)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases, shapes = (importlib.import_module(name) for name in ("op_cases", "shapes"))
    measured = {case.op for case in cases.cases(shapes.TINY)}
    assert set(ops.OPS) - measured == {"sparse_attention"}


@pytest.mark.slow
def test_the_benchmark_of_ras_runs(tmp_path):
    out = tmp_path / "ras.json"
    sizes = ["--depth", "1", "--tokens", "256", "--pairs", "1", "--rows", "2", "--heads", "4"]
    done = run("bench_ras.py", tmp_path, "--out", str(out), *sizes)
    assert done.returncode == 0, done.stderr
    (batch,) = json.loads(out.read_text())["batches"]
    for weights in ("packed", "as they are"):
        steps = batch[weights]["steps"]
        assert [row["active"] for row in steps] == [128, 64, 64]
        assert steps[0]["flop_speedup"] == pytest.approx(2.50, abs=0.01)
        assert 0 < steps[0]["outside_share"] < 1


@pytest.fixture
def ralu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_ralu")


@pytest.mark.parametrize("name", ["sd3", "flux"])  # which the benchmark is of
def test_the_benchmark_of_ralu_runs(name, ralu, monkeypatch):
    monkeypatch.setattr(ralu, "build", lambda name, depth: tiny_models.pipeline(name))
    family = dataclasses.replace(ralu.FAMILIES[name], text=5, whole=True)
    method = fastdit.RALU.preset(family.preset)
    with torch.no_grad():
        row = ralu.measure(name, family, 16, 2)
    coarse, mixed, full = (row["tokens_per_step"][place] for place in (0, method.steps[0], -1))
    assert (coarse, full) == (16, 64)
    assert mixed == 16 + 3 * int(16 * method.split)
    assert len(row["stage_step_s"]) == 3
    for what in ("between_s", "published_between_s", "decode_s", "whole_run_s", "outside_share"):
        assert row[what] > 0, what


def test_the_published_noise_has_the_published_covariance(ralu):
    torch.manual_seed(0)
    draws = torch.stack([ralu.published_channel(2, 2, 0.2) for _ in range(20_000)])
    expected = torch.block_diag(torch.eye(2), *[torch.eye(4) - 0.2] * 2)
    # The standard error of an entry is 1 / sqrt(20000), of the diagonal sqrt(2) times that.
    torch.testing.assert_close(torch.cov(draws.T), expected, rtol=0, atol=0.05)


def test_frechet_distance_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    first, second = (
        (np.zeros(5), turn @ np.diag(a) @ turn.T),
        (np.ones(5), turn @ np.diag(b) @ turn.T),
    )
    # Covariances that commute have the closed form sum (sqrt a - sqrt b)^2.
    wanted = 5 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(first, second) == pytest.approx(wanted, rel=1e-9)
    assert distance(first, first) == pytest.approx(0, abs=1e-9)
    # And any two: the trace of the root by another route.
    s1, s2 = (m @ m.T for m in rng.normal(size=(2, 5, 5)))
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
    wanted = np.trace(s1) + np.trace(s2) - 2 * root
    assert distance((np.zeros(5), s1), (np.zeros(5), s2)) == pytest.approx(wanted, rel=1e-6)


def test_the_control_of_ras_draws_its_tokens_at_random(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    random_tokens = importlib.import_module("arms").random_tokens
    pipe = tiny.load_pipeline()
    handle = fastdit.patch(pipe, fastdit.RAS(ratio=0.5, metric="std", start=1, align=1, resets=()))
    chosen = []
    for around in (contextlib.nullcontext, random_tokens, random_tokens):
        with around():
            pipe("a red circle", num_inference_steps=3, output_type="latent")
        chosen.append({step: mask.copy() for step, mask in handle.report().active.items()})
    ras, control, again = chosen
    for step in ras:
        assert ras[step].sum() == control[step].sum()
        assert not np.array_equal(ras[step], control[step])
        assert np.array_equal(control[step], again[step])


@pytest.mark.slow
def test_roofline_counts_what_public_models_cost(tmp_path):
    """TFLOP of a dense step, and GB of a stock one's launches that are no products, counted by others with a dispatch
    trace of stock diffusers; and the page is what results and code say.
    """
    done = run("roofline.py", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"\| ([^|]+) \| (stock|dense) \| ([\d.]+) \| [\d,]+ \| ([\d.]+) ", done.stdout
    )
    found = {(model, step): (float(tflop), float(gb)) for model, step, tflop, gb in rows}
    counted = {
        "FLUX.1-dev 1024": (74.4, 143.8),
        # Less the 1.3 and 3.3 GB of views behind products, which those traces took for copies.
        "SD3 medium 1024": (17.8, 26.4 - 1.3),
        "SD3.5 large 1024": (62.2, 122.2 - 3.3),
        "PixArt-Sigma 1024": (13.3, 19.7),
        "DiT-XL/2 512": (2.10, 4.34),
    }
    uncounted = {"Lumina-Next 1024", "Qwen-Image 1024", "FLUX.2-dev 1024"}
    uncounted |= {"Wan 2.1 14B, one frame of 1024", "Z-Image 1024", "Lumina 2 1024"}
    uncounted |= {"HunyuanVideo-1.5, one frame of 1024"}
    assert {model for model, _ in found} == set(counted) | uncounted
    for model, (tflop, gb) in counted.items():
        assert found[model, "dense"][0] == pytest.approx(tflop, rel=0.01), model
        assert found[model, "stock"][1] == pytest.approx(gb, rel=0.01), model
        assert found[model, "dense"][1] < 0.7 * gb, model
    page = BENCHMARKS.parent / "docs" / "roofline.md"
    assert done.stdout.strip() == page.read_text().strip(), (
        "run benchmarks/roofline.py --out docs/roofline.md"
    )


def test_a_race_times_each_contender_and_checks_itself():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from timing import race
    finally:
        sys.path.pop(0)
    calls: dict[str, list[int]] = {"a": [], "b": []}

    def broken(i: int) -> None:
        raise RuntimeError("no kernel")

    contenders = {"a": calls["a"].append, "b": calls["b"].append, "broken": broken}
    found = race(contenders, 3, torch.device("cpu"), turns=4)
    assert set(found.seconds) == {"a", "b"}
    assert found.failed == {"broken": "RuntimeError: no kernel"}
    assert found.self_check is not None
    # Warm-up, then a turn that is not counted and four that are; `a` runs twice in each.
    assert calls["b"] == [0, 1, 2] * 6
    assert calls["a"] == [0, 1, 2] * 12


@pytest.fixture
def router_study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("router_study")


def test_the_study_of_routers_asks_what_no_router_was_trained_on(router_study):
    from fastdit import tiny
    from fastdit.cli.training import SCENES

    asked = router_study.held_out(96)
    assert len(set(asked)) == 96
    trained = {text for objects in (1, 2) for text in tiny.prompts(SCENES, "train", objects)}
    assert trained.isdisjoint(asked)


def test_the_study_of_routers_compares_equal_arithmetic_in_pairs(router_study):
    rng = np.random.default_rng(0)
    away = {"router as every 2": rng.random(200), "every 2": rng.random(200) + 0.1}
    found = {name: {"distance": values} for name, values in away.items()}
    (row,) = router_study.compare(found, {"router as every 2": 0.5, "every 2": 0.504})
    change = away["router as every 2"] - away["every 2"]
    assert row["distance"]["value"] == pytest.approx(change[0])
    assert row["distance"]["low"] == pytest.approx(np.quantile(change[1:], 0.025))
    with pytest.raises(RuntimeError, match="every 2 spends"):
        router_study.compare(found, {"router as every 2": 0.5, "every 2": 0.51})


def test_a_router_of_forecasts_meets_an_interval_at_equal_arithmetic(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study, beds = (importlib.import_module(name) for name in ("solver_study", "bed"))
    from fastdit import tiny

    pipe = tiny.load_pipeline()
    pipe.stock_scheduler = pipe.scheduler
    handle = fastdit.patch(pipe)
    spec = handle.explain(steps=8).blocks
    handle.unpatch()
    rng = np.random.default_rng(0)
    rows = {kind: rng.normal(size=(8, count, len(names))) for kind, (count, names) in spec.items()}
    names = {kind: names for kind, (_, names) in spec.items()}
    found = fastdit.Router(rows, names, order=1)
    arms, beside = study.arms_of({"some": found}, study.macs_of(pipe, 64), 8)
    bed = beds.Bed(pipe, "full", 2.5, 64, tmp_path)
    spent = {name: bed.arithmetic(arm) for name, arm in {**arms, **beside}.items()}
    # A step that is forecast as a whole spares what lies outside the blocks, too.
    assert spent["unipc 8, every 2, V"] == pytest.approx(spent["some"], rel=0.03)
    assert spent["some"] == pytest.approx(spent["some, repeated"], rel=0.03)
    assert spent["unipc 4"] == spent["ab2 4"] == 4
    assert arms["some"].method(pipe, 8).forecasts
    assert not arms["some, repeated"].method(pipe, 8).forecasts
    sweep = study.sweep_of("some", found, study.macs_of(pipe, 64), 8)
    shares = [bed.arithmetic(arm) for arm in sweep.values()]
    # What lies outside the blocks runs unless all of a step is drawn.
    assert len(shares) == 5
    for count, share in enumerate(shares, 3):
        assert count <= share < 1.1 * count + 0.5


def test_the_benchmark_of_training_counts_in_forwards(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_train")
    one = bench.measure("drawing", 2, 1)["operations"] / 2
    epoch = bench.measure("training", 2, 1)["operations"] / one
    assert 2 < epoch - 1 <= 3.2


def test_fusions_are_rehearsed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fusions = importlib.import_module("fusions")
    rows = fusions.measure(torch.device("cpu"), turns=1)
    assert {row["what"] for row in rows} == {"project", "gelu", "waves"}
    assert not any(row["failed"] for row in rows)
    for row in rows:
        rivals = {"waves": 1, "project": 3, "gelu": 3}[row["what"]]
        assert len(row["us"]) == rivals, row
