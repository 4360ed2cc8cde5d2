"""Captions of emoji scenes, from terse ("a cat") to complete, and reading them back.

Does not draw and does not judge. The words used here are the whole vocabulary of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdit.tiny.captions import join_place, words

from .scenes import COLORS, GROUNDS, SIZES, Scene, SceneObject, sample_scene
from .sprites import NAMES, STYLES

_PLACE_WORDS = ("center", "left", "right", "top", "bottom")
_FILLERS = "a an the and on at of in with , ."
VOCABULARY: tuple[str, ...] = tuple(
    sorted({*NAMES, *STYLES, *SIZES, *COLORS, *GROUNDS, *_PLACE_WORDS, *_FILLERS.split()})
)
MAX_TOKENS = 28  # begin and end marks included; the longest caption has 26 words and marks


@dataclass(frozen=True)
class ParsedObject:
    """A prompt says this of one emoji; ``None`` where it says nothing."""

    name: str
    style: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt says this: its emoji in order, and the colour of the ground or ``None``."""

    objects: tuple[ParsedObject, ...]
    color: str | None = None


def parse(prompt: str) -> ParsedPrompt:
    """This reads a prompt: adjectives belong to the next emoji, places to the last one.

    Raises
    ------
    ValueError
        If the prompt names no emoji.
    """
    tokens = words(prompt)
    color = None
    objects: list[dict[str, str]] = []
    pending: dict[str, str] = {}
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token in COLORS and following in GROUNDS:
            color = token
        elif token in NAMES:
            objects.append({"name": token, **pending})
            pending = {}
        elif token in STYLES:
            pending["style"] = token
        elif token in SIZES:
            pending["size"] = token
        elif token in _PLACE_WORDS and objects:
            objects[-1]["place"] = join_place(objects[-1].get("place"), token)
    if not objects:
        raise ValueError(f"prompt must name an emoji out of {NAMES}, got {prompt!r}")
    return ParsedPrompt(tuple(ParsedObject(**item) for item in objects), color)


def _phrase(one: SceneObject, say_size: bool, rng: np.random.Generator, drop: float) -> str:
    parts = ["a"]
    if say_size and rng.random() >= drop:
        parts.append(one.size)
    if rng.random() >= drop:
        parts.append(one.style)
    parts.append(one.name)
    if rng.random() >= drop:
        parts.append(f"{'in' if one.place == 'center' else 'at'} the {one.place}")
    return " ".join("an" if p == "a" and q == "apple" else p for p, q in _pairs(parts))


def _pairs(parts: list[str]) -> list[tuple[str, str]]:
    return list(zip(parts, [*parts[1:], ""], strict=True))


def write(scene: Scene, rng: np.random.Generator | None = None, drop: float = 0.0) -> str:
    """This writes a caption of a scene.

    Parameters
    ----------
    scene : Scene
        What to describe. Three emoji are always small, so their size goes without saying.
    rng : numpy.random.Generator, optional
        Varies the order of the emoji and draws what is left out; without it both are fixed.
    drop : float
        Probability of leaving out each style, size, place and the ground; 1 leaves the names.
    """
    items = list(scene.objects)
    if rng is not None:
        items = [items[int(i)] for i in rng.permutation(len(items))]
    rng = np.random.default_rng(0) if rng is None else rng
    phrases = [_phrase(one, len(items) < 3, rng, drop) for one in items]
    joined = ", ".join(phrases[:-1]) + (" and " if len(items) > 1 else "") + phrases[-1]
    if rng.random() < drop:
        return joined
    return f"{joined} on {scene.color} {scene.ground}"


def prompts(
    n: int, split: str = "test", objects: int = 1, seed: int = 0, terse: bool = False
) -> list[str]:
    """This lists captions of scenes of a split, by default complete ones.

    Parameters
    ----------
    n : int
        How many.
    split : str
        ``"test"`` for combinations that training never saw, ``"train"`` for the others.
    objects : int
        Emoji in each scene, 1 to 3.
    seed : int
        Other seeds give other prompts.
    terse : bool
        Whether captions name the emoji alone.
    """
    rng = np.random.default_rng((seed, objects, 3))
    return [write(sample_scene(rng, objects, split), rng, float(terse)) for _ in range(n)]
