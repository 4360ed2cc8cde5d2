"""The tiny model as a Stable Diffusion 3 pipeline, and how to load it.

Subclasses the stock pipeline only where a small model needs it: no empty text tokens in
place of the missing third text encoder, and better defaults. It holds no model code.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusion3Pipeline

from fastdit.cli.saved import index_of

ASSETS = Path(__file__).parent / "assets"
GUIDANCE_SCALE = 2.5  # chosen by score on held-out prompts


def _with_defaults(call: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """This gives ``call`` other default values while keeping its signature readable."""
    signature = inspect.signature(call)
    parameters = [
        p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()
    ]
    signature = signature.replace(parameters=parameters)

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return call(*bound.args, **bound.kwargs)

    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return wrapped


class TinySD3Pipeline(StableDiffusion3Pipeline):
    """This is Stable Diffusion 3's pipeline with defaults that suit the tiny model.

    The stock pipeline replaces a missing T5 encoder by 256 zero tokens. Beside the tiny
    model's 24 text tokens those would dominate attention, so here they are left out. A folder
    it saves names the stock class, so any diffusers program can load it, as it would load
    Stable Diffusion 3 without T5: ``text_encoder_3=None, tokenizer_3=None``. There, pass
    ``max_sequence_length=0`` to leave the zero tokens out as well.
    """

    _optional_components = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
    ]

    __call__ = _with_defaults(
        StableDiffusion3Pipeline.__call__, guidance_scale=GUIDANCE_SCALE, max_sequence_length=0
    )

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The third encoder gives these embeddings; they are of zero length where there is none."""
        length = 0 if self.text_encoder_3 is None else max_sequence_length
        return super()._get_t5_prompt_embeds(
            prompt=prompt,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=length,
            device=device,
            dtype=dtype,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """This saves like the stock pipeline, under the stock pipeline's class name."""
        super().save_pretrained(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        entries = json.loads(index.read_text())
        entries["_class_name"] = StableDiffusion3Pipeline.__name__
        entries.pop("_name_or_path", None)
        index.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """This switches the loading bars of diffusers and transformers off, then back as they were."""
    switches = [diffusers.utils.logging, transformers.utils.logging]
    were_on = [switch.is_progress_bar_enabled() for switch in switches]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch, was_on in zip(switches, were_on, strict=True):
            if was_on:
                switch.enable_progress_bar()


def load_pipeline(
    folder: str | Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
    progress_bar: bool = False,
) -> TinySD3Pipeline:
    """This loads the tiny model; see :func:`fastdit.tiny.load_pipeline`."""
    folder = ASSETS if folder is None else Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"folder must hold a model_index.json, got {str(folder)!r}")
    index_of(folder)
    with _quiet_loading():
        pipeline = TinySD3Pipeline.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        )
    # Cast afterwards, since versions of diffusers disagree on the name of the argument.
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch_dtype)
    pipeline.set_progress_bar_config(disable=not progress_bar)
    return pipeline
