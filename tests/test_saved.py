"""No file of a pipeline's folder runs as code, whatever the folder says, and whatever the version of diffusers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import fastdit
import fastdit.tiny
from fastdit.cli.loading import load_model
from fastdit.cli.saved import INDEX, index_of
from saved_pipelines import save_dit, save_sd3

CODE = """
from pathlib import Path
Path({witness!r}).touch()
from diffusers import StableDiffusion3Pipeline, SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast
class Planted(StableDiffusion3Pipeline): pass
class Transformer(SD3Transformer2DModel): pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("evil.py", {"_class_name": ["evil", "Planted"]}),
        ("None.py", {}),
        ("transformer/evil.py", {"transformer": ["evil", "Transformer"]}),
        ("transformer/diffusers.py", {}),
        ("tokenizer/transformers.py", {}),
    ],
)
@pytest.mark.parametrize("load", [load_model, fastdit.tiny.load_pipeline])
def test_code_of_a_folder_is_refused_and_not_run(folder, tmp_path, file, entries, load):
    witness = tmp_path / "witness"
    (folder / file).write_text(CODE.format(witness=str(witness)))
    change(folder / INDEX, **entries)
    with pytest.raises(fastdit.ArgumentError, match=rf"no code of a folder is run.*{file}"):
        load(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": ["evil", "Planted"]}, "pipeline class of diffusers"),
        ({"_class_name": "NoSuchPipeline"}, "pipeline class of diffusers"),
        ({"_class_name": None}, "pipeline class of diffusers"),
        ({"_class_name": "utils.logging"}, "pipeline class of diffusers"),
        ({"vae": ["os", "system"]}, "part 'vae' .* class of diffusers or transformers"),
        ({"vae": ["diffusers.utils", "logging"]}, "part 'vae'"),
        ({"vae": [None, "AutoencoderKL"]}, "part 'vae'"),
        ({"vae": ["diffusers", "a.b"]}, "part 'vae'"),
        ({"vae": [["diffusers"], "AutoencoderKL"]}, "part 'vae'"),
        ({"vae": "os"}, "part 'vae'"),
        ({"other": ["subprocess", "run"]}, "part 'other'"),
    ],
    ids=str,
)
def test_classes_of_other_libraries_are_refused(folder, entries, message):
    change(folder / INDEX, **entries)
    with pytest.raises(fastdit.ArgumentError, match=message):
        load_model(folder)


@pytest.mark.parametrize("file", ["transformer/config.json", "tokenizer/tokenizer_config.json"])
def test_configurations_that_name_code_are_refused(folder, file):
    change(folder / file, auto_map={"AutoModel": "evil.Transformer"})
    with pytest.raises(fastdit.ArgumentError, match=rf"{file} has an auto_map"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder, tmp_path):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "witness",)

    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Planted()}, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(fastdit.ArgumentError, match="could not be loaded"):
        load_model(folder)
    assert not (tmp_path / "witness").exists()


def test_a_scheduler_saved_with_an_infinity_is_read(folder):
    DPMSolverMultistepScheduler(use_flow_sigmas=True).save_pretrained(folder / "scheduler")
    change(folder / INDEX, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    assert load_model(folder).pipeline.scheduler.config.lambda_min_clipped == -math.inf


def test_what_is_saved_is_accepted(folder, tmp_path):
    assert index_of(folder)["_class_name"] == "StableDiffusion3Pipeline"
    assert "id2label" in index_of(save_dit(tmp_path / "dit"))
    assert load_model(folder).pipeline.text_encoder_3 is None
