"""Families without an adapter: components wrapped as they are equal a plain cache of the same modules."""

from __future__ import annotations

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdit
import oracle
import tiny_models
from contract import same_bits
from denoisers import ENTRIES
from fastdit import ECAD, RAS, ArgumentError, Schedule, UnsupportedModelError
from fastdit.adapters import find_adapter
from fastdit.adapters.generic import Generic, block_lists, use_of_keys
from fastdit.patch import handle_of
from oracle import Oracle
from snapshot import snapshot

pytestmark = pytest.mark.diffusers

STEPS = 5
#: blocks that keep keys and values from call to call
HAS_KEYS = hasattr(transformers, "QwenImage21Transformer2DModel")


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
@pytest.mark.parametrize(
    ("build", "parts"), [(cogview4, ("attn1", "ff")), (easy_animate, ("attn1", "ff", "txt_ff"))]
)
def test_each_call_of_a_module_in_a_block_has_a_slot(build, parts, text, monkeypatch):
    """CogView4, GLM-Image and EasyAnimate call one feed-forward on both streams."""
    calls = [call_of(build, step, text) for step in range(STEPS)]
    plain, report = run_beside_a_plain_cache(
        build(), {"transformer_blocks": parts}, calls, monkeypatch
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


def test_blocks_that_run_again_in_a_call_have_slots_of_their_own(monkeypatch):
    """As where a model recycles what it made."""

    class Twice(SanaTransformer2DModel):
        def forward(self, hidden_states, **kwargs):
            first = super().forward(hidden_states, **kwargs)[0]
            return super().forward(first, **kwargs)

    model = Twice(**sana().config)
    calls = [inputs(step) for step in range(STEPS)]
    plain, report = run_beside_a_plain_cache(
        model, {"transformer_blocks": ("attn1", "attn2", "ff")}, calls, monkeypatch
    )
    assert plain.reused > 0
    assert (report.computed, report.reused) == (plain.computed, plain.reused)


@pytest.mark.parametrize("name", ["Kandinsky5Transformer3DModel", "PriorTransformer"])
def test_outputs_of_any_form(name, monkeypatch):
    """A bare tensor, and an object whose sample has another name."""
    entry = ENTRIES[name]
    model = getattr(transformers, name)(**entry.config)
    calls = [
        entry.call(step) | ({"return_dict": False} if name[0] == "K" else {})
        for step in range(STEPS)
    ]
    assert isinstance(model(**calls[0]), torch.Tensor) == (name[0] == "K")
    parts = {kind: tuple(names.split()) for kind, names in entry.parts.items()}
    plain, report = run_beside_a_plain_cache(model, parts, calls, monkeypatch)
    assert (report.computed, report.reused) == (plain.computed, plain.reused)


def glm_with_keys(mode, kept):
    kept.set_mode(mode)
    return {"kv_caches": kept}


def qwen_with_keys(mode, kept):
    return {
        "kv_cache": kept,
        "kv_cache_mode": {"write": "extract", "read": "cached"}[mode],
    }


@pytest.mark.skipif(not HAS_KEYS, reason="since diffusers 0.42")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("GlmImageTransformer2DModel", glm_with_keys),
        ("QwenImage21Transformer2DModel", qwen_with_keys),
    ],
)
@pytest.mark.parametrize("modes", ["wrrr", "wwrr"])
def test_blocks_that_keep_keys_compute_them(name, given, modes, monkeypatch):
    """The pipelines leave keys and values of references in a first call; so do all calls of a chunk, elsewhere."""
    entry, module = ENTRIES[name], sys.modules[getattr(transformers, name).__module__]
    model = tiny_models.randomise(getattr(transformers, name)(**entry.config))
    parts = {kind: tuple(names.split()) for kind, names in entry.parts.items()}
    monkeypatch.setitem(oracle.MODULES, name, {k: {part: part for part in parts[k]} for k in parts})

    def run():
        kept = next(
            v for k, v in vars(module).items() if k.endswith(("ImageKVCache", "21KVCache"))
        )(2)
        words = {"w": "write", "r": "read"}
        with torch.no_grad():
            return [
                model(**entry.call(step), **given(words[mode], kept))[0]
                for step, mode in enumerate(modes)
            ]

    computes = np.array([True, True, True, False])  # the first that reads has nothing of its form
    bits = {k: np.broadcast_to(computes[:, None, None], (4, 2, len(p))) for k, p in parts.items()}
    with Oracle(model, bits).installed():
        expected = run()
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(model, fastdit.Cached(Schedule.every(2)))
    with handle.run(range(4)):
        found = run()
    for mine, wanted in zip(found, expected, strict=True):
        same_bits(mine, wanted)
    report = handle.report()
    assert report.computed == 3 * report.reused > 0


def test_what_a_cache_of_keys_is_for_must_be_known():
    """AnyFlow's causal form is told by a dict of its own; FLUX.2 is given no cache where it is to make one."""
    unknown = {"kv_cache": {}, "kv_cache_flag": {"is_cache_step": False}}
    makes, reads = ({"kv_cache_mode": mode} for mode in ("extract", "cached"))
    assert use_of_keys(unknown) != use_of_keys(unknown)
    assert use_of_keys(makes) != use_of_keys(makes)
    assert use_of_keys(reads) == use_of_keys(reads) != use_of_keys({"kv_cache": None}) == ()


@pytest.fixture
def unknown(monkeypatch):
    """Wan has no adapter."""
    monkeypatch.setattr("fastdit.adapters.wan.ADAPTER.model_classes", ())


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
def test_patches_with_a_side_for_each_axis(patch_size, monkeypatch, unknown):
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


def wan_pipeline():
    """Two transformers, one for the noisier steps: three calls of the first, five of the second."""
    models = [tiny_models.randomise(wan((1, 2, 2)), seed) for seed in (0, 1)]
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=models[0],
        transformer_2=models[1],
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_both_transformers_of_a_pipeline_run_by_its_steps(monkeypatch, unknown):
    pipe = wan_pipeline()
    models = pipe.transformer, pipe.transformer_2
    parts = {"blocks": {part: part for part in ("attn1", "attn2", "ffn")}}
    monkeypatch.setitem(oracle.MODULES, "WanTransformer3DModel", parts)
    bits, names = oracle.random_bits(models[0], 8, 3)

    def run():
        return pipe(
            prompt_embeds=text(1, 5, 12),
            negative_prompt_embeds=text(1, 4, 12),
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=8,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).frames

    with (
        Oracle(models[0], bits, calls_per_step=2).installed() as first,
        Oracle(models[1], bits, calls_per_step=2, first=3).installed() as second,
    ):
        expected = run()
    schedule = Schedule.from_bits(bits, names)
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(pipe, ECAD(schedule))
    same_bits(run(), expected)
    report = handle.report()
    assert min(first.reused, second.reused) > 0
    assert report.computed == first.computed + second.computed
    assert report.reused == first.reused + second.reused


def test_a_transformer_by_another_name_is_told_of(unknown):
    pipe = wan_pipeline()
    pipe.unconditional = wan((1, 2, 2))
    method = ECAD(Schedule.every(2))
    with pytest.warns(UserWarning, match=r"unconditional of this WanPipeline is not patched with"):
        fastdit.patch(pipe, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*has no adapter")
        fastdit.patch(pipe.unconditional, method)
        fastdit.patch(pipe, method)


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
        ({"patch_size": 1, "in_channels": 64}, (2, 64, 77), 77),
        ({"embedding_dim": 64}, (2, 64), 1),
        ({"patch_size": 2, "patch_size_t": 4, "in_channels": 4}, (1, 4, 8, 6), 12),
        ({"patch_size": (1, 2, 2), "in_visual_dim": 4}, (1, 3, 8, 6, 4), 36),
        ({"patch_size": (1, 2, 2), "in_channels": 4}, (1, 2, 4, 3, 8, 6), 72),
        ({"latent_patch_size": 2, "latent_channel": 4}, (1, 1, 4, 3, 8, 6), 36),
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
    for methods in ((), (RAS(),), (ECAD(schedule), RAS())):
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


# ---- what is found, and what it costs

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}
JOINT = SMALL | {"in_channels": 16, "joint_attention_dim": 20, "num_layers": 2}


def text(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def packed(step, width=20, **more):
    """16 tokens of packed latents and 6 of text."""
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(step))
    given = {"hidden_states": noise, "encoder_hidden_states": text(1, 6, width)}
    return given | {"timestep": torch.tensor([0.9 - 0.1 * step]), "return_dict": False} | more


def chroma():
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 32}
    model = ChromaTransformer2DModel(
        **JOINT,
        **approximator,
        num_single_layers=2,
        axes_dims_rope=(4, 6, 6),
        approximator_layers=1,
    )
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    return model, lambda step: packed(step, **ids)


def flux2():
    model = Flux2Transformer2DModel(
        **JOINT, num_single_layers=2, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)
    )
    ids = {"img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 6, 4)}
    return model, lambda step: packed(step, guidance=torch.ones(1), **ids)


FOUND = {
    "chroma": (
        chroma,
        {
            "transformer_blocks": ("attn", "ff", "ff_context"),
            "single_transformer_blocks": ("proj_mlp", "proj_out", "attn"),
        },
    ),
    "flux2": (
        flux2,
        {
            "transformer_blocks": ("attn", "ff", "ff_context"),
            "single_transformer_blocks": ("attn",),
        },
    ),
}


def macs(run):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


if tiny_models.HAS_FLUX2:  # which has an adapter
    del FOUND["flux2"]


@pytest.fixture(params=FOUND)
def found(request):
    build, parts = FOUND[request.param]
    model, given = build()
    adapter = Generic(model)
    assert {kind: tuple(names) for kind, names in adapter.components.items()} == parts
    return tiny_models.randomise(model), given


def test_costs_are_exact_once_a_call_was_seen(found):
    model, given = found
    with pytest.warns(UserWarning, match=r"are wrapped as they are, about \d+% of its arithmetic"):
        handle = fastdit.patch(model, fastdit.Cached(Schedule.every(2)))
    assert not handle.explain(steps=4).exact
    dense = macs(lambda: model(**given(0)))

    def run():
        with handle.run(range(4)):
            for step in range(4):
                model(**given(step))

    done = macs(run)
    report = handle.report()
    assert report.flop_speedup == 4 * dense / done
    assert f"{1 - done / (4 * dense):.1%} of the arithmetic" in str(report)
    side = 8 * 4 * find_adapter(model, generic="components").patch(model)
    said = handle.explain(steps=4, cfg=False, height=side, width=side)
    assert said.exact
    assert said.image_tokens == report.tokens_per_step[0] == 16
    assert (said.macs, said.dense_macs) == (done, 4 * dense)
    assert said.cache_bytes == report.peak_cache_bytes
    assert said.reusable_share == pytest.approx(2 * (1 - done / (4 * dense)))


def test_what_could_not_be_reused_is_not_counted_as_spared(case):
    model, _, _ = case
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(model, fastdit.Cached(Schedule.every(2)))
    with torch.no_grad(), handle.run(range(2)):
        model(**inputs(0))
        model(**inputs(1) | {"encoder_hidden_states": torch.randn(2, 5, 12)})
    with pytest.warns(UserWarning, match="reused nothing"):
        report = handle.report()
    assert report.reused == 0
    assert report.flop_speedup == 1


@pytest.mark.skipif(not HAS_KEYS, reason="since diffusers 0.42")
@pytest.mark.parametrize("name", ["Ideogram4Transformer2DModel", "QwenImage21Transformer2DModel"])
def test_costs_are_exact_where_masks_are_read_on_the_host(name):
    entry = ENTRIES[name]
    model = getattr(transformers, name)(**entry.config)
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(model, fastdit.Cached(Schedule.every(2)))
    with torch.no_grad(), handle.run(range(4)):
        for step in range(4):
            model(**entry.call(step))
    told = str(handle.report())
    assert "of the arithmetic" in told
    assert "estimated" not in told


def test_caches_are_bounded_before_they_are_filled(found):
    model, given = found

    def run(most):
        method = fastdit.Cached(Schedule.every(2), max_cache_bytes=most)
        with pytest.warns(UserWarning, match="has no adapter"):
            handle = fastdit.patch(model, method)
        with torch.no_grad(), handle.run(range(4)):
            for step in range(4):
                model(**given(step))
        return handle.report().peak_cache_bytes

    needed = run(1 << 30)
    assert run(needed) == needed
    with pytest.raises(ArgumentError, match=f"need {needed} bytes"):
        run(needed - 1)


def test_bounds_need_a_call_that_can_be_counted(case):
    """AuraFlow and Sana can; a model that reads values of its arguments cannot."""
    model, _, schedule = case

    class Reads(type(model)):
        def forward(self, hidden_states, timestep, **kwargs):
            return super().forward(
                hidden_states, timestep=timestep + 0 * timestep[0].item(), **kwargs
            )

    model.__class__ = Reads
    with pytest.warns(UserWarning, match="has no adapter"):
        handle = fastdit.patch(model, ECAD(schedule, max_cache_bytes=1))
    refused = pytest.raises(UnsupportedModelError, match="Reads: it has no adapter, and its call")
    with torch.no_grad(), handle.run(range(STEPS)), refused:
        model(**inputs(0))


def test_lists_of_blocks_in_dicts_are_found():
    """FLUX.3 keeps those of its modes so."""

    class Modes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            lists = {name: sana().transformer_blocks for name in ("image", "sound")}
            self.modes = torch.nn.ModuleDict(lists)

    parts = ("attn1", "attn2", "ff")
    assert block_lists(Modes()) == {"modes.image": parts, "modes.sound": parts}
