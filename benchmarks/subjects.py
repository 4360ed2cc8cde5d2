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
        found = []
        for index in range(count):
            (a, b), (c, d) = (
                rng.choice(list(names), 2) for names in (scenes.SHAPES, scenes.COLORS)
            )
            forms = f"a {a}", f"a {c} {a}", f"a {a} and a {b}", f"a {c} {a} and a {d} {b}"
            found.append(forms[index % 4])
        return found

    def judge(self, picture: np.ndarray, text: str) -> tuple[bool, float]:
        found = find_objects(picture)[0]
        verdicts = tiny.score(picture[None], text).objects
        clean = bool(found) and all(one.shape for one in found)
        return clean, float(np.mean([one.right for one in verdicts]))


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
