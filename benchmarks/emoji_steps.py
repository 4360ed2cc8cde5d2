"""How many pictures of the emoji model stay clean with fewer steps of Euler.

    python benchmarks/emoji_steps.py [--pictures 96] [--out FILE]

The testbed's held-out prompts (`subjects.py`), complete captions and emoji alone, at the model's own guidance and at
twice that; intervals are 95 % bootstrap intervals over the prompts, of shares and of their paired differences.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from fastdit.evaluate.paired import share
from fastdit.tiny.evaluate import sample
from machine import describe_machine
from subjects import SUBJECTS

RESULT = Path(__file__).parent / "results/emoji-steps.json"
GUIDANCES = (2.5, 5.0)
STEPS = (28, 7, 4)


def main() -> None:
    """Draw, judge and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=96, help="of each row and number of steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = SUBJECTS["emoji"]
    pipe = subject.load()
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for captions, guidance in itertools.product(("full", "open"), GUIDANCES):
        texts = subject.prompts(captions, options.pictures)
        judged = {}
        for steps in STEPS:
            drawn = sample(
                pipe, texts, 1000, 16, num_inference_steps=steps, guidance_scale=guidance
            )
            judged[steps] = np.array(
                [subject.judge(*each) for each in zip(drawn, texts, strict=True)]
            )
        clean = {steps: found[:, 0] for steps, found in judged.items()}
        falls = [share(clean[some], clean[fewer]) for some, fewer in itertools.pairwise(STEPS)]
        rows.append(
            {
                "captions": captions,
                "guidance": guidance,
                "clean": [float(clean[steps].mean()) for steps in STEPS],
                "score": [float(judged[steps][:, 1].mean()) for steps in STEPS],
                "falls": falls,
            }
        )
        print(rows[-1], flush=True)
    result = {
        "machine": describe_machine(),
        "pictures": options.pictures,
        "steps": STEPS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
