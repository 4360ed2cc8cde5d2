"""Files that others made: whatever is in them, and whatever they are, a reader gives its own error, in bounded words.

Every reader of the package is in `READERS`, with what makes a valid file for it; bytes and JSON values are changed at
random, from a fixed seed.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

import fastdit
import tiny_models
from fastdit.blocks.attention_choice import Choices, Shape
from fastdit.cli.saved import INDEX, index_of
from fastdit.cli.search import prompts_of
from fastdit.errors import MAX_MESSAGE, ArgumentError, ScheduleError, SearchError
from fastdit.files import parse
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.router import Router
from fastdit.schedules.schedule import Schedule
from fastdit.search.ledger import Ledger
from fastdit.tiny import checkpoint
from fastdit.tiny.bank import load_bank
from fastdit.train import HarmoniCa

NAMES = ("attn", "ff")
KIND = "transformer_blocks"
TIMES = 150


def schedule() -> Schedule:
    bits = np.random.default_rng(0).random((3, 2, 2)) < 0.5
    return Schedule.from_bits(bits, NAMES, {"note": [1, {"a": None}]})


def router(**more) -> Router:
    logits = np.random.default_rng(0).standard_normal((3, 2, 2))
    conditions = Conditions("DDIMScheduler", (999.0, 500.0, 1.0), 16, 4.0)
    return Router({KIND: logits}, {KIND: NAMES}, "dit", conditions, **more)


def save_index(path: Path) -> None:
    parts = {"vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
    path.write_text(json.dumps({"_class_name": "DiTPipeline", **parts, "id2label": {"0": "a"}}))


def save_ledger(path: Path) -> None:
    with closing(Ledger(path, {"steps": 3, "prompts": ["a"]})) as ledger:
        ledger.add_losses("a", 0, 2, [0.5, 0.25])
        ledger.add_costs("a", {"macs": 3.0})
        ledger.add_generation(0, {"candidates": "0123", "front": ["a"], "hypervolume": 0.5})


def read_ledger(path: Path) -> None:
    Ledger(path, {"steps": 3, "prompts": ["a"]}).close()


def save_unsealed(path: Path) -> None:
    save_ledger(path)
    lines = [line[:-18] + b"}" for line in path.read_bytes().splitlines()]
    lines[0] = lines[0].replace(b'"version":2', b'"version":1')
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@functools.cache
def training(folder: Path) -> HarmoniCa:
    """One training for all tries of a folder: what it reads replaces what it read before."""
    pipe = tiny_models.pipeline("dit")
    return HarmoniCa(pipe, steps=3, prompts=[3], epochs=1, batch=1, folder=folder)


def save_attentions(path: Path) -> None:
    sizes = Shape("bfloat16", 1, 1536, 24, 4608, 24, 128)
    Choices("GPU", {sizes: {"torch": 300.0, "cudnn": 200.0}}).write(path)


def read_attentions(path: Path) -> None:
    Choices.read(path, "GPU").best(Shape("bfloat16", 1, 1536, 24, 4608, 24, 128))


def save_scenes(path: Path) -> None:
    objects = [{"shape": "circle", "color": "red", "size": "large", "place": "left"}]
    path.write_text(json.dumps({"16": [{"objects": objects, "background": "white"}]}))
    (path.parent / "bank.safetensors").write_bytes(tensors_of({"16": torch.zeros(1)}))


def tensors_of(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)


@dataclass(frozen=True)
class Reader:
    """How a valid file is made, how it is read, and what the reader raises."""

    save: Callable[[Path], Any]
    read: Callable[[Path], Any]
    error: type[Exception]
    name: str = "file"


READERS = {
    "schedule": Reader(schedule().save, Schedule.load, ScheduleError),
    "ecad": Reader(lambda path: schedule().save(path, "ecad"), Schedule.load, ScheduleError),
    "router": Reader(router().save, lambda path: repr(Router.load(path)), ScheduleError),
    "checkpoint": Reader(
        lambda path: torch.save({f"{i}.prob": torch.zeros(4) for i in range(3)}, path),
        lambda path: repr(Router.from_checkpoint(path)),
        ScheduleError,
    ),
    "ledger": Reader(save_ledger, read_ledger, SearchError),
    "ledger of version 1": Reader(save_unsealed, read_ledger, SearchError),
    "training": Reader(
        lambda path: training(path.parent).fit(),
        lambda path: training(path.parent).resume(),
        ArgumentError,
        "state.safetensors",
    ),
    "index": Reader(save_index, lambda path: index_of(path.parent), ArgumentError, INDEX),
    "prompts": Reader(
        lambda path: path.write_text("a circle\na square\n"),
        lambda path: prompts_of(path, embedded=False),
        ArgumentError,
    ),
    "tiny's facts": Reader(
        lambda path: checkpoint.save(path.parent, {"a": torch.zeros(2)}, {"step": 3}),
        lambda path: checkpoint.load(path.parent),
        ArgumentError,
        "state.json",
    ),
    "tiny's tensors": Reader(
        lambda path: checkpoint.save(path.parent, {"a": torch.zeros(2)}, {"step": 3}),
        lambda path: checkpoint.load(path.parent),
        ArgumentError,
        "state.safetensors",
    ),
    "attentions": Reader(save_attentions, read_attentions, ArgumentError),
    "scenes": Reader(save_scenes, lambda path: load_bank(path.parent), ArgumentError, "bank.json"),
}
JSON_FILES = (
    "schedule",
    "ecad",
    "ledger of version 1",
    "index",
    "tiny's facts",
    "attentions",
    "scenes",
)
TENSOR_FILES = ("router", "training")

VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, 1.5, "", "x", "\0", "1", "\ud800"),
    *([], {}, [[]], {"a": 1}, ["1"], [None], float("nan"), float("inf"), "1" * 100_000),
]


def refused_or_read(reader: Reader, path: Path) -> bool:
    """Whether it was refused, in words that are not too many; any other exception is the test's failure."""
    try:
        reader.read(path)
    except reader.error as error:
        message = str(error)
    else:
        return False
    assert 0 < len(message) <= MAX_MESSAGE
    return True


def damaged(content: bytes, random: Random) -> bytes:
    """Some bytes changed, put in or cut off."""
    found = bytearray(content)
    how = random.random()
    if how < 0.3:
        return bytes(found[: random.randrange(len(found))])
    if how < 0.5:
        place = random.randrange(len(found))
        found[place:place] = random.randbytes(random.randrange(50))
        return bytes(found)
    for _ in range(random.randrange(1, 6)):
        found[random.randrange(len(found))] = random.randrange(256)
    return bytes(found)


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    if not isinstance(value, (dict, list)):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*above, key)
        yield from places(value[key], (*above, key))


def changed(document: Any, random: Random) -> Any:
    """A copy with a value or two exchanged, removed or added."""
    copy = json.loads(json.dumps(document))
    for _ in range(random.choice([1, 1, 2])):
        if not copy:
            break
        *above, last = random.choice(list(places(copy)))
        node = functools.reduce(lambda value, key: value[key], above, copy)
        how = random.random()
        if how < 0.7:
            node[last] = random.choice(VALUES)
        elif how < 0.85 and isinstance(node, dict):
            del node[last]
        elif isinstance(node, dict):
            node[random.choice(["x", "", "format", "cache_schedule"])] = random.choice(VALUES)
    return copy


def header_changed(content: bytes, random: Random) -> bytes:
    """A safetensors file whose facts, JSON in its header, are others."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    facts = changed(json.loads(header["__metadata__"]["fastdit"]), random)
    header["__metadata__"]["fastdit"] = json.dumps(facts)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@pytest.fixture
def valid(request, tmp_path) -> tuple[Reader, Path]:
    reader = READERS[request.param]
    path = tmp_path / reader.name
    reader.save(path)
    assert not refused_or_read(reader, path)
    return reader, path


@pytest.mark.filterwarnings("ignore:.*last line was cut off")
@pytest.mark.parametrize("valid", READERS, indirect=True)
def test_bytes_at_random(valid):
    reader, path = valid
    content, random = path.read_bytes(), Random(0)
    refused = 0
    for _ in range(TIMES):
        path.write_bytes(damaged(content, random))
        refused += refused_or_read(reader, path)
    assert refused > TIMES / 4 or reader is READERS["prompts"]


@pytest.mark.parametrize("valid", JSON_FILES, indirect=True)
def test_json_at_random(valid):
    reader, path = valid
    lines = path.read_text().splitlines() if reader.read is read_ledger else [path.read_text()]
    random = Random(1)
    refused = 0
    for _ in range(3 * TIMES):
        index = random.randrange(len(lines))
        text = json.dumps(changed(json.loads(lines[index]), random))
        path.write_text("\n".join([*lines[:index], text, *lines[index + 1 :]]) + "\n")
        refused += refused_or_read(reader, path)
    assert refused


@pytest.mark.parametrize("valid", TENSOR_FILES, indirect=True)
def test_facts_beside_tensors_at_random(valid):
    reader, path = valid
    content, random = path.read_bytes(), Random(2)
    refused = 0
    for _ in range(3 * TIMES):
        path.write_bytes(header_changed(content, random))
        refused += refused_or_read(reader, path)
    assert refused


@pytest.mark.parametrize("valid", READERS, indirect=True)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b"[" + b"9" * 1_000_000 + b"]",
        b'["' + b"x" * 1_000_000 + b'"]',
        b"[NaN]",
        b"[1e999]",
        b'{"a": 1, "a": 1}',
        b"null",
        b"\xff\xfe\0",
        struct.pack("<Q", 1 << 62),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_bombs(valid, content):
    reader, path = valid
    path.write_bytes(content + b"\n" * (reader.read is read_ledger))
    refused_or_read(reader, path)


@pytest.mark.parametrize("valid", READERS, indirect=True)
def test_only_regular_files_of_bounded_size_are_read(valid):
    reader, path = valid
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 41)
    assert refused_or_read(reader, path)
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        assert refused_or_read(reader, path)


# ---- routers, by name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((3, 2, 2), np.inf), "finite for at least one component"),
        (np.full((3, 2, 2), -np.inf), "inf where the model has no such component"),
        (np.full((3, 2, 2), np.nan), "must be numbers"),
        ("x", "must be numbers"),
        ([[1], [1, 2]], "must be numbers"),
    ],
    ids=str,
)
def test_logits_that_are_none(value, message):
    with pytest.raises(ScheduleError, match=message):
        Router({KIND: value}, {KIND: NAMES})


@pytest.mark.parametrize("names", ["ab", ("a", "a"), ("a", 1), ("a", ""), ("a", "\x1b[31m"), None])
def test_names_that_are_none(names):
    for make in (
        lambda: Router({KIND: np.zeros((2, 1, 2))}, {KIND: names}),
        lambda: Schedule.from_bits(np.ones((2, 1, 2), bool), names),
        lambda: Router.from_checkpoint("unread", names),
    ):
        with pytest.raises(ScheduleError, match="components of"):
            make()


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 2),
        torch.tensor(1.0),
        torch.zeros(1).expand(1 << 40),
        torch.zeros(3).to_sparse(),
    ],
    ids=["matrix", "number", "huge view", "sparse"],
)
def test_entries_of_a_checkpoint_that_are_no_rows(tmp_path, rows):
    torch.save({"0.prob": rows}, tmp_path / "router.pt")
    with pytest.raises(ScheduleError, match="not a router checkpoint"):
        Router.from_checkpoint(tmp_path / "router.pt")


def test_a_checkpoint_that_unpacks_to_much_more(tmp_path, monkeypatch):
    torch.save({"0.prob": torch.zeros(1 << 16)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    assert Router.from_checkpoint(tmp_path / "packed.pt").steps == 1
    monkeypatch.setattr("fastdit.schedules.router.MAX_FILE_BYTES", 1 << 16)
    with pytest.raises(ScheduleError, match="unpacks to more than 65536 bytes"):
        Router.from_checkpoint(tmp_path / "packed.pt")


# ---- what is written, and what is no damage


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        router().save(tmp_path / "router.safetensors")
        checkpoint.save(tmp_path, {"a": torch.zeros(2)}, {})
        training(tmp_path / "training").fit()
    finally:
        os.umask(before)
    assert mode(tmp_path / "router.safetensors") == 0o640
    assert mode(tmp_path / "state.safetensors") == 0o640
    assert mode(tmp_path / "training" / "state.safetensors") == 0o640
    assert load_tensors((tmp_path / "state.safetensors").read_bytes()).keys() == {"a"}


def test_a_byte_order_mark_is_no_damage(tmp_path):
    for layout in ("fastdit", "ecad"):
        schedule().save(tmp_path / "schedule.json", layout)
        text = (tmp_path / "schedule.json").read_text()
        (tmp_path / "schedule.json").write_text(text, encoding="utf-8-sig")
        assert Schedule.load(tmp_path / "schedule.json") == schedule()
        assert Schedule.from_json("\ufeff" + text) == schedule()
    (tmp_path / "prompts.txt").write_text("a circle\n", encoding="utf-8-sig")
    assert prompts_of(tmp_path / "prompts.txt", embedded=False) == ("a circle",)


def test_numbers_are_those_that_a_float_can_hold():
    assert parse("[1.5, -3, 1e308, true, null]") == [1.5, -3, 1e308, True, None]
    for text in ("NaN", "-Infinity", "1e999", "-1e999", "9" * 309):
        with pytest.raises(ValueError, match="accepted"):
            parse(f"[{text}]")


def test_a_message_is_shortened_in_its_middle():
    for kind in (fastdit.FastDiTError, fastdit.errors.DependencyError, ScheduleError):
        long = str(kind("begins " + "x" * 10_000 + " ends"))
        assert len(long) == MAX_MESSAGE
        assert long.startswith("begins ")
        assert long.endswith(" ends")
        assert str(kind("short")) == "short"
