"""How much of RAS's error is that of the keys and values that its waiting tokens keep, on the model in the package.

    python benchmarks/ras_keys.py [--folder build/testbed]

Beside RAS runs the same rule with fresh keys and values: every token passes at every step, and of the velocities those
of the active tokens are taken alone. That spares nothing; what it gains over RAS is all that any refresh could.
Resets are the published ones. Errors are distances to Heun's solution, as in `testbed.py`; what is drawn is kept in
the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import fastdit
from arms import fixed
from bed import Bed
from fastdit import tiny
from fastdit.evaluate.arms import TRUTH, Arm
from fastdit.evaluate.paired import ratio
from fastdit.methods.ras import PUBLISHED_RESETS
from fastdit.tokens.active import TokenRun
from machine import describe_machine
from testbed import away

PICTURES, SIZE, STEPS = 16, 128, 28
RATIOS = (0.5, 0.25)
RESULT = Path(__file__).parent / "results" / "ras-keys.json"


@contextlib.contextmanager
def fresh_keys() -> Iterator[None]:
    """All tokens pass, and those that were not chosen keep their velocities all the same."""
    choose, finish = TokenRun.rows, TokenRun.output

    def rows(self: Any, call: Any) -> None:
        call.chosen = choose(self, call)

    def output(self: Any, call: Any, sample: torch.Tensor) -> torch.Tensor:
        if call.chosen is None:
            return finish(self, call, sample)
        adapter, patch = self.run.patched.adapter, self.run.patch
        fresh, kept = (adapter.patches(x, patch) for x in (sample, call.branch.velocity))
        merged = kept.flatten(1, 2).clone()
        some = torch.arange(len(merged))[:, None], call.chosen
        merged[some] = fresh.flatten(1, 2)[some]
        adapter.patches(sample, patch).copy_(merged.view(fresh.shape))
        call.branch.velocity = sample.clone()
        return sample

    with mock.patch.object(TokenRun, "rows", rows), mock.patch.object(TokenRun, "output", output):
        yield


def main() -> None:
    """Draw what is missing and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/testbed"))
    folder = parser.parse_args().folder
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.stock_scheduler = pipe.scheduler
    bed = Bed(pipe, "full", 2.5, SIZE, folder)
    truth = bed.latents("truth of 60 steps", TRUTH, PICTURES)
    errors = {}
    for share in RATIOS:
        method = fastdit.RAS(ratio=share, align=1, resets=PUBLISHED_RESETS[STEPS])
        for name, arm in {
            f"RAS {share}": fixed(method, STEPS),
            f"RAS {share}, fresh keys": fixed(method, STEPS, around=fresh_keys),
        }.items():
            errors[name] = away(bed.latents(f"{name}, any count", arm, PICTURES), truth)
    plain = Arm("stock", STEPS)
    errors["plain"] = away(bed.latents("stock 28", plain, PICTURES), truth)
    result = {
        "pictures": PICTURES,
        "size": SIZE,
        "steps": STEPS,
        "machine": describe_machine(),
        "median": {name: float(np.median(found)) for name, found in errors.items()},
        "fresh over kept": {
            str(share): ratio(errors[f"RAS {share}, fresh keys"], errors[f"RAS {share}"])
            for share in RATIOS
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
