"""`fastdit train-router`: what it writes runs, and what it is given is checked before the work."""

from __future__ import annotations

import diffusers
import pytest
from typer.testing import CliRunner

import fastdit
from fastdit.cli import commands
from fastdit.cli.sampler import swap_scheduler
from saved_pipelines import save_dit, save_sd3

QUICK = ("--steps", "3", "--epochs", "2", "--batch", "1", "--threads", "1")


def run(*arguments, code=0):
    """The output of `fastdit train-router ARGUMENTS`, which must end with `code`."""
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(
        commands.app, ["train-router", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.output


def test_a_router_of_a_text_model(tmp_path):
    folder, out = save_sd3(tmp_path / "sd3"), tmp_path / "learned.safetensors"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle at the left\n\na small blue square\n")
    checkpoints = tmp_path / "checkpoints"
    given = ("--model", folder, "--out", out, "--prompts", prompts, "--checkpoints", checkpoints)
    output = run(*given, *QUICK, "--lambda-form", "published", "--guidance", "3")
    assert "epoch 2: loss" in output
    assert "of arithmetic" in output
    router = fastdit.Router.load(out)
    assert router.steps == 3
    assert router.conditions.guidance == 3
    assert dict(router.provenance)["training"]["lambda_form"] == "published"
    assert "epoch" not in run(*given, *QUICK, "--lambda-form", "published", "--guidance", "3")


def test_a_router_of_a_class_model(tmp_path):
    folder, out = save_dit(tmp_path / "dit"), tmp_path / "learned.safetensors"
    options = ("--lambda-form", "none", "--raw", "--pairs", "--target", "0.3", "--loss", "released")
    run("--model", folder, "--out", out, *QUICK, *options, "--scheduler", "DDIMScheduler")
    found = fastdit.Router.load(out)
    assert found.family == "dit"
    assert found.conditions.scheduler == "DDIMScheduler"
    assert found.provenance["training"]["target"] == 0.3
    assert found.provenance["training"]["loss"] == "released"


def test_a_router_for_a_solver_of_flows(tmp_path):
    """A flow-matching model keeps what it predicts, and its shift, under a solver for noise."""
    folder, out = save_sd3(tmp_path / "sd3"), tmp_path / "learned.safetensors"
    options = ("--order", "1", "--whole-steps", "--scheduler", "UniPCMultistepScheduler")
    run("--model", folder, "--out", out, *QUICK, *options)
    router = fastdit.Router.load(out)
    assert router.order == 1
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    advised = fastdit.recommend(pipe, 3).scheduler
    advised.set_timesteps(3)
    assert router.conditions.scheduler == type(advised).__name__
    assert router.conditions.timesteps == tuple(advised.timesteps.tolist())
    swap_scheduler(pipe, "UniPCMultistepScheduler")
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    refused = fastdit.UnsupportedModelError
    with pytest.raises(refused, match=r"DDIMScheduler cannot stand for UniPC.*velocities"):
        swap_scheduler(pipe, "DDIMScheduler")
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(refused, match="the model follows no flow"):
        swap_scheduler(pipe, "FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "router.json"), "--out must end in .safetensors"),
        (("--prompts", "missing.txt"), "--prompts missing.txt cannot be read"),
        (("--lambda-form", "paper"), "lambda_form must be one of"),
        (("--order", "3"), "less than or equal to 2"),
        (("--loss", "all"), "loss must be one of guided, released, got 'all'"),
        (("--scheduler", "DiTPipeline"), "--scheduler must be a scheduler class of diffusers"),
    ],
    ids=lambda value: str(value[0])[:16],
)
def test_bad_arguments_end_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    folder = save_dit(tmp_path / "dit")
    output = run("--model", folder, *QUICK, *arguments, code=2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
