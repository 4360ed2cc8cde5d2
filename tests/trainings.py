"""Trainings of tiny pipelines, and what the oracle is given to train as they do."""

from __future__ import annotations

import inspect

import torch

import harmonica_oracle
import tiny_models
from fastdit.train import HarmoniCa

STEPS, GUIDANCE = 4, 4.0


def training(name="dit", pipe=None, dtype=torch.float32, **more):
    """A training of a tiny pipeline; its prompts are embeddings, or classes."""
    pipe = pipe or tiny_models.pipeline(name, dtype)
    if name == "dit":
        prompts, arguments = [3, 4, 5], {"guidance_scale": GUIDANCE}
    else:
        given = tiny_models.arguments(name, dtype=dtype)
        arguments = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
        for key in list(arguments):
            if key in ("generator", "num_inference_steps") or key.endswith("_per_prompt"):
                arguments.pop(key)
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
        prompts = [tensors, {k: v * 0.7 if "embeds" in k else v for k, v in tensors.items()}]
    settings = {"steps": STEPS, "beta": 1e-3, "lr": 0.1, "epochs": 1, "batch": 2} | more
    arguments |= settings.pop("arguments", {})
    return HarmoniCa(pipe, prompts=prompts, arguments=arguments, **settings)


def table(made):
    """The logits [T, N]."""
    return torch.stack([row.detach() for row in made.logits])


def restated(made):
    """The oracle's view of the next epoch of a training of DiT, PixArt-Sigma or SD3, with embeddings for labels in the
    last two: model, scheduler, latents, labels, guidance."""
    pipe = made.trainee.pipeline
    state = made.generator.get_state()
    given = made.draw()()
    made.generator.set_state(state)
    dtype = pipe.transformer.dtype
    pipe.scheduler.set_timesteps(made.settings.steps)
    settings = made.settings
    parts = pipe.transformer, settings.tau, settings.keep
    more = {"order": settings.order, "whole": settings.whole_steps and settings.order > 0}
    generators = given["generator"]
    if "class_labels" in given:
        # torch's global generator starts from the seed after the first image's
        model = harmonica_oracle.BlendedDiT(*parts, generators[0].initial_seed() + 1, **more)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g, dtype=dtype) for g in generators])
        labels = torch.tensor([*given["class_labels"], *[1000] * len(x)])
        return model, pipe.scheduler, torch.cat([x, x]), labels, GUIDANCE
    size = 1, 4, given["height"], given["width"]
    if "pooled_prompt_embeds" in given:
        size = (
            1,
            4,
            given["height"] // pipe.vae_scale_factor,
            given["width"] // pipe.vae_scale_factor,
        )
    x = torch.cat([torch.randn(size, generator=g, dtype=dtype) for g in generators])
    if "pooled_prompt_embeds" in given:
        prompt = tuple(
            torch.cat([given[f"negative_{what}"], given[what]])
            for what in ("prompt_embeds", "pooled_prompt_embeds")
        )
        model = harmonica_oracle.BlendedSD3(*parts, **more)
        return model, pipe.scheduler, x, prompt, given["guidance_scale"]
    states = [g.get_state() for g in generators]
    model = harmonica_oracle.BlendedPixArt(*parts, states, **more)
    model.takes_generators = "generator" in inspect.signature(pipe.scheduler.step).parameters
    prompt = tuple(
        torch.cat([given[f"negative_prompt_{what}"], given[f"prompt_{what}"]])
        for what in ("embeds", "attention_mask")
    )
    return model, pipe.scheduler, x, prompt, given["guidance_scale"]
