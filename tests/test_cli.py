"""The command line: what it prints and writes, and that bad arguments end in one line and code 2.

Runs the commands in this process on saved pipelines of random weights; see `saved_pipelines.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastdit
from fastdit.cli import commands as cli
from fastdit.cli import console
from fastdit.cli.grid import GAP, MARGIN, to_picture
from fastdit.cli.loading import load_model
from saved_pipelines import save_dit, save_sd3, save_unsupported

PROMPT = "a large red circle at the left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def schedule_file(tmp_path_factory) -> Path:
    bits = np.zeros((4, 2, 3), dtype=bool)
    bits[2, 1, 0] = True
    schedule = fastdit.Schedule.from_bits(
        bits, ["attn", "ff", "ff_context"], {"search": "by hand [1]"}
    )
    path = tmp_path_factory.mktemp("schedules") / "searched.json"
    schedule.save(path)
    return path


def run(*arguments: str | Path, code: int = 0) -> str:
    """The output of `fastdit ARGUMENTS`, which must end with `code`."""
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(
        cli.app, [str(argument) for argument in arguments]
    )
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """The error of `fastdit ARGUMENTS`: one line, without a traceback."""
    output = run(*arguments, code=2)
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    return lines[0]


# ---- demo


def test_demo_writes_the_grid_and_prints_the_table(folder, tmp_path):
    out = tmp_path / "grid.png"
    output = run(
        *("demo", PROMPT, "a blue square", "--model", folder, "--out", out),
        *("--steps", 3, "--seed", 5, "--repeats", 1, "--every", 2, "--every", 3),
    )
    lines = output.splitlines()
    arms = [
        line.split("  ")[0].strip()
        for line in lines
        if line.startswith((" unpatched", " fewer steps", " every"))
    ]
    assert arms == ["unpatched", "fewer steps", "every(2)", "fewer steps", "every(3)"], output
    assert all(len(line) <= 80 for line in lines if not line.startswith("pictures:"))
    assert "PSNR (in dB)" in output
    assert "medians of 2 interleaved calls each" in output.replace("\n", " ")
    assert "whole pipeline calls" in output.replace("\n", " ")
    assert str(out) in output
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width == 2 * MARGIN + 5 * 256 + 4 * GAP
        assert picture.height > 2 * 256
        pixels = np.asarray(picture)

    pipeline = load_model(folder).pipeline
    generator = torch.Generator().manual_seed(5)
    image = pipeline(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images[0]
    shown = np.asarray(to_picture(image)).repeat(8, axis=0).repeat(8, axis=1)
    first_column = pixels[:, MARGIN : MARGIN + 256]
    tops = range(pixels.shape[0] - 256)
    assert any(np.array_equal(first_column[top : top + 256], shown) for top in tops)


def test_demo_runs_a_schedule_file(folder, schedule_file, tmp_path):
    output = run(
        *("demo", PROMPT, "--model", folder, "--schedule", schedule_file, "--repeats", 1),
        *("--out", tmp_path / "a.png", "--threads", 1, "--backend", "reference"),
    )
    assert "searched" in output
    assert "steps: 4" in output


def test_demo_draws_the_stages_of_a_run(folder, tmp_path):
    output = run(
        *("demo", PROMPT, "--model", folder, "--ralu", "sd35-turbo", "--repeats", 1),
        *("--steps", 2, "--out", tmp_path / "a.png"),
    )
    assert "RALU sd35-turbo" in output
    assert "one call each" in output
    assert "medians" not in output
    assert str(tmp_path / "a-stages.png") in output
    with Image.open(tmp_path / "a-stages.png") as picture:
        assert picture.width == 2 * MARGIN + 4 * 256 + 3 * GAP
    assert "preset must be one of flux-4x" in refused("demo", "--model", folder, "--ralu", "3x")


def test_demo_of_classes(tmp_path):
    folder = save_dit(tmp_path / "dit")
    arguments = ("--model", folder, "--steps", 2, "--repeats", 1, "--out", tmp_path / "a.png")
    run("demo", "3", "--every", 2, *arguments)
    assert "DiTPipeline draws classes" in refused("demo", PROMPT, "--every", 2, *arguments)


def test_demo_judges_the_embedded_model(folder, tmp_path, monkeypatch):
    from fastdit import emoji

    pipeline = load_model(folder).pipeline
    monkeypatch.setattr(emoji, "load_pipeline", lambda **_: pipeline)
    output = run(
        *("demo", "a cat", "--steps", 2, "--repeats", 1, "--every", 2),
        *("--out", tmp_path / "a.png"),
    )
    assert "embedded model" in output
    assert "right" in output
    assert "0/1" in output
    assert not any("forward" in vars(block) for block in pipeline.transformer.transformer_blocks)


# ---- explain, schedule, backends


def test_explain(folder):
    output = run("explain", "--model", folder, "--steps", 6, "--every", 3, "--batch", 2)
    assert "fastdit Cached on SD3Transformer2DModel (sd3)" in output
    assert "6 steps, a transformer batch of 4 with 16 image" in output
    assert "attn █··█··" in output


@pytest.mark.parametrize("order", [0, 1, 2, "auto"])
def test_explain_takes_an_order(folder, schedule_file, order):
    pipeline = load_model(folder).pipeline
    sources = {"--every": (3, fastdit.Schedule.every(3)), "--schedule": (schedule_file,) * 2}
    if order == "auto":  # the file's schedule separates components
        sources.pop("--schedule")
    for option, (given, source) in sources.items():
        handle = fastdit.patch(pipeline, fastdit.Cached(source, order=order))
        expected = str(handle.explain(steps=4))
        fastdit.unpatch(pipeline)
        found = run("explain", "--model", folder, option, given, "--order", order, "--steps", 4)
        assert found.split() == expected.split()
    refused = run("explain", "--model", folder, "--order", 3, code=2)
    assert "'--order'" in refused


def test_demo_names_the_order(folder, tmp_path):
    asked = ("demo", PROMPT, "--model", folder, "--out", tmp_path / "grid.png", "--repeats", 1)
    assert "every(2), order 1" in run(*asked, "--steps", 3, "--every", 2, "--order", 1)


def test_explain_takes_a_schedule_size_and_backend(folder, schedule_file):
    output = run(
        *("explain", "--model", folder, "--schedule", schedule_file, "--backend", "reference"),
        *("--height", 64, "--width", 32, "--no-cfg"),
    )
    assert "4 steps, a transformer batch of 1 with 32 image" in output
    assert "gated_residual on reference" in output


def test_explain_draws_the_merged_plan(folder, tmp_path):
    png = tmp_path / "plan.png"
    options = ("--ras", 0.5, "--every", 2, "--order", 1, "--steps", 8, "--png", png)
    output = run("explain", "--model", folder, *options, "--height", 128, "--width", 128)
    assert "tokens █·█·▄·▄·" in output
    assert "attn █1█1█1█1" in output
    with Image.open(png) as picture:
        assert picture.format == "PNG"


def test_schedule_show(schedule_file, tmp_path):
    schedule = fastdit.Schedule.load(schedule_file)
    png = tmp_path / "raster.png"
    output = run("schedule", "show", schedule_file, "--png", png)
    assert schedule.sha256 in output
    assert "by hand [1]" in output
    assert "attn █·▒·" in output
    assert "ff_context █···" in output
    with Image.open(png) as picture:
        assert picture.format == "PNG"


def test_schedule_raster_of_several_kinds():
    bits = {"first": np.ones((2, 1, 1), dtype=int), "second": np.zeros((2, 3, 1), dtype=int)}
    schedule = fastdit.Schedule.from_bits(bits, {"first": ["a"], "second": ["b"]})
    lines = str(console.schedule_raster(schedule)).splitlines()
    assert lines[:4] == ["first", "  a ██", "second", "  b █·"]


def test_backends():
    output = run("backends")
    for word in ("reference", "cpu", "float64", "fastdit._C", "fastdit._cuda", "FASTDIT_BACKEND"):
        assert word in output


# ---- the program itself


def test_version_and_help():
    assert run("--version").strip() == f"fastdit {fastdit.__version__}"
    output = run("--help")
    for word in ("demo", "explain", "schedule", "backends", "Examples"):
        assert word in output


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "fastdit", "schedule", "show", "nowhere.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: FILE nowhere.json")
    assert "Traceback" not in done.stderr


def test_a_name_of_a_file_that_is_no_text(schedule_file, tmp_path):
    odd = bytes(tmp_path) + b"/\xff.json"
    Path(os.fsdecode(odd)).write_bytes(schedule_file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "fastdit", "schedule", "convert", odd, odd],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"schedule: " in done.stdout


def test_importing_the_command_line_is_light():
    code = (
        "import sys, fastdit; before = set(sys.modules); import fastdit.cli; "
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert added.isdisjoint({"torch", "diffusers", "transformers", "matplotlib", "PIL"})


def test_ctrl_c_ends_with_130(folder, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdit.cli.loading.load_model", interrupt)
    output = run("demo", "--model", folder, "--out", tmp_path / "a.png", code=130)
    assert output.strip() == "interrupted"


# ---- refusals


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_no_such_folder(command, tmp_path):
    assert "--model" in refused(command, "--model", tmp_path / "missing")
    assert "model_index.json" in refused(command, "--model", tmp_path)


@pytest.mark.parametrize("text", ["{", '{"_class_name": "NoSuchPipeline"}', "[1]"])
def test_damaged_folder(text, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    assert "could not be loaded" in refused("explain", "--model", tmp_path)


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_unsupported_pipeline(command, tmp_path):
    folder = save_unsupported(tmp_path / "ddpm")
    message = refused(command, "--model", folder)
    assert "DDPMPipeline" in message
    assert "SD3Transformer2DModel" in message


def test_bad_schedule_files(folder, schedule_file, tmp_path):
    damaged = tmp_path / "damaged.json"
    document = json.loads(schedule_file.read_text())
    document["steps"] = 3
    damaged.write_text(json.dumps(document))
    for command in ("explain", "demo"):
        arguments = (command, "--model", folder, "--schedule")
        assert "--schedule" in refused(*arguments, damaged)
        assert "--schedule" in refused(*arguments, tmp_path / "missing.json")
        assert "--every" in refused(*arguments, schedule_file, "--every", 2)
    assert "FILE" in refused("schedule", "show", damaged)
    assert "4 steps" in refused(
        "demo", "--model", folder, "--schedule", schedule_file, "--steps", 5
    )


@pytest.mark.parametrize(
    "option", ["--steps", "--every", "--seed", "--repeats", "--height", "--width", "--threads"]
)
def test_negative_numbers(option, folder):
    assert option in run("demo", "--model", folder, option, -1, code=2)


@pytest.mark.parametrize("option", ["--steps", "--every", "--batch", "--height", "--width"])
def test_zero(option, folder):
    assert option in run("explain", "--model", folder, option, 0, code=2)


def test_unknown_backend_and_dtype(folder):
    for command in ("demo", "explain"):
        message = refused(command, "--model", folder, "--backend", "abacus")
        assert "backend 'abacus'" in message
        assert "reference" in message
        assert "--dtype" in refused(command, "--model", folder, "--dtype", "int3")


def test_outputs_that_cannot_be_written(folder, schedule_file, tmp_path):
    arguments = ("demo", "--model", folder, "--out")
    assert "--out" in refused(*arguments, tmp_path / "missing" / "a.png")
    assert "--out must end in .png" in refused(*arguments, tmp_path / "a.jpg")
    (tmp_path / "folder.png").mkdir()
    assert "--out" in refused(*arguments, tmp_path / "folder.png")
    assert "--png" in refused("schedule", "show", schedule_file, "--png", tmp_path / "a.txt")


def test_folders_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    search = ("search", "--model", folder, "--prompts", tmp_path / "file", "--out")
    train = ("train-router", "--model", folder, "--checkpoints")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--out must be a folder" in refused(*search, out)
        assert "--checkpoints must be a folder" in refused(*train, out)


def test_a_disk_that_fails_ends_in_one_line(schedule_file, tmp_path, monkeypatch):
    from fastdit.cli import raster

    def full(*_):
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setattr(raster, "save_raster", full)
    output = run("schedule", "show", schedule_file, "--png", tmp_path / "a.png", code=2)
    assert output.splitlines()[-1].startswith("error: [Errno 28] No space left on device")


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "9" * 5000])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_an_environment_that_makes_no_sense(folder, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    arguments = ("train-router", "--model", folder, "--out", tmp_path / "a.safetensors")
    assert f"environment variable {name} must be a whole number" in refused(*arguments)
    if name == "WORLD_SIZE":
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a circle")
        arguments = ("search", "--model", folder, "--prompts", prompts, "--out", tmp_path / "found")
        assert f"environment variable {name}" in refused(*arguments)


def test_processes_that_cannot_meet(folder, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ("train-router", "--model", folder, "--out", tmp_path / "a.safetensors")
    assert "the processes of the launch could not meet" in refused(*arguments)


def test_what_a_terminal_would_obey_is_spelt_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"format": "\x1b[2J\x07\udcff"}))
    message = refused("schedule", "show", tmp_path / "a.json")
    assert "\x1b" not in message
    assert "x1b[2J" in message
    given = {"\x1b[2J\udcff": "\x1b[31m\udcff"}
    fastdit.Schedule.from_bits([[[1]]], ["ff"], given).save(tmp_path / "b.json")
    output = run("schedule", "show", tmp_path / "b.json")
    assert "\x1b" not in output
    assert "x1b[31m" in output


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("demo", "--threads", 10**6),
        ("demo", "--steps", 10**6),
        ("explain", "--steps", 10**6),
        ("explain", "--height", 10**9),
        ("explain", "--batch", 10**9),
        ("search", "--threads", 10**6),
        ("search", "--workers", 10**6),
        ("search", "--steps", 10**6),
        ("search", "--population", 10**9),
        ("search", "--images-per-prompt", 10**9),
        ("search", "--seed", 2**63),
        ("search", "--image-seed", 2**63),
        ("train-router", "--threads", 10**6),
        ("train-router", "--steps", 10**6),
        ("train-router", "--batch", 10**9),
        *(
            ("train-router", option, value)
            for option in ("--guidance", "--target", "--tau", "--beta", "--lr", "--spread")
            for value in ("nan", "inf")
        ),
        *(("train-router", "--target", value) for value in (0, 1)),
        *(("train-router", "--tau", value) for value in (-0.1, 1)),
        *(("train-router", option, -1) for option in ("--beta", "--lr", "--spread")),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_the_work(
    folder, tmp_path, command, option, value
):
    out = ("--out", tmp_path / "found") if command == "search" else ()
    output = run(command, "--model", folder, *out, option, value, code=2)
    assert f"Invalid value for '{option}'" in output
    assert not (tmp_path / "found").exists()


def test_a_size_the_pipeline_refuses(folder, tmp_path):
    output = run(
        *("demo", PROMPT, "--model", folder, "--steps", 8, "--height", 33),
        *("--out", tmp_path / "a.png"),
        code=2,
    )
    assert "error: StableDiffusion3Pipeline: `height` and `width`" in output


def test_missing_embedded_model(monkeypatch):
    from fastdit import tiny

    def missing(**_):
        raise FileNotFoundError("folder must hold a model_index.json")

    monkeypatch.setattr(tiny, "load_pipeline", missing)
    assert "--model" in refused("explain")
