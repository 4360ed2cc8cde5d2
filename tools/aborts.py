"""Requests that are broken off at lines of fastdit and of the pipeline: what is drawn next is right, nothing stays.

    PYTHONPATH=tests python tools/aborts.py [--aborts 300]

The lines are drawn over all that one request runs there. After each, a sibling draws the bits that a process of its own
would, and no run, cache or object is left. What runs while an object is collected is left out: Python drops exceptions
there.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import random
import sys
from pathlib import Path

import diffusers
import torch

import fastdit
import tiny_models
from fastdit.runtime.install import LINK

EVERY_2 = fastdit.Cached(fastdit.Schedule.every(2))
SPARSE = fastdit.RAS(start=1, resets=(), align=1)
STAGED = fastdit.RALU((2, 2, 3), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.05, 0.3, "gradient")
CASES = [
    ("sd3", (EVERY_2,)),
    ("flux-dev", (SPARSE, EVERY_2)),
    ("sd3", (STAGED,)),
    ("pixart-sigma", (SPARSE,)),
    ("lumina", (EVERY_2,)),
]
FASTDIT = str(Path(fastdit.__file__).parent)
PIPELINES = str(Path(diffusers.__file__).parent / "pipelines")


class Gone(BaseException):
    """Raised at a line."""


class Breaker:
    """Raises before line number `at`; counts them where that is None."""

    def __init__(self, at=None):
        self.at = at
        self.seen = 0
        self.where = None

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if not name.startswith((FASTDIT, PIPELINES)):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                sys.settrace(None)
                self.where = f"{Path(name).name}:{frame.f_lineno}"
                raise Gone
        return self


def own(pipe):
    made = copy.copy(pipe)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return made


def draw(pipe, name, seed, breaker=None):
    try:
        sys.settrace(breaker)
        return tiny_models.generate(pipe, name, seed=seed, steps=7, output_type="np")
    finally:
        sys.settrace(None)


def tensors():
    """Bytes of all tensors."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def latents(pipe, name, seed):
    return tiny_models.generate(pipe, name, seed=seed, steps=7)


def trial(name, methods, aborts, generator):
    pipe, fresh = tiny_models.pipeline(name), tiny_models.pipeline(name)
    for one in (pipe, fresh):
        fastdit.patch(one, *methods, backend="reference")
    state = pipe.transformer.__dict__[LINK]
    expected = latents(own(fresh), name, 1)
    found = collections.Counter()
    known = own(pipe)
    latents(known, name, 0)
    for kind, target in (("known", lambda: known), ("stranger", lambda: own(pipe))):
        counter = Breaker()
        draw(target(), name, 0, counter)
        latents(own(pipe), name, 1)
        before = tensors()
        for _ in range(aborts // 2):
            breaker = Breaker(generator.randrange(1, counter.seen))
            try:
                draw(target(), name, 0, breaker)
                found["went on"] += 1
            except Gone:
                found["broken off"] += 1
            held = state.runs.cache_bytes(), len(state.runs.live())
            if held != (0, 0):
                found["held"] += 1
                print(f"  {kind}, at {breaker.where}: {held[0]} bytes in {held[1]} live runs")
            try:
                right = torch.equal(latents(own(pipe), name, 1), expected)
            except Exception as error:
                right = False
                print(f"  {kind}, at {breaker.where}: {type(error).__name__}: {error}")
            if not right:
                found["wrong"] += 1
                print(f"  {kind}, at {breaker.where}: the sibling's picture is wrong")
        found["bytes left"] += tensors() - before
    print(name, [method.name for method in methods], dict(found), flush=True)
    return found["wrong"] + found["held"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aborts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(given.seed)
    return sum(trial(*case, given.aborts // len(CASES), generator) for case in CASES)


if __name__ == "__main__":
    sys.exit(main() != 0)
