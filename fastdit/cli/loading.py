"""What the commands run on: a diffusers pipeline from the package or from a folder, and the calls
that draw a prompt.

Folders are read from the disk alone: nothing is downloaded and no code of the folder is executed
(`saved.py`); weights are safetensors.
What a pipeline is asked for follows from its own `__call__` signature; this file knows no model
family.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdit.cli.saved import INDEX, index_of
from fastdit.errors import ArgumentError, UnsupportedModelError

DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = (
    "a small red fox sitting in fresh snow, photograph",
    "a bowl of lemons on a blue table, oil painting",
    "a lighthouse on a cliff at sunset, watercolour",
    "the word HELLO in white chalk on a blackboard",
)
CLASSES = ("207", "360", "387", "974")  # of ImageNet: golden retriever, otter, red panda, geyser


@dataclass(frozen=True)
class Model:
    """This is a loaded pipeline.

    Attributes:
        pipeline: On its device, without progress bars.
        name: How to call it in titles.
        package: Which of the package's own it is, `fastdit.tiny` or `fastdit.emoji`; None for another. These
            make prompts, and judge pictures.
        device, dtype: Where and in what the transformer computes.
    """

    pipeline: Any
    name: str
    package: ModuleType | None
    device: str
    dtype: str


def load_model(
    folder: Path | None = None, dtype: str | None = None, package: str = "tiny"
) -> Model:
    """This loads a model in the package, or the diffusers pipeline saved in `folder`.

    Args:
        folder: What `DiffusionPipeline.save_pretrained` wrote; the embedded model if left out.
        dtype: One of `DTYPES`; by default float32 on a CPU and bfloat16 on a GPU.
        package: Which embedded model: "tiny" or "emoji".

    Returns:
        The model on the first CUDA device if there is one, else on the CPU.

    Raises:
        ArgumentError: There is no such pipeline, or `dtype` is not accepted.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if folder is not None and not (folder / INDEX).is_file():
        what = f"it has no {INDEX}" if folder.is_dir() else "there is no such folder"
        raise ArgumentError(f"--model {folder} is not a saved diffusers pipeline: {what}")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if folder is None:
        own = importlib.import_module(f"fastdit.{package}")
        pipeline, name = _embedded(own, getattr(torch, dtype)), "embedded model"
    else:
        own, pipeline, name = None, _read(folder, getattr(torch, dtype)), folder.resolve().name
    pipeline.set_progress_bar_config(disable=True)
    return Model(pipeline.to(device), name, own, device, dtype)


def _embedded(package: ModuleType, dtype: Any) -> Any:
    try:
        with _quiet():
            return package.load_pipeline(torch_dtype=dtype)
    except FileNotFoundError as error:
        raise ArgumentError(
            f"this copy of fastdit comes without its embedded model ({error}); "
            "give --model the folder of a diffusers pipeline"
        ) from error


def _read(folder: Path, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    try:
        index = index_of(folder)
    except ArgumentError as error:
        raise ArgumentError(f"--model {error}") from error
    # A part saved as absent (SD3 without T5) has to be named again as absent.
    absent = {name: None for name, part in index.items() if part == [None, None]}
    try:
        with _quiet():
            return DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                **absent,
            )
    # What a damaged folder raises depends on the part and on the library that reads it.
    except Exception as error:
        raise ArgumentError(
            f"--model {folder} could not be loaded: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """There are no loading bars and no advice about other packages; afterwards all is as before."""
    import diffusers
    import transformers

    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # diffusers renames `torch_dtype`; the oldest version supported has only that name.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, (bar, verbosity) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


class _Once(logging.Filter):
    """This filter lets every message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self.seen
        self.seen.add(message)
        return fresh


@contextmanager
def messages_once() -> Iterator[None]:
    """What diffusers and transformers say at every call (a prompt was cut) is said once."""
    names = ("diffusers", "transformers")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    filters = [_Once() for _ in handlers]
    for handler, once in zip(handlers, filters, strict=True):
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in zip(handlers, filters, strict=True):
            handler.removeFilter(once)


def default_prompts(model: Model) -> list[str]:
    """These four prompts suit the model; the embedded one gets scenes it was not trained on."""
    if model.package is not None:
        return [text for objects in (1, 2) for text in model.package.prompts(2, objects=objects)]
    return list(CLASSES if draws_classes(model.pipeline) else PROMPTS)


def draws_classes(pipeline: Any) -> bool:
    """This tells whether it takes class numbers in place of prompts."""
    return "class_labels" in _parameters(pipeline)


def judge_of(model: Model) -> Callable[..., Any] | None:
    """This judges the model's pictures by their prompts; None where nothing can."""
    return None if model.package is None else model.package.score


def calls(
    pipeline: Any, prompts: Sequence[str], height: int | None = None, width: int | None = None
) -> list[dict[str, Any]]:
    """These arguments of `pipeline(...)` draw each prompt; for DiT prompts are classes.

    Raises:
        UnsupportedModelError: The pipeline takes neither prompts nor classes.
        ArgumentError: It cannot draw a prompt, or not at this size.
    """
    parameters = _parameters(pipeline)
    size = {"height": height, "width": width}
    size = {name: value for name, value in size.items() if value is not None}
    if refused := [name for name in size if name not in parameters]:
        raise ArgumentError(
            f"--{refused[0]}: {type(pipeline).__name__} always draws at the size it was trained for"
        )
    if "prompt" in parameters:
        return [{"prompt": prompt, **size} for prompt in prompts]
    if draws_classes(pipeline):
        return [{"class_labels": [_class_number(pipeline, prompt)], **size} for prompt in prompts]
    raise UnsupportedModelError(
        f"{type(pipeline).__name__} takes neither prompts nor class labels: "
        "fastdit demo cannot drive it"
    )


def pictures_of(output: Any) -> Any:
    """This is what a pipeline's call drew: its images, or of a pipeline of videos the frames of each."""
    found = getattr(output, "images", None)
    return output.frames if found is None else found


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipeline).__call__).parameters


def _class_number(pipeline: Any, prompt: str) -> int:
    count = pipeline.transformer.config.num_embeds_ada_norm
    labels = getattr(pipeline, "labels", None) or {}
    text = prompt.strip()
    number = int(text) if text.isascii() and text.isdigit() else labels.get(text, -1)
    if not 0 <= number < count:
        known = ", or one of the labels it was saved with" if labels else ""
        raise ArgumentError(
            f"prompt {prompt!r}: {type(pipeline).__name__} draws classes, not texts; "
            f"give a class number from 0 to {count - 1}{known}"
        )
    return number
