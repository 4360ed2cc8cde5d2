"""What a GPU would be asked is rehearsed from end to end, and what fails there costs one section."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def imported(monkeypatch):
    """What imports a file of benchmarks or tools."""
    for folder in (BENCHMARKS, ROOT / "tools"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    """The result of a whole check, of the fewest arms, on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-P", str(BENCHMARKS / "gpu_check.py"), "--rehearse", "--quick"]
    command += ["--rows", "pixart:every(2), graphs", "--out", str(folder / "result.json")]
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_every_section_makes_the_rows_it_promised(rehearsed, imported):
    sections = imported("gpu_sections.sections")
    assert rehearsed["rehearsal"] is True
    assert tuple(rehearsed["sections"]) == sections.NAMES
    for name, section in rehearsed["sections"].items():
        assert section["state"] == "done", name
        assert not section["unmade"], name
        assert section["rows"], name
        for row in section["rows"]:
            if name != "build":
                assert row["gpu"] == "none: a rehearsal"
                assert row["launch_us"] > 0
    stands_in = " ".join(
        s for found in rehearsed["sections"].values() for s in found.get("stand-ins", ())
    )
    for what in ("tape", "eager backend", "host's clock", "mirrored", "compute-sanitizer", "built"):
        assert what in stands_in


@pytest.mark.slow
def test_rows_of_runs_stand_beside_both_baselines(rehearsed):
    rows = {row["method"]: row for row in rehearsed["sections"]["flux"]["rows"] if "method" in row}
    assert set(rows) == {
        "unpatched",
        "dense",
        "every(2), graphs",
        "compiled, best attention",
        "every(2)",
        "RAS 0.25",
    }
    for row in rows.values():
        assert row["over"]["unpatched"] > 0
        assert row["over"]["compiled, best attention"] > 0
        for name in ("call_ms", "host_ms", "device_ms"):
            assert len(row[name]) == row["steps"]
            assert min(row[name]) > 0
        assert row["idle"] == pytest.approx(1 - sum(row["device_ms"]) / sum(row["call_ms"]))
    assert rows["every(2)"]["flop_speedup"] > 1.9
    assert rows["RAS 0.25"]["flop_speedup"] > 1.2
    assert rows["every(2), graphs"]["mode"].startswith("replayed")
    assert rows["every(2), graphs"]["to_eager"] < 1e-5
    (absent,) = (row for row in rehearsed["sections"]["flux"]["rows"] if "absent" in row)
    assert "cache-dit" in absent["name"]
    assert "--wheels" in absent["absent"]
    named = {row["method"]: row for row in rehearsed["sections"]["rows"]["rows"]}
    over = named["every(2), graphs"]["over"]["dense, graphs"]
    realised = over / (
        named["every(2), graphs"]["flop_speedup"] / named["dense, graphs"]["flop_speedup"]
    )
    assert named["every(2), graphs"]["realised_over_graphs"] == pytest.approx(realised)
    rivals = rehearsed["sections"]["arms"]["rows"]
    assert any(row["method"].startswith("FirstBlockCache") for row in rivals)


@pytest.mark.slow
def test_pictures_and_kernels_are_right(rehearsed):
    for row in rehearsed["sections"]["graphs"]["rows"]:
        assert row["to_cpu"] < 1e-5, row
        assert row["mode"].startswith("replayed")
        assert row["graphs"] < 1e-5, row
    for row in rehearsed["sections"]["ops"]["rows"]:
        assert set(row["us"]) >= {"eager", "cpu"}, row
        assert not row["failed"], row
    for row in rehearsed["sections"]["fusions"]["rows"]:
        assert not row["failed"], row
    (tests,) = rehearsed["sections"]["tests"]["rows"]
    assert set(tests["outcomes"]) == {"PASSED"}
    assert rehearsed["sections"]["sanitizer"]["rows"][0]["collected"] >= 0


@pytest.mark.slow
def test_tables_are_made_of_such_a_result(rehearsed, imported, monkeypatch, tmp_path):
    tables, results = imported("gpu_tables"), imported("gpu_results")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "gpu-check-some.json").write_text(json.dumps(rehearsed))
    assert not results.results()  # a rehearsal is not taken for a measurement
    measured = rehearsed | {"rehearsal": False, "package": "built"}
    measured["machine"] = measured["machine"] | {"gpu": "Some GPU", "driver": "1"}
    (tmp_path / "gpu-check-some.json").write_text(
        json.dumps(measured | {"package": "the checkout"})
    )
    assert not results.results()
    (tmp_path / "gpu-check-some.json").write_text(json.dumps(measured))
    (result,) = results.results()
    text = "\n".join(tables.runs(result))
    assert "over compiled | idle |" in text
    assert "| every(2), graphs |" in text
    assert "cache-dit is not installed" in text
    assert "Host time of a call" in text
    text = "\n".join(tables.kernels(result))
    assert text.count("\n| gated_residual |") == 3
    assert "\n| GELU, tiny |" in text
    assert "\n| tiny | 1.0 |" in text
    for lines in (tables.claim(), tables.best(), tables.measured("every", "random")):
        assert lines


def test_a_rehearsal_has_no_page_of_what_is_possible(imported, tmp_path, monkeypatch):
    roofline = imported("roofline")
    (tmp_path / "result.json").write_text(json.dumps({"rehearsal": True}))
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--results", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit) as refused:
        roofline.main()
    assert refused.value.code == 2


# ---- what fails


def section(imported, name, seconds=60.0, least=1.0):
    made = imported("gpu_sections.sections").Section
    return made(name, 1, seconds, least, f"gpu_check_fakes:{name}", "a fake")


@pytest.fixture
def check(imported, tmp_path, monkeypatch):
    """A check of fakes, of so many seconds in all."""
    driver = imported("gpu_check")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which a check adds to
    monkeypatch.setattr(driver, "GRACE", 0.5)

    def made(seconds):
        settings = {"rehearsal": True}
        return driver.Check(seconds, tmp_path / "out" / "result.json", settings)

    return made


def test_what_fails_costs_its_section_alone(check, imported):
    names = ("raising", "dying", "forgetful", "broken_row", "quick")
    made = check(math.inf)
    made.run([section(imported, name) for name in names])
    found = json.loads(made.out.read_text())["sections"]
    states = {name: found[name]["state"] for name in names}
    assert states == {
        "raising": "failed",
        "dying": "failed",
        "forgetful": "done",
        "broken_row": "done",
        "quick": "done",
    }
    for name in ("raising", "dying", "forgetful"):
        assert [row["name"] for row in found[name]["rows"]] == ["first"]
        assert found[name]["unmade"] == ["second"]
    assert "no such kernel" in found["raising"]["why"]
    assert "ended with 9" in found["dying"]["why"]
    assert found["broken_row"]["unmade"] == ["first"]
    assert "no such size" in found["broken_row"]["rows"][0]["error"]
    assert found["quick"]["unmade"] == []
    faults = " ".join(made.faults())
    for what in ("raising: failed", "forgetful: no row 'second'", "broken_row: no row 'first'"):
        assert what in faults
    assert "quick" not in faults


def test_what_takes_too_long_is_ended_and_what_does_not_fit_is_skipped_by_name(check, imported):
    check(math.inf).run([section(imported, "quick")])  # what all import is imported now
    made = check(900.0)
    made.run(
        [
            section(imported, "slow", seconds=4.0),
            section(imported, "quick", seconds=1000.0, least=1000.0),
            section(imported, "forgetful"),
        ]
    )
    found = json.loads(made.out.read_text())["sections"]
    assert found["slow"]["state"] == "out of time"
    assert [row["name"] for row in found["slow"]["rows"]] == ["first"]
    assert found["slow"]["unmade"] == ["second"]
    assert found["quick"]["state"] == "skipped"
    assert "it needs 1000 s" in found["quick"]["why"]
    assert found["forgetful"]["state"] == "done"


def test_where_forks_are_of_no_use_sections_import_for_themselves(check, imported):
    made = check(math.inf)
    made.run([section(imported, "unforkable")])
    (answer,) = made.answers.values()
    assert answer.state == "done"
    assert answer.unmade() == []
    assert made.method == "spawn"


def test_a_section_has_what_others_spared_and_no_more(imported):
    sections = imported("gpu_sections.sections")
    one, two, three = (section(imported, "quick", seconds, 10.0) for seconds in (60.0, 20.0, 110.0))
    assert sections.limit(one, [two, three], 200.0) == 70.0
    assert sections.limit(two, [three], 190.0) == 80.0
    assert sections.limit(two, [three], 100.0) == 20.0
    assert sections.limit(three, [], 12.0) == 12.0
    assert sections.limit(three, [], 9.0) is None
    assert sections.limit(three, [two], math.inf) == 110.0


def test_the_first_call_fits_and_every_function_is_there(imported):
    sections = imported("gpu_sections.sections")
    driver = imported("gpu_check")
    planned = sum(section.seconds for section in sections.chosen(1, ()))
    assert planned <= 300 - driver.RESERVE
    for found in sections.SECTIONS:
        module, _, function = found.function.partition(":")
        assert callable(getattr(imported(module), function))
    assert {s.call for s in sections.chosen(2, ())} == {0, 2}
    assert [s.name for s in sections.chosen(None, ("ops", "flux"))] == ["build", "flux", "ops"]


# ---- what measures


def test_a_clock_times_calls_of_one_transformer_and_leaves_its_class_as_it_was(imported):
    clocks = imported("gpu_sections.clocks")

    class Model(torch.nn.Linear):
        pass

    mine, other, x = Model(4, 4), Model(4, 4), torch.ones(1, 4)
    clock = clocks.CallClock(mine, torch.device("cpu"))
    with clock.running():
        mine(x), other(x), mine(x)
        assert len(clock.host_ms) == len(clock.call_ms()) == 2
    assert "__call__" not in vars(Model)
    with pytest.raises(ValueError, match="broken off"), clock.running():
        raise ValueError("broken off")
    assert "__call__" not in vars(Model)
    assert clocks.idle_share([2.0, 2.0], [1.0, 2.0]) == 0.25


def test_a_build_is_made_anew_where_its_sources_are_others(imported, monkeypatch, tmp_path):
    build, order = imported("gpu_sections.build"), imported("gpu_sections.order")
    commands = []

    def run(command, seconds, **environment):
        commands.append((command, environment))
        if "pip" in command:
            (tmp_path / "build" / "gpu").mkdir(parents=True)
        return "90a-real\n"

    monkeypatch.setattr(build, "shell", run)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUILT", tmp_path / "build" / "gpu")
    for name in (*build.SOURCES, "csrc/one.cu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    asked = order.Order("build", "", 60.0, tmp_path / "file", rehearsal=False)
    made = [build.build(asked).rows[0]["built"] for _ in range(2)]
    (tmp_path / "csrc" / "one.cu").write_text("2")
    made.append(build.build(asked).rows[0]["built"])
    assert made == [True, False, True]
    assert commands[1][1] == {"FASTDIT_CUDA_ARCHS": "90a-real"}
    answer = build.build(dataclasses.replace(asked, wheels=tmp_path / "none"))
    assert answer.state == "failed"
    assert "no wheel" in answer.why
    package, paths = build.paths(answer, asked)
    assert "without compiled kernels" in package
    assert paths == [str(tmp_path)]


def test_a_model_is_as_before_after_a_rival_that_leaves_its_own_forwards(imported, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = [dict(vars(module)) for module in model.modules()]

    def enable_cache(pipe, cache_config):
        for module in model.modules():
            module.forward = lambda x: x
            module.was_here = True

    rival = types.ModuleType("cache_dit")
    rival.__spec__ = importlib.machinery.ModuleSpec("cache_dit", None)
    rival.DBCacheConfig = dict
    rival.enable_cache, rival.disable_cache = enable_cache, lambda pipe: None
    monkeypatch.setitem(sys.modules, "cache_dit", rival)
    runs = types.SimpleNamespace(steps=4, transformer=model, pipe=None)
    with imported("gpu_sections.run_arms").cache_dit(runs, None):
        assert model.was_here
    assert [dict(vars(module)) for module in model.modules()] == before
