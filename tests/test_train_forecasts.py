"""Routers trained for forecasts: epochs and lambda beside the plain restatement, and what they are at inference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastdit
import harmonica_oracle
import tiny_models
from contract import same_bits
from fastdit.train import checkpoint, proxy
from fastdit.train.blending import COMPUTE
from trainings import restated, table, training

SAMPLERS = {
    "DDIM": ("dit", lambda: DDIMScheduler(clip_sample=False), 5),
    "Euler": ("sd3", FlowMatchEulerDiscreteScheduler, 5),
    "Heun": ("sd3", FlowMatchHeunDiscreteScheduler, 3),
    "UniPC": (
        "sd3",
        lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        5,
    ),
}


#: with one that guides by a second call, whose outputs have slots of their own
AT_INFERENCE = SAMPLERS | {"FLUX": ("flux", FlowMatchEulerDiscreteScheduler, 5)}


def made_for(sampler, **more):
    name, scheduler, steps = AT_INFERENCE[sampler]
    pipe = tiny_models.pipeline(name, torch.float64, scheduler=scheduler())
    given = {"tau": 0.4, "lr": 0.5, "steps": steps} | more
    return training(name, pipe=pipe, dtype=torch.float64, **given)


# ---- training


@pytest.mark.parametrize("whole_steps", [False, True], ids=["components", "whole steps"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_epochs_equal_the_plain_restatement(sampler, order, whole_steps):
    """Lambda by whole runs, losses and logits of two epochs; slots are renewed here and not there."""
    made = made_for(sampler, order=order, whole_steps=whole_steps, lambda_every=1, beta=1e-2)
    made.trainee.transformer.requires_grad_(False)
    logits = [torch.nn.Parameter(row.detach().clone()) for row in made.logits]
    optimizer = torch.optim.AdamW(logits[1:], lr=0.5, weight_decay=0)
    ratios = torch.sigmoid(table(made)[1:])
    assert (ratios > 0.4).any()
    assert (ratios < 0.4).any()
    for _ in range(2):
        given = restated(made)
        rows = [torch.sigmoid(row.detach()) for row in logits]
        weights, _ = harmonica_oracle.released_lambda(*given, rows)
        with tied(logits, whole_steps):
            expected = harmonica_oracle.train(*given, logits, optimizer, weights, 1e-2)
        losses, _ = made.train_epoch()
        np.testing.assert_allclose(made.weights, weights, rtol=1e-4)
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    found = torch.stack([row.detach() for row in logits])
    torch.testing.assert_close(table(made), found, rtol=1e-4, atol=1e-4)


class tied:
    """Inside, the gradient of a row is the sum of its entries', which are one logit."""

    def __init__(self, logits, wanted):
        self.logits = logits if wanted else []

    def __enter__(self):
        self.hooks = [
            row.register_hook(lambda grad: grad.sum().expand_as(grad)) for row in self.logits
        ]

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("sampler", ["DDIM", "Heun"])
def test_the_published_lambda_equals_whole_runs(sampler):
    made = made_for(sampler, order=2)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.sigmoid(2 * torch.randn(row.shape, generator=generator)) for row in made.logits]
    plain = harmonica_oracle.published_lambda(*restated(made), rows)
    with made.trainee:
        found = proxy.estimate("published", made.trainee, rows, made.draw())
    np.testing.assert_allclose(found.numpy(), np.array(plain, np.float32), rtol=1e-6)


def test_fresh_outputs_are_kept_if_asked():
    """Slots that hold what was computed draw other lines than slots that hold blends."""
    found = {}
    for keep in ("fresh", "blended"):
        made = made_for("Euler", order=1, keep=keep, lambda_form=None, tau=0.0)
        given = restated(made)
        logits = [torch.nn.Parameter(row.detach().clone()) for row in made.logits]
        optimizer = torch.optim.AdamW(logits[1:], lr=0.5, weight_decay=0)
        expected = harmonica_oracle.train(*given, logits, optimizer, [1.0] * 5, 1e-3)
        found[keep], _ = made.train_epoch()
        torch.testing.assert_close(found[keep], torch.tensor(expected), rtol=1e-5, atol=0)
    assert (abs(found["fresh"] / found["blended"] - 1)[2:] > 1e-3).all()


def test_whole_steps_cost_one_forward():
    """The output that is blended is the teacher's, so no student runs, and nothing behind the model."""
    made = made_for("Euler", order=1, whole_steps=True, lambda_form=None)
    calls = []
    made.trainee.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    made.train_epoch()
    assert len(calls) == 5


def test_checkpointed_blocks_train_alike():
    plain, saved = (training(lambda_form=None, order=1, checkpointing=c) for c in (False, True))
    for made in (plain, saved):
        made.train_epoch()
    same_bits(table(saved), table(plain))


# ---- what it is at inference


def student_of(made, rows):
    """(the latents of a run of the student, with ratios of 0 and 1, those of the same router at inference)."""
    ratios = [COMPUTE, *rows[1:]]
    with made.trainee:
        arguments = made.draw()
        run = proxy.Sampling(made.trainee, ratios).run(arguments())
    with torch.no_grad():
        for logits, row in zip(made.logits, [torch.ones_like(rows[0]), *rows[1:]], strict=True):
            logits.copy_(10 * row - 5)
    pipe = made.trainee.pipeline
    handle = fastdit.patch(pipe, fastdit.HarmoniCa(made.router()), backend="reference")
    found = tiny_models.latents_of(pipe, arguments())
    report = handle.report()
    handle.unpatch()
    student = run.latents
    if made.trainee.spec.family == "dit":  # both halves of guidance, not yet scaled
        student = student[: len(found)] / pipe.vae.config.scaling_factor
    return student, found, report


def away(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("sampler", AT_INFERENCE)
def test_a_whole_step_of_the_student_is_that_of_a_run(sampler, order):
    """No block is visited there, but with order 0 blocks add what their components repeat."""
    made = made_for(sampler, order=order, whole_steps=True, keep="fresh")
    computes = torch.arange(len(made.logits)) % 3 != 2
    rows = [torch.full_like(row, float(on)) for row, on in zip(made.logits, computes, strict=True)]
    student, found, report = student_of(made, rows)
    assert away(student, found) <= 1e-9
    skipped = [tokens == 0 for tokens in report.tokens_per_step]
    assert skipped == [bool(order) and not on for on in computes.tolist()]


@pytest.mark.parametrize("sampler", AT_INFERENCE)
def test_components_of_the_student_are_those_of_a_run(sampler):
    """Where no step reuses everything; such a step is extrapolated at inference, and blended apart in training."""
    made = made_for(sampler, order=2, keep="fresh")
    generator = torch.Generator().manual_seed(4)
    rows = [(torch.rand(row.shape, generator=generator) < 0.4).float() for row in made.logits]
    assert all(row.any() for row in rows)
    student, found, report = student_of(made, rows)
    assert away(student, found) <= 1e-9
    assert report.reuse_share > 0.3
    rows[2] = torch.zeros_like(rows[2])
    student, found, _ = student_of(made, rows)
    assert away(student, found) > 1e-5


def test_a_router_runs_by_the_order_it_was_trained_for(tmp_path):
    made = made_for("UniPC", order=1, whole_steps=True, lambda_form=None, beta=1e3, lr=4.0)
    path = tmp_path / "router.safetensors"
    made.fit().save(path)
    router = fastdit.Router.load(path)
    assert router.order == 1
    assert router.provenance["training"]["order"] == 1
    assert fastdit.HarmoniCa(path).forecasts
    assert not fastdit.HarmoniCa(path, order=0).forecasts
    pipe, drawn = made.trainee.pipeline, {}
    methods = {
        "own": fastdit.HarmoniCa(path),
        "1": fastdit.HarmoniCa(path, order=1),
        "0": fastdit.HarmoniCa(path, order=0),
        "schedule": fastdit.Cached(router.schedule()),
    }
    for name, method in methods.items():
        fastdit.patch(pipe, method)
        drawn[name] = tiny_models.generate(pipe, "sd3", steps=5)
    same_bits(drawn["own"], drawn["1"])
    same_bits(drawn["own"], drawn["schedule"])
    assert away(drawn["own"], drawn["0"]) > 1e-4


# ---- refusals


@pytest.mark.parametrize("order", [-1, 3, True, 1.0, "1"])
def test_an_order_must_be_one(order):
    with pytest.raises(fastdit.ArgumentError, match="order must be"):
        training(order=order)


def test_a_sampler_that_draws_noise_has_no_lines():
    pipe = tiny_models.pipeline("dit", scheduler=DDPMScheduler())
    with pytest.raises(fastdit.ArgumentError, match=r"order must be 0 .*DDPMScheduler"):
        training(pipe=pipe, order=1)
    training(pipe=pipe, order=0)


def test_a_folder_of_another_order_is_refused(tmp_path):
    training(folder=tmp_path, order=1, lambda_form=None).fit()
    with pytest.raises(fastdit.ArgumentError, match="other order"):
        training(folder=tmp_path, order=2, lambda_form=None).fit()
    longer = training(folder=tmp_path, order=1, lambda_form=None, epochs=2)
    longer.fit()
    assert longer.epoch == 2


def test_a_folder_that_names_no_order_repeats(tmp_path):
    """As all did when it was written."""
    options = {"folder": tmp_path, "lambda_form": None}
    training(**options).fit()
    path = tmp_path / checkpoint.STATE
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["fastdit"])
    del facts["settings"]["order"]
    save_file(load_file(path), path, metadata={"fastdit": json.dumps(facts)})
    with pytest.raises(fastdit.ArgumentError, match="other order"):
        training(order=1, **options).fit()
    longer = training(epochs=2, **options)
    longer.fit()
    assert longer.epoch == 2
