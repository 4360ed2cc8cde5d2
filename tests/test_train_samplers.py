"""HarmoniCa under the samplers it was published with, on DiT and PixArt: training beside its plain restatement, where
the noise comes from, both losses, and what was trained run at inference."""

from __future__ import annotations

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
)

import fastdit
import harmonica_oracle
import tiny_models
from contract import same_bits
from fastdit.train import proxy
from fastdit.train.ddim import ListedDDIM
from oracle import Oracle
from trainings import STEPS, restated, table, training

SAMPLERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False),
    "listed DDIM": lambda: ListedDDIM(timestep_spacing="linspace", clip_sample=False),
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "IDDPM": lambda: DDPMScheduler(clip_sample=False),
    "SA-Solver": SASolverScheduler,
}
STOCHASTIC = ["IDDPM", "SA-Solver"]
MODELS = ["dit", "pixart-sigma"]


def made_for(sampler, name, dtype=torch.float64, **more):
    """A training under one of SAMPLERS; no step is a whole one, so the noise of all of them is in its losses."""
    pipe = tiny_models.pipeline(name, dtype, scheduler=SAMPLERS[sampler]())
    return training(name, pipe=pipe, dtype=dtype, **{"tau": 0.4, "lr": 0.5} | more)


# ---- training


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_epochs_equal_the_plain_restatement(sampler, name):
    """Lambda by whole runs, losses and logits of two epochs: noise, and the history of solvers, are the student's."""
    made = made_for(sampler, name, lambda_every=1, beta=1e-2)
    made.trainee.transformer.requires_grad_(False)
    logits = [torch.nn.Parameter(row.detach().clone()) for row in made.logits]
    optimizer = torch.optim.AdamW(logits[1:], lr=0.5, weight_decay=0)
    for _ in range(2):
        given = restated(made)
        rows = [torch.sigmoid(row.detach()) for row in logits]
        weights, _ = harmonica_oracle.released_lambda(*given, rows)
        expected = harmonica_oracle.train(*given, logits, optimizer, weights, 1e-2)
        losses, _ = made.train_epoch()
        np.testing.assert_allclose(made.weights, weights, rtol=1e-4)
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(table(made), table_of(logits), rtol=1e-4, atol=1e-4)


def table_of(logits):
    return torch.stack([row.detach() for row in logits])


@pytest.mark.parametrize("form", ["released", "published"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_runs_of_an_estimate_share_their_noise(sampler, name, form):
    """Where every run computes everything nothing differs, though each draws its noise anew."""
    made = made_for(sampler, name)
    rows = [torch.ones_like(row) for row in made.logits]
    with made.trainee:
        found = proxy.estimate(form, made.trainee, rows, made.draw())
    assert (found == 0).all()


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_the_noise_of_steps_is_not_that_of_the_first_latents(sampler):
    """DiTPipeline's latents and its scheduler's noise come from two generators, which must not start alike."""
    made = made_for(sampler, "dit", batch=1)
    seen = []
    step = made.trainee.pipeline.scheduler.step

    def watch(prediction, t, sample):
        state = torch.get_rng_state()
        seen.append((sample.clone(), torch.randn(prediction.shape, dtype=prediction.dtype)))
        torch.set_rng_state(state)
        return step(prediction, t, sample)

    made.trainee.pipeline.scheduler.step = watch
    with made.trainee:
        proxy.Sampling(made.trainee, ["stock"] * STEPS, stop=1).run(made.draw()())
    (latents, first), (_, second) = seen
    for noise in (first, second):
        assert abs(torch.corrcoef(torch.stack([latents[0].ravel(), noise[0].ravel()]))[0, 1]) < 0.3
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_training_is_its_seeds_alone(sampler, name):
    """Neither does the global generator reach it, nor it the global generator; another seed has other noise."""
    torch.manual_seed(3)
    found = []
    for seed in (0, 0, 1):
        made = made_for(sampler, name, torch.float32, seed=seed, spread=0.0, lambda_every=1)
        torch.randn(7)  # the program goes on drawing
        state = torch.get_rng_state()
        losses, _ = made.train_epoch()
        assert torch.equal(torch.get_rng_state(), state)
        found.append((losses, table(made), made.weights))
    for first, second in zip(*found[:2], strict=True):
        same_bits(first, second)
    assert not torch.allclose(found[0][0], found[2][0])


@pytest.mark.gpu
def test_a_training_on_a_gpu_is_its_seeds_alone():
    """There DiT's noise comes from the device's own global generator."""
    found = []
    for seed in (1, 2):
        pipe = tiny_models.pipeline("dit", scheduler=SASolverScheduler()).to("cuda")
        made = training(pipe=pipe, lambda_every=1)
        torch.cuda.manual_seed(seed)
        state = torch.cuda.get_rng_state()
        losses, _ = made.train_epoch()
        assert torch.equal(torch.cuda.get_rng_state(), state)
        found.append(losses)
    torch.testing.assert_close(*found)


def test_a_killed_training_goes_on_to_the_same_logits(tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.epoch == 2:
            raise Killed

    options = {"epochs": 3, "lambda_every": 2, "save_every": 1, "loss": "released"}
    whole = made_for("SA-Solver", "dit", torch.float32, **options)
    whole.fit()
    with pytest.raises(Killed):
        made_for("SA-Solver", "dit", torch.float32, folder=tmp_path, report=kill, **options).fit()
    torch.manual_seed(99)
    resumed = made_for("SA-Solver", "dit", torch.float32, folder=tmp_path, **options)
    resumed.fit()
    same_bits(table(resumed), table(whole))
    with pytest.raises(fastdit.ArgumentError, match="other loss"):
        made_for(
            "SA-Solver", "dit", torch.float32, folder=tmp_path, **options | {"loss": "guided"}
        ).fit()


@pytest.mark.parametrize("name", MODELS)
def test_variances_that_the_pipeline_drops_are_asked_for_in_vain(name):
    """Stock pipelines hand four of eight channels on; a sampler of learned variances needs all of them."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    made = training(name, pipe=tiny_models.pipeline(name, scheduler=scheduler))
    with pytest.raises(fastdit.ArgumentError, match=r"variance_type='learned_range'.*drops"):
        made.train_epoch()


def test_a_pipeline_that_hands_on_its_variances_trains():
    """The loss is then of all eight channels either way, and the noise as large as the student says."""
    losses = {}
    for loss in ("guided", "released"):
        pipe = tiny_models.pipeline(
            "dit", scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False)
        )
        pipe.transformer.register_to_config(out_channels=16)  # what DiTPipeline goes by
        made = training(pipe=pipe, loss=loss, lambda_form=None)
        seen = []
        pipe.scheduler.step = watching(pipe.scheduler.step, seen)
        losses[loss], _ = made.train_epoch()
        assert {tuple(shape) for shape in seen} == {(4, 8, 8, 8)}
    same_bits(losses["guided"], losses["released"])
    assert (losses["guided"][1:] > 0).all()


def watching(step, seen):
    def watch(prediction, *args, **kwargs):
        seen.append(prediction.shape)
        return step(prediction, *args, **kwargs)

    return watch


# ---- the loss


@pytest.mark.parametrize("name", MODELS)
def test_the_released_loss_is_of_all_channels_of_both_halves(name):
    made = made_for("DDIM", name, loss="released", lambda_form=None)
    guided = made_for("DDIM", name, lambda_form=None)
    made.trainee.transformer.requires_grad_(False)
    logits = [torch.nn.Parameter(row.detach().clone()) for row in made.logits]
    optimizer = torch.optim.AdamW(logits[1:], lr=0.5, weight_decay=0)
    given = restated(made)
    ones = [1.0] * STEPS
    expected = harmonica_oracle.train(*given, logits, optimizer, ones, 1e-3, released=True)
    losses, _ = made.train_epoch()
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    torch.testing.assert_close(table(made), table_of(logits), rtol=1e-4, atol=1e-4)
    others, _ = guided.train_epoch()
    assert (abs(losses / others - 1)[1:] > 0.1).all()
    assert dict(made.router().provenance)["training"]["loss"] == "released"


def test_without_guidance_the_released_loss_is_of_the_plain_outputs():
    pipe = tiny_models.pipeline("dit", torch.float64)
    made = training(
        pipe=pipe, loss="released", lambda_form=None, arguments={"guidance_scale": 1.0}, batch=1
    )
    pairs = []
    handle = pipe.transformer.register_forward_hook(lambda *given: pairs.append(given[2].sample))
    losses, _ = made.train_epoch()
    handle.remove()
    assert pairs[1].shape == (1, 8, 8, 8)
    for pair, loss in zip(pairs[1:], losses[1:], strict=True):
        student, teacher = pair.__dict__["student"].detach(), pair.__dict__["teacher"]
        assert float((student - teacher).square().mean()) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux"])  # guided by one call and by two
def test_where_no_channel_is_dropped_both_losses_are_one(name):
    losses = [
        training(name, loss=loss, lambda_form=None).train_epoch()[0]
        for loss in ("guided", "released")
    ]
    same_bits(*losses)


# ---- inference


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_router_runs_under_the_sampler_it_was_trained_for(sampler, name):
    """Whole runs beside plain hooks, without a warning; training left the pipeline as it was."""
    pipe = tiny_models.pipeline(name, torch.float64, scheduler=SAMPLERS[sampler]())
    before = drawn(pipe, name)
    router = training(name, pipe=pipe, dtype=torch.float64, lambda_every=1, batch=1).fit()
    same_bits(drawn(pipe, name), before)
    tau = float(1 / (1 + np.exp(-np.median(router.logits["transformer_blocks"][1:]))))
    bits = {kind: layer.bits for kind, layer in router.schedule(tau).layers.items()}
    with Oracle(pipe.transformer, bits).installed() as oracle:
        expected = drawn(pipe, name)
    assert 0 < oracle.reused < oracle.computed + oracle.reused
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "HarmoniCa")
        handle = fastdit.patch(pipe, fastdit.HarmoniCa(router, tau), backend="reference")
        found = drawn(pipe, name)
    assert handle.report().reuse_share > 0.2
    assert float((found - expected).norm() / expected.norm()) <= 1e-9
    assert float((found - before).norm() / before.norm()) > 1e-3
    if sampler in STOCHASTIC:
        with pytest.warns(UserWarning, match="draws noise at each step"):
            fastdit.patch(pipe, fastdit.Cached(router.schedule(tau)))


def drawn(pipe, name):
    """A run's latents; DiTPipeline's stochastic samplers draw from the global generator."""
    torch.manual_seed(5)
    return tiny_models.generate(pipe, name)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_router_of_one_sampler_is_refused_under_the_others(sampler):
    pipe = tiny_models.pipeline("dit", scheduler=SAMPLERS[sampler]())
    router = training(pipe=pipe, lambda_form=None).fit()
    own = type(pipe.scheduler).__name__
    for other in SAMPLERS.keys() - {sampler}:
        pipe.scheduler = SAMPLERS[other]()
        fastdit.patch(pipe, fastdit.HarmoniCa(router, 0.5))
        with pytest.raises(fastdit.ScheduleError, match=f"scheduler is .*made for {own}"):
            drawn(pipe, "dit")
        fastdit.unpatch(pipe)


def test_a_router_of_no_known_sampler_is_warned_of_noise():
    """An imported one says nothing of what it was trained for, so nobody knows that it knows noise."""
    pipe = tiny_models.pipeline("dit", scheduler=DDPMScheduler())
    router = training(pipe=pipe, lambda_form=None).fit()
    silent = dataclasses.replace(router, conditions=fastdit.schedules.conditions.Conditions())
    with pytest.warns(UserWarning, match="draws noise at each step"):
        fastdit.patch(pipe, fastdit.HarmoniCa(silent))


SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize(
    ("scheduler", "trained", "drawn_under", "warned"),
    [
        (DPMSolverMultistepScheduler, {}, SDE, "algorithm_type='sde-dpmsolver\\+\\+'"),
        (DPMSolverMultistepScheduler, SDE, SDE, None),
        (DDIMScheduler, {}, {"eta": 1.0}, "eta=1"),
        (DDIMScheduler, {"eta": 1.0}, {"eta": 1.0}, None),
    ],
    ids=["SDE", "trained for SDE", "eta", "trained for eta"],
)
def test_noise_by_a_setting_is_warned_of_unless_it_was_trained_for(
    scheduler, trained, drawn_under, warned, tmp_path
):
    """The class of the scheduler is the same; the router's file says which noise it knows."""

    def pipe_and_arguments(settings):
        arguments = {"eta": settings["eta"]} if "eta" in settings else {}
        made = scheduler() if arguments else scheduler(**settings)
        return tiny_models.pipeline("pixart-sigma", scheduler=made), arguments

    pipe, arguments = pipe_and_arguments(trained)
    made = training("pixart-sigma", pipe=pipe, lambda_form=None, arguments=arguments)
    made.fit().save(tmp_path / "router.safetensors")
    pipe, arguments = pipe_and_arguments(drawn_under)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastdit.patch(pipe, fastdit.HarmoniCa(tmp_path / "router.safetensors"))
        tiny_models.generate(pipe, "pixart-sigma", **arguments)
    found = [str(w.message) for w in caught if "HarmoniCa keeps outputs" in str(w.message)]
    assert bool(found) == (warned is not None)
    assert all(re.search(warned, message) for message in found)
