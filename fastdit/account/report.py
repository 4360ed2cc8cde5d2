"""A report tells what a run did, from its own record."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastdit.checks import whole
from fastdit.errors import ArgumentError


@dataclass(frozen=True)
class StageReport:
    """This is one stage of a run whose resolution changes.

    Attributes:
        layout: "coarse", "mixed" or "full".
        steps: Steps of it.
        tokens: Image tokens of each.
        sigmas: Of its first step and of its end.
        coarse: bool [B, gh, gw] on the CPU: which tokens of the full size a coarse one stands for.
    """

    layout: str
    steps: int
    tokens: int
    sigmas: tuple[float, float]
    coarse: np.ndarray


@dataclass(frozen=True)
class Report:
    """This is what the last run did; `print` it.

    Attributes:
        methods: Names of the methods patched in.
        steps: Steps executed.
        tokens_per_step: Image tokens of a picture through the blocks at each executed step.
        computed, reused: Components run and reused, over all steps and calls.
        seconds: Wall time from the run's start to its last step, on the host.
        peak_cache_bytes: Most bytes held by caches at once.
        live: False when a method that should have reused or left out something did neither.
        first: The scheduler's index of the first executed step; image-to-image begins late.
        flop_speedup: Multiply-accumulates of the stock model over those executed.
        programs: Transformer calls that ran as programs; others, such as the first of a kind, ran the model's forward.
        exact: Whether these are counted; of some models without an adapter they are estimates.
        active: Sparse step -> which image tokens it computed, bool [B, gh, gw] on the CPU.
        stages: Those that have ended, where a method changes the resolution.
        packed_bytes: What weights that were kept packed took beside the model's own.
        graphs: Under CUDA graphs: whether the run was "warming up", "captured" or "replayed", and how many of its calls
            were replayed; or why it was eager.
        frames: Latent frames of a video, which lie below each other in maps; 1 of a picture.
        unforeseen: Steps that had no table of shed modulations, so that all weights of these were moved in again.
    """

    methods: tuple[str, ...]
    steps: int = 0
    tokens_per_step: tuple[int, ...] = ()
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0
    peak_cache_bytes: int = 0
    live: bool = True
    active: Mapping[int, np.ndarray] = field(default_factory=dict)
    first: int = 0
    flop_speedup: float = 1.0
    stages: tuple[StageReport, ...] = ()
    packed_bytes: int = 0
    graphs: str = ""
    exact: bool = True
    programs: int = 0
    unforeseen: tuple[int, ...] = ()
    frames: int = 1

    @property
    def reuse_share(self) -> float:
        """This share of the components was reused."""
        return self.reused / max(1, self.reused + self.computed)

    def token_map(self, frames: Any = None, sample: int = 0, scale: int = 8) -> np.ndarray:
        """This draws the tokens computed at each step as pictures, a stack that video writers take as it is.

        Args:
            frames: What to lay the map over: one picture, or one for each executed step (the image as it forms), PIL or
                [H, W, 3] uint8. White by default.
            sample: Which image of the batch.
            scale: Pixels of a token's side, where no frames are given.

        Returns:
            uint8 [steps, H, W, 3]; tokens that were not computed are darkened.

        Raises:
            ArgumentError: The last run had no sparse step, there is no such sample, or the frames do not fit.
        """
        if not self.active:
            raise ArgumentError("token_map needs a run with a sparse step; the last one had none")
        batch, *grid = next(iter(self.active.values())).shape
        if not 0 <= sample < batch:
            raise ArgumentError(f"sample must be 0 to {batch - 1}, got {sample}")
        pictures = _pictures(frames, self.steps, [side * scale for side in grid])
        for step, picture in enumerate(pictures, self.first):
            if step in self.active:
                mask = self.active[step][sample]
                picture[~_at_pixels(mask, picture)] //= 3
        return pictures

    def resolution_map(self, frames: Any = None, sample: int = 0, scale: int = 8) -> np.ndarray:
        """This draws the tokens of each stage as pictures: each outlined, coarse ones twice as large.

        Args:
            frames: What to draw over: one picture, or one for each stage that ran, as for `token_map`.
            sample: Which image of the batch.
            scale: Pixels of a full-size token's side, where no frames are given.

        Returns:
            uint8 [stages, H, W, 3].

        Raises:
            ArgumentError: The last run had no stages, there is no such sample, or the frames do not fit.
        """
        if not self.stages:
            raise ArgumentError("resolution_map needs a run in stages; the last one had none")
        batch = max(stage.coarse.shape[0] for stage in self.stages)
        if not 0 <= sample < batch:
            raise ArgumentError(f"sample must be 0 to {batch - 1}, got {sample}")
        grid = self.stages[0].coarse.shape[1:]
        pictures = _pictures(frames, len(self.stages), [side * scale for side in grid])
        for picture, stage in zip(pictures, self.stages, strict=True):
            coarse = stage.coarse[sample if stage.coarse.shape[0] > 1 else 0]
            number = np.arange(coarse.size).reshape(coarse.shape)
            number = np.where(coarse, np.kron(number[::2, ::2], np.ones((2, 2), int)), number)
            token = _at_pixels(number, picture)
            edge = np.zeros(token.shape, bool)
            edge[:, 1:] |= token[:, 1:] != token[:, :-1]
            edge[1:] |= token[1:] != token[:-1]
            picture[edge] //= 3
        return pictures

    def clip(self, maps: np.ndarray, columns: int | None = None) -> np.ndarray:
        """This makes a video of a video's maps: each of its pictures is a frame, of all maps beside each other.

        Args:
            maps: What `token_map` or `resolution_map` gave, uint8 [n, H, W, 3].
            columns: How many are in a row; None for about as many as there are rows.

        Returns:
            uint8 [frames, rows (h + 2), columns (W + 2), 3], h being H / frames, with white lines between.

        Raises:
            ArgumentError: The maps are none of so many frames, or `columns` is no whole number from 1 on.

        Example:
            >>> report = handle.report()
            >>> clip = [Image.fromarray(frame) for frame in report.clip(report.token_map())]
            >>> clip[0].save("map.gif", save_all=True, append_images=clip[1:], duration=250, loop=0)
        """
        count, height, width = maps.shape[:3]
        if height % self.frames:
            raise ArgumentError(
                f"maps must have {self.frames} frames below each other, got a height of {height}"
            )
        if columns is None:
            columns = math.ceil(math.sqrt(count))
        rows, height = -(-count // whole("columns", columns)), height // self.frames
        found = np.full((self.frames, rows, height + 2, columns, width + 2, 3), 255, dtype=np.uint8)
        for number, one in enumerate(maps):
            row, column = divmod(number, columns)
            frames = one.reshape(self.frames, height, width, 3)
            found[:, row, 1:-1, column, 1:-1] = frames
        return found.reshape(self.frames, rows * (height + 2), columns * (width + 2), 3)

    def __str__(self) -> str:
        if not self.steps:
            return "fastdit: no run yet"
        state = "live" if self.live else "INERT: nothing was reused"
        packed = (
            f", packed weights {self.packed_bytes / 2**20:.1f} MiB" if self.packed_bytes else ""
        )
        graphs = f", CUDA graphs: {self.graphs}" if self.graphs else ""
        moved = (
            f"\n  shed weights moved in at {len(self.unforeseen)} steps" if self.unforeseen else ""
        )
        return (
            f"fastdit {' + '.join(self.methods)}: {state}\n"
            f"  steps {self.steps}, tokens per step {ranges(self.tokens_per_step)}\n"
            f"  components: {self.computed} computed, {self.reused} reused ({self.reuse_share:.1%}), "
            f"{1 - 1 / self.flop_speedup:.1%} of the arithmetic: {self.flop_speedup:.2f}x fewer multiply-accumulates"
            f"{'' if self.exact else ', estimated'}\n"
            f"  {self.seconds:.2f} s, caches at most {self.peak_cache_bytes / 2**20:.1f} MiB{packed}{graphs}{moved}"
        )


def _doubt(patched: Any, run: Any) -> str:
    """This says why a method may have done nothing in a run."""
    if run.selection is None:
        return "Does the schedule reuse anything at this number of steps?"
    return (
        f"At no step was one of {run.image_tokens} image tokens left out: a number of active tokens that RAS rounds "
        "to `align` may be all of a small picture's"
    )


def last_runs(parts: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any, Any]]:
    """Of each transformer that ran in the last pass (patched, transformer, run), in the order of their turns."""
    runs = [(*part, run) for part in parts if (run := part[0].runs.last()) is not None]
    newest = max((run.started for *_, run in runs), default=0.0)
    # Those of one pass begin together; one of an earlier pass has ended before.
    same = [each for each in runs if _end(each[-1]) >= newest]
    return sorted(same, key=lambda each: each[-1].first or 0)


def _end(run: Any) -> float:
    return math.inf if run.live else run.started + run.seconds


def report_runs(patched: Any, found: Sequence[tuple[Any, Any, float, bool]]) -> Report:
    """This makes the report of the last pass, and warns when no transformer left out anything.

    Args:
        patched: Any of the pipeline's.
        found: Patched model, run, and what :func:`report_run` is given besides, in the order of their turns.
    """
    if not found:
        return Report(tuple(m.name for m in patched.methods), live=not patched.acts)
    reports = [report_run(*each) for each in found]
    report = reports[0] if len(reports) == 1 else _one_report(reports)
    if report.steps and not report.live:
        warnings.warn(
            f"fastdit {' + '.join(report.methods)} reused nothing in the last run: the pictures are right, but "
            f"nothing was saved. {_doubt(*found[0][:2])}",
            stacklevel=3,
        )
    return report


def _one_report(found: Sequence[Report]) -> Report:
    """The transformers are taken to be alike, so that a step of one has the arithmetic of a step of the other."""
    steps = sum(each.steps for each in found)
    spent = sum(each.steps / each.flop_speedup for each in found)
    return replace(
        found[0],
        steps=steps,
        tokens_per_step=sum((each.tokens_per_step for each in found), ()),
        computed=sum(each.computed for each in found),
        reused=sum(each.reused for each in found),
        seconds=max(each.seconds for each in found),
        peak_cache_bytes=max(each.peak_cache_bytes for each in found),
        live=any(each.live for each in found),
        active={step: mask for each in found for step, mask in each.active.items()},
        flop_speedup=steps / spent if spent else 1.0,
        packed_bytes=max(each.packed_bytes for each in found),
        graphs="; then ".join(dict.fromkeys(filter(None, (each.graphs for each in found)))),
        exact=all(each.exact for each in found),
        programs=sum(each.programs for each in found),
    )


def report_run(patched: Any, run: Any, flop_speedup: float, exact: bool) -> Report:
    """This makes the report of a run."""
    methods = patched.under(run.budget, run.steps)
    names = tuple(method.name for method in methods)
    records = [run.records[step] for step in sorted(run.records)]
    reused = sum(record.reused for record in records)
    adapter = patched.adapter
    active, stages = _active(adapter, run), _stages(run)
    live = bool(reused or active or any(s.coarse.any() for s in stages) or not patched.acts)
    return Report(
        methods=names,
        steps=len(records),
        tokens_per_step=tuple(record.tokens for record in records),
        computed=sum(record.computed for record in records),
        reused=reused,
        seconds=run.seconds,
        peak_cache_bytes=run.peak_bytes,
        live=live,
        active=active,
        first=run.first or 0,
        flop_speedup=flop_speedup,
        stages=stages,
        packed_bytes=run.packed_bytes,
        graphs=str(run.trace or ""),
        exact=exact,
        programs=run.programs,
        unforeseen=tuple(sorted(run.unforeseen)),
        frames=adapter.frames(run.latents, run.positions, run.patch) if run.latents else 1,
    )


def _stages(run: Any) -> tuple[StageReport, ...]:
    """These are the stages that have ended; it waits for the device."""
    if run.resolution is None:
        return ()
    return tuple(
        StageReport(
            record.stage.layout,
            record.stage.steps,
            record.layout.tokens,
            (record.stage.sigmas[0], record.stage.sigmas[-1]),
            record.layout.levels().bool().cpu().numpy(),
        )
        for record in run.resolution.records
    )


def _active(adapter: Any, run: Any) -> dict[int, np.ndarray]:
    """Each sparse step has a mask of the tokens it computed; it waits for the device once."""
    selection = run.selection
    if selection is None or not selection.tokens:
        return {}
    grid = adapter.grid(run.latents, run.positions, run.patch)
    found = {}
    for step, rows in selection.history.items():
        if selection.first + step in run.records:
            mask = np.zeros((rows.shape[0], selection.tokens), dtype=bool)
            np.put_along_axis(mask, rows.cpu().numpy().astype(np.int64), True, axis=1)
            found[selection.first + step] = mask.reshape(rows.shape[0], *grid)
    return found


def _at_pixels(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Each pixel of a picture gets the value of its token."""
    down, across = (
        np.arange(size) * side // size
        for size, side in zip(picture.shape[:2], values.shape, strict=True)
    )
    return values[down[:, None], across]


def _pictures(frames: Any, steps: int, size: Sequence[int]) -> np.ndarray:
    """This gives pictures [steps, H, W, 3] to draw on."""
    if frames is None:
        return np.full((steps, *size, 3), 255, dtype=np.uint8)
    several = isinstance(frames, (list, tuple)) or getattr(frames, "ndim", 3) == 4
    found = [np.asarray(frame) for frame in (frames if several else [frames] * steps)]
    shapes = {frame.shape for frame in found}
    if len(found) != steps or len(shapes) != 1 or found[0].ndim != 3 or found[0].shape[2] != 3:
        raise ArgumentError(
            f"frames must be one picture [H, W, 3] or {steps} of the same size, got {len(found)} of "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    if any(frame.dtype != np.uint8 for frame in found):
        raise ArgumentError(f"frames must be uint8, got {found[0].dtype}")
    return np.stack(found)


def ranges(tokens: tuple[int, ...]) -> str:
    """This shortens (256, 256, 64) to '2 x 256, 1 x 64'."""
    return ", ".join(f"{len(list(same))} x {count}" for count, same in itertools.groupby(tokens))
