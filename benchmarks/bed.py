"""A model in the package under one condition of the testbed: it draws, keeps what it drew, and times.

Every arm draws the same held-out prompts from the same noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdit
from fastdit.evaluate.arms import Arm
from subjects import SUBJECTS, Subject

BATCH = 16
ROUNDS = 3  # of timing
TIMED = 2  # pictures of a batch that is timed
SEED = 70_000  # of the first picture's noise


class Bed:
    """One condition, and what was drawn under it.

    Args:
        pipe: With its own scheduler as `stock_scheduler`.
        folder: Where latents are kept; what was interrupted goes on there.
        subject: Whose pipeline it is.
    """

    def __init__(
        self,
        pipe: Any,
        captions: str,
        guidance: float,
        size: int,
        folder: Path,
        subject: Subject = SUBJECTS["tiny"],
    ) -> None:
        self.subject = subject
        self.pipe, self.captions, self.guidance, self.size = pipe, captions, guidance, size
        self.folder = folder / f"{captions}-{guidance:g}-{size}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def prompts(self, count: int) -> list[str]:
        """The first prompts are these."""
        return self.subject.prompts(self.captions, count)

    def latents(self, name: str, arm: Arm, count: int) -> np.ndarray:
        """These are the latents [count, C, H, W] that an arm ends with; batches are kept as they come."""
        path = self.folder / (name.replace(" ", "_").replace(",", "").replace("/", "-") + ".npy")
        done = np.load(path) if path.exists() else None
        while done is None or len(done) < count:
            first = 0 if done is None else len(done)
            texts = self.prompts(first + BATCH)[first:]
            more = self._draw(arm, texts, first)
            done = more if done is None else np.concatenate([done, more])
            part = path.with_suffix(".part.npy")
            np.save(part, done)
            part.replace(path)
        return done[:count]

    def _draw(self, arm: Arm, texts: list[str], first: int) -> np.ndarray:
        with self._ready(arm) as arguments:
            if not arm.alone:
                return self._called(arm, arguments, texts, first)
            drawn = [self._called(arm, arguments, [t], first + i) for i, t in enumerate(texts)]
            return np.concatenate(drawn)

    @contextmanager
    def _ready(self, arm: Arm) -> Iterator[dict[str, Any]]:
        """Inside, the pipeline draws by an arm when it is called with these arguments."""
        arguments = arm.prepare(self.pipe)
        handle = None if arm.method is None else self._patched(arm)
        try:
            yield arguments
        finally:
            if handle is not None:
                handle.unpatch()

    def _called(
        self, arm: Arm, arguments: Mapping[str, Any], texts: list[str], first: int
    ) -> np.ndarray:
        side = self.size // self.pipe.vae_scale_factor
        channels = self.pipe.transformer.config.in_channels
        noise = [
            torch.randn(
                channels, side, side, generator=torch.Generator().manual_seed(SEED + arm.seed + i)
            )
            for i in range(first, first + len(texts))
        ]
        with arm.around():
            found = self.pipe(
                texts,
                latents=torch.stack(noise),
                height=self.size,
                width=self.size,
                guidance_scale=self.guidance,
                output_type="latent",
                **arguments,
            )
        return found.images.numpy()

    def _patched(self, arm: Arm) -> fastdit.Handle:
        methods = arm.method(self.pipe, arm.steps)
        return fastdit.patch(self.pipe, *(methods if isinstance(methods, list) else [methods]))

    @torch.no_grad()
    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """These are decoded latents, float32 [n, h, w, 3] in [0, 1]."""
        config, vae = self.pipe.vae.config, self.pipe.vae
        found = []
        for some in torch.from_numpy(latents).split(BATCH):
            scaled = some / config.scaling_factor + (config.shift_factor or 0)
            found.append((vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
        return torch.cat(found).numpy()

    def arithmetic(self, arm: Arm) -> float:
        """This is the arithmetic of an arm, in evaluations of the model."""
        if arm.method is None:
            return float(arm.steps)
        arm.prepare(self.pipe)
        handle = self._patched(arm)
        said = handle.explain(self.size, self.size, BATCH, arm.steps)
        handle.unpatch()
        return arm.steps * said.macs / said.dense_macs

    def levels(self, arm: Arm) -> list[float]:
        """These are the noise levels an arm's scheduler goes through."""
        arguments = arm.prepare(self.pipe)
        scheduler = self.pipe.scheduler
        if "sigmas" in arguments:
            scheduler.set_timesteps(sigmas=arguments["sigmas"])
        else:
            scheduler.set_timesteps(arm.steps)
        return [float(sigma) for sigma in scheduler.sigmas]

    def seconds(self, arms: Mapping[str, Arm]) -> dict[str, float]:
        """These are seconds of a picture for each arm: medians of rounds in which the arms take turns.

        Of a pipeline that has drawn so before: what is done once, at the first picture after `patch`, is left out. With
        a single thread the processor's time is taken, which is wall time where nothing else runs.
        """
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        texts = self.prompts(TIMED)
        found: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                some = texts[:1] if arm.alone else texts
                with self._ready(arm) as arguments:
                    self._called(arm, arguments, some, 0)
                    start = clock()
                    self._called(arm, arguments, some, 0)
                    found[name].append((clock() - start) / len(some))
        return {name: statistics.median(times) for name, times in found.items()}
