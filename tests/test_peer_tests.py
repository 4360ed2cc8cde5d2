"""What tools/peer_tests.py makes of an outcome: the rules, on outcomes made up here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdit
import fastdit.ops

TOOLS = Path(__file__).parents[1] / "tools"


def output(*samples: float, half: bool = False, shape: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"samples": list(samples), "half": half, "shape": list(shape)}


PASSED = {"outcome": "passed", "outputs": [output(0.5, -0.5)]}
SKIPPED = {"outcome": "skipped"}


def failed(**changes: Any) -> dict[str, Any]:
    result = {"outcome": "failed", "refusal": False, "assertion": True, "numbers": False}
    return result | {"name": "test_one", "error": "ValueError", "outputs": []} | changes


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("peer_tests")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("PEER_MODE", "ras")
    monkeypatch.setenv("PEER_TARGET", "models")
    return importlib.import_module("peer_plugin")


@pytest.mark.parametrize(
    ("result", "dense", "lossy"),
    [
        (PASSED, "pass", "pass"),
        (failed(), "fault", "fault"),
        (failed(refusal=True, assertion=False), "fault", "refused"),
        (failed(numbers=True), "fault", "numbers"),
        (failed(numbers=True, assertion=False), "fault", "fault"),
        (failed(name="test_faster_cache_state"), "fault", "counts"),
        (SKIPPED, "fault", "fault"),
        (None, "fault", "fault"),
        (PASSED | {"outputs": [output(0.5, -0.4)]}, "fault", "pass"),
    ],
)
def test_verdicts(tool, result, dense, lossy):
    assert tool.verdict("dense", PASSED, result) == dense
    assert tool.verdict("ras", PASSED, result) == lossy


def test_what_does_not_pass_stock_proves_nothing(tool):
    for mode in ("dense", "ras"):
        assert tool.verdict(mode, SKIPPED, PASSED) == "unproved"
        assert tool.verdict(mode, failed(), failed()) == "unproved"
    assert tool.verdict("ras", failed(), PASSED) == "unproved"


def test_what_fails_stock_fails_in_the_same_way_with_dense(tool):
    assert tool.verdict("dense", failed(), failed(error="TypeError")) == "fault"
    assert tool.verdict("dense", failed(), failed(outputs=[output(1.0)])) == "fault"
    assert tool.verdict("dense", failed(), PASSED) == "fault"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([output(0.5, -0.5)], None),
        ([output(0.5, -0.5000001)], None),
        ([output(0.5, -0.45, half=True)], None),
        ([], "0 outputs instead of 1"),
        ([output(0.5, -0.5, shape=(2, 1))], "inf"),
        ([output(0.5, float("nan"))], "inf"),
        ([output(0.5, -0.3)], "0.2 from stock"),
    ],
)
def test_outputs_are_compared(tool, outputs, said):
    found = tool.apart(PASSED, PASSED | {"outputs": outputs})
    assert found is None if said is None else said in found


def test_a_broken_run_is_a_fault(tool):
    _, faults = tool.compare("dit", "dense", {"a::test_one": PASSED}, {})
    assert faults == {"dense: missing: ": ["a::test_one"], "dense: nothing was patched": ["dit"]}
    refused = {"a::test_one": failed(refusal=True)}
    assert tool.compare("dit", "ras", {"a::test_one": PASSED}, refused)[1] == {}


def test_numbers_of_a_stock_model_are_found(plugin):
    def with_numbers():
        expected = [0.25, -0.5, 0.75]
        assert expected

    def without():
        for scale in (0.5, 1.0):
            assert scale, [1, 2, 3]

    assert plugin.holds_numbers(with_numbers.__code__)
    assert not plugin.holds_numbers(without.__code__)
    assert not plugin.holds_numbers(compile("[0.25, -0.5, 0.75]", "no file", "eval"))


def test_what_an_op_says_of_its_arguments_is_no_refusal(plugin):
    def raised(call, *arguments, cause=None):
        try:
            try:
                call(*arguments)
            except Exception as error:
                if cause is None:
                    raise
                raise cause from error
        except Exception as error:
            return error

    refusal = raised(fastdit.RAS, 2.0)
    assert isinstance(refusal, fastdit.ArgumentError)
    assert plugin.is_refusal(refusal)
    assert plugin.is_refusal(raised(fastdit.RAS, 2.0, cause=RuntimeError()))
    assert not plugin.is_refusal(raised(int, "one"))
    x = torch.zeros(1, 2, 4)
    complaint = raised(fastdit.ops.gated_residual, x, x.double(), x)
    assert isinstance(complaint, fastdit.ArgumentError)
    assert not plugin.is_refusal(complaint)


def test_the_stand_in_hub_is_a_cache(tool, tmp_path, monkeypatch):
    hub = importlib.import_module("peer_hub")
    hub.write_hub(tmp_path)
    for repository in (hub.CLIP, hub.T5, hub.GEMMA, hub.QWEN, *hub.ENCODERS):
        snapshot = tmp_path / ("models--" + repository.replace("/", "--")) / "snapshots"
        assert (snapshot / hub.REVISION / "tokenizer_config.json").is_file()


REPORT = """<testsuites><testsuite>
<testcase name="test_it[A-OneConfig]"><properties><property name="became" value="served"/></properties></testcase>
<testcase name="test_it[B-Config]"><properties><property name="became" value="served"/></properties>
  <failure message="far
 from it">trace</failure></testcase>
<testcase name="test_it[C]"><skipped message="none"/></testcase>
<testcase name="test_it[D]"><error message="broke">trace</error></testcase>
</testsuite></testsuites>"""


def test_what_became_of_each_class(tool, tmp_path):
    (tmp_path / "classes.xml").write_text(REPORT)
    assert tool.read_classes(tmp_path / "classes.xml") == {
        "A, OneConfig": "served",
        "B, Config": "fault: far from it",
        "C": "unproved: none",
        "D": "fault: broke",
    }
