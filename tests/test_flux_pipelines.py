"""FLUX pipelines whose transformer is given more than the picture: reference tokens, or channels of a condition."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)

import fastdit
import ralu_oracle
import tiny_models
from contract import distance, within_contract
from fastdit import RALU, RAS, ArgumentError, Cached, Schedule
from oracle import random_bits
from ras_oracle import RowOracle, published
from tiny_models import LATENT, arguments

pytestmark = pytest.mark.diffusers

STEPS = 7
SIZE = {"height": 16, "width": 24}
TOKENS = 8 * 12


def picture(height, width):
    draw = torch.Generator().manual_seed(5)
    return torch.rand(1, 3, height, width, generator=draw, dtype=torch.float64)


def kontext():
    """With a reference image of another shape."""
    parts = tiny_models.pipeline("flux-dev", torch.float64).components
    pipe = FluxKontextPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    extra = {"image": picture(16, 16), "max_area": 16 * 24, "_auto_resize": False}

    def given(cfg=True):
        return arguments("flux-dev", 1, STEPS, cfg=cfg, dtype=torch.float64, **SIZE, **extra)

    return pipe, given


@pytest.mark.parametrize("scheduled", [False, True], ids=["tokens", "tokens and schedule"])
@pytest.mark.parametrize("cfg", [False, True], ids=["one call", "two calls"])
def test_ras_on_kontext_chooses_among_the_pictures_tokens(cfg, scheduled):
    pipe, given = kontext()
    bits, methods = None, []
    if scheduled:
        bits, names = random_bits(pipe.transformer, STEPS, seed=1, compute=0.5)
        methods = [Cached(Schedule.from_bits(bits, names))]
    truth = RowOracle(pipe, published(0.5, STEPS, 2, (5,), 0.3, packed=True), bits, 1 + cfg)
    with truth.installed():
        expected = pipe(**given(cfg)).images
    assert expected.shape[1] == TOKENS < truth.tokens
    ras = RAS(start=2, resets=(5,), high_ratio=0.3, mode="parity")
    for backend in ("reference", None):
        handle = fastdit.patch(pipe, ras, *methods, backend=backend)
        with handle.watch() as frames:
            found = pipe(**given(cfg)).images
        assert distance(found, expected) <= 1e-9
        report = handle.report()
        assert {step: mask.shape[1:] for step, mask in report.active.items()} == dict.fromkeys(
            truth.history, (8, 12)
        )
        assert frames.grid == (8, 12)
        for step, rows in truth.history.items():
            chosen = report.active[step].reshape(1, -1).nonzero()[1]
            assert chosen.tolist() == rows[0].sort().values.tolist()
        handle.unpatch()


def test_ras_wants_the_velocity_of_the_picture_alone():
    """A hand-written loop gives that of every token."""
    pipe, given = kontext()
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe(**given(cfg=False) | {"num_inference_steps": 1})
    hook.remove()
    handle = fastdit.patch(pipe.transformer, RAS(start=1, align=1, resets=()))
    with torch.no_grad(), handle.run(range(3)):
        count = pipe.transformer(**calls[0])[0].shape[1]
        with pytest.raises(
            ArgumentError, match=rf"the picture's {TOKENS} tokens .* got \(1, {count},"
        ):
            handle.advance()


def control(pipeline, channels, **images):
    """A pipeline whose transformer has `channels` more in than out; in its packed latents four times as many."""
    parts = tiny_models.pipeline("flux-dev", torch.float64).components
    del parts["image_encoder"], parts["feature_extractor"]
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * (LATENT + channels),
        out_channels=4 * LATENT,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = pipeline(**parts | {"transformer": tiny_models.randomise(transformer).double()})
    pipe.set_progress_bar_config(disable=True)

    def given(**more):
        found = arguments("flux-dev", 1, STEPS, cfg=False, dtype=torch.float64, **SIZE, **more)
        del found["true_cfg_scale"]
        return found | images

    return pipe, given


CONDITIONED = {
    "control": lambda: control(FluxControlPipeline, LATENT, control_image=picture(16, 24)),
    "fill": lambda: control(
        FluxFillPipeline,
        LATENT + 1,
        image=picture(16, 24),
        mask_image=picture(16, 24)[:, :1].round(),
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONDITIONED)
def test_ralu_with_channels_of_a_condition(name, batch):
    """Coarse tokens read the condition as they read the noise, at every other pixel."""
    pipe, given = CONDITIONED[name]()
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, LATENT, 16, 24, generator=draw, dtype=torch.float64)
    start = {"latents": ralu_oracle.pack(noise), "num_images_per_prompt": batch}
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    pipe(**given(**start) | {"num_inference_steps": 1})
    hook.remove()
    condition = ralu_oracle.unpack(seen[0][..., 4 * LATENT :], (8, 12))
    method = RALU((2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
    with torch.no_grad():
        expected = [
            ralu_oracle.run(
                pipe,
                method,
                noise[b : b + 1],
                given() | {"true_cfg_scale": 1.0, "condition": condition[b]},
            )
            for b in range(batch)
        ]
    fastdit.patch(pipe, method)
    found = ralu_oracle.unpack(pipe(**given(**start)).images, (8, 12))
    within_contract(found, torch.cat(expected))
