"""Captions of scenes: writing them in varied words, reading them back, listing prompts.

Does not draw and does not judge. The words used here are the whole vocabulary that the
tiny model knows (see ``tokenizer.py``); any other word is read as unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    check_objects,
    check_split,
    sample_scene,
)

# Other words for the same attribute; the reader accepts all, the writer uses them sometimes.
SYNONYMS: dict[str, str] = {
    "grey": "gray",
    "violet": "purple",
    "big": "large",
    "huge": "large",
    "tiny": "small",
    "little": "small",
    "middle": "center",
    "centre": "center",
    "upper": "top",
    "lower": "bottom",
    "rhombus": "diamond",
    "plus": "cross",
    "disc": "circle",
}
_FILLERS = "a an the and with on in at of to side corner background , . picture image"
_PLACE_WORDS = ("center", "left", "right", "top", "bottom")
VOCABULARY: tuple[str, ...] = tuple(
    sorted({*SHAPES, *COLORS, *SIZES, *BACKGROUNDS, *_PLACE_WORDS, *SYNONYMS, *_FILLERS.split()})
)


@dataclass(frozen=True)
class ParsedObject:
    """A prompt says this of one object; ``None`` where it says nothing."""

    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt says this: its objects in order, and the background or ``None``."""

    objects: tuple[ParsedObject, ...]
    background: str | None = None


def words(text: str) -> list[str]:
    """``text`` has these lower-case words and punctuation marks, hyphens taken as spaces."""
    return re.findall(r"[a-z0-9]+|[,.]", text.lower().replace("-", " "))


def parse(prompt: str) -> ParsedPrompt:
    """This reads the attributes out of a prompt.

    Adjectives belong to the next shape, places to the last one; a colour followed by
    ``background`` is the background.

    Raises
    ------
    ValueError
        If the prompt names no shape.
    """
    tokens = [SYNONYMS.get(token, token) for token in words(prompt)]
    background = None
    objects: list[dict[str, str]] = []
    pending: dict[str, str] = {}
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else ""
        if token in BACKGROUNDS and following == "background":
            background = token
        elif token in SHAPES:
            objects.append({"shape": token, **pending})
            pending = {}
        elif token in COLORS:
            pending["color"] = token
        elif token in SIZES:
            pending["size"] = token
        elif token in _PLACE_WORDS and objects:
            earlier = objects[-1].get("place")
            objects[-1]["place"] = join_place(earlier, token)
    if not objects:
        raise ValueError(f"prompt must name a shape out of {SHAPES}, got {prompt!r}")
    return ParsedPrompt(tuple(ParsedObject(**item) for item in objects), background)


def join_place(earlier: str | None, word: str) -> str:
    """This adds a place word to those read before: ``top`` and ``left`` make ``top left``."""
    if earlier in ("top", "bottom") and word in ("left", "right"):
        return f"{earlier} {word}"
    if earlier in ("left", "right") and word in ("top", "bottom"):
        return f"{word} {earlier}"
    return word if earlier is None else earlier


def _place_phrase(place: str, rng: np.random.Generator, corner: bool) -> str:
    if place == "center":
        choices = ("in the center", "in the middle", "at the center")
    elif " " in place:
        choices = (f"in the {place}", f"at the {place}")
        if corner:
            choices = (*choices, f"in the {place} corner")
    elif place in ("left", "right"):
        choices = (f"at the {place}", f"on the {place}")
        if corner:
            choices = (*choices, f"on the {place} side")
    else:
        choices = (f"at the {place}",)
    return choices[int(rng.integers(len(choices)))]


def _vary(text: str, rng: np.random.Generator, chance: float) -> str:
    """This replaces single words by synonyms, each with probability ``chance``."""
    varied = []
    for word in text.split():
        others = [other for other, plain in SYNONYMS.items() if plain == word]
        if others and rng.random() < chance:
            word = others[int(rng.integers(len(others)))]
        varied.append(word)
    return " ".join(varied)


def _object_phrase(
    item: SceneObject, rng: np.random.Generator, article: bool, drop: float, corner: bool
) -> str:
    parts = ["a"] if article else []
    if rng.random() >= drop:
        parts.append(item.size)
    # Colour and shape are what a short prompt still names; they are left out rarely.
    if rng.random() >= drop / 5.0:
        parts.append(item.color)
    parts.append(item.shape)
    if rng.random() >= drop:
        parts.append(_place_phrase(item.place, rng, corner))
    return " ".join("an" if p == "a" and q == "orange" else p for p, q in _pairs(parts))


def _pairs(parts: list[str]) -> list[tuple[str, str]]:
    return list(zip(parts, [*parts[1:], ""], strict=True))


def write(
    scene: Scene,
    rng: np.random.Generator | None = None,
    drop: float = 0.0,
    synonyms: float = 0.0,
) -> str:
    """This writes a caption of a scene.

    Parameters
    ----------
    scene : Scene
        What to describe.
    rng : numpy.random.Generator, optional
        Varies phrasing and the order of objects; without it the wording is fixed.
    drop : float
        Probability of leaving out each size, place and background.
    synonyms : float
        Probability of replacing a word by a synonym of it.

    Returns
    -------
    str
        At most 22 words and punctuation marks.
    """
    fixed = rng is None
    rng = np.random.default_rng(0) if rng is None else rng
    items = list(scene.objects)
    if not fixed and rng.random() < 0.5:
        items.reverse()
    article = fixed or rng.random() < 0.8
    corner = not fixed and len(items) == 1
    joined = " and ".join(_object_phrase(o, rng, article, drop, corner) for o in items)
    ground = f"{'a ' if article else ''}{scene.background} background"
    if rng.random() >= drop:
        if not fixed and rng.random() < 0.15:
            joined = f"on {ground} , {joined}"
        else:
            joined = f"{joined} on {ground}"
    return _vary(joined, rng, synonyms).replace(" ,", ",")


def prompts(n: int, split: str = "test", objects: int = 1, seed: int = 0) -> list[str]:
    """This lists prompts of a split that name every attribute, in varied phrasing.

    Parameters
    ----------
    n : int
        How many; scenes are distinct as long as the split has that many.
    split : str
        ``"train"`` or ``"test"``. No test scene's attributes occur in training.
    objects : int
        1 or 2 objects per prompt.
    seed : int
        Same arguments, same prompts.

    Raises
    ------
    ValueError
        If ``n`` is negative, or ``split`` or ``objects`` is not accepted.
    """
    check_split(split)
    check_objects(objects)
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    rng = np.random.default_rng((seed, objects, 3))
    listed: list[str] = []
    seen: set[str] = set()
    attempts = 0
    while len(listed) < n:
        scene = sample_scene(rng, objects, split)
        attempts += 1
        if scene.key in seen and attempts < 50 * n:
            continue
        seen.add(scene.key)
        listed.append(write(scene, rng))
    return listed
