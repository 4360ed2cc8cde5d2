"""Putting trained parts together into the shipped folder.

Builds the pipeline from a run's checkpoints and saves it in diffusers' standard layout with
float16 safetensors. It neither trains nor measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint
from .denoiser import Denoiser
from .models import build_scheduler, build_vae
from .recipe import Recipe, Sizes
from .shapes import SHAPES_RECIPE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from .pipeline import TinySD3Pipeline


def load_vae(
    folder: str | Path, stage: str = "compact", recipe: Recipe = SHAPES_RECIPE
) -> AutoencoderKL:
    """A run has this autoencoder, scaled.

    Parameters
    ----------
    folder : str or Path
        The run's folder.
    stage : str
        ``"vae"`` for the larger one that the bank is encoded with, ``"compact"`` for the
        shipped one.
    recipe : Recipe
        Whose autoencoder it is.

    Raises
    ------
    FileNotFoundError
        If that stage has not run.
    """
    saved = checkpoint.load(Path(folder) / stage)
    if saved is None or "scaling_factor" not in saved[1]:
        raise FileNotFoundError(f"folder must hold a finished {stage} stage, got {str(folder)!r}")
    tensors, facts = saved
    vae = build_vae(recipe.teacher if stage == "vae" else recipe.sizes.vae)
    vae.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    vae.register_to_config(
        scaling_factor=facts["scaling_factor"], shift_factor=facts["shift_factor"]
    )
    return vae.eval()


def load_denoiser(folder: str | Path, sizes: Sizes = SHAPES_RECIPE.sizes) -> Denoiser:
    """A run has this averaged denoiser; ``FileNotFoundError`` if that stage has not run."""
    saved = checkpoint.load(Path(folder) / "transformer")
    if saved is None:
        raise FileNotFoundError(f"folder must hold a transformer stage, got {str(folder)!r}")
    model = Denoiser(sizes)
    model.load_state_dict({n[8:]: t for n, t in saved[0].items() if n.startswith("average.")})
    return model.eval()


def assemble(vae: AutoencoderKL, model: Denoiser) -> TinySD3Pipeline:
    """This joins trained parts to a pipeline."""
    from .pipeline import TinySD3Pipeline

    pipeline = TinySD3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tidy_tokenizer(folder: Path) -> None:
    """This names the tokenizer's class as every version of transformers knows it."""
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _tidy_config(path: Path) -> None:
    """This drops where parts were loaded from, and asks for float32 unless a program says otherwise."""
    settings: dict[str, Any] = json.loads(path.read_text())
    settings.pop("_name_or_path", None)
    if "dtype" in settings:
        settings["dtype"] = "float32"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def export(pipeline: TinySD3Pipeline, folder: str | Path) -> None:
    """This saves ``pipeline`` into ``folder`` as float16; the pipeline itself becomes float16."""
    folder = Path(folder)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        # By the base class: diffusers' own method warns of casts that training never undoes.
        torch.nn.Module.to(getattr(pipeline, name), torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("tokenizer", "tokenizer_2"):
        _tidy_tokenizer(folder / name)
        index[name] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        _tidy_config(folder / name / "config.json")
