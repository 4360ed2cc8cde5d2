"""What is drawn and said of searched plans: their arms, the best of a speed-up, and which baselines it beats."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymoo")

import search_composed
from fastdit.schedules.schedule import Schedule
from fastdit.search import seeds
from fastdit.search.archive import Candidate
from fastdit.search.genome import Genome
from fastdit.search.knobs import Run
from fastdit.spec import BlockKind, ModelSpec
from search_forecast import EVEN, PLAIN, SEARCHED, summed_up

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
            "corner": 1.0,
            "gain": {"plain steps": {"value": -0.1, "interval": [-0.2, 0.05]}},
            "fronts": {
                "searched front": [["a", 0.02, 0.5], ["b", 0.1, 0.25]],
                "plain steps": [["euler 5", 0.03, 0.4]],
            },
        }
    },
    "search": {
        "knobs": {"steps": [4, 3], "ratios": [1.0, 0.75, 0.5], "solvers": ["own", "recommended"]},
        "orders": [0, 1, 2],
        **dict.fromkeys(("generations", "population", "surrogate", "schedules", "pictures"), 1),
    },
    "evaluations": {"a": 2.5, "b": 2.0},
    "seconds": {"a": 0.25, "b": 0.2},
    "unpatched": 0.5,
    **dict.fromkeys(("steps", "pictures", "of_areas", "truth_steps", "timed_batch"), 4),
}


def test_a_baseline_is_beaten_beyond_its_interval_by_pictures_that_are_no_worse(tables):
    assert tables.beaten(RESULT, "open", 2) == (1, 2)
    assert tables.beaten(RESULT, "open", 3) == (0, 2)
    (said,) = tables.sentences(RESULT)
    assert "on open captions at 2x 1 of 2 and at 3x 0 of 2" in said
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
    assert "| plain steps | -10.0% [-20.0%, +5.0%] |" in lines


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
        {"name": name, "key": name * 10, "loss": 0.1, **asdict(run)}
        for name, (_, run, _) in plans.items()
    ]
    (tmp_path / "search.json").write_text(json.dumps({"front": points}))
    front = search_composed.front_of(tmp_path, SD3)
    assert [point["text"] for _, point in front.values()] == [p[2] for p in plans.values()]
    arms = [arm for arm, _ in front.values()]
    assert [arm.nodes for arm in arms] == [(0, 1, 3), (), (), ()]
    assert [arm.solver for arm in arms] == ["unipc", "stock", "stock", "stock"]
    assert [len(arm.method(None, 6)) for arm in arms] == [1, 1, 2, 1]
    assert arms[2].method(None, 6)[1] == Run(6, 0.5).ras

    even = search_composed.sets_of({}, SD3, 6)[EVEN]
    arm = even["unipc 6, 3 evenly, order 1"]
    assert (arm.solver, arm.steps, arm.nodes) == ("unipc", 6, (0, 2, 4))
    genome = Genome(SD3, 6, (0, 1))
    expected = genome.vector(Schedule.every(2, 1).bind(SD3, 6))
    assert genome.key(genome.vector(arm.method(None, 6)[0].source)) == genome.key(expected)


def test_the_plan_of_a_speed_up_is_the_searchs_best_that_is_fast_enough():
    front = {name: (None, {"loss": loss}) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    seconds = {"a": 6.0, "b": 5.0, "c": 3.0}
    assert search_composed.picked(front, seconds, 10.0) == {"b": 2, "c": 3}
    assert search_composed.picked(front, seconds, 5.0) == {}


def test_areas_are_of_geometric_means():
    """One picture in two that flipped: the mean of the errors would be 0.5, ten times the geometric one."""

    def one(errors, share):
        values = (float(np.exp(np.log(errors).mean())), share)
        return Candidate("any", np.ones(1, dtype=bool), tuple(errors), values, 1, True)

    sets = {
        SEARCHED: {"a": one([0.01, 1.0], 0.5)},
        EVEN: {"a": one([1.0, 1.0], 0.1), "b": one([0.1, 0.1], 0.75)},
        PLAIN: {"a": one([0.1, 0.1], 0.5)},
    }
    found = summed_up(sets, "truth")
    assert found["corner"] == pytest.approx(1.0)
    assert found["hypervolume"][SEARCHED] == pytest.approx(0.5)
    assert found["gain"][PLAIN]["value"] == pytest.approx(0.0)
    low, high = found["gain"][PLAIN]["interval"]
    assert low == pytest.approx(-1.0)
    assert high == pytest.approx(1.0)
