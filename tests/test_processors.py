"""Attention processors other than the family's own, in a model when it is patched: honoured, or refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import fastdit
import tiny_models
from contract import same_bits
from fastdit import RALU, RAS, Cached, Schedule, UnsupportedModelError
from oracle import Oracle, random_bits

pytestmark = pytest.mark.diffusers

STEPS = 3


def attentions(model):
    return [module for module in model.modules() if getattr(module, "processor", None) is not None]


def spied(model, seen):
    """Put processors of one's own, of the stock ones' names, into the model; calls go to `seen`."""
    for module in attentions(model):
        stock = type(module.processor)

        class Mine(stock):
            @functools.wraps(stock.__call__)  # which arguments it is given depends on the signature
            def __call__(self, *args, **kwargs):
                seen.append(type(self))
                return super().__call__(*args, **kwargs)

        Mine.__name__ = stock.__name__
        module.processor = Mine()
    return model


def run(model, family, **extra):
    with torch.no_grad():
        given = (tiny_models.call(family, 2, step=step) for step in range(STEPS))
        return [tiny_models.sample(model(**one, **extra)) for one in given]


@pytest.mark.parametrize("family", tiny_models.one_each(tiny_models.forms(), -1))
def test_patch_calls_nobodys_processor(family):
    seen = []
    model = spied(tiny_models.transformer(family), seen)
    expected = run(tiny_models.transformer(family), family)
    fastdit.patch(model, backend="reference")
    assert not seen
    for actual, wanted in zip(run(model, family), expected, strict=True):
        same_bits(actual, wanted)
    assert seen
    if tiny_models.adapter_of(family).layouts:
        with pytest.raises(UnsupportedModelError, match=r"has the attention processor .*Mine"):
            fastdit.patch(model, RAS())


def test_blocks_of_stock_processors_are_compared_whatever_the_first_one_has(monkeypatch):
    seen = []
    model = tiny_models.transformer("flux")
    spied(model.transformer_blocks[0], seen)
    probed = []
    adapter = fastdit.adapters.find_adapter(model)
    for kind, forward in adapter.forwards.items():

        def note(block, *args, forward=forward, **kwargs):
            probed.append(block)
            return forward(block, *args, **kwargs)

        monkeypatch.setitem(adapter.forwards, kind, functools.wraps(forward)(note))
    fastdit.patch(model)
    assert probed == [model.transformer_blocks[1], model.single_transformer_blocks[0]]
    assert not seen


def with_ip_adapter(model):
    """FLUX's image prompt, 4 tokens of an embedding of 10 values."""
    for index, block in enumerate(model.transformer_blocks):
        processor = FluxIPAdapterAttnProcessor(32, 12, num_tokens=(4,), scale=[0.8])
        block.attn.processor = tiny_models.randomise(processor, index)
    project = ImageProjection(image_embed_dim=10, cross_attention_dim=12, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([tiny_models.randomise(project)])
    return model


def image_prompt(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "joint_attention_kwargs": {
            "ip_adapter_image_embeds": [torch.randn(2, 1, 10, generator=draw)]
        }
    }


def test_flux_with_an_ip_adapter():
    model = with_ip_adapter(tiny_models.transformer("flux"))
    dense = run(model, "flux", **image_prompt())
    assert not torch.equal(dense[0], run(model, "flux", **image_prompt(1))[0])
    bits, names = random_bits(model, STEPS, 3)
    with Oracle(model, bits).installed():
        cached = run(model, "flux", **image_prompt())
    for method, expected in (((), dense), ((Cached(Schedule.from_bits(bits, names)),), cached)):
        handle = fastdit.patch(model, *method, backend="reference")
        with handle.run(range(STEPS)):
            found = run(model, "flux", **image_prompt())
        for actual, wanted in zip(found, expected, strict=True):
            same_bits(actual, wanted)
    pipe = tiny_models.pipeline("flux")
    with_ip_adapter(pipe.transformer)
    stages = RALU((2, 2, 3), (0.2, 0.3, 1.0), (8.0, 2.8, 2.2), 0.0255, 0.3, selector="gradient")
    for method in (RAS(), stages):
        with pytest.raises(UnsupportedModelError, match="FluxIPAdapterAttnProcessor"):
            fastdit.patch(pipe, method)


def pag_arguments():
    return tiny_models.arguments("sd3", steps=STEPS) | {"pag_scale": 3.0}


def interrupted():
    """A pipeline whose first call was broken off: PAG's processors stay, for more rows."""

    def interrupt(*args):
        raise KeyboardInterrupt

    pipe = StableDiffusion3PAGPipeline.from_pipe(
        tiny_models.pipeline("sd3"), pag_applied_layers="blocks.0"
    )
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(KeyboardInterrupt):
        pipe(**pag_arguments(), callback_on_step_end=interrupt)
    return pipe


def test_patching_after_an_interrupted_pag_call():
    expected = tiny_models.latents_of(interrupted(), pag_arguments())
    pipe = interrupted()
    with pytest.raises(
        UnsupportedModelError, match=r"blocks\.0\.attn .* PAG\w*JointAttnProcessor2_0"
    ):
        fastdit.patch(pipe, RAS())
    fastdit.patch(pipe, backend="reference")
    same_bits(tiny_models.latents_of(pipe, pag_arguments()), expected)
