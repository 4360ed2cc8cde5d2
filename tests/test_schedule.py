"""The schedule and its file: what round-trips, what is refused, and that a bad file is never
anything but a ScheduleError.
"""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdit
from fastdit import ECAD, Cached, PerStage, Schedule, ScheduleError
from fastdit.schedules.actions import COMPUTE, REUSE
from fastdit.schedules.plan import plan_run
from fastdit.schedules.schedule_file import MAX_COUNT
from fastdit.spec import BlockKind, ModelSpec

SPEC = ModelSpec("toy", (BlockKind("transformer_blocks", 3, ("attn", "ff")),))


def random_schedule(seed=0, steps=4):
    generator = np.random.default_rng(seed)
    bits = {
        "transformer_blocks": generator.random((steps, 3, 2)) < 0.5,
        "single_transformer_blocks": generator.random((steps, 2, 3)) < 0.5,
    }
    names = {
        "transformer_blocks": ("attn", "ff"),
        "single_transformer_blocks": ("a", "b", "c"),
    }
    return Schedule.from_bits(bits, names, {"seed": seed, "note": "made by a test"})


def document(**changes):
    return json.loads(random_schedule().to_json()) | changes


# ---- construction


@pytest.mark.parametrize(
    "make", [list, tuple, np.asarray, lambda bits: np.asarray(bits).astype(np.int8)]
)
def test_bits_may_come_in_any_form(make):
    nested = [[[1, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [0, 1]]]
    schedule = Schedule.from_bits(make(nested), ["attn", "ff"])
    bits = schedule.layers["transformer_blocks"].bits
    assert bits[0].all()  # step 0 computes whatever it says
    assert bits[1].tolist() == np.asarray(nested[1], dtype=bool).tolist()
    assert schedule.steps == 2
    assert schedule.reuse_share == pytest.approx(3 / 12)


def test_a_tensor_of_bits():
    torch = pytest.importorskip("torch")
    bits = torch.rand(3, 2, 2) < 0.5
    layer = Schedule.from_bits(bits, ["attn", "ff"]).layers["transformer_blocks"]
    assert layer.bits[1:].tolist() == bits[1:].tolist()


def test_bits_are_read_only_and_copied():
    bits = np.ones((2, 1, 1), dtype=bool)
    schedule = Schedule.from_bits(bits, ["ff"])
    bits[:] = False
    assert schedule.layers["transformer_blocks"].bits.all()
    with pytest.raises(ValueError, match="read-only"):
        schedule.layers["transformer_blocks"].bits[0, 0, 0] = False


@pytest.mark.parametrize(
    ("bits", "components"),
    [
        ([[[2, 0]]], ["a", "b"]),
        ([[[0.5, 1.0]]], ["a", "b"]),
        ([[["x", "y"]]], ["a", "b"]),
        ([[[1, 0], [1]]], ["a", "b"]),
        ([[1, 0]], ["a", "b"]),
        ([], ["a"]),
        ([[]], ["a"]),
        ([[[]]], []),
        ([[[1, 0]]], ["a"]),
        ([[[1, 0]]], ["a", "a"]),
        ([[[1, 0]]], ["a", ""]),
        ([[[1, 0]]], ["a", 3]),
        ([[[1, 0]]], "ab"),
        ([[[1, 0]]], None),
        (None, ["a"]),
        ({}, {}),
        ({"x": [[[1]]]}, ["a"]),
        ([[[1]]], {"x": ["a"]}),
        ({"x": [[[1]]]}, {"y": ["a"]}),
        ({"x": [[[1]]], "y": [[[1]], [[1]]]}, {"x": ["a"], "y": ["a"]}),
    ],
)
def test_bits_of_another_form_are_refused(bits, components):
    with pytest.raises(ScheduleError):
        Schedule.from_bits(bits, components)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, True])
def test_every_takes_a_positive_int(n):
    with pytest.raises(ScheduleError, match="n must be"):
        Schedule.every(n)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_computes_each_nth_step(n):
    bound = Schedule.every(n).bind(SPEC, 6)
    bits = bound.layers["transformer_blocks"].bits
    assert bits.shape == (6, 3, 2)
    assert bits.all(axis=(1, 2)).tolist() == [step % n == 0 for step in range(6)]
    assert bits.any(axis=(1, 2)).tolist() == [step % n == 0 for step in range(6)]


@pytest.mark.parametrize("source", [3, None, [[1]], Cached])
def test_cached_takes_a_schedule_or_a_path(source):
    with pytest.raises(ScheduleError, match=r"source must be a Schedule.*from_bits"):
        Cached(source)


# ---- binding


@pytest.mark.parametrize("layers", [np.ones((2, 3, 1), bool), {}, {"transformer_blocks": [[[1]]]}])
def test_bits_given_for_layers_are_shown_the_way(layers):
    with pytest.raises(ScheduleError, match=r"layers must be .*from_bits"):
        Schedule(layers)


def test_a_schedule_for_something_else_is_refused_by_name():
    fits = Schedule.from_bits(np.ones((4, 3, 2), bool), ["attn", "ff"])
    assert fits.bind(SPEC, 4) is fits
    with pytest.raises(ScheduleError, match="4 steps but the run has 5"):
        fits.bind(SPEC, 5)
    with pytest.raises(ScheduleError, match="has 2 transformer_blocks, the toy model has 3"):
        Schedule.from_bits(np.ones((4, 2, 2), bool), ["attn", "ff"]).bind(SPEC, 4)
    with pytest.raises(ScheduleError, match=r"\['mlp'\].*\['attn', 'ff'\]"):
        Schedule.from_bits(np.ones((4, 3, 2), bool), ["attn", "mlp"]).bind(SPEC, 4)
    with pytest.raises(ScheduleError, match="block kinds"):
        Schedule.from_bits({"layers": np.ones((4, 3, 1), bool)}, {"layers": ["ff"]}).bind(SPEC, 4)


# ---- orders

#: the hash of PLAIN, as it was before schedules had orders
PLAIN = Schedule.from_bits([[[1, 1], [1, 1]], [[0, 1], [1, 0]]], ["attn", "ff"])
PLAIN_SHA256 = "c7998dff07d69cfe88b0345b96d23236f5118e51168490992a81f931d5eb7aef"


def random_orders(seed=0, steps=4):
    """The random schedule, every reused output of an order of its own; the first of them of order 2."""
    plain, generator = random_schedule(seed, steps), np.random.default_rng(seed)
    bits = {kind: layer.bits.copy() for kind, layer in plain.layers.items()}
    bits["transformer_blocks"][1, 0, 0] = False
    orders = {kind: generator.integers(0, 3, each.shape) for kind, each in bits.items()}
    orders["transformer_blocks"][1, 0, 0] = 2
    names = {kind: layer.components for kind, layer in plain.layers.items()}
    return Schedule.from_bits(bits, names, {"seed": seed}, orders)


def orders_of(schedule, kind="transformer_blocks"):
    return schedule.layers[kind].orders


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_orders_round_trip(seed, steps):
    schedule = random_orders(seed, steps)
    content = json.loads(schedule.to_json())
    assert content["version"] == 2
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.forecasts
    for kind, layer in schedule.layers.items():
        assert (orders_of(again, kind) == layer.orders).all()
        assert not layer.orders[layer.bits].any()  # what computes is not drawn
        flat = layer.orders.reshape(steps, -1)
        assert content["blocks"][kind]["orders"] == ["".join(map(str, row)) for row in flat]


def test_a_file_without_orders_is_what_it_was():
    content = json.loads(PLAIN.to_json())
    assert (content["version"], content["sha256"]) == (1, PLAIN_SHA256)
    assert set(content["blocks"]["transformer_blocks"]) == {"count", "components", "bits"}
    assert PLAIN.with_order(0).to_json() == PLAIN.to_json()


def test_orders_are_content():
    one, two = PLAIN.with_order(1), PLAIN.with_order(2)
    assert len({PLAIN, one, two, PLAIN.with_order(1)}) == 3
    text = one.to_json()
    assert '"0110"' in text  # bits and orders are not the same here: reused are 1001
    with pytest.raises(ScheduleError, match="damaged or was edited"):
        Schedule.from_json(text.replace('"1001"', '"2001"'))


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (["000000"] * 3, r"blocks\.transformer_blocks\.orders must have 4 strings"),
        (["000000", "000000", "00000", "000000"], r"orders\[2\] must be a string of 6 characters"),
        (["000000", "000003", "000000", "000000"], r"orders\[1\] must be .* 0, 1 or 2"),
        (["000000", "00000x", "000000", "000000"], r"orders\[1\] must be .* 0, 1 or 2"),
        (["000000", 0, "000000", "000000"], r"orders\[1\]"),
        ("000000", r"blocks\.transformer_blocks\.orders must be list"),
        (None, r"blocks\.transformer_blocks\.orders must be list"),
    ],
    ids=str,
)
def test_orders_of_a_file_that_are_none_are_refused_by_place(orders, message):
    content = json.loads(random_orders().to_json())
    content["blocks"]["transformer_blocks"]["orders"] = orders
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("version", "message"), [(1, "fields"), (3, "version must be 1 or 2, got 3")]
)
def test_orders_in_a_file_of_another_version_are_refused(version, message):
    content = json.loads(random_orders().to_json()) | {"version": version}
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(json.dumps(content))


def test_a_file_of_version_2_without_orders_is_refused():
    with pytest.raises(ScheduleError, match=r"blocks\.\w+ must have exactly .*'orders'"):
        Schedule.from_json(json.dumps(document(version=2)))


@pytest.mark.parametrize(
    "orders",
    [3, -1, 0.5, "1", True, [[[0, 3], [0, 0]]] * 2, [[[0, 0]]] * 3, [[1], [1, 2]], {"other": 1}],
    ids=str,
)
def test_orders_of_another_form_are_refused(orders):
    bits = PLAIN.layers["transformer_blocks"].bits
    with pytest.raises(ScheduleError, match="orders"):
        Schedule.from_bits(bits, ["attn", "ff"], orders=orders)


@pytest.mark.parametrize("order", [3, -1, 1.0, "1", None, True, [[[1]]]], ids=str)
def test_one_order_of_another_form_is_refused(order):
    for make in (PLAIN.with_order, Schedule.every(2).with_order, lambda o: Schedule.every(2, o)):
        with pytest.raises(ScheduleError, match="order must be 0, 1 or 2"):
            make(order)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_order_for_all_that_is_reused(order):
    for schedule in (PLAIN, random_orders()):
        changed = schedule.with_order(order)
        for kind, layer in changed.layers.items():
            assert (layer.bits == schedule.layers[kind].bits).all()
            assert (layer.orders == np.where(layer.bits, 0, order)).all()
        assert changed.forecasts == (order > 0)
        assert Cached(schedule, order=order).source == changed
        assert changed.provenance == schedule.provenance
    bound = Schedule.every(3).with_order(order).bind(SPEC, 7)
    assert orders_of(bound)[:, 0, 0].tolist() == [0, order, order] * 2 + [0]


def test_no_order_leaves_those_of_the_schedule():
    assert Cached(random_orders()).source == random_orders()


def test_groups_keep_orders():
    kind = BlockKind("transformer_blocks", 2, ("a", "b", "c"), groups={"ab": ("a", "b")})
    bits, orders = [[[1, 1]] * 2, [[0, 0]] * 2, [[0, 1]] * 2], [[[0, 0]] * 2, [[2, 1], [1, 0]]] * 2
    made = Schedule.from_bits(bits, ["c", "ab"], orders=orders[:3])
    layer = made.bind(ModelSpec("toy", (kind,)), 3).layers["transformer_blocks"]
    assert layer.components == ("c", "a", "b")
    assert layer.orders.tolist()[1] == [[2, 1, 1], [1, 0, 0]]
    assert layer.orders.tolist()[2] == [[0, 0, 0], [0, 0, 0]]


def test_a_resampled_schedule_keeps_orders():
    schedule, taken = random_orders(), [0, 1, 1, 2, 3]
    again = schedule.resampled(taken)
    assert again.taken == tuple(taken)
    for kind, layer in schedule.layers.items():
        assert (orders_of(again, kind) == layer.orders[taken]).all()
    # The first step computes, whichever it was taken from.
    assert not orders_of(schedule.resampled([1, 2]))[0].any()
    assert orders_of(schedule)[1].any()


@pytest.mark.parametrize("taken", [[], [4], [-1]])
def test_a_step_that_is_none_is_not_taken(taken):
    with pytest.raises(ScheduleError, match="taken must be steps 0 to 3"):
        random_orders().resampled(taken)


def test_the_ecad_layout_has_no_orders(tmp_path):
    with pytest.raises(ScheduleError, match=r"ECAD layout has no place for orders"):
        random_orders().save(tmp_path / "orders.json", "ecad")
    assert not list(tmp_path.iterdir())
    random_orders().with_order(0).save(tmp_path / "plain.json", "ecad")
    assert Schedule.load(tmp_path / "plain.json") == random_orders().with_order(0)
    assert ECAD(tmp_path / "plain.json", order=1).source == random_orders().with_order(1)


def test_stages_join_orders():
    """A stage without a method, one that names a part of the components, and one by every third step."""
    part = Schedule.from_bits([[[1]] * 3, [[0]] * 3], ["ff"], orders=2)
    method = PerStage(None, Cached(part), Cached(Schedule.every(3, order=1)))
    assert method.forecasts
    joined = method.staged_schedule(SPEC, [2, 2, 4]).layers["transformer_blocks"]
    assert joined.bits[:, 0].tolist() == [
        *([True, True], [True, True]),
        *([True, True], [True, False]),
        *([True, True], [False, False], [False, False], [True, True]),
    ]
    assert joined.orders[:, 0].tolist() == [
        *([0, 0], [0, 0]),
        *([0, 0], [0, 2]),
        *([0, 0], [1, 1], [1, 1], [0, 0]),
    ]
    assert (joined.orders == joined.orders[:, :1]).all()


def test_a_forecast_of_the_whole_output_needs_every_component():
    """A component that a schedule does not name computes, so the model runs."""
    part = Schedule.from_bits([[[1]] * 3, [[0]] * 3], ["ff"], orders=1)
    found = plan_run([Cached(part)], SPEC, 2)
    assert [found.forecast_order(step) for step in range(2)] == [0, 0]
    assert found.actions[1][0]["attn"] & COMPUTE
    assert found.actions[1][0]["ff"] & REUSE
    whole = Schedule.from_bits([[[1, 1]] * 3, [[0, 0]] * 3], ["ff", "attn"], orders=1)
    assert plan_run([Cached(whole)], SPEC, 2).forecast_order(1) == 1


# ---- equality and the file


def test_equality_and_hash_go_by_content():
    one, same, other = random_schedule(0), random_schedule(0), random_schedule(1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one.sha256 != other.sha256
    assert one != "schedule"
    with_note = Schedule.from_bits(
        {kind: layer.bits for kind, layer in one.layers.items()},
        {kind: layer.components for kind, layer in one.layers.items()},
        {"other": "provenance"},
    )
    assert with_note == one


@given(st.integers(0, 10**6), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_files_round_trip(seed, steps):
    schedule = random_schedule(seed, steps)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert dict(again.provenance) == dict(schedule.provenance)
    assert again.to_json() == schedule.to_json()


def test_save_and_load(tmp_path):
    path = tmp_path / "schedule.json"
    random_schedule().save(path)
    assert Schedule.load(path) == Schedule.load(str(path)) == random_schedule()
    assert Cached(path).source == Cached(str(path)).source == random_schedule()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [{1, 2}, float("nan"), object(), nested(100_000)], ids=["set", "nan", "object", "deep"]
)
def test_provenance_must_be_json(value):
    schedule = Schedule.from_bits([[[1]]], ["ff"], {"x": value})
    with pytest.raises(ScheduleError, match="provenance"):
        schedule.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"fastdit.schedule"',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": "fastdit.schedule", "format": "fastdit.schedule"}',
        '{"format": NaN}',
        '{"format": Infinity}',
        "9" * 10_000,
        "\ud800",
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_no_schedule(text):
    with pytest.raises(ScheduleError):
        Schedule.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"format": 3}, "format"),
        ({"version": 3}, "version"),
        ({"version": "1"}, "version"),
        ({"version": True}, "version"),
        ({"steps": 5}, "5 strings"),
        ({"steps": 4.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": -4}, "steps"),
        ({"steps": 10**30}, "steps"),
        ({"steps": MAX_COUNT + 1}, "steps"),
        ({"blocks": []}, "blocks"),
        ({"blocks": {}}, "block kinds"),
        ({"blocks": {"x": 3}}, "blocks.x"),
        ({"provenance": []}, "provenance"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"sha256": None}, "sha256"),
        ({"extra": 1}, "fields"),
    ],
    ids=str,
)
def test_documents_with_a_wrong_field_say_which(change, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(json.dumps(document(**change)))


@pytest.mark.parametrize("name", ["format", "version", "steps", "blocks", "provenance", "sha256"])
def test_documents_without_a_field_are_refused(name):
    content = document()
    del content[name]
    with pytest.raises(ScheduleError):
        Schedule.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {"count": 4},
        {"count": 0},
        {"count": True},
        {"count": 10**20},
        {"components": []},
        {"components": ["attn", "attn"]},
        {"components": ["attn", 1]},
        {"components": ["attn"] * 3},
        {"components": [["attn"], ["ff"]]},
        {"components": [None, {}]},
        {"bits": []},
        {"bits": ["111111"] * 3},
        {"bits": ["111112"] * 4},
        {"bits": ["11111"] * 4},
        {"bits": [111111] * 4},
        {"bits": ["١١١١١١"] * 4},  # digits, but not ours
        {"more": 1},
    ],
    ids=str,
)
def test_block_entries_with_a_wrong_field_are_refused(change):
    content = document()
    content["blocks"]["transformer_blocks"] |= change
    with pytest.raises(ScheduleError):
        Schedule.from_json(json.dumps(content))


def test_edited_bits_do_not_match_the_hash():
    text = random_schedule().to_json()
    row = json.loads(text)["blocks"]["transformer_blocks"]["bits"][2]
    edited = row[:-1] + "01"[row[-1] == "0"]
    with pytest.raises(ScheduleError, match="damaged or was edited"):
        Schedule.from_json(text.replace(row, edited))


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_files_give_a_schedule_or_a_schedule_error(data):
    """Characters are cut, repeated, exchanged and inserted at random."""
    text = random_schedule().to_json()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 40)))
        alphabet = string.printable + "é\x00\ud800١"
        middle = data.draw(
            st.one_of(
                st.just(""),
                st.just(text[start:stop] * 2),
                st.text(alphabet, max_size=8),
                st.sampled_from(["NaN", "1e999", "-1", "null", "{}", "[[", '"', "true", "1" * 50]),
            )
        )
        text = text[:start] + middle + text[stop:]
    try:
        schedule = Schedule.from_json(text)
    except ScheduleError:
        return
    assert schedule == random_schedule()  # only spaces or provenance were touched


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_documents_with_any_value_anywhere(data):
    """One node of a valid document is replaced by an arbitrary value."""
    content = document()
    node, path = content, []
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        path.append(key)
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(values)
            break
        node = node[key]
    try:
        schedule = Schedule.from_json(json.dumps(content))
    except ScheduleError:
        return
    assert schedule == random_schedule() or path[0] == "sha256"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"{", b"\x00" * 100])
def test_loading_names_the_file(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError, match=r"broken\.json"):
        Schedule.load(path)


def test_loading_what_is_not_there_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(ScheduleError, match=r"missing\.json"):
        Schedule.load(tmp_path / "missing.json")
    with pytest.raises(ScheduleError, match="not a readable"):
        Schedule.load(tmp_path)
    with pytest.raises(ScheduleError, match="not a readable"):
        Schedule.load("no\0path")
    path = tmp_path / "large.json"
    random_schedule().save(path)
    monkeypatch.setattr("fastdit.schedules.schedule_file.MAX_FILE_BYTES", 10)
    with pytest.raises(ScheduleError, match="at most 10"):
        Schedule.load(path)


def test_a_schedule_error_is_a_value_error():
    assert issubclass(ScheduleError, ValueError)
    assert issubclass(ScheduleError, fastdit.FastDiTError)
