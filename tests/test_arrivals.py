"""What comes to a model after it was patched: honoured at the next run, or refused by name at its first call."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    LuminaAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, ArgumentError, Cached, Dense, FastDiTError, UnsupportedModelError
from tiny_models import generate

STEPS = 5
RAS_METHOD = RAS(start=1, align=1, resets=())
STAGES = RALU((1, 1, 3), (0.2, 0.3, 1.0), (8.0, 2.8, 2.2), 0.0255, 0.3, selector="gradient")
EVERY_2 = Cached(fastdit.Schedule.every(2))
STOCK = {
    "sd3": JointAttnProcessor2_0,
    "flux": FluxAttnProcessor,
    "pixart-sigma": AttnProcessor2_0,
    "lumina": LuminaAttnProcessor2_0,
}


def doubling(stock):
    """A user's processor: the stock one's output times two."""

    class Doubled(stock):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            return tuple(2 * x for x in found) if isinstance(found, tuple) else 2 * found

    return Doubled()


def attention_of(pipe):
    """The first block's attention."""
    block = next(iter(fastdit.adapters.find_adapter(pipe.transformer).blocks(pipe.transformer)))[1]
    return getattr(block, "attn", None) or block.attn1


@pytest.mark.parametrize("name", STOCK)
def test_a_processor_is_refused_by_name_where_it_would_be_left_out(name):
    pipe = tiny_models.pipeline(name)
    handle = fastdit.patch(pipe, RAS_METHOD)
    expected = generate(pipe, name, steps=STEPS)
    attention = attention_of(pipe)
    before = attention.processor
    attention.set_processor(doubling(STOCK[name]))
    with pytest.raises(
        UnsupportedModelError, match=r"of block 0 has the attention processor .*Doubled"
    ):
        generate(pipe, name, steps=STEPS)
    assert not handle.live_runs()
    with handle.disabled():
        generate(pipe, name, steps=STEPS)
    attention.set_processor(before)
    same_bits(generate(pipe, name, steps=STEPS), expected)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("method", [Dense(), EVERY_2], ids=lambda method: method.name)
def test_a_processor_is_honoured_where_the_stock_ones_run(name, method):
    first, second = (tiny_models.pipeline(name) for _ in range(2))
    fastdit.patch(first, method, backend="reference")
    plain = generate(first, name, steps=STEPS)
    for pipe in (first, second):
        attention_of(pipe).set_processor(doubling(STOCK[name]))
    fastdit.patch(second, method, backend="reference")
    found = generate(first, name, steps=STEPS)
    same_bits(found, generate(second, name, steps=STEPS))
    assert not torch.equal(found, plain)


def test_stages_refuse_it_where_their_own_attention_runs_and_honour_it_elsewhere():
    given = {"steps": STEPS, "height": 16, "width": 24}
    alike = replace(STAGES, weigh_keys=False)
    for name, method in (("flux", STAGES), ("flux", alike), ("sd3", STAGES), ("sd3", alike)):
        pipe = tiny_models.pipeline(name)
        fastdit.patch(pipe, method, backend="reference")
        plain = generate(pipe, name, batch=2, **given)
        attention_of(pipe).set_processor(doubling(STOCK[name]))
        if (name, method) == ("sd3", alike):
            assert not torch.equal(generate(pipe, name, batch=2, **given), plain)
        else:
            with pytest.raises(UnsupportedModelError, match="Doubled, which RALU would leave out"):
                generate(pipe, name, batch=2, **given)


def test_attention_arguments_are_refused_but_for_the_scale_of_lora_layers():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, RAS_METHOD)
    mask = {"attention_mask": torch.zeros(1)}
    with pytest.raises(ArgumentError, match="attention arguments attention_mask are for"):
        generate(pipe, "sd3", steps=STEPS, joint_attention_kwargs=mask)
    expected = generate(pipe, "sd3", steps=STEPS)
    same_bits(generate(pipe, "sd3", steps=STEPS, joint_attention_kwargs={"scale": 0.5}), expected)


CACHES = {
    "FBCHeadBlockHook": lambda pipe: FirstBlockCacheConfig(threshold=0.9),
    "PyramidAttentionBroadcastHook": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=["transformer_blocks"],
        current_timestep_callback=lambda: pipe._current_timestep,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "methods", [(EVERY_2,), (RAS_METHOD,), (RAS_METHOD, EVERY_2)], ids=["Cached", "RAS", "both"]
)
def test_caches_of_diffusers_are_refused_before_and_after(methods, cache):
    pipe = tiny_models.pipeline("flux")
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    with pytest.raises(UnsupportedModelError, match=cache):
        fastdit.patch(pipe, *methods)
    assert "_fastdit" not in pipe.transformer.__dict__
    pipe.transformer.disable_cache()
    handle = fastdit.patch(pipe, *methods)
    expected = generate(pipe, "flux", steps=STEPS)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    with pytest.raises(UnsupportedModelError, match=f"{cache}, another cache"):
        generate(pipe, "flux", steps=STEPS)
    assert not handle.live_runs()
    pipe.transformer.disable_cache()
    same_bits(generate(pipe, "flux", steps=STEPS), expected)


def test_caches_of_diffusers_are_seen_on_models_without_enable_cache():
    pipe = tiny_models.pipeline("sd3")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.9))
    with pytest.raises(UnsupportedModelError, match="FBCHeadBlockHook"):
        fastdit.patch(pipe, EVERY_2)


def test_dense_runs_beside_a_cache_of_diffusers():
    pipe = tiny_models.pipeline("flux")
    pipe.transformer.enable_cache(CACHES["FBCHeadBlockHook"](pipe))
    expected = generate(pipe, "flux", steps=STEPS)
    fastdit.patch(pipe, backend="reference")
    same_bits(generate(pipe, "flux", steps=STEPS), expected)


@pytest.mark.parametrize("method", [Dense(), EVERY_2, RAS_METHOD], ids=lambda method: method.name)
def test_another_block_is_refused_until_it_is_patched(method):
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, method)
    blocks = pipe.transformer.transformer_blocks
    twin = copy.deepcopy(tiny_models.pipeline("sd3", seed=3).transformer.transformer_blocks[1])
    mine, blocks[1] = blocks[1], twin
    with pytest.raises(FastDiTError, match="block 1 of the transformer, in transformer_blocks"):
        generate(pipe, "sd3", steps=STEPS)
    del blocks[2]
    with pytest.raises(FastDiTError, match="has 2 blocks, it had 3"):
        generate(pipe, "sd3", steps=STEPS)
    handle.unpatch()
    assert "_fastdit" not in mine.__dict__
    assert "forward" not in mine.__dict__
