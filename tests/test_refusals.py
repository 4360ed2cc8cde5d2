"""What cannot work is refused when patching or when a run starts, by name, and leaves everything as it was."""

from __future__ import annotations

import types

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel

import fastdit
import tiny_models
from contract import same_bits
from fastdit import Cached, Dense, Schedule
from fastdit.runtime.install import LINK
from oracle import random_bits
from snapshot import scheduler_snapshot, snapshot
from tiny_models import generate

EVERY_2 = Cached(Schedule.every(2))


def state(pipe):
    return snapshot(pipe.transformer), scheduler_snapshot(pipe.scheduler)


# ---- targets


@pytest.mark.parametrize(
    "target",
    [None, 3, "sd3", torch.nn.Linear(2, 2), Dense(), object()],
    ids=lambda target: type(target).__name__,
)
def test_a_target_that_is_none_names_what_is_supported(target):
    with pytest.raises(fastdit.UnsupportedModelError, match="SD3Transformer2DModel") as error:
        fastdit.patch(target)
    assert isinstance(error.value, TypeError)


def test_models_without_an_adapter_are_named():
    unet = UNet2DModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        layers_per_block=1,
    )
    with pytest.raises(
        fastdit.UnsupportedModelError, match=r"UNet2DModel.*PixArtTransformer2DModel"
    ):
        fastdit.patch(unet)
    with pytest.raises(fastdit.UnsupportedModelError, match="AutoencoderKL"):
        fastdit.patch(AutoencoderKL(block_out_channels=(4,), norm_num_groups=1))
    pipe = types.SimpleNamespace(unet=unet)
    with pytest.raises(fastdit.UnsupportedModelError, match="SimpleNamespace"):
        fastdit.patch(pipe)


def test_asking_an_unpatched_model():
    model = tiny_models.transformer("dit")
    for ask in (fastdit.report, fastdit.explain):
        with pytest.raises(fastdit.FastDiTError, match="not patched"):
            ask(model)


def test_a_pipeline_whose_transformer_is_missing_is_told_so():
    pipe = tiny_models.pipeline("dit")
    pipe.transformer = None
    with pytest.raises(fastdit.UnsupportedModelError, match="DiTPipeline, whose transformer is No"):
        fastdit.patch(pipe)


def test_a_pipeline_without_a_scheduler_says_what_to_patch():
    model = tiny_models.transformer("dit")
    for pipe in (
        types.SimpleNamespace(transformer=model),
        types.SimpleNamespace(transformer=model, scheduler=None),
    ):
        with pytest.raises(fastdit.UnsupportedModelError, match=r"without one; .* its transformer"):
            fastdit.patch(pipe)


@pytest.mark.parametrize(
    "scheduler", [None, object(), types.SimpleNamespace(step=len)], ids=range(3)
)
def test_a_pipeline_without_a_usable_scheduler(scheduler):
    model = tiny_models.transformer("dit")
    before = snapshot(model)
    pipe = types.SimpleNamespace(transformer=model, scheduler=scheduler)
    with pytest.raises(fastdit.UnsupportedModelError, match="scheduler"):
        fastdit.patch(pipe)
    assert snapshot(model) == before


# ---- what is given with the target, on a stock and on a patched pipeline


def wrong_forward(pipe):
    pipe.transformer.transformer_blocks[1].forward = lambda *args, **kwargs: None


def drifted(pipe):
    block = pipe.transformer.transformer_blocks[1]

    class JointTransformerBlock(type(block)):
        def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
            text, image = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return text, image * 1.0000001

    block.__class__ = JointTransformerBlock


def other_arguments(pipe):
    block = pipe.transformer.transformer_blocks[2]

    class JointTransformerBlock(type(block)):
        def forward(self, hidden_states, encoder_hidden_states, temb, extra=None):
            return super().forward(hidden_states, encoder_hidden_states, temb)

    block.__class__ = JointTransformerBlock


def foreign_block(pipe):
    pipe.transformer.transformer_blocks[1] = torch.nn.Identity()


def schedule(steps=4, blocks=3, names=("attn", "ff", "ff_context")):
    ones = torch.zeros(steps, blocks, len(names), dtype=torch.bool)
    return Cached(Schedule.from_bits(ones, list(names)))


REFUSALS = {
    "class for instance": (
        None,
        (Dense,),
        {},
        fastdit.ArgumentError,
        r"instances.*Dense\(\.\.\.\)",
    ),
    "schedule for method": (None, (Schedule.every(2),), {}, fastdit.ArgumentError, "Cached\\(it"),
    "methods in a list": (None, ([EVERY_2],), {}, fastdit.ArgumentError, "one by one"),
    "method by its name": (None, ("ras",), {}, fastdit.ArgumentError, "got 'ras'"),
    "packing in words": (None, (), {"pack_weights": "yes"}, fastdit.ArgumentError, "got 'yes'"),
    "graphs by number": (None, (), {"graphs": 1}, fastdit.ArgumentError, "graphs.*got 1"),
    "two schedules": (None, (EVERY_2, EVERY_2), {}, fastdit.CompositionError, "Cached and Cached"),
    "block count": (None, (schedule(blocks=2),), {}, fastdit.ScheduleError, "has 2 .* has 3"),
    "components": (None, (schedule(names=("mlp",)),), {}, fastdit.ScheduleError, "mlp"),
    "backend unknown": (None, (), {"backend": "fpga"}, fastdit.BackendError, "fpga"),
    "backend absent": (None, (), {"backend": "cuda"}, fastdit.BackendError, "cuda"),
    "forward replaced": (wrong_forward, (), {}, fastdit.UnsupportedModelError, "lambda"),
    "drift": (drifted, (), {}, fastdit.DriftError, "JointTransformerBlock.* of diffusers [0-9]"),
    "drift of arguments": (other_arguments, (), {}, fastdit.DriftError, "diffusers [0-9].*extra"),
    "foreign block": (foreign_block, (), {}, fastdit.UnsupportedModelError, "got Identity"),
}


@pytest.mark.parametrize(
    ("case", "patched"),
    # Replacing a block takes the patch out of it, so that is tried on a stock model only.
    [(c, p) for c in REFUSALS for p in (False, True) if not (p and c == "foreign block")],
)
def test_a_refused_patch_changes_nothing(case, patched):
    alter, methods, options, error, message = REFUSALS[case]
    pipe = tiny_models.pipeline("sd3")
    if patched:
        fastdit.patch(pipe, EVERY_2)
    if alter is not None:
        alter(pipe)
    before = state(pipe)
    session = pipe.transformer.__dict__.get(LINK)
    with pytest.raises(error, match=message):
        fastdit.patch(pipe, *methods, **options)
    assert state(pipe) == before
    assert pipe.transformer.__dict__.get(LINK) is session
    if alter is None:
        generate(pipe, "sd3")
        assert not patched or fastdit.report(pipe).reused == 2 * 8


def test_the_cpu_backend_does_not_serve_fp64():
    pipe = tiny_models.pipeline("sd3", torch.float64)
    before = state(pipe)
    with pytest.raises(fastdit.BackendError, match="float64"):
        fastdit.patch(pipe, backend="cpu")
    assert state(pipe) == before


def test_the_environment_names_a_backend(monkeypatch):
    pipe = tiny_models.pipeline("sd3")
    stock = generate(pipe, "sd3")
    monkeypatch.setenv("FASTDIT_BACKEND", "reference")
    handle = fastdit.patch(pipe)
    assert set(handle.explain().backends.values()) == {"reference"}
    same_bits(generate(pipe, "sd3"), stock)
    monkeypatch.setenv("FASTDIT_BACKEND", "cuda")
    with pytest.raises(fastdit.BackendError, match="cuda"):
        fastdit.patch(pipe)
    handle = fastdit.patch(pipe, backend="reference")  # an argument goes before the environment
    assert set(handle.explain().backends.values()) == {"reference"}


# ---- at the start of a run


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms(), -1))
def test_another_number_of_steps_is_refused_before_any_step(name):
    pipe = tiny_models.pipeline(name)
    bits, names = random_bits(pipe.transformer, 4, 0)
    handle = fastdit.patch(pipe, Cached(Schedule.from_bits(bits, names)))
    expected = generate(pipe, name, steps=4)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(fastdit.ScheduleError, match="4 steps but the run has 6"):
        generate(pipe, name, steps=6)
    assert calls == []
    hook.remove()
    assert not handle.live_runs()
    assert handle.cache_bytes() == 0
    same_bits(generate(pipe, name, steps=4), expected)


def test_a_run_of_another_length_is_refused_for_a_bare_transformer():
    model = tiny_models.transformer("dit")
    bits, names = random_bits(model, 4, 0)
    handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
    with (
        pytest.raises(fastdit.ScheduleError, match="4 steps but the run has 3"),
        handle.run(range(3)),
    ):
        raise AssertionError("the run must not begin")
    with handle.run(range(4)), torch.no_grad():
        model(**tiny_models.call("dit"))


def test_explain_refuses_impossible_sizes():
    handle = fastdit.patch(tiny_models.pipeline("sd3"), schedule())
    for name in ("height", "width", "batch", "steps"):
        for value in (0, -1, 1.5, True, "8", 10**6):
            with pytest.raises(fastdit.ArgumentError, match=name):
                handle.explain(**{name: value})
    with pytest.raises(fastdit.ScheduleError, match="4 steps"):
        handle.explain(steps=5)
