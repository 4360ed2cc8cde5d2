"""Sections of a GPU check that do what real ones must not; `test_gpu_check.py` runs them."""

from __future__ import annotations

import os
import sys
import time

from gpu_sections.order import BAD_FORK


def quick(place):
    place.promise(["a", "b"])
    place.add("a", us={"eager": 1.0})
    place.lack("b", "it is not installed")


def slow(place):
    """Something is measured, and then nothing comes back."""
    place.promise(["first", "second"])
    place.add("first", us={"eager": 1.0})
    time.sleep(600)


def raising(place):
    place.promise(["first", "second"])
    place.add("first", us={"eager": 1.0})
    raise ValueError("no such kernel")


def dying(place):
    place.promise(["first", "second"])
    place.add("first", us={"eager": 1.0})
    os._exit(9)


def forgetful(place):
    place.promise(["first", "second"])
    place.add("first", us={"eager": 1.0})


def broken_row(place):
    def row():
        raise ValueError("no such size")

    place.promise(["first", "second"])
    place.attempt("first", row)
    place.attempt("second", lambda: {"us": {"eager": 1.0}})


def unforkable(place):
    """As where what was imported before the fork has touched the GPU."""
    if "gpu_sections.preload" in sys.modules:
        os._exit(BAD_FORK)
    place.promise(["a"])
    place.add("a", us={"eager": 1.0})
