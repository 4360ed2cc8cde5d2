"""The layout of ECAD's released files: what it means, that it round-trips, and that whatever else a file holds is
refused and leaves a model as it was.
"""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest

import fastdit
import tiny_models
from fastdit import ECAD, FastDiTError, Schedule, ScheduleError
from snapshot import snapshot

KINDS = {
    "transformer_blocks": ("", ("attn1", "attn2", "ff")),
    "single_transformer_blocks": ("single_", ("a", "b")),
}


def released(steps=3, blocks=3, singles=0, seed=0):
    """A document as the authors write it, and its bits as nested lists."""
    draw = random.Random(seed)
    counts = {"transformer_blocks": blocks, "single_transformer_blocks": singles}
    rows = {
        f"{step:03d}": {
            f"{prefix}{block}": {part: draw.random() < 0.5 for part in parts}
            for kind, (prefix, parts) in KINDS.items()
            for block in range(counts[kind])
        }
        for step in range(steps)
    }
    header = {
        "name": "toy",
        "attributes": {"made": "by a test"},
        "num_blocks": blocks,
        "num_inference_steps": steps,
        "schedule": rows,
    }
    if singles:
        header["num_single_blocks"] = singles
    return {"cache_schedule": header, "config": {"height": 256}, "metrics": {}}


@pytest.mark.parametrize("singles", [0, 2])
def test_true_computes_and_step_0_always_does(singles):
    document = released(singles=singles)
    schedule = Schedule.from_json(json.dumps(document))
    rows = document["cache_schedule"]["schedule"]
    assert not all(flag for block in rows["000"].values() for flag in block.values())
    for kind, layer in schedule.layers.items():
        prefix, parts = KINDS[kind]
        assert layer.components == parts
        assert layer.bits[0].all()
        for step, block in np.ndindex(*layer.bits.shape[:2]):
            if step:
                published = rows[f"{step:03d}"][f"{prefix}{block}"]
                assert layer.bits[step, block].tolist() == [published[part] for part in parts]
    assert set(schedule.layers) == set(list(KINDS)[: 1 + bool(singles)])


def test_round_trips(tmp_path):
    schedule = Schedule.from_json(json.dumps(released(singles=2)))
    schedule.save(tmp_path / "theirs.json", layout="ecad")
    schedule.save(tmp_path / "ours.json")
    for name in ("theirs", "ours"):
        again = Schedule.load(tmp_path / f"{name}.json")
        assert again == schedule
        assert again.provenance == schedule.provenance
    written = json.loads((tmp_path / "theirs.json").read_text())
    expected = released(singles=2)
    for block in expected["cache_schedule"]["schedule"]["000"].values():
        block.update(dict.fromkeys(block, True))
    assert written == expected
    assert ECAD(tmp_path / "theirs.json").source == schedule


def test_layouts_and_kinds_without_a_place_are_refused(tmp_path):
    schedule = Schedule.from_bits({"layers": np.ones((2, 1, 1)) > 0}, {"layers": ["ff"]})
    with pytest.raises(ScheduleError, match=r"no block kinds \['layers'\]"):
        schedule.save(tmp_path / "a.json", layout="ecad")
    with pytest.raises(ScheduleError, match='layout must be "fastdit" or "ecad"'):
        schedule.save(tmp_path / "a.json", layout="onnx")
    single = {"single_transformer_blocks": np.ones((2, 1, 1)) > 0}
    with pytest.raises(ScheduleError, match="needs transformer_blocks"):
        Schedule.from_bits(single, {"single_transformer_blocks": ["a"]}).to_ecad_json()
    assert not list(tmp_path.iterdir())


def changed(path, value):
    """The document with the node at `path` replaced, or removed where `value` is `...`."""
    document = released()
    node = document
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return json.dumps(document)


HEAD = ("cache_schedule",)
ROWS = (*HEAD, "schedule")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("cache_schedule",), [], "must be an object"),
        (("extra",), 1, r"got also \['extra'\]"),
        ((*HEAD, "num_blocks"), ..., r"lacks \['num_blocks'\]"),
        ((*HEAD, "num_blocks"), 4, "3"),
        ((*HEAD, "num_blocks"), True, "must be int, got bool"),
        ((*HEAD, "num_blocks"), 10**9, "from 1 to"),
        ((*HEAD, "num_inference_steps"), 4, '"000" to "003"'),
        ((*HEAD, "num_inference_steps"), 10**6, "from 1 to 1000"),
        ((*HEAD, "num_single_blocks"), 1, 'block "single_0"'),
        ((*HEAD, "unknown"), 1, "unknown fields"),
        ((*ROWS, "002"), ..., "keys"),
        ((*ROWS, "3"), {}, "keys"),
        ((*ROWS, "001"), 5, "must be an object"),
        ((*ROWS, "001", "7"), {}, "must have 3 blocks"),
        ((*ROWS, "001", "1"), 5, "must be an object"),
        ((*ROWS, "001", "1", "ff"), 1, "true or false, got 1"),
        ((*ROWS, "001", "1", "ff"), "true", "true or false, got .true."),
        ((*ROWS, "001", "1", "ff"), ..., "must have the components"),
        ((*ROWS, "001", "1", "other"), True, "must have the components"),
        (
            (*ROWS, "001", "1", "custom_compute_attn"),
            {"name": "compute_attn_tgate", "kwargs": {"gate_step": 10}},
            "custom_compute_attn names a function, which is not run",
        ),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(changed(path, value))


VALUES = [
    *(None, True, 0, -1, 10**30, 1e308, "", "x" * 9, [], {}, [[[]]], {"a": {}}),
    *({"__class__": "os.system"}, "__import__('os').system('touch owned')", "\ud800"),
]
FRAGMENTS = [
    *("NaN", "1e999", "[" * 2000, '{"a":' * 2000, '"', "\\u0000", "null", "1" * 5000),
    *('"000":', "cache_schedule", '"format": "fastdit.schedule",', "true", "//", "\x00"),
]


def corrupt(draw, text):
    """The text cut, repeated, exchanged or filled with something else; or with one value replaced."""
    how = draw.randrange(5)
    start = draw.randrange(len(text) + 1)
    stop = min(len(text), start + draw.randrange(60))
    if how == 0:
        return text[:start].encode()
    if how == 1:
        return (text[:start] + text[start:stop] * 2 + text[stop:]).encode()
    if how == 2:
        return (text[:start] + draw.choice(FRAGMENTS) + text[stop:]).encode()
    if how == 3:
        return text[:start].encode() + draw.randbytes(draw.randrange(9)) + text[stop:].encode()
    document = json.loads(text)
    node = document
    while True:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.3:
            node[key] = copy.deepcopy(draw.choice(VALUES))
            return json.dumps(document).encode()
        node = node[key]


def test_no_file_crashes_runs_or_half_patches(tmp_path, monkeypatch):
    """2400 corrupt files of both layouts; those that are still a schedule fit the model or leave it alone."""
    monkeypatch.chdir(tmp_path)
    model = tiny_models.transformer("pixart-alpha")
    before = snapshot(model)
    valid = Schedule.from_json(json.dumps(released()))
    sources = (valid.to_json(), valid.to_ecad_json(), json.dumps(released(singles=1)))
    draw = random.Random(0)
    path = tmp_path / "schedule.json"
    refused = misfits = longest = 0
    for count in range(2400):
        path.write_bytes(corrupt(draw, sources[count % 3]))
        try:
            method = ECAD(path)
        except ScheduleError as error:
            longest = max(longest, len(str(error)))
            refused += 1
            continue
        if refused % 5:
            continue
        try:
            fastdit.patch(model, method).unpatch()
        except FastDiTError:
            misfits += 1
        assert snapshot(model) == before
    assert refused > 1500
    assert longest < 1000
    assert misfits > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["schedule.json"]
