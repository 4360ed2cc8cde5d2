"""Other people's features on the same model, before and after patching: their results stay, removal is clean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import hooks as diffusers_hooks
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, inject_adapter_in_model

import fastdit
import tiny_models
from contract import FORWARD_FP64, same_bits, within_contract
from fastdit import Cached, Schedule
from fastdit.patch import handle_of
from fastdit.runtime.install import LINK, is_installed
from oracle import Oracle, random_bits
from snapshot import snapshot
from tiny_models import sample

pytestmark = pytest.mark.diffusers

STEPS = 3


def blocks(model):
    kinds = ("transformer_blocks", "single_transformer_blocks", "layers", "blocks")
    return [block for kind in kinds for block in getattr(model, kind, ())]


# ---- the features


class Counting(ModelHook):
    """An accelerate hook that sees calls and changes nothing."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Seeing(diffusers_hooks.ModelHook):
    """A diffusers hook that sees calls and changes nothing."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Around(diffusers_hooks.ModelHook):
    """A diffusers hook that takes the forward's place and calls the original."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hooks(model):
    for block in blocks(model):
        add_hook_to_module(block, Counting())
    add_hook_to_module(model, Counting())


def accelerate_offload(model):
    cpu_offload_with_hook(model, execution_device="cpu")


def diffusers_hook(model):
    for block in blocks(model):
        registry = diffusers_hooks.HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(Seeing(), "seeing")
        registry.register_hook(Around(), "around")
        registry.register_hook(Seeing(), "seeing more")


def both_hooks(model):
    accelerate_hooks(model)
    diffusers_hook(model)


def group_offload(level):
    def apply(model):
        if not torch.accelerator.is_available() and diffusers.__version__.startswith("0.36"):
            pytest.skip("diffusers 0.36 offloads groups only where there is an accelerator")
        model.enable_group_offload(
            torch.device("cpu"),
            torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
        )

    return apply


def lora(model):
    """Random adapters on every linear layer of attentions, feed-forwards and FLUX's single blocks."""
    parts = r"to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_mlp|proj_out|linear_[123]"
    config = LoraConfig(
        r=2, init_lora_weights=False, target_modules=rf".*(blocks|layers)\.\d+\.(.*\.)?({parts})"
    )
    dtype = model.dtype
    torch.manual_seed(3)
    inject_adapter_in_model(config, model)
    model.to(dtype)


def fuse_qkv(model):
    model.fuse_qkv_projections()


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=model.dtype)


def chunking(dim):
    def apply(model):
        for block in blocks(model):
            block.set_chunk_feed_forward(1, dim)

    return apply


def other_processor(model):
    model.set_attn_processor(AttnProcessor())


FEATURES: dict[str, Callable[[Any], None]] = {
    "accelerate hooks": accelerate_hooks,
    "accelerate offload": accelerate_offload,
    "diffusers hooks": diffusers_hook,
    "both kinds of hooks": both_hooks,
    "group offload by block": group_offload("block_level"),
    "group offload by leaf": group_offload("leaf_level"),
    "LoRA": lora,
    "fused QKV": fuse_qkv,
    "layerwise casting": layerwise_casting,
    "chunked batch": chunking(0),
    "chunked tokens": chunking(1),
    "another processor": other_processor,
}
#: what diffusers itself does not offer for a family
MISSING = {
    ("flux", "chunked batch"),
    ("flux", "chunked tokens"),
    ("flux", "another processor"),
    ("sd3.5", "another processor"),
    ("sd3.5", "fused QKV"),  # not with dual attention
    ("dit", "fused QKV"),
    ("dit", "another processor"),
    ("dit", "group offload by block"),
    ("dit", "group offload by leaf"),
    ("lumina", "fused QKV"),
    ("lumina", "chunked batch"),
    ("lumina", "chunked tokens"),
    ("lumina", "another processor"),
}
CASES = [
    (family, feature)
    for family in ("sd3.5", "flux", "pixart-sigma", "dit", "lumina")
    for feature in FEATURES
    if (family, feature) not in MISSING
] + [("sd3", "fused QKV")]


def outputs(model, family, dtype=torch.float32):
    """One run's outputs."""
    with torch.no_grad():
        return [
            sample(model(**tiny_models.call(family, 2, dtype, step=step))) for step in range(STEPS)
        ]


def build(family, dtype=torch.float32):
    """A model, and a random schedule for it: bits and names."""
    model = tiny_models.transformer(family, dtype)
    return model, *random_bits(model, STEPS, 6)


@functools.cache
def truth(family, feature, dtype):
    """Stock outputs with the feature: (dense, under the schedule)."""
    model, bits, _ = build(family, dtype)
    FEATURES[feature](model)
    dense = outputs(model, family, dtype)
    if feature.startswith("chunked"):  # the oracle keeps whole outputs of a module, not chunks
        model = build(family, dtype)[0]
    with Oracle(model, bits).installed():
        return dense, outputs(model, family, dtype)


def install(model, feature, patch, order):
    if order == "before":
        FEATURES[feature](model)
    patch()
    if order == "after":
        FEATURES[feature](model)


@pytest.mark.parametrize(
    ("family", "feature", "order"),
    [(*case, ("after", "before")[index % 2]) for index, case in enumerate(CASES)],
)
def test_features_keep_their_bits_on_reference(family, feature, order):
    dense, cached = truth(family, feature, torch.float32)
    model, bits, names = build(family)
    install(model, feature, lambda: fastdit.patch(model, backend="reference"), order)
    for _ in range(2):  # some features lose hooks after a run
        for actual, expected in zip(outputs(model, family), dense, strict=True):
            same_bits(actual, expected)
    if not feature.startswith("chunked"):  # chunks go through other GEMM kernels than the oracle
        schedule = Cached(Schedule.from_bits(bits, names))
        with fastdit.patch(model, schedule, backend="reference").run(range(STEPS)):
            for actual, expected in zip(outputs(model, family), cached, strict=True):
                same_bits(actual, expected)
    fastdit.unpatch(model)
    for actual, expected in zip(outputs(model, family), dense, strict=True):
        same_bits(actual, expected)
    assert_clean(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "feature", "order"),
    [(*case, ("before", "after")[index % 2]) for index, case in enumerate(CASES)],
)
def test_features_run_on_the_fast_path(family, feature, order):
    _, cached = truth(family, feature, torch.float64)
    model, bits, names = build(family, torch.float64)
    schedule = Cached(Schedule.from_bits(bits, names))
    install(model, feature, lambda: fastdit.patch(model, schedule), order)
    for _ in range(2):
        with handle_of(model).run(range(STEPS)):
            actuals = outputs(model, family, torch.float64)
            for actual, expected in zip(actuals, cached, strict=True):
                within_contract(actual, expected, bound=FORWARD_FP64)


@pytest.mark.parametrize(("family", "feature"), CASES)
def test_unpatching_leaves_features_as_they_were(family, feature):
    model = tiny_models.transformer(family)
    FEATURES[feature](model)
    outputs(model, family)  # offloading moves the weights in its first run
    before = snapshot(model)
    fastdit.patch(model, Cached(Schedule.every(2)))
    fastdit.unpatch(model)
    assert snapshot(model) == before


def assert_clean(model):
    """Nothing of ours is left anywhere."""
    assert [name for name, part in model.named_modules() if LINK in part.__dict__] == []
    assert [name for name, part in model.named_modules() if is_installed(part)] == []
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    assert [hook for hook in hooks if "fastdit" in getattr(hook, "__module__", "")] == []


# ---- hooks keep working, and can be taken away, under the patch


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_hooks_are_called_and_can_be_removed(order):
    model = tiny_models.transformer("sd3")
    stock = outputs(model, "sd3")
    patch = lambda: fastdit.patch(model, backend="reference")  # noqa: E731
    install(model, "accelerate hooks", patch, order)
    outputs(model, "sd3")
    assert [block._hf_hook.calls for block in blocks(model)] == [STEPS] * 3
    for module in (model, *blocks(model)):
        remove_hook_from_module(module)
    for actual, expected in zip(outputs(model, "sd3"), stock, strict=True):
        same_bits(actual, expected)
    assert fastdit.report(model).steps == STEPS
    fastdit.unpatch(model)
    assert_clean(model)
    same_bits(outputs(model, "sd3")[0], stock[0])


@pytest.mark.parametrize("gone", ["seeing", "around", "seeing more"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_diffusers_hooks_are_called_and_can_be_removed(order, gone):
    model = tiny_models.transformer("flux")
    stock = outputs(model, "flux")
    patch = lambda: fastdit.patch(model, backend="reference")  # noqa: E731
    install(model, "diffusers hooks", patch, order)
    outputs(model, "flux")
    for block in blocks(model):
        registry = block._diffusers_hook
        assert {name: hook.calls for name, hook in registry.hooks.items()} == {
            "seeing": STEPS,
            "around": STEPS,
            "seeing more": STEPS,
        }
        registry.remove_hook(gone, recurse=False)
    for actual, expected in zip(outputs(model, "flux"), stock, strict=True):
        same_bits(actual, expected)
    assert fastdit.report(model).steps == STEPS
    fastdit.unpatch(model)
    assert_clean(model)
    same_bits(outputs(model, "flux")[0], stock[0])


def test_offloading_a_whole_pipeline_survives_the_end_of_a_run():
    """diffusers then takes accelerate's hooks away, which puts `_old_forward` back, and adds them again."""
    pipe = tiny_models.pipeline("sd3")
    expected = [tiny_models.generate(pipe, "sd3", seed=seed) for seed in range(3)]
    accelerate_offload(pipe.transformer)
    fastdit.patch(pipe, backend="reference")
    for seed in range(3):
        same_bits(tiny_models.generate(pipe, "sd3", seed=seed), expected[seed])
        assert fastdit.report(pipe).computed == 4 * 8
        remove_hook_from_module(pipe.transformer, recurse=True)
        accelerate_offload(pipe.transformer)


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
@pytest.mark.parametrize("reuse", [False, True], ids=["dense", "cached"])
def test_autocast_keeps_its_bits(family, reuse):
    model = tiny_models.transformer(family)
    bits, names = random_bits(model, STEPS, 8, compute=0.4 if reuse else 1.1)
    with torch.autocast("cpu", torch.bfloat16):
        with Oracle(model, bits).installed():
            expected = outputs(model, family)
        handle = fastdit.patch(model, Cached(Schedule.from_bits(bits, names)))
        with handle.run(range(STEPS)):
            for actual, wanted in zip(outputs(model, family), expected, strict=True):
                same_bits(actual, wanted)


def test_autocast_that_begins_inside_a_run_recomputes():
    model = tiny_models.transformer("sd3")
    first, second = (tiny_models.call("sd3", step=step) for step in range(2))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = sample(model(**second))
        handle = fastdit.patch(model, Cached(Schedule.every(2)))
        with handle.run(range(2)):
            model(**first)
            with torch.autocast("cpu", torch.bfloat16):
                same_bits(sample(model(**second)), expected)
