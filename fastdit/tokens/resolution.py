"""The token layouts of one run: which stage it is in, and what happens between two stages.

A :class:`ResolutionRun` lives as long as a run. At the end of a stage it takes the latents that the scheduler made,
splits tokens, gives them the noise of an earlier time, and draws the new state into the same latents.

Each image has a random generator of its own, seeded from its initial latents, and on the CPU, whose numbers no device
changes. So the seed that a user gives decides all noise, and an image comes out the same alone, in a batch, and on
another device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import ArgumentError, ScheduleError
from fastdit.methods.base import MethodRun, Step
from fastdit.tokens import edges, lift, multistep
from fastdit.tokens.clip import rows_of_clip
from fastdit.tokens.layout import SIDE, Layout, picture_cells
from fastdit.tokens.stages import Stage


@dataclass(frozen=True)
class StageRecord:
    """A stage that has ended.

    Attributes:
        stage: Its plan.
        layout: Its tokens.
        estimate: [B, C, H, W], what the clean latents looked like at its end: at half size after a coarse stage.
    """

    stage: Stage
    layout: Layout
    estimate: Tensor


class ResolutionRun(MethodRun):
    """The layouts of one run.

    Attributes:
        index: The stage.
        stages: All of them.
        now: The layout of the stage's tokens; None before the run's first call.
        frames: How many frames lie below each other in its layouts; all are kept in all stages.
        records: The stages that have ended.
        generators: One for each image of the batch, for the noise between stages.
        velocities: Of the coarse stage's last two steps, as tokens, where the selector looks at them.
        memory: Free space of the adapter that lives as long as the stage: tables of positions.
    """

    def __init__(self, method: Any, run: Any) -> None:
        super().__init__(method, run)
        self.index = 0
        self.stages = method.stages()
        self.now: Layout | None = None
        self.frames = 1
        self.records: list[StageRecord] = []
        self.memory: dict[Any, Any] = {}
        self.adapter, self.ops = run.patched.adapter, run.patched.ops
        self.generators: list[torch.Generator] = []
        self.velocities: list[Tensor] = []
        self._text, self._side = 0, SIDE

    # ---- hooks

    def layout(self, call: Any) -> Layout:
        """The layout of this call's tokens, made at the first."""
        name, run = self.method.name, self.run
        if torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} has no gradient: run under torch.no_grad(), or inside `with handle.disabled()`"
            )
        if run.first:
            raise ScheduleError(
                f"{name} starts from noise, but this run begins at step {run.first} of {run.steps}"
            )
        if self.now is None:
            arguments = call.arguments
            grid = self.adapter.full_grid(arguments, run.patch)
            frames = self.adapter.frames(run.latents, run.positions, run.patch)
            sides = grid[0] // frames, grid[1]
            if any(side % 2 for side in sides):
                side = run.patch if isinstance(run.patch, int) else run.patch[-1]
                scale = side * _vae_scale(run.pipeline())
                raise ArgumentError(
                    f"height and width must be multiples of {2 * scale} for {name}, "
                    f"got {sides[0] * scale} x {sides[1] * scale}"
                )
            self.begin(grid, arguments.text, arguments.hidden_states.device, frames)
        return self.now

    def begin_step(self, scheduler: Any, sample: Tensor) -> None:
        """The initial latents seed the noise; a stage's last step leads to where it ends."""
        run = self.run
        if run.step == run.first:
            self.seed(sample)
        end_sigma = self.end_sigma(run.step)
        if end_sigma is not None:
            scheduler.sigmas[run.step + 1] = end_sigma

    def end_step(self, step: Step) -> None:
        """What the scheduler made becomes, at the end of a stage, the state that the next one begins with."""
        run = self.run
        if run.step == run.first:
            self.project(step.latents)
            multistep.replace(step.scheduler, self._projected)
        if self.method.selector == "change" and self.now.name == "coarse":
            velocity = self.now.read(self._field(step.velocity), self.ops)
            self.velocities = [*self.velocities[-1:], velocity]
        if self.end_sigma(run.step) is not None:
            self.finish(step.velocity, step.latents)
            multistep.forget(step.scheduler)
            ended = len(self.records) == len(self.stages)
            step.scheduler.sigmas[run.step + 1] = 0.0 if ended else self.stage.sigmas[0]

    def end(self) -> None:
        """Only the records stay."""
        self.memory.clear()
        self.generators.clear()
        self.velocities.clear()

    # ---- stages

    @property
    def stage(self) -> Stage:
        """The stage in progress."""
        return self.stages[self.index]

    def begin(
        self, grid: tuple[int, int], text: int, device: torch.device, frames: int = 1
    ) -> None:
        """Lay out the first stage over a grid of cells, of so many frames, beside so many text tokens."""
        self._text, self.frames = text, frames
        if self.method.steps[1]:  # refuse now what it refuses
            self.method.split_count(grid[0] * grid[1] // 4, text, frames)
        level = 0 if self.stage.layout == "full" else 1
        self.now = Layout.uniform(grid, level, device, frames)

    def seed(self, latents: Tensor) -> None:
        """Make a generator for each of the initial latents [B, ...]."""
        self.generators = []
        for image in latents:
            content = image.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
            digest = hashlib.blake2b(content, digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            self.generators.append(generator)

    def project(self, latents: Tensor) -> None:
        """Draw in `latents` what their tokens are: initial ones had details that no token has."""
        if self.now.name != "full":
            state = self._field(latents)
            self.now.write(self.now.read(state, self.ops), state, self.ops)

    def _projected(self, latents: Tensor) -> Tensor:
        latents = latents.clone()
        self.project(latents)
        return latents

    def end_sigma(self, step: int) -> float | None:
        """The sigma at which a step ends its stage, None for other steps."""
        last = self.stage.first + self.stage.steps - 1
        return self.stage.sigmas[-1] if step == last else None

    def finish(self, velocity: Tensor, latents: Tensor) -> None:
        """End the stage: `latents`, where the scheduler says `velocity` led, become those of the next stage, if any."""
        state = self._field(latents)
        self._side = state.shape[3]
        x = self.now.read(state, self.ops)
        v = self.now.read(self._field(velocity), self.ops)
        exact = torch.promote_types(x.dtype, torch.float32)
        clean = x.to(exact) - self.stage.sigmas[-1] * v.to(exact)
        self.records.append(StageRecord(self.stage, self.now, self._picture(clean)))
        if self.index + 1 < len(self.stages):
            self.index += 1
            self.memory.clear()
            x = self._transition(x) if self.method.lift == "pixels" else self._lifted(x)
            self.now.write(x, state, self.ops)

    @torch.no_grad()
    def pictures(self) -> np.ndarray:
        """The estimates of all stages that have ended, decoded: uint8 [stages, B, H, W, 3]."""
        found = []
        for record in self.records:
            estimate = record.estimate
            decoded = torch.cat([self._decoded(one) for one in estimate.split(1)])
            side = 2 if record.layout.name == "coarse" else 1
            decoded = decoded.repeat_interleave(side, -1).repeat_interleave(side, -2)
            levels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            found.append(levels.permute(0, 2, 3, 1).cpu().numpy())
        return np.stack(found)

    def _transition(self, x: Tensor) -> Tensor:
        """The state of the stage that begins, and its layout, from that of the one before."""
        stage, before, noise = self.stage, self.now, self.method.noise
        batch = x.shape[0]
        full, parity = stage.layout == "full", self.method.mode == "parity"
        if full:
            rows = torch.arange(before.coarse, device=before.table.device).expand(batch, -1)
        else:
            rows = self._chosen()
        x, table = self.ops.resolution_transition(
            x,
            before.table_of(batch),
            rows,
            self._noise(before.tokens + 3 * rows.shape[1], x),
            scale=stage.scale,
            deviation=stage.deviation,
            correlation=noise,
            unsplit=1.0 if parity else math.sqrt(1 - noise),
            # Copies of a token of one pixel are that pixel four times.
            pixelwise=not parity and self._side > 1,
            raster=before.grid[1] if full else None,
        )
        coarse = before.coarse - rows.shape[1]
        if full:
            self.now = Layout.uniform(before.grid, 0, x.device, self.frames)
        else:
            keys = 4 if self.method.weighs_keys else 1
            self.now = Layout(before.grid, table, coarse, not parity, keys, self.frames)
        return x

    def _lifted(self, x: Tensor) -> Tensor:
        """The state of the full stage, and its layout, from that of the coarse one, by way of the picture they make."""
        stage, clean = self.stage, self.records[-1].estimate
        fine = Layout.uniform(self.now.grid, 0, x.device, self.frames)
        small = self._picture(x.to(clean.dtype))
        noise = self._picture(self._noise(fine.tokens, x), fine)
        # One image after the other, so that each comes out in a batch as it would alone.
        found = []
        for image, own, estimate in zip(small, noise, clean.split(1), strict=True):
            state = lift.enlarged(
                self._frames_of(image),
                self._frames_of(own),
                scale=stage.scale,
                deviation=stage.deviation,
                correlation=self.method.noise,
            ).flatten(1, 2)
            if self.method.lift == "picture":
                plain = lift.enlarged(self._frames_of(estimate[0])).flatten(1, 2)
                state = state + (1 - stage.sigmas[0]) * (self._redrawn(estimate)[0] - plain)
            found.append(state)
        self.now = fine
        return fine.read(self._cells(torch.stack(found)), self.ops).to(x.dtype)

    def _redrawn(self, clean: Tensor) -> Tensor:
        """Clean latents of one image at twice the size, as the VAE encodes their picture when it is enlarged."""
        clip = self.adapter.as_clip(clean, self.frames)
        return self.adapter.redrawn(clip, self._vae).to(clean)

    def _frames_of(self, picture: Tensor) -> Tensor:
        """A picture [C, H, W] as its frames [C, F, h, w]."""
        return picture.unflatten(1, (self.frames, -1))

    def _noise(self, count: int, x: Tensor) -> Tensor:
        """Standard normal tokens [B, count, 4 C], fp32, of each image's own generator."""
        eps = [torch.randn(count, x.shape[2], generator=own) for own in self.generators]
        return torch.stack(eps).to(x.device)

    def _decoded(self, latents: Tensor) -> Tensor:
        """The picture of latents; offloading hooks move the VAE in."""
        clip = self.adapter.as_clip(latents, self.frames)
        return self.adapter.decode(clip, self._vae).to(latents.device)

    @property
    def _vae(self) -> Any:
        return (self.run.pipeline() or self.run.patched.pipeline()).vae

    def _chosen(self) -> Tensor:
        """The rows to split; as many of each frame, the most detailed there."""
        method, frames, tokens = self.method, self.frames, self.now.tokens
        height, width = (side // 2 for side in self.now.grid)
        clean, clipped = self.records[-1].estimate, self.method.mode == "parity"
        if method.selector == "change":
            energy = edges.change_energy(*self.velocities).view(-1, tokens // frames)
        else:
            cells = height // frames, width
            energy = edges.energy(method.selector, clean, cells, self._decoded, clipped, frames)
        count = method.split_count(tokens, self._text, frames) // frames
        return rows_of_clip(edges.top_rows(energy, count), frames, tokens)

    def _picture(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Tokens [B, n, 4 C] as latents [B, C, H, W], at half size if all of them are coarse."""
        layout = layout or self.now
        if layout.name == "coarse":
            layout = Layout.uniform(tuple(side // 2 for side in layout.grid), 0, tokens.device)
        height, width = (self._side * side for side in layout.grid)
        picture = tokens.new_empty(tokens.shape[0], tokens.shape[2] // self._side**2, height, width)
        layout.write(tokens, self._cells(picture), self.ops)
        return picture

    def _cells(self, picture: Tensor) -> Tensor:
        """Latents [B, C, H, W] as a field, a view."""
        return picture_cells(picture, self._side)

    def _field(self, latents: Tensor) -> Tensor:
        return self.adapter.field(latents, self.now.grid)


def _vae_scale(pipeline: Any) -> int:
    """How many of a picture's pixels are one of the latents."""
    names = "vae_scale_factor vae_scale_factor_spatial vae_spatial_compression_ratio"
    return next(filter(None, (getattr(pipeline, name, None) for name in names.split())), 8)
