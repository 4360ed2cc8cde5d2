"""The models of the testbed: what each is asked for, and who judges what it draws.

Captions are full, or open: those name objects and leave most to the model, so that trajectories curve as those of
large models do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from fastdit import emoji, tiny
from fastdit.emoji.score import read
from fastdit.tiny import scenes
from fastdit.tiny.score import find_objects


class Subject(ABC):
    """A model in the package.

    Attributes:
        size: Pixels of a picture, where a study is not run at its own.
        pictures: How many, likewise.
    """

    size: int | None = None
    pictures: int | None = None

    @abstractmethod
    def load(self) -> Any:
        """This loads the pipeline."""

    @abstractmethod
    def prompts(self, captions: str, count: int) -> list[str]:
        """These are held-out prompts; more of them begin with the same."""

    @abstractmethod
    def judge(self, picture: np.ndarray, text: str) -> tuple[bool, float]:
        """Whether a picture is clean, and the share of the prompt's objects that are there."""


class Shapes(Subject):
    """The first model; an open caption says a shape and perhaps a colour."""

    def load(self) -> Any:
        return tiny.load_pipeline()

    def prompts(self, captions: str, count: int) -> list[str]:
        """Half of the full ones are of two objects; open ones have four forms by turns."""
        if captions == "full":
            one, two = (tiny.prompts(count, "test", objects, seed=7) for objects in (1, 2))
            return [(one, two)[i % 2][i // 2] for i in range(count)]
        rng = np.random.default_rng(5)
        return [_open_captions(rng)[index % 4] for index in range(count)]

    def training(self, count: int) -> list[str]:
        """These are so many prompts for searches and trainings, in turn a full one and two open ones.

        None is among the first 96 that are held out. Those have every shape alone, so here open ones have the other
        forms.

        Raises:
            ValueError: There are no so many, or they cannot be shared out.
        """
        if count % 6 or not 0 < count <= 24:
            raise ValueError(f"count must be 6, 12, 18 or 24, got {count!r}")
        full = [t for objects in (1, 2) for t in tiny.prompts(count // 6, "train", objects, seed=1)]
        held, rng = set(self.prompts("open", 96)), np.random.default_rng(11)
        found: list[str] = []
        while len(found) < 2 * count // 3:
            text = _open_captions(rng)[(1, 3, 2, 3)[len(found) % 4]]
            if text not in held and text not in found:
                found.append(text)
        return [text for i, one in enumerate(full) for text in (one, *found[2 * i : 2 * i + 2])]

    def judge(self, picture: np.ndarray, text: str) -> tuple[bool, float]:
        found = find_objects(picture)[0]
        verdicts = tiny.score(picture[None], text).objects
        clean = bool(found) and all(one.shape for one in found)
        return clean, float(np.mean([one.right for one in verdicts]))


def _open_captions(rng: np.random.Generator) -> tuple[str, ...]:
    """One of each form: a shape, with its colour, two shapes, with theirs."""
    (a, b), (c, d) = (rng.choice(list(names), 2) for names in (scenes.SHAPES, scenes.COLORS))
    return f"a {a}", f"a {c} {a}", f"a {a} and a {b}", f"a {c} {a} and a {d} {b}"


class Emoji(Subject):
    """The second model; an open caption names emoji alone."""

    size, pictures = 128, 32

    def load(self) -> Any:
        return emoji.load_pipeline()

    def prompts(self, captions: str, count: int) -> list[str]:
        """One emoji and two by turns; pairs are held out, a single name that is said alone cannot be."""
        terse = captions == "open"
        one, two = (emoji.prompts(count, "test", n, seed=7, terse=terse) for n in (1, 2))
        return [(one, two)[i % 2][i // 2] for i in range(count)]

    def judge(self, picture: np.ndarray, text: str) -> tuple[bool, float]:
        return read(picture).clean, emoji.score(picture[None], text).mean


SUBJECTS = {"tiny": Shapes(), "emoji": Emoji()}
