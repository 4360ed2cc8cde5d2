"""Attention by measurement: the file, the look-up, and what a run does with it, with stand-ins for a GPU."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch._C import _get_sdp_priority_order as order
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RAS, ArgumentError
from fastdit.blocks import attention_choice
from fastdit.blocks.attention_choice import (
    TORCH,
    Choices,
    Shape,
    attend_by,
    choices,
    fastest,
    measure,
)
from tiny_models import sample

GPU = "Stand-in GPU"
FLUX = Shape("bfloat16", 1, 1536, 24, 4608, 24, 128)
CUDNN = {"torch": 300.0, "cudnn": 200.0, "flash": 310.0}


@pytest.fixture(autouse=True)
def afresh():
    choices.cache_clear()
    yield
    choices.cache_clear()


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The file, of a GPU that is not there; its attentions run, and cuDNN's is the fastest."""
    path = tmp_path / "folder" / "attention.json"
    monkeypatch.setenv("FASTDIT_ATTENTION", str(path))
    monkeypatch.setattr(attention_choice, "gpu_of", lambda device: GPU)
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: True)
    times = dict(CUDNN)
    monkeypatch.setattr(attention_choice, "microseconds", lambda name, *_: times.get(name, 400.0))
    return path


@pytest.fixture
def names(monkeypatch):
    """The attentions that were called by name."""
    called = []

    def attend(name, *given):
        called.append(name)
        return attend_by(name, *given)

    monkeypatch.setattr("fastdit.blocks.attention.attend_by", attend)
    return called


# --- the file


def changed(**sizes):
    return Shape(**{**vars(FLUX), **sizes})


def test_sizes_near_measured_ones_take_the_same_attention():
    found = Choices(GPU, {FLUX: CUDNN, changed(queries=4608): {"torch": 1.0, "cudnn": 2.0}})
    assert found.best(FLUX) == "cudnn"
    assert found.best(changed(queries=1400, keys=5000)) == "cudnn"
    assert found.best(changed(queries=4000)) == TORCH  # the other one is nearer
    assert found.best(changed(batch=2, queries=700)) == "cudnn"
    for sizes in ({"keys": 12000}, {"heads": 12}, {"kv_heads": 8}, {"head_dim": 64}):
        assert found.best(changed(**sizes)) == TORCH
    assert found.best(changed(dtype="float16")) == TORCH
    assert FLUX.unlike(changed(queries=700)) == math.inf


def test_noise_decides_for_torch():
    assert fastest({"torch": 101.0, "cudnn": 100.0}) == TORCH
    assert fastest({"torch": 103.0, "cudnn": 100.0, "flash": 100.0}) == "cudnn"
    assert fastest({"_flash_3": 7.0}) == "_flash_3"


def test_a_file_is_of_one_gpu_and_one_torch(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    Choices(GPU, {FLUX: CUDNN}).write(path)
    assert Choices.read(path, GPU).times == {FLUX: CUDNN}
    assert Choices.read(path, "another").times == {}
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert str(Choices.read(path, GPU)) == "not measured with this torch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "2"}, "its format is not"),
        ({"measured": 3}, "no list"),
        ({"measured": [{}]}, "other keys"),
        ({"us": {"sage": 1.0}}, "times must be of torch, cudnn"),
        ({"us": {"torch": -1.0}}, "not positive numbers"),
        ({"heads": 0}, "not positive whole numbers"),
    ],
)
def test_a_wrong_file_is_refused_when_patching(change, words, path):
    Choices(GPU, {FLUX: CUDNN}).write(path)
    content = json.loads(path.read_text())
    row = content["measured"][0]
    (row if change.keys() <= row.keys() else content).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=rf"attention\.json cannot be read: .*{words}.*delete"):
        fastdit.patch(tiny_models.transformer("flux"))


# --- torch's order


def test_one_attention_is_first_for_one_call(monkeypatch):
    seen, before = [], order()
    monkeypatch.setattr(attention_choice, "attention", lambda *_: seen.append(order()))
    q = torch.randn(1, 4, 2, 8)
    attend_by("cudnn", q, q, q, None)
    attend_by("efficient", q, q, q, None)
    attend_by(TORCH, q, q, q, None)
    firsts = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    assert [found[0] for found in seen[:2]] == [first.value for first in firsts]
    assert all(sorted(found) == sorted(before) for found in seen)
    assert seen[2] == order() == before

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention_choice, "attention", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        attend_by("flash", q, q, q, None)
    assert order() == before


@pytest.mark.parametrize("priority", [True, False])
def test_the_users_order_is_theirs(priority, monkeypatch):
    seen = []
    monkeypatch.setattr(attention_choice, "attention", lambda *_: seen.append(order()))
    q = torch.randn(1, 4, 2, 8)
    theirs = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    theirs += [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if priority else []
    with sdpa_kernel(theirs, set_priority=priority):
        set_by_them = order()
        attend_by("cudnn", q, q, q, None)
    assert seen == [set_by_them]


def test_another_name_is_refused():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ArgumentError, match="attention must be one of torch, cudnn"):
        attend_by("sage", q, q, q, None)


# --- runs


@pytest.mark.diffusers
@pytest.mark.parametrize("family", ["sd3", "flux"])
@torch.no_grad()
def test_a_measured_attention_runs_from_then_on(family, path, names):
    model = tiny_models.transformer(family)
    given = tiny_models.call(family, 2)
    handle = fastdit.patch(model)
    assert handle.explain().attention == ""
    stock = sample(model(**given))
    assert set(names) <= {TORCH}
    with handle.tune_attention() as tuning:
        same_bits(sample(model(**given)), stock)
    assert {fastest(times) for times in tuning.times.values()} == {"cudnn"}
    assert "_flash_3" not in next(iter(tuning.times.values()))  # it is not installed
    assert f"{GPU}, in {path}" in str(tuning)
    assert Choices.read(path, GPU).times == tuning.times
    names.clear()
    same_bits(sample(model(**given)), stock)
    assert set(names) == {"cudnn"}
    said = f"cudnn for {len(tuning.times)} of {len(tuning.times)} measured sizes"
    assert f"attention {said}" in str(handle.explain())


@pytest.mark.diffusers
@torch.no_grad()
def test_what_was_measured_before_stays(path):
    Choices(GPU, {FLUX: CUDNN}).write(path)
    model = tiny_models.transformer("flux")
    with fastdit.patch(model).tune_attention() as tuning:
        model(**tiny_models.call("flux", 1))
    assert Choices.read(path, GPU).times == {FLUX: CUDNN, **tuning.times}
    shapes = len(tuning.times)

    def interrupted():
        with fastdit.patch(model).tune_attention():
            model(**tiny_models.call("flux", 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(Choices.read(path, GPU).times) == 1 + shapes


@pytest.mark.diffusers
@torch.no_grad()
def test_the_users_attention_wins(path, names):
    model = tiny_models.transformer("flux")
    given = tiny_models.call("flux", 1)
    with fastdit.patch(model).tune_attention():
        model(**given)
    names.clear()
    with attention_backend("_native_math"):
        model(**given)
    assert names == []
    for backend in ("cpu", "reference"):  # ops of a named backend are that backend's
        fastdit.patch(model, backend=backend)
        model(**given)
        assert names == []
    fastdit.patch(model)
    model.set_attention_backend("_native_math")
    model(**given)
    assert names == []
    model.set_attention_backend("native")
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = None
    model(**given)
    assert set(names) == {"cudnn"}


@pytest.mark.diffusers
@torch.no_grad()
def test_active_tokens_have_sizes_of_their_own(path):
    pipe = tiny_models.pipeline("flux-dev")
    handle = fastdit.patch(pipe, RAS(0.5, start=1, resets=(), align=1))
    with handle.tune_attention() as tuning:
        tiny_models.generate(pipe, "flux-dev", steps=3)
    queries = {(shape.queries, shape.keys) for shape in tuning.times}
    text = {keys - 32 for _, keys in queries}
    assert queries == {(n + t, 32 + t) for n in (16, 32) for t in text}


def test_a_wrong_attention_is_not_timed(monkeypatch, path):
    def attend(name, q, k, v, scale):
        if name == "flash":
            return attend_by(TORCH, q, k, v.roll(1, dims=1), scale)
        if name == "efficient":
            raise RuntimeError("no kernel")
        return attend_by(name, q, k, v, scale)

    monkeypatch.setattr(attention_choice, "attend_by", attend)
    shape = Shape("bfloat16", 2, 20, 6, 30, 2, 16)
    assert measure(shape, torch.device("cpu")) == {"torch": 300.0, "cudnn": 200.0}


def test_without_a_gpu_or_a_file_nothing_is_measured(monkeypatch):
    model = tiny_models.transformer("sd3")
    with pytest.raises(ArgumentError, match="measures a GPU, but the model is on cpu"):
        fastdit.patch(model).tune_attention().__enter__()
    monkeypatch.setattr(attention_choice, "gpu_of", lambda device: GPU)
    monkeypatch.setenv("FASTDIT_ATTENTION", "off")
    with pytest.raises(ArgumentError, match="FASTDIT_ATTENTION is 'off'"):
        fastdit.patch(model).tune_attention().__enter__()
    assert choices(torch.device("cpu")) is None


@pytest.mark.diffusers
@torch.no_grad()
def test_a_program_runs_the_measured_attention(path, monkeypatch):
    """Calls that were recorded before are recorded anew, and what is led to another attention stays so."""
    seen = []
    attend = attention_choice.attention
    monkeypatch.setattr(
        attention_choice, "attention", lambda *given: seen.append(order()[0]) or attend(*given)
    )
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe)

    def drawn():
        return tiny_models.latents_of(pipe, tiny_models.arguments("sd3", steps=4)).clone()

    before = drawn()
    assert handle.last_run().programs > 0
    with handle.tune_attention():
        same_bits(drawn(), before)
    for recorded in (True, False):
        seen.clear()
        same_bits(drawn(), before)
        assert set(seen) == {SDPBackend.CUDNN_ATTENTION.value}, recorded
    assert handle.last_run().programs > 0
