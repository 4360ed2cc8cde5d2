"""The README and the documents say what results and code say, and their examples run."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import warnings
from pathlib import Path

import pytest

import fastdit
from fastdit import tiny
from fastdit.methods import methods
from fastdit.methods.base import NOISE_COSTS

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = (README, *sorted(DOCS.rglob("*.md")))
EXAMPLES = {
    str(page.relative_to(ROOT)): found
    for page in PAGES
    if (found := re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
}


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("readme")


def test_what_is_written_is_what_results_and_code_say(readme):
    stale = [path.name for path in readme.FILES if readme.written(path) != path.read_text()]
    assert not stale, f"run PYTHONPATH=. python tools/readme.py: {stale}"


def test_what_noise_costs_is_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "noisy-sampler.json").read_text())
    for name, percent in NOISE_COSTS.items():
        assert f"{result['shares'][name]['with noise']:.0%}" == f"{percent}%", name


def test_what_is_said_of_forecasts_is_what_was_measured(readme):
    """In the README and on the pages of Cached and RAS, in words."""
    tables = readme.testbed_tables
    clean = {}
    result = json.loads((ROOT / "benchmarks" / "results" / "testbed-caches.json").read_text())
    places = [(c["captions"], c["guidance"]) for c in result["conditions"]]
    found = {
        side: {
            name: dict(zip(places, (one.found["error"] for one in said), strict=True))
            for name, said in tables.verdicts(result, side)
        }
        for side in ("arithmetic", "time")
    }
    for name, said in tables.verdicts(result, "arithmetic"):
        clean[name] = dict(zip(places, (one.found["clean"] for one in said), strict=True))
    for steps in (20, 28):
        sharp = "full", 7.0
        assert clean[f"unipc {steps}, every 2, auto"][sharp]["low"] <= 0.0
        assert clean[f"unipc {steps}, every 2, auto"][sharp]["high"] >= 0.0
        assert clean[f"unipc {steps}, every 2, V"][sharp]["high"] < 0.0
    equal = found["arithmetic"]
    for captions in ("full", "open"):
        mild = captions, 2.5
        level = equal["unipc 20, every 2, V"][mild]
        assert level["low"] <= 1.0
        assert 0.85 < level["value"] < 1.1
        assert equal["unipc 28, every 2, V"][mild]["high"] < 1.0
        assert equal["unipc 28, every 2, auto"][mild]["value"] < 1.0
        assert equal["unipc 20, every 2, auto"][mild]["value"] < 1.1
        assert equal["unipc 10, every 2, V"][mild]["value"] > 1.0
    for steps in (10, 14, 20, 28):
        line, auto = (equal[f"unipc {steps}, every 2, {how}"]["full", 7.0] for how in ("V", "auto"))
        assert line["low"] > 2.0
        assert auto["low"] > 1.0
        assert auto["high"] < line["low"]
        for solver in ("euler", "unipc"):
            repeated = equal[f"{solver} {steps}, every 2, repeated"]
            assert all(ratio["high"] >= 1.0 for ratio in repeated.values())
    assert found["time"]["RAS 0.5 change"]["full", 2.5]["high"] < 1.0
    assert found["time"]["RAS 0.5 change"]["open", 2.5]["low"] > 1.0
    assert found["time"]["RAS 0.25 change"]["full", 2.5]["low"] > 1.0
    for ratio in ("0.5", "0.25"):
        assert found["time"][f"RAS {ratio} std"]["full", 2.5]["low"] > 1.0


def test_what_is_said_of_forecasts_on_the_second_model_is_what_was_measured(readme):
    """On the page of Cached, in words."""
    result = json.loads((ROOT / "benchmarks/results/testbed-caches-emoji.json").read_text())
    assert [(c["captions"], c["guidance"]) for c in result["conditions"]] == [
        ("full", 2.5),
        ("open", 2.5),
    ]
    found = dict(readme.testbed_tables.verdicts(result, "arithmetic"))
    for full, open_ in (found["unipc 20, every 2, V"], found["unipc 28, every 2, V"]):
        assert full.best.startswith("ab2")
        assert open_.best.startswith("ab2")
    for verdict in found["unipc 20, every 2, V"]:
        assert verdict.found["error"]["low"] <= 1.0 <= verdict.found["error"]["high"]
    for verdict in found["unipc 28, every 2, V"]:
        assert 0.99 < verdict.found["error"]["high"] < 1.0
    for steps in (10, 14):
        assert found[f"unipc {steps}, every 2, V"][0].found["error"]["low"] > 1.0
        assert found[f"unipc {steps}, every 2, repeated"][0].found["error"]["high"] < 1.0


def test_what_is_said_of_ras_is_what_was_measured(readme):
    """In the README and on its page: its own choice beats the others, and plain steps where captions say all."""
    result = json.loads((ROOT / "benchmarks" / "results" / "testbed-ras.json").read_text())
    full, open_ = (
        {
            name: said[place].found["error"]
            for name, said in readme.testbed_tables.verdicts(result, "arithmetic")
        }
        for place in (0, 1)
    )
    assert [condition["captions"] for condition in result["conditions"]] == ["full", "open"]
    for share in ("0.75", "0.5", "0.25"):
        own, std = f"RAS {share} change, every fourth step dense", f"RAS {share} std"
        for errors in (full, open_):
            others = [n for n in errors if n.startswith(f"RAS {share}") and n != own]
            assert all(errors[own]["value"] <= errors[n]["value"] * 1.01 for n in others)
            assert errors[f"RAS {share} change"]["high"] < errors[std]["low"]
        for condition in result["conditions"]:
            median = {name: row["median"] for name, row in condition["rows"].items()}
            assert median[f"RAS {share} std, parity"] > median[f"RAS {share}, random tokens"]
            assert median[std] > median[f"RAS {share}, random tokens"]
        assert (full[own]["high"] < 1.0) == (share != "0.25")
        assert open_[own]["low"] > 1.0


def test_what_is_said_of_ralu_is_what_was_measured(readme):
    """In the README and on its page: no interval is clear of zero, and how the values of distances lie."""
    tables = readme.testbed_tables
    result = json.loads((ROOT / "benchmarks" / "results" / "testbed-ralu.json").read_text())
    assert result["pictures"] == 256
    for side in ("time", "arithmetic"):
        for name, (said,) in tables.verdicts(result, side):
            for judged in ("clean", "score", "frechet"):
                assert said.found[judged]["low"] <= 0.0 <= said.found[judged]["high"], name
            assert said.found["frechet"]["less"] > 0.0
    (condition,) = result["conditions"]
    away = {name: row["frechet"] for name, row in condition["rows"].items()}
    picture, spectrum, pixels = (away[f"RALU late, {n}"] for n in ("picture", "spectrum", "pixels"))
    assert picture < pixels < spectrum
    mends = ("RALU 3x", "RALU 3x, keys alike", "RALU 3x, corners, keys alike")
    assert away[mends[0]] < away[mends[1]] < away[mends[2]]
    others = "RALU 3x, no mixed stage", "RALU 3 + 7 steps to 0.2, picture", "unipc 8, other noise"
    assert all(away["RALU 3x"] < away[name] for name in others)
    assert away["RALU 3x, parity"] < away["unipc 8, other noise"]
    assert away["RALU 3x, split by change"] == pytest.approx(away["RALU 3x"], rel=0.1)


def test_what_is_said_of_the_mixed_stage_is_what_was_measured():
    """Places and weights mend it one after the other, and at the end of the run nothing is left of it."""
    result = json.loads((ROOT / "benchmarks" / "results" / "mixed-stage.json").read_text())
    rows = [row["stage"] for row in result["rows"].values()]
    parity, corners, alike, weighed = (row["clean"] for row in rows)
    assert corners["low"] < 0.0 < corners["high"]
    assert alike["low"] > 0.0
    assert weighed["low"] > alike["less"]
    assert weighed["value"] > 0.95 > 0.6 > parity["value"]
    for row in result["rows"].values():
        assert all(found["low"] <= 0.0 <= found["high"] for found in row["run"].values())


def test_what_is_said_of_kept_keys_is_what_was_measured():
    """Less than half of what RAS adds to the error of as many plain steps goes with fresh ones."""
    result = json.loads((ROOT / "benchmarks" / "results" / "ras-keys.json").read_text())
    median, plain = result["median"], result["median"]["plain"]
    for share, gain in result["fresh over kept"].items():
        kept, fresh = median[f"RAS {share}"], median[f"RAS {share}, fresh keys"]
        assert plain < fresh < kept
        assert kept - fresh < 0.5 * (kept - plain)
        assert gain["value"] < 1.0
    assert result["fresh over kept"]["0.25"]["high"] < 1.0


def test_what_is_said_of_searched_plans_is_what_was_measured(readme):
    """In the README and on ECAD's page."""
    result = json.loads((ROOT / "benchmarks" / "results" / "search-composed-cpu.json").read_text())
    beaten = functools.partial(readme.composed_tables.beaten, result)
    for speedup in (2, 3):
        assert beaten("full", speedup)[1] == []
    assert beaten("open", 2)[1] == ["ab2 13"]
    (two,) = (name for name, plan in result["plans"].items() if plan["speedup"] == 2)
    assert "ab2 13" in result["beside"][two]["more time"]
    level = result["conditions"][1]["rows"][two]["against"]["ab2 13"]["error"]
    assert level["low"] < 1.0 < level["high"]
    assert {name.split()[0] for name in beaten("open", 3)[0]} == {"euler"}
    assert not any(name.startswith("euler") for name in beaten("open", 3)[1])
    for name, area in result["areas"]["full"].items():
        assert all(gain["interval"][0] > 0 for gain in area["gain"].values()), name
    for area in result["areas"]["open"].values():
        low, high = area["gain"]["evenly spread steps with V"]["interval"]
        assert low < 0 < high
    searched, *others = result["areas"]["full"]["searched front"]["fronts"].values()
    for other in others:
        for _, error, share in other:
            if 0.2 <= share <= 0.5:
                assert min(row[1] for row in searched if row[2] <= share) < error
    presets = result["presets"]
    assert [preset["solver"] for preset in presets.values()] == ["recommended", "own", "own"]
    fronts = result["areas"]["open"]["searched front"]["fronts"]
    even = fronts["evenly spread steps with V"]
    beside = {
        name: preset["errors"]["open"] / min(r[1] for r in even if r[2] <= preset["share"] + 0.01)
        for name, preset in presets.items()
    }
    assert beside["faster"] < 0.95
    assert min(beside["fast"], beside["fastest"]) > 1.05
    summary = json.loads((ROOT / "fastdit/presets/tiny/ledger/summary.json").read_text())
    dense = summary["uncached"]["true-macs"]
    sparse = [p["true-macs"] / dense for p in summary["front"] if p["ratio"] < 1]
    assert not any(0.1 <= share <= 0.8 for share in sparse)


def test_no_router_of_forecasts_ships_since_each_loses(readme):
    result = json.loads((ROOT / "benchmarks" / "results" / "router-unipc.json").read_text())
    for found in result["captions"].values():
        rows = {row["arm"]: row for row in found["rows"]}
        for name in result["routers"]:
            assert rows[name]["against"]["unipc 28, every 2, V"]["low"] > 1.0
            gains = found["areas"][name]["gain"].values()
            assert all(gain["interval"][1] < 0 for gain in gains)
    assert fastdit.HarmoniCa.preset("tiny").source.order == 0
    assert any("None ships" in line for line in readme.routed())


def test_the_readme_is_short_enough_to_read():
    assert README.stat().st_size <= 12 * 1024


def test_every_method_has_a_page_and_a_line():
    for module, method in methods().items():
        assert (DOCS / "methods" / f"{module}.md").read_text().startswith(f"# {method.__name__}\n")
        assert f"[`{method.__name__}`](docs/methods/{module}.md)" in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """mkdocs checks the anchors, but not the README's links."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def templates() -> list[str]:
    """Every string of the package, with an ellipsis where something is put in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return "…"

    return [
        text(node)
        for path in Path(fastdit.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]


def test_messages_in_troubleshooting_are_those_of_the_source():
    messages = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 50
    said = templates()
    unknown = [message for message in messages if not any(begins(message, found) for found in said)]
    assert not unknown


def begins(message: str, template: str) -> bool:
    """Whether a template begins with a message, or with its end of what is put in."""
    return template.startswith(message.removesuffix("…")) and len(message) > 3


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page, tmp_path, monkeypatch):
    """In the order in which they stand, each on a fresh patch."""
    monkeypatch.chdir(tmp_path)
    names = {"fastdit": fastdit}
    for example in EXAMPLES[page]:
        names["pipe"] = tiny.load_pipeline()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(example, page, "exec"), names)


def test_the_readme_says_what_the_comparisons_found():
    """Plans of 1.5 to 5 times the speed are nearer than everything as fast, but one arm at 1.5 on one model."""
    level = {"tiny": {(1.5, "cache-dit DBCache + TaylorSeer")}, "emoji": set()}
    for model, expected in level.items():
        path = ROOT / "benchmarks" / "results" / f"comparison-{model}.json"
        verdicts = json.loads(path.read_text())["verdicts"]
        assert [verdict["budget"] for verdict in verdicts] == [1.5, 2, 3, 4, 5]
        found = {
            (verdict["budget"], group): beside["verdict"]
            for verdict in verdicts
            for group, beside in verdict["against"].items()
        }
        assert {
            key for key, said in found.items() if said not in ("nearer", "too slow")
        } == expected
        assert all(found[budget, "fewer steps"] == "nearer" for budget, _ in found)
    readme = (ROOT / "README.md").read_text()
    assert "plans of 1.5 to 5 times the speed are nearer" in readme
    assert "one that is level at 1.5 on the first" in readme


def test_the_readme_says_what_a_budget_loses():
    """Beside evenly spread steps, of which every plan of the package's book is the nearer, by its interval."""
    result = json.loads((ROOT / "benchmarks" / "results" / "budget.json").read_text())
    ratios = [row["over_even"] for row in result["held_out"]]
    assert all(high < 1 for _, _, high in ratios)
    least, most = (f"{each(value for value, _, _ in ratios):.2f}"[1:] for each in (min, max))
    assert f"{least} to {most} of what evenly spread steps do" in (ROOT / "README.md").read_text()
