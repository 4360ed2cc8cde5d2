"""A handle is what `patch` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdit.account.asked import Asked
from fastdit.account.explain import Explanation, explain_parts, run_speedup
from fastdit.account.measure import Measurement, measure
from fastdit.account.previews import Previews
from fastdit.account.report import Report, last_runs, report_runs
from fastdit.blocks.attention_choice import Tuning
from fastdit.errors import ArgumentError
from fastdit.methods.budget import Budget
from fastdit.runtime.attach import refuse_while_running, remove
from fastdit.runtime.install import LINK
from fastdit.runtime.runs import ManualLoop
from fastdit.schedules.plan import check_composition
from fastdit.schedules.solvers import Advice, recommend

if TYPE_CHECKING:
    from fastdit.runtime.patched import Patched
    from fastdit.runtime.run import Run


class Handle:
    """A handle explains, reports, pauses and removes a patch; that of a pipeline's two transformers, of both."""

    def __init__(self, parts: Sequence[tuple[Patched, nn.Module]], pipeline: Any | None) -> None:
        self._parts = tuple(parts)
        self._pipeline = pipeline
        self._patched, self._transformer = parts[0]

    def explain(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        steps: int | None = None,
        cfg: bool | None = None,
        text_tokens: int | None = None,
        frames: int | None = None,
    ) -> Explanation:
        """This predicts what a run will do: backends, plan, FLOPs, bytes and cache size.

        Of two transformers each has the steps that the pipeline's `boundary_ratio` gives it.

        Args:
            height, width: Image size in pixels; the pipeline's default if left out.
            batch: Images per run.
            steps: Transformer steps; the schedule's, else the pipeline's default.
            cfg: Whether classifier-free guidance doubles the batch; by default what is usual for the family.
            text_tokens: Text length; the family's usual one if left out.
            frames: Frames of a video; the pipeline's default if left out.

        Raises:
            ScheduleError: A schedule does not fit `steps`.
            ArgumentError: A size is not positive, or frames are asked for where there are none.
        """
        asked = Asked(height, width, batch, steps, cfg, text_tokens, frames)
        return explain_parts(self._parts, self._pipeline, asked)

    def report(self) -> Report:
        """This tells what the last run of this thread or task did, or else the last of all.

        It warns when a method that should reuse something reused nothing.
        """
        runs = last_runs(self._parts)
        found = [(patched, run, *run_speedup(patched, run, model)) for patched, model, run in runs]
        return report_runs(self._patched, found)

    def last_run(self) -> Run | None:
        """The run that :meth:`report` tells of, with all that it holds; None before the first.

        Each transformer has a run of its own: of two it is that of the one which ran last.
        """
        runs = last_runs(self._parts)
        return runs[-1][-1] if runs else None

    def live_runs(self) -> list[Run]:
        """The runs in progress, of all threads; a loop that was given up counts until its thread goes on."""
        return [run for patched, _ in self._parts for run in patched.runs.live()]

    def cache_bytes(self) -> int:
        """Bytes that the caches of all runs hold now."""
        return sum(patched.runs.cache_bytes() for patched, _ in self._parts)

    def measure(self, run: Callable[[], Any], repeats: int = 5) -> Measurement:
        """This measures wall seconds of `run()` on this machine, patched and stock in turns.

        Args:
            run: Does the work, such as ``lambda: pipe("a red circle")``.
            repeats: Timed turns after a warm-up.

        Raises:
            ArgumentError: `run` cannot be called, or `repeats` is not a positive int; or modulations are shed.
        """
        if self._patched.shed is not None:
            raise ArgumentError(
                "measure: with modulations shed the stock model has to move their weights in at every step, which is "
                "not its time; patch without shed_modulations to measure"
            )
        return measure(run, self.disabled, self._transformer.device, repeats)

    @contextmanager
    def tune_attention(self) -> Iterator[Tuning]:
        """This measures which attention is the fastest on this GPU at the sizes of what runs inside the `with`.

        Measured are, when the `with` is over, torch's attentions and FlashAttention-3 where it is installed, in the
        attentions that fastdit itself runs. They are added to a file that later patches of this and other processes
        read, see :mod:`fastdit.blocks.attention_choice`; an attention that the user chooses is theirs all the same.

        Example:
            >>> with handle.tune_attention() as tuning:
            ...     pipe("a red circle", num_inference_steps=8)
            >>> print(tuning)

        Raises:
            ArgumentError: The model is not on a GPU, or the file can be neither read nor written.
        """
        tuning = Tuning(next(self._transformer.parameters()).device)
        token = tuning.listen()
        done = False
        try:
            yield tuning
            done = True
        finally:
            tuning.finish(token, measures=done)

    def stage_pictures(self) -> np.ndarray:
        """This decodes, with the pipeline's VAE, what the picture was to be at the end of each stage of the last run.

        Returns:
            uint8 [stages, B, H, W, 3]; half-size ones are drawn twice as large.

        Raises:
            ArgumentError: The last run had no stages.
        """
        run = self.last_run()
        stages = None if run is None else run.resolution
        if stages is None or not stages.records:
            raise ArgumentError("stage_pictures needs a run in stages; the last one had none")
        return stages.pictures()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The runs that this thread or task begins inside the `with` are those of the stock model.

        A call of the transformer without a pipeline is stock inside the `with` whenever its loop began.
        """
        states, mark = [patched.runs.local() for patched, _ in self._parts], object()
        try:
            for state in states:
                state.disabled.add(mark)
            yield
        finally:
            for state in states:
                state.disabled.discard(mark)

    @contextmanager
    def budget(self, **budget: Any) -> Iterator[None]:
        """The runs that this thread or task begins inside the `with` have this budget in place of the patch's.

        Args:
            budget: One of `speedup`, `quality` and `latency`, as :func:`fastdit.patch` takes them, and another
                :class:`~fastdit.PlanBook` as `book` if it is not to be the patch's.

        Example:
            >>> handle = fastdit.patch(pipe, speedup=2)
            >>> with handle.budget(speedup=4):
            ...     pipe("a red circle")

        Raises:
            ArgumentError: It is none, or the model was patched without one.
            CompositionError: It does not compose with the patch's other methods.
            ScheduleError: The book is of another model.
        """
        own = next((m for m in self._patched.methods if isinstance(m, Budget)), None)
        if own is None:
            raise ArgumentError(
                "budget() needs a model that was patched with one, such as speedup=2"
            )
        asked = own.asked(**budget)
        for patched, transformer in self._parts:
            check_composition(patched.under(asked))
            if asked.book is not None:
                asked.book.check_model(transformer)
        with self._locally("budget", asked):
            yield

    def recommend(self, steps: int) -> Advice:
        """This recommends a solver for runs of so many steps, see :func:`fastdit.recommend`; nothing changes.

        It also says which one the search of a budget's plan book found best for as many.

        Raises:
            UnsupportedModelError: The handle is of a bare transformer, which has no scheduler.
        """
        found = recommend(self._pipeline, steps)
        own = next((m for m in self._patched.methods if isinstance(m, Budget)), None)
        return found if own is None else replace(found, why=found.why + own.advice(steps))

    @contextmanager
    def watch(self) -> Iterator[Previews]:
        """This keeps what each step takes the clean image to be, for pictures of the image as it forms.

        The steps are those of the last run that this thread or task begins inside the `with`.

        Example:
            >>> with handle.watch() as frames:
            ...     image = pipe("a red circle").images[0]
            >>> video = handle.report().token_map(frames.pictures())

        Raises:
            ArgumentError: The handle is of a bare transformer, so nothing can decode.
        """
        for parts in (("vae",), ("image_processor", "video_processor")):
            if not any(hasattr(self._pipeline, part) for part in parts):
                raise ArgumentError(
                    f"watch() needs a patched pipeline with a {parts[0]} to decode with"
                )
        watch = Previews(self._patched.adapter, self._pipeline)
        with self._locally("watch", watch):
            yield watch

    @contextmanager
    def _locally(self, name: str, value: Any) -> Iterator[None]:
        """The runs that this thread or task begins inside the `with` find this value in the local state."""
        states = [patched.runs.local() for patched, _ in self._parts]
        before = [getattr(state, name) for state in states]
        try:
            for state in states:
                setattr(state, name, value)
            yield
        finally:
            for state, old in zip(states, before, strict=True):
                setattr(state, name, old)

    @contextmanager
    def run(self, timesteps: Sequence[Any] | torch.Tensor) -> Iterator[Handle]:
        """The `with` is one run of a hand-written loop over `timesteps`, where no scheduler tells the steps.

        A new value of the transformer's timestep argument is a new step; that read waits for a GPU. Call `advance()`
        after each step to spare it, and where two transformers take turns, of which neither sees the other's steps.

        Example:
            >>> with h.run(timesteps):
            ...     for t in timesteps:
            ...         velocity = transformer(latents, timestep=t, ...)
            ...         latents = update(latents, velocity)
            ...         h.advance()
        """
        if len(timesteps) < 1:
            raise ArgumentError("timesteps must hold at least one value, got none")
        with ExitStack() as loops:
            runs = []
            for patched, _ in self._parts:
                loop = ManualLoop(patched.runs.local(), timesteps)
                loops.callback(patched.runs.end_manual, loop)
                runs.append(patched.runs.begin(loop, len(timesteps)))
            yield self
            for run in filter(None, runs):
                run.check()

    def advance(self, velocity: torch.Tensor | None = None) -> None:
        """The user says that a step of `run` is done, instead of letting the timestep argument tell.

        Args:
            velocity: What the step was done with, guidance applied, as a pipeline gives it to its scheduler: RAS
                chooses the tokens of the next step by it. Without it the mean of the step's outputs stands in, which
                is another choice than a pipeline's.

        Raises:
            ArgumentError: No run is in progress here, or `velocity` is no tensor, or of another size than the picture.
        """
        for patched, _ in self._parts:
            patched.runs.advance(velocity)

    def reset(self) -> None:
        """This forgets this thread's or task's own loops and their caches, e.g. after an aborted one.

        A pipeline's run ends with its call, however that ends.
        """
        for patched, _ in self._parts:
            patched.runs.reset()

    def unpatch(self) -> None:
        """This removes the patch; the model is as it was before. A later patch of the same model is not affected.

        Raises:
            FastDiTError: A run is in progress.
        """
        parts = [t for patched, t in self._parts if t.__dict__.get(LINK) is patched]
        for transformer in parts:
            refuse_while_running(transformer, "unpatch")
        for transformer in parts:
            remove(transformer)

    def __repr__(self) -> str:
        methods = ", ".join(method.name for method in self._patched.methods)
        names = " and ".join(type(transformer).__name__ for _, transformer in self._parts)
        return f"<fastdit {methods} on {names}>"
