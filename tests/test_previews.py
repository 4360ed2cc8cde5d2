"""Previews: the last step's estimate is the picture, and each earlier one is what a run cut there would aim at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler

import fastdit
import tiny_models
from fastdit import ArgumentError
from fastdit.account.previews import estimate
from fastdit.methods.ras import RAS
from tiny_models import generate


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms("layouts"), -1))
def test_the_last_frame_is_the_picture(name):
    pipe = tiny_models.pipeline(name)
    if name == "pixart-sigma":  # its last step goes to the estimate itself
        pipe.scheduler = DDIMScheduler(clip_sample=False)
    handle = fastdit.patch(pipe, RAS(start=1, align=1, resets=()))
    with handle.watch() as frames:
        images = generate(pipe, name, batch=2, steps=4, height=16, width=32, output_type="np")
    images = [
        image.reshape(-1, *image.shape[-2:]) for image in images
    ]  # a video's frames below each other
    assert len(frames.latents) == 4
    for sample in range(2):
        pictures = frames.pictures(sample)
        assert {picture.shape for picture in pictures} == {images[0].shape}
        away = np.abs(pictures[-1].astype(int) - np.round(images[sample] * 255).astype(int))
        assert away.max() <= 1
        assert not np.array_equal(pictures[0], pictures[-1])
    laid = handle.report().token_map(pictures, sample=1)
    mask = handle.report().active[2][1]
    grid = np.kron(
        mask, np.ones([side // n for side, n in zip(laid.shape[1:3], mask.shape, strict=True)])
    )
    assert np.array_equal(laid[2][grid == 1], pictures[2][grid == 1])
    assert np.array_equal(laid[2][grid == 0], pictures[2][grid == 0] // 3)


def test_a_run_outside_the_watch_is_not_kept():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe)
    with handle.watch() as frames:
        generate(pipe, "sd3", steps=2)
        generate(pipe, "sd3", steps=3)
    generate(pipe, "sd3", steps=4)
    assert len(frames.latents) == 3
    with pytest.raises(ArgumentError, match="sample must be 0 to 0, got 1"):
        frames.pictures(1)
    with handle.watch() as frames, pytest.raises(ArgumentError, match="no run was watched"):
        frames.pictures()
    bare = fastdit.patch(pipe.transformer)
    with pytest.raises(ArgumentError, match="watch"), bare.watch():
        pass


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_estimates_of_a_variance_preserving_model(prediction):
    """From noise and clean sample known beforehand, mixed by the scheduler itself."""
    scheduler = DDIMScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    t = scheduler.timesteps[3]
    sample = scheduler.add_noise(clean, noise, t[None])
    output = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, t[None]),
        "sample": clean,
    }[prediction]
    assert torch.allclose(estimate(scheduler, output, t, sample), clean, atol=1e-6)
    # A learned variance rides behind the noise.
    wide = torch.cat([output, output], 1)
    assert torch.allclose(estimate(scheduler, wide, t, sample), clean, atol=1e-6)


def test_estimates_of_a_flow_model_before_and_between_steps():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    sample = noise
    for t in scheduler.timesteps:
        assert torch.allclose(estimate(scheduler, noise - clean, t, sample), clean, atol=1e-4)
        sample = scheduler.step(noise - clean, t, sample).prev_sample
