"""Judges of pictures that are networks, from weights on the disk: nothing is downloaded, and files are hashed.

Of a picture: LPIPS (Zhang et al. 2018, AlexNet, version 0.1), CLIP's and HPS's cosine, ImageReward. Of a set beside
the solution's: FID (Heusel et al. 2017, eq. 6) and KID (Binkowski et al. 2018) on the features of torch-fidelity's
Inception, and CMMD (Jayasumana et al. 2024) on CLIP's. Sets of few pictures say little by FID, whose bias grows as they
shrink; KID has none.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdit.errors import ArgumentError, DependencyError
from fastdit.evaluate import frechet
from fastdit.search.image_reward import CHECKPOINT, VOCABULARY
from fastdit.search.local_models import eight_bits
from fastdit.search.quality import Clip, make_quality

BATCH = 32
#: files of LPIPS: torchvision's AlexNet and the heads of the package `lpips`, weights/v0.1/alex.pth
ALEXNET, HEADS = "alexnet.pth", "alex.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
#: of AlexNet's five convolutions: stride and padding; a maximum over 3 x 3 comes before the second and the third
CONVOLUTIONS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
POOLED = (3, 6)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
#: of CMMD: the kernel's width, and what its value is multiplied by
WIDTH, TIMES = 10.0, 1000.0

CLIP = ("config.json", "preprocessor_config.json")
#: judge -> files without which it does not begin
FILES = {
    "lpips": (ALEXNET, HEADS),
    "clip": CLIP,
    "hps": CLIP,
    "image-reward": (CHECKPOINT, VOCABULARY),
    "fid": (INCEPTION,),
    "kid": (INCEPTION,),
    "cmmd": CLIP,
}

#: pictures or videos, prompts and the solution's give {"value"}, and "low" and "high" where each picture has one
Judged = Callable[[np.ndarray, Sequence[str], np.ndarray], dict[str, Any]]


def make_judge(name: str, folder: Path) -> Judged:
    """This makes a judge of the weights in a folder.

    Raises:
        ArgumentError: There is none of that name, or its files are not there; names them.
        DependencyError: A package is not installed.
    """
    if name not in JUDGES:
        raise ArgumentError(f"a judge must be one of {', '.join(JUDGES)}, got {name!r}")
    missing = [file for file in FILES[name] if not (folder / file).is_file()]
    if missing:
        what = f"has no {', '.join(missing)}" if folder.is_dir() else "is not a folder"
        raise ArgumentError(f"judge {name!r}: {folder} {what}; nothing is downloaded")
    try:
        return JUDGES[name](folder)
    except DependencyError:
        raise
    except Exception as error:  # what a wrong file raises depends on where it is wrong
        raise ArgumentError(
            f"judge {name!r}: {folder} does not hold the released weights: {error!s:.300}"
        ) from error


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder's top level."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
            found[path.name] = digest.hexdigest()
    return found


# ---- of a picture


class Lpips:
    """LPIPS of pictures and others: 0 where they are equal.

    Args:
        folder: Holds `ALEXNET` and `HEADS`, both read as tensors only.
    """

    def __init__(self, folder: Path) -> None:
        net, heads = (
            torch.load(folder / name, map_location="cpu", weights_only=True)
            for name in (ALEXNET, HEADS)
        )
        self._layers = [
            (net[f"features.{at}.weight"].float(), net[f"features.{at}.bias"].float())
            for at, _, _ in CONVOLUTIONS
        ]
        self._heads = [heads[f"lin{index}.model.1.weight"].float() for index in range(5)]

    @torch.no_grad()
    def distances(self, pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
        """These are of [n, h, w, 3] in [0, 1]."""
        found = []
        for start in range(0, len(pictures), BATCH):
            pair = [self._features(each[start : start + BATCH]) for each in (pictures, references)]
            parts = [
                F.conv2d((a - b) ** 2, head).mean((1, 2, 3))
                for a, b, head in zip(*pair, self._heads, strict=True)
            ]
            found.append(torch.stack(parts).sum(0).numpy())
        return np.concatenate(found)

    def _features(self, pictures: np.ndarray) -> list[Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(pictures)).float().permute(0, 3, 1, 2) * 2 - 1
        x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
        found = []
        for (at, stride, padding), (weight, bias) in zip(CONVOLUTIONS, self._layers, strict=True):
            if at in POOLED:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found


def _lpips(folder: Path) -> Judged:
    judge = Lpips(folder)
    return lambda pictures, prompts, truth: _mean(
        judge.distances(frames_of(pictures), frames_of(truth)), len(pictures)
    )


def _rewarded(name: str) -> Callable[[Path], Judged]:
    """One of the judges of a search, whose loss is 1 - value."""

    def make(folder: Path) -> Judged:
        judge = Clip(folder) if name == "hps" else make_quality(name, folder)

        def judged(
            pictures: np.ndarray, prompts: Sequence[str], truth: np.ndarray
        ) -> dict[str, Any]:
            frames = frames_of(pictures)
            texts = [text for text in prompts for _ in range(len(frames) // len(pictures))]
            losses: list[float] = []
            for start in range(0, len(frames), BATCH):
                some = slice(start, start + BATCH)
                losses += judge.losses(frames[some], texts[some], None)
            return _mean(1 - np.array(losses), len(pictures))

        return judged

    return make


def frames_of(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, h, w, 3] as they are, videos [n, frames, h, w, 3] as pictures [n frames, h, w, 3]."""
    return pictures if pictures.ndim == 4 else pictures.reshape(-1, *pictures.shape[2:])


def _mean(values: np.ndarray, count: int) -> dict[str, Any]:
    """Over so many pictures, or videos of which each has the mean of its frames; with a bootstrap interval."""
    values = values.reshape(count, -1).mean(1)
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


# ---- of sets


def kid(rows: np.ndarray, others: np.ndarray) -> float:
    """The unbiased squared discrepancy of features [n, d], [m, d] by the kernel (x.y / d + 1)^3."""
    n, m = len(rows), len(others)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own, other = kernel(rows, rows), kernel(others, others)
    within = (own.sum() - np.trace(own)) / (n * (n - 1))
    within += (other.sum() - np.trace(other)) / (m * (m - 1))
    return float(within - 2 * kernel(rows, others).mean())


def cmmd(rows: np.ndarray, others: np.ndarray) -> float:
    """1000 times the squared discrepancy of embeddings of length 1 by a Gaussian kernel of width 10."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.exp(-squares / (2 * WIDTH**2))

    value = (
        kernel(rows, rows).mean() + kernel(others, others).mean() - 2 * kernel(rows, others).mean()
    )
    return float(TIMES * value)


def fid(rows: np.ndarray, others: np.ndarray) -> float:
    """The Fréchet distance of features."""
    return frechet.distance(frechet.gaussian(rows), frechet.gaussian(others))


def _of_sets(
    name: str,
    features: Callable[[Path], Callable[[np.ndarray], np.ndarray]],
    distance: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[Path], Judged]:
    def make(folder: Path) -> Judged:
        of = features(folder)
        return lambda pictures, prompts, truth: {
            "value": distance(of(frames_of(pictures)), of(frames_of(truth))),
            "pictures": len(frames_of(pictures)),
        }

    return make


def _inception(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise DependencyError(
            "fid and kid need the package torch-fidelity: pip install torch-fidelity"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # It would run what the file holds; it is read as tensors before, which refuses a file that holds more.
    torch.load(folder / INCEPTION, map_location="cpu", weights_only=True)
    net = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(folder / INCEPTION)
    ).eval()

    @torch.no_grad()
    def of(pictures: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(pictures), BATCH):
            some = np.stack([eight_bits(p) for p in pictures[start : start + BATCH]])
            found.append(net(torch.from_numpy(some).permute(0, 3, 1, 2))[0].double().numpy())
        return np.concatenate(found)

    return of


def _clip(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    judge = Clip(folder)
    return judge.embeddings


JUDGES: dict[str, Callable[[Path], Judged]] = {
    "lpips": _lpips,
    "clip": _rewarded("clip"),
    "hps": _rewarded("hps"),
    "image-reward": _rewarded("image-reward"),
    "fid": _of_sets("fid", _inception, fid),
    "kid": _of_sets("kid", _inception, kid),
    "cmmd": _of_sets("cmmd", _clip, cmmd),
}
