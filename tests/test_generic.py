"""Families without an adapter: components wrapped as they are equal a plain cache of the same modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    EasyAnimateTransformer3DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import FrozenDict

import fastdit
import oracle
import tiny_models
from contract import same_bits
from fastdit import ECAD, RAS, Schedule, UnsupportedModelError
from fastdit.adapters.generic import Generic
from fastdit.patch import handle_of
from oracle import Oracle
from snapshot import snapshot

pytestmark = pytest.mark.diffusers

STEPS = 5


def sana():
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )


def aura_flow():
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )


MODELS = {
    "sana": (sana, {"transformer_blocks": ("attn1", "attn2", "ff")}),
    "aura-flow": (
        aura_flow,
        {
            "joint_transformer_blocks": ("attn", "ff", "ff_context"),
            "single_transformer_blocks": ("attn", "ff"),
        },
    ),
}


def cogview4():
    """Its blocks call one `ff` on the image and on the text."""
    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
    )


def easy_animate():
    """So does its last, single-stream block; the others have an `ff` for each."""
    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=12,
    )


def inputs(step, batch=2):
    draw = torch.Generator().manual_seed(step)
    condition = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=condition),
        "timestep": torch.full((batch,), 0.9 - 0.1 * step),
        "return_dict": False,
    }


@pytest.fixture(params=MODELS)
def case(request, monkeypatch):
    """(model, bits, schedule); the oracle is told which modules these are."""
    build, parts = MODELS[request.param]
    model = tiny_models.randomise(build())
    monkeypatch.setitem(
        oracle.MODULES,
        type(model).__name__,
        {kind: {name: name for name in names} for kind, names in parts.items()},
    )
    bits, names = oracle.random_bits(model, STEPS, 3)
    return model, bits, Schedule.from_bits(bits, names)


def test_wrapped_components_equal_a_plain_cache(case):
    model, bits, schedule = case
    before = snapshot(model)
    calls = [inputs(step) for step in range(STEPS)]
    with torch.no_grad(), Oracle(model, bits).installed() as plain:
        expected = [model(**given)[0] for given in calls]
    with pytest.warns(UserWarning, match="has no adapter: its attn"):
        handle = fastdit.patch(model, ECAD(schedule))
    for _ in range(2):  # a second run starts with empty caches
        with torch.no_grad(), handle.run(range(STEPS)):
            for given, wanted in zip(calls, expected, strict=True):
                same_bits(model(**given)[0], wanted)
    report = handle.report()
    assert (report.computed, report.reused) == (plain.computed, plain.reused)
    with torch.no_grad(), handle.disabled():
        model(**calls[0])
    handle.unpatch()
    assert snapshot(model) == before


def call_of(build, step, text):
    """The arguments of `cogview4` or `easy_animate`, 16 image tokens."""
    given = inputs(step, batch=1)
    given["encoder_hidden_states"] = torch.randn(
        1, text, 12, generator=torch.Generator().manual_seed(7)
    )
    if build is easy_animate:
        return given | {"hidden_states": given["hidden_states"].unsqueeze(2)}
    sizes = {"original_size": 8.0, "target_size": 8.0, "crop_coords": 0.0}
    return given | {name: torch.full((1, 2), value) for name, value in sizes.items()}


@pytest.mark.parametrize("text", [5, 16], ids=["other-length", "equal-lengths"])
@pytest.mark.parametrize("build", [cogview4, easy_animate])
def test_each_call_of_a_module_in_a_block_has_a_slot(build, text, monkeypatch):
    """CogView4, GLM-Image and EasyAnimate call one feed-forward on both streams."""
    calls = [call_of(build, step, text) for step in range(STEPS)]
    plain, report = run_beside_a_plain_cache(
        build(), {"transformer_blocks": ("attn1", "ff")}, calls, monkeypatch
    )
    assert plain.reused > 0
    assert (report.computed, report.reused) == (plain.computed, plain.reused)


def run_beside_a_plain_cache(model, parts, calls, monkeypatch):
    """The oracle and the report after runs of equal bits under a random schedule."""
    tiny_models.randomise(model)
    modules = {kind: {name: name for name in names} for kind, names in parts.items()}
    monkeypatch.setitem(oracle.MODULES, type(model).__name__, modules)
    bits, names = oracle.random_bits(model, STEPS, 3)
    with torch.no_grad(), Oracle(model, bits).installed() as plain:
        expected = [model(**given)[0] for given in calls]
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(model, ECAD(Schedule.from_bits(bits, names)))
    with torch.no_grad(), handle.run(range(STEPS)):
        for given, wanted in zip(calls, expected, strict=True):
            same_bits(model(**given)[0], wanted)
    return plain, handle.report()


def test_reused_modules_do_not_run_also_in_a_copy(case):
    model, bits, _ = case
    names = {kind: tuple(oracle.MODULES[type(model).__name__][kind]) for kind in bits}
    idle = {kind: np.zeros_like(value[:2]) for kind, value in bits.items()}
    with pytest.warns(UserWarning, match="no adapter"):
        fastdit.patch(model, ECAD(Schedule.from_bits(idle, names)))
    twin = copy.deepcopy(model)
    for one in (model, twin):
        ran = []
        # Hooks stay outside of what is wrapped, so look at what is inside of it.
        for block in getattr(one, next(iter(bits))):
            next(iter(block.ff.children())).register_forward_hook(
                lambda *_, seen=ran: seen.append(1)
            )
        handle = handle_of(one)
        with torch.no_grad(), handle.run(range(2)):
            one(**inputs(0))
            first = len(ran)
            one(**inputs(1))
        assert len(ran) == first > 0
    fastdit.unpatch(twin)
    fastdit.unpatch(model)


def wan(patch_size):
    return WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


@pytest.mark.parametrize("patch_size", [(1, 2, 2), [1, 2, 2], (1, 4, 2)])
def test_patches_with_a_side_for_each_axis(patch_size, monkeypatch):
    """Wan and others; a config read from a file has a list."""
    draw = torch.Generator().manual_seed(0)
    calls = [
        inputs(step) | {"hidden_states": torch.randn(2, 4, 3, 8, 8, generator=draw)}
        for step in range(STEPS)
    ]
    model = wan(patch_size)
    _, report = run_beside_a_plain_cache(
        model, {"blocks": ("attn1", "attn2", "ffn")}, calls, monkeypatch
    )
    frame = 64 // (patch_size[1] * patch_size[2])
    assert report.tokens_per_step == (3 * frame,) * STEPS
    assert fastdit.explain(model, height=64, width=64, steps=STEPS).image_tokens == frame


@pytest.mark.parametrize(
    ("config", "shape", "tokens"),
    [
        ({"patch_size": None}, (1, 4, 8, 6), 48),
        ({}, (1, 4, 8, 6), 48),
        ({"patch_size": 2}, (2, 4, 8, 6), 12),
        ({"patch_size": 2, "in_channels": 8}, (1, 4, 8, 6), 12),
        ({"patch_size": [2, 1]}, (1, 4, 8, 6), 24),
        ({"patch_size": 2, "patch_size_t": 4, "in_channels": 4}, (1, 4, 8, 8, 6), 24),
        ({"patch_size": 2, "patch_size_t": None, "in_channels": 4}, (1, 3, 4, 8, 6), 36),
        ({"patch_size": (1, 2, 2)}, (1, 16, 3, 8, 6), 36),
        ({"patch_size": 1}, (2, 77, 64), 77),
    ],
)
def test_tokens_of_any_patch_size(config, shape, tokens):
    model = sana()
    model._internal_dict = FrozenDict(config)
    assert Generic(model).tokens(model, shape) == tokens
    assert isinstance(Generic(model).patch(model), int)


def test_what_needs_an_adapter_is_refused(case):
    model, _, schedule = case
    before = snapshot(model)
    name = type(model).__name__
    for methods in ((), (RAS(),), (ECAD(schedule), RAS()), (ECAD(schedule, max_cache_bytes=1),)):
        with pytest.raises(UnsupportedModelError, match=name):
            fastdit.patch(model, *methods)
    assert snapshot(model) == before


def test_modules_in_two_places_are_refused(case):
    """Their outputs would share a slot, or be asked for under the wrong block's name."""
    model, bits, schedule = case
    blocks = getattr(model, next(iter(bits)))
    blocks[1].ff = blocks[0].ff
    with pytest.raises(UnsupportedModelError, match="ff of block 1 is the same module as ff of"):
        fastdit.patch(model, ECAD(schedule))
    blocks[1] = blocks[0]
    with pytest.raises(UnsupportedModelError, match=r"blocks\[1\] is the same module as .*\[0\]"):
        fastdit.patch(model, ECAD(schedule))
