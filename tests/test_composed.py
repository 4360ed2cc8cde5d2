"""What is drawn and said of searched plans: their arms, the best of a speed-up, and which baselines it beats."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymoo")

import areas
import fastdit
import search_composed
from fastdit.methods.ecad import PRESETS as SHIPPED
from fastdit.schedules.schedule import Schedule
from fastdit.search import seeds
from fastdit.search.archive import Candidate
from fastdit.search.genome import Genome
from fastdit.search.knobs import Knobs, Run
from fastdit.spec import BlockKind, ModelSpec
from search_composed import PRESETS, SEARCHED
from subjects import SUBJECTS

SD3 = ModelSpec(
    "sd3",
    (BlockKind("transformer_blocks", 2, ("attn", "ff", "ff_context"), {(1, "ff_context")}),),
)
PLANS = Genome(SD3, 6, (0, 1, 2))
TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("composed_tables")


def found(low: float, high: float, clean: float = 0.0, score: float = 0.0) -> dict:
    level = {"less": 0.0, "low": -0.1, "high": 0.1}
    return {
        "error": {"value": (low + high) / 2, "low": low, "high": high},
        "clean": {**level, "high": clean},
        "score": {**level, "high": score},
        "frechet": level,
    }


RESULT = {
    "plans": {
        "a": {"speedup": 2, "solver": "recommended", "steps": 4, "ratio": 0.5, "text": "xx1p"},
        "b": {"speedup": 3, "solver": "own", "steps": 4, "ratio": 1, "text": "x2x2"},
    },
    "beside": {
        "a": {
            "arithmetic": ["euler 5", "unipc 5"],
            "time": ["euler 5", "unipc 5"],
            "more time": [],
        },
        "b": {"time": ["euler 3"], "nodes": ["ab2 on the levels of b"]},
    },
    "conditions": [
        {
            "captions": "open",
            "guidance": 2.5,
            "truth": {"clean": 1.0, "score": 0.9},
            "rows": {
                "a": {"against": {"euler 5": found(0.8, 0.99), "unipc 5": found(0.9, 1.01)}},
                "b": {
                    "against": {
                        "euler 3": found(0.5, 0.6, clean=-0.01),
                        "ab2 on the levels of b": found(0.5, 0.6, score=-0.01),
                    }
                },
            },
        }
    ],
    "areas": {
        "open": {
            "searched front": {
                "corner": 1.0,
                "gain": {"plain steps": {"value": -0.1, "interval": [-0.2, 0.05]}},
                "fronts": {
                    "searched front": [["a", 0.02, 0.5], ["b", 0.1, 0.25]],
                    "plain steps": [["euler 5", 0.03, 0.4]],
                },
            },
            "its schedules": {
                "corner": 1.0,
                "gain": {"plain steps": {"value": 0.25, "interval": [0.2, 0.3]}},
            },
        }
    },
    "presets": {
        "fast": {"solver": "own", "share": 0.4, "errors": {"open": 0.025}},
        "faster": {"solver": "recommended", "share": 0.3, "errors": {"open": 0.05}},
    },
    "search": {
        "knobs": {"steps": [4, 3], "ratios": [1.0, 0.75, 0.5], "solvers": ["own", "recommended"]},
        "orders": [0, 1, 2],
        **dict.fromkeys(
            ("generations", "population", "surrogate", "schedules", "pictures", "given"), 1
        ),
    },
    "evaluations": {"a": 2.5, "b": 2.0},
    "seconds": {"a": 0.25, "b": 0.2},
    "dense": 0.5,
    **dict.fromkeys(("steps", "pictures", "of_areas", "truth_steps", "timed_batch"), 4),
}


def test_a_baseline_is_beaten_beyond_its_interval_by_pictures_that_are_no_worse(tables):
    assert tables.beaten(RESULT, "open", 2) == (["euler 5"], ["unipc 5"])
    assert tables.beaten(RESULT, "open", 3) == ([], ["euler 3", "AB2 on its own levels"])
    (said,) = tables.sentences(RESULT)
    assert "on open captions at 2x 1 of 2 (not unipc 5) and at 3x 0 of 2" in said
    assert "-10.0% [-20.0%, +5.0%] over plain steps on open captions" in said


def test_tables_name_each_baseline_once_with_all_it_is_equal_in(tables):
    lines = tables.tables(RESULT, "a machine")
    assert "| 2x | UniPC | 4 | 0.5 | 2.5 | 0.250 | `xx1p` |" in lines
    assert "| 3x | Euler | 4 | - | 2.0 | 0.200 | `x2x2` |" in lines
    beside = [line for line in lines if "euler 5" in line or "| AB2 |" in line]
    assert [line.split("|")[3].strip() for line in beside] == [
        "equal arithmetic, no more time",
        "AB2, same levels",
    ]
    assert "| 25% | 0.1000 (25%) | - |" in lines
    assert "| 50% | 0.0200 (50%) | 0.0300 (40%) |" in lines
    assert "| searched front | plain steps | -10.0% [-20.0%, +5.0%] |" in lines
    assert "| its schedules | plain steps | +25.0% [+20.0%, +30.0%] |" in lines
    assert "| fast | Euler | 40% | 0.0250 | 0.0300 (40%) |" in lines
    assert "| faster | UniPC | 30% | 0.0500 | - |" in lines


def test_plans_of_a_front_and_even_steps_are_arms(tmp_path):
    """Nodes are told of plans that compute whole steps alone, so that AB2 can take the same levels."""
    (tmp_path / "front").mkdir()
    plans = {
        "01": (seeds.whole_steps(PLANS, [0, 1, 3], 2), Run(6, 1.0, "recommended"), "xx2x22"),
        "02": (seeds.whole_steps(PLANS, [0, 2, 4], 0), Run(6, 1.0, "own"), "x0x0x0"),
        "03": (seeds.whole_steps(PLANS, [0, 1, 3], 1), Run(6, 0.5, "own"), "xx1x11"),
        "04": (seeds.halves(PLANS, 1), Run(6, 1.0, "own"), "xxpppp"),
    }
    for name, (vector, _, _) in plans.items():
        PLANS.schedule(vector).save(tmp_path / f"front/{name}.json")
    points = [
        {"name": name, "key": name * 10, "loss": 0.1, "true-macs": 50.0, **asdict(run)}
        for name, (_, run, _) in plans.items()
    ]
    cheap = {**points[0], "name": "05", "true-macs": 49.0}
    summary = {"settings": {"steps": 6}, "uncached": {"true-macs": 100.0}}
    (tmp_path / "search.json").write_text(json.dumps({**summary, "front": [*points, cheap]}))
    front = search_composed.front_of(tmp_path, SD3)
    assert [point["text"] for _, point in front.values()] == [p[2] for p in plans.values()]
    arms = [arm for arm, _ in front.values()]
    assert [arm.nodes for arm in arms] == [(0, 1, 3), (), (), ()]
    assert [arm.solver for arm in arms] == ["unipc", "stock", "stock", "stock"]
    assert [len(arm.method(None, 6)) for arm in arms] == [1, 1, 2, 1]
    assert arms[2].method(None, 6)[1] == Run(6, 0.5).ras


def test_even_arms_draw_whole_steps_as_lines():
    even = areas.evenly_spread(SD3, 6)
    arm = even["unipc 6, 3 evenly, order 1"]
    assert (arm.solver, arm.steps) == ("unipc", 6)
    genome = Genome(SD3, 6, (0, 1))
    for count, schedule in ((3, Schedule.every(2, 1).bind(SD3, 6)), (5, None)):
        found = genome.vector(even[f"stock 6, {count} evenly, order 1"].method(None, 6).source)
        assert genome.parts(found)[0].all(axis=1).sum() == count
        if schedule is not None:
            assert genome.key(found) == genome.key(genome.vector(schedule))


def test_the_plan_of_a_speed_up_is_the_searchs_best_that_is_fast_enough():
    front = {name: (None, {"loss": loss}) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    seconds = {"a": 6.0, "b": 5.0, "c": 3.0}
    assert search_composed.picked(front, seconds, 10.0) == {"b": 2, "c": 3}
    assert search_composed.picked(front, seconds, 5.0) == {}


def one(errors, share):
    values = (float(np.exp(np.log(errors).mean())), share)
    return Candidate("any", np.ones(1, dtype=bool), tuple(errors), values, 1, True)


def test_areas_are_of_geometric_means():
    """One picture in two that flipped: the mean of the errors would be 0.5, ten times the geometric one."""
    sets = {
        SEARCHED: {"a": one([0.01, 1.0], 0.5)},
        areas.EVEN: {"a": one([1.0, 1.0], 0.1), "b": one([0.1, 0.1], 0.75)},
        areas.PLAIN: {"a": one([0.1, 0.1], 0.5)},
    }
    found = areas.summed_up(sets)
    assert found["corner"] == pytest.approx(1.0)
    assert found["hypervolume"][SEARCHED] == pytest.approx(0.5)
    assert found["gain"][areas.PLAIN]["value"] == pytest.approx(0.0)
    low, high = found["gain"][areas.PLAIN]["interval"]
    assert low == pytest.approx(-1.0)
    assert high == pytest.approx(1.0)


def test_areas_against_the_closed_form():
    """Up to the worst even steps; what another of its set dominates, and what costs more than 1, adds nothing."""
    sets = {
        SEARCHED: {"a": one([0.01, 0.01], 0.5), "b": one([0.02, 0.02], 0.6)},
        areas.EVEN: {"a": one([0.1, 0.1], 0.3), "b": one([0.02, 0.02], 0.5)},
        areas.PLAIN: {"a": one([0.01, 0.01], 0.75), "b": one([0.001, 0.001], 1.1)},
    }
    found = areas.summed_up(sets)
    assert found["corner"] == pytest.approx(0.1)
    volumes = {SEARCHED: 1.0 * 0.5, areas.EVEN: np.log10(5) * 0.5, areas.PLAIN: 1.0 * 0.25}
    assert found["hypervolume"] == {name: pytest.approx(v) for name, v in volumes.items()}
    for name in (areas.EVEN, areas.PLAIN):
        gain = found["gain"][name]
        assert gain["value"] == pytest.approx(0.5 / volumes[name] - 1)
        assert gain["interval"] == [pytest.approx(0.5 / volumes[name] - 1)] * 2
    assert [row[1:] for row in found["fronts"][SEARCHED]] == [[pytest.approx(0.01), 0.5]]


def test_a_front_is_thinned_to_as_many_plans_as_others_have():
    plans = {str(index): {"true-macs": index} for index in range(100)}
    found = search_composed.thinned(plans, ["1", "50"])
    assert {"0", "1", "50", "99"} <= set(found)
    assert len(areas.COUNTS) <= len(found) <= len(areas.COUNTS) + 2
    few = dict(list(plans.items())[:5])
    assert search_composed.thinned(few, ()) == list(few)


def test_presets_are_the_best_schedules_within_their_share():
    plans = {
        "joint": {"ratio": 0.5, "steps": 6, "loss": 0.1, "true-macs": 20},
        "short": {"ratio": 1.0, "steps": 4, "loss": 0.1, "true-macs": 20},
        "dear": {"ratio": 1.0, "steps": 6, "loss": 0.2, "true-macs": 51},
        "good": {"ratio": 1.0, "steps": 6, "loss": 0.3, "true-macs": 50},
        "poor": {"ratio": 1.0, "steps": 6, "loss": 0.4, "true-macs": 25},
    }
    found = search_composed.presets_of(plans, 6, 100.0)
    assert found == {"fast": "good", "faster": "poor", "fastest": "poor"}


def test_shipped_presets_come_from_the_shipped_search():
    """Each is the named front's best within its share, and its entries have the key that the summary tells."""
    summary = json.loads((SHIPPED / "tiny/ledger/summary.json").read_text())
    kinds = BlockKind("transformer_blocks", 6, ("attn", "ff", "ff_context"), {(5, "ff_context")})
    settings = summary["settings"]
    knobs = Knobs(**settings["knobs"])
    spec = ModelSpec("sd3", (kinds,))
    genome = Genome(spec, settings["steps"], tuple(settings["orders"]), knobs=knobs)
    dense = summary["uncached"]["true-macs"]
    plans = {point["key"]: point for point in summary["front"]}
    picked = search_composed.presets_of(plans, settings["steps"], dense)
    assert list(picked) == list(PRESETS)
    for name, key in picked.items():
        source = fastdit.ECAD.preset("tiny", name).source
        run = Run(settings["steps"], 1.0, plans[key]["solver"])
        alone = genome.alone(run)
        assert genome.key(genome.embed(alone.vector(source), run)) == key
        assert source.provenance["objectives"]["loss"] == plans[key]["loss"]


def test_searches_and_trainings_draw_no_prompt_that_is_held_out():
    shapes = SUBJECTS["tiny"]
    for count in (6, 12, 18, 24):
        found = shapes.training(count)
        assert len(set(found)) == count
        assert set(found).isdisjoint(shapes.prompts("open", 96) + shapes.prompts("full", 96))
    with pytest.raises(ValueError, match="6, 12, 18 or 24"):
        shapes.training(30)
