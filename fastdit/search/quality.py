"""What makes a picture good: the plug-ins that turn images into losses, smaller being better.

* `paired`: relative L2 distance to the uncached picture of the same seed; asks for sameness, not for beauty.
* `truth`: relative L2 distance of the latents to those of many steps from the same noise (`solution.py`); the
  sampler's own error counts too, which `paired` rewards repeating.
* `task`: for the embedded model, the share of the named objects that are wrong (`fastdit.tiny.score`).
* `clip`: 1 - cosine between image and prompt by a CLIP model in a local folder.
* `image-reward`: 1 - ImageReward, the paper's objective, from a local folder; see `image_reward.py`.

Weights are read from the folder given and nowhere else: nothing is downloaded. Any object with `name`,
`needs_reference` and `losses` may stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastdit.cli.distance import relative_l2
from fastdit.errors import ArgumentError
from fastdit.search import solution
from fastdit.search.front import TINY
from fastdit.search.local_models import eight_bits, require_files

EMBEDDED = 32  # pictures at a time


class Quality(Protocol):
    """This judges pictures.

    Attributes:
        name: For the ledger and the axis of the plot.
        needs_reference: Whether `losses` is given the uncached pictures of the same seeds.

    One with `logarithmic = True` has positive losses of which the ratios matter: the search spreads its front, and
    measures hypervolume, over their logarithm. One with `of_latents = True` is given latents, and the solution's as
    references; its losses do not vanish where nothing is reused. One with `geometric = True` has the logarithms of its
    losses averaged, so that a few pictures which became others do not rule. One with `of_videos = True` is given videos
    as they are, [n, F, H, W, 3]; others are given their frames, and a video's loss is the mean of these.
    """

    name: str
    needs_reference: bool

    def losses(
        self, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
    ) -> list[float]:
        """Each of `images`, [n, H, W, 3] in [0, 1], has one loss."""
        ...


class Paired:
    """The loss is the relative L2 distance to the uncached picture of the same seed."""

    name = "paired"
    needs_reference = True
    logarithmic = True
    of_videos = True

    def losses(
        self, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
    ) -> list[float]:
        """Each picture has |image - reference| / |reference|."""
        return [relative_l2(*pair) for pair in zip(images, references, strict=True)]


class Truth(Paired):
    """The loss is the same of a run's latents, to those of many steps."""

    name = "truth"
    of_latents = True
    geometric = True


class Task:
    """The loss is the share of the objects named in the prompt whose shape or colour is wrong; embedded model only."""

    name = "task"
    needs_reference = False

    def losses(
        self, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
    ) -> list[float]:
        """Each picture has 1 - `fastdit.tiny.score`."""
        from fastdit import tiny

        try:
            pairs = zip(images, prompts, strict=True)
            return [1 - tiny.score([image], [prompt]).mean for image, prompt in pairs]
        except ValueError as error:
            raise ArgumentError(
                f"quality 'task' judges the embedded model only: {error}"
            ) from error


class Clip:
    """The loss is 1 - cosine of CLIP's image and text embeddings.

    Args:
        folder: What `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` wrote.
    """

    name = "clip"
    needs_reference = False

    def __init__(self, folder: Path) -> None:
        require_files(folder, self.name, ("config.json", "preprocessor_config.json"))
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            model, told = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(told["missing_keys"]):  # it has random ones in their place
                raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
            self._model = model.eval()
            self._pictures = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._words = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ArgumentError(f"quality 'clip': {folder} could not be loaded: {error}") from error

    def losses(
        self, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
    ) -> list[float]:
        """Each picture and its prompt have 1 - cosine."""
        import torch

        pixels = self._pictures(images=[eight_bits(image) for image in images], return_tensors="pt")
        words = self._words(list(prompts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = self._model(
                pixel_values=pixels["pixel_values"],
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
            )
            cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return [1 - float(value) for value in cosine]

    def embeddings(self, images: np.ndarray) -> np.ndarray:
        """Of pictures [n, H, W, 3] in [0, 1]: float64 [n, d] of length 1."""
        import torch

        found = []
        for start in range(0, len(images), EMBEDDED):
            some = [eight_bits(image) for image in images[start : start + EMBEDDED]]
            pixels = self._pictures(images=some, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                seen = self._model.vision_model(pixel_values=pixels).pooler_output
                rows = self._model.visual_projection(seen).double()
            found.append(torch.nn.functional.normalize(rows, dim=1).numpy())
        return np.concatenate(found)


def losses_of(
    quality: Quality, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
) -> list[float]:
    """The losses of pictures [n, H, W, 3], of videos [n, F, H, W, 3], or of latents."""
    if images.ndim < 5 or _says(quality, "of_videos") or is_of_latents(quality):
        return quality.losses(images, prompts, references)
    frames = images.shape[1]
    references = None if references is None else references.reshape(-1, *images.shape[2:])
    repeated = [prompt for prompt in prompts for _ in range(frames)]
    found = quality.losses(images.reshape(-1, *images.shape[2:]), repeated, references)
    return np.asarray(found).reshape(-1, frames).mean(axis=1).tolist()


def make_quality(name: str, folder: str | Path | None = None) -> Quality:
    """This makes the plug-in called `name`; `folder` holds the weights of those that need some.

    Raises:
        ArgumentError: There is no such plug-in, or its weights are not in `folder`; names the folder.
    """
    if name not in QUALITIES:
        raise ArgumentError(f"quality must be one of {', '.join(QUALITIES)}, got {name!r}")
    if name not in WEIGHTS:
        return QUALITIES[name]()
    if folder is None:
        raise ArgumentError(
            f"quality {name!r} needs quality_path, the folder of its weights: nothing is downloaded"
        )
    return QUALITIES[name](Path(folder))


def is_logarithmic(quality: str | Quality) -> bool:
    """This tells whether the ratios of a judge's losses matter rather than their differences."""
    return _says(quality, "logarithmic")


def is_of_latents(quality: str | Quality) -> bool:
    """This tells whether a judge is given latents, and the solution's beside them."""
    return _says(quality, "of_latents")


def is_geometric(quality: str | Quality) -> bool:
    """This tells whether a judge's losses are averaged as logarithms."""
    return _says(quality, "geometric")


def average(quality: str | Quality, losses: Sequence[float]) -> float:
    """The loss over pictures is the mean of theirs; the geometric one where the judge says so."""
    if not is_geometric(quality):
        return float(np.mean(losses))
    return float(np.exp(np.log(np.maximum(losses, TINY)).mean()))


def judgement(quality: str | Quality) -> dict[str, Any]:
    """These decide a loss beside the judge's name, as JSON data: how it is averaged, the steps of the solution."""
    found: dict[str, Any] = {"mean": "geometric" if is_geometric(quality) else "arithmetic"}
    return {**found, "solution": solution.STEPS} if is_of_latents(quality) else found


def _says(quality: str | Quality, what: str) -> bool:
    judge = QUALITIES.get(quality) if isinstance(quality, str) else quality
    return bool(getattr(judge, what, False))


def _image_reward(folder: Path) -> Quality:
    from fastdit.search.image_reward import ImageReward

    return ImageReward(folder)


QUALITIES: dict[str, Callable[..., Any]] = {
    "paired": Paired,
    "truth": Truth,
    "task": Task,
    "clip": Clip,
    "image-reward": _image_reward,
}
WEIGHTS = ("clip", "image-reward")
