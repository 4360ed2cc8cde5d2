"""Mixed requests with cancellations over one patched transformer: right to the bit, and nothing stays.

    PYTHONPATH=tests python tools/soak.py [--requests 1000] [--workers 4]

Each request is a pipeline of its own over the shared transformer, with a size, a number of steps and a seed of its own.
One in three is broken off: by an exception, an interrupt, `_interrupt`, or inside a block. Prints, after each half, how
many objects and bytes there are and how many answers were wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

import fastdit
import tiny_models
from fastdit.runtime.install import LINK

METHODS = {
    "dense": (),
    "cached": (fastdit.Cached(fastdit.Schedule.every(2)),),
    "ras+cached": (
        fastdit.RAS(start=1, resets=(), align=1),
        fastdit.Cached(fastdit.Schedule.every(2)),
    ),
}


class Gone(BaseException):
    """A client that went away."""


def request(pipe, name, number, broken):
    """Draw; None where it was broken off."""
    own = copy.copy(pipe)
    own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    options = {"steps": 3 + number % 3, "height": 8 * (1 + number % 2), "width": 16}

    def callback(pipe, step, timestep, tensors):
        if step == 1 and broken == 1:
            raise ValueError
        if step == 1 and broken == 2:
            raise Gone
        pipe._interrupt = step == 1 and broken == 3
        return tensors

    if broken and name in ("sd3", "flux-dev", "lumina"):
        options["callback_on_step_end"] = callback
    try:
        found = tiny_models.generate(own, name, seed=number % 7, **options)
    except (ValueError, Gone):
        return None
    return None if broken else found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--name", default="sd3")
    parser.add_argument("--method", default="ras+cached", choices=METHODS)
    parser.add_argument("--pack", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = tiny_models.pipeline(given.name)
    alone = tiny_models.pipeline(given.name)
    for one in (pipe, alone):
        fastdit.patch(one, *METHODS[given.method], pack_weights=given.pack)
    state = pipe.transformer.__dict__[LINK]

    @functools.cache
    def expected(kind):
        return request(alone, given.name, kind, 0)

    def one(number):
        broken = number % 4 if number % 3 == 0 else 0
        found = request(pipe, given.name, number, broken)
        # 7 seeds, 3 numbers of steps and 2 sizes come again after 42 requests.
        return found is not None and not torch.equal(found, expected(number % 42))

    for number in range(42):
        expected(number)
    sys.setswitchinterval(1e-4)
    process, done, wrong = psutil.Process(), 0, 0
    for until in (given.requests // 10, given.requests // 2, given.requests):
        with ThreadPoolExecutor(given.workers) as pool:
            wrong += sum(pool.map(one, range(done, until)))
        done = until
        request(pipe, given.name, 0, 0)  # so that what the report tells is of one size
        gc.collect()
        print(
            f"{given.name} {given.method}{' packed' if given.pack else ''}: {done} requests, {wrong} wrong, "
            f"{len(gc.get_objects())} objects, {process.memory_info().rss / 2**20:.1f} MB "
            f"(at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f}), "
            f"{len(state.runs.live())} live runs, {state.runs.cache_bytes()} bytes of caches",
            flush=True,
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main() != 0)
