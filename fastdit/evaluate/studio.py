"""A pipeline draws the same prompts from the same noise in many ways, keeps what it drew, and times them by turns.

A picture and its latents come from one call: the latents are those after the last step. Both are kept in a folder, so
a study that was interrupted goes on; pictures with 16 bits, latents in float32.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdit.errors import ArgumentError, UnsupportedModelError
from fastdit.evaluate.arms import Arm, prepared
from fastdit.schedules.solvers import noise_of

DEEP = 65535  # of 16 bits
#: pictures of a timed call
TIMED = 2
ROUNDS = 3
UNPATCHED = "unpatched"

Lose = Callable[[str, Exception], None]


@dataclass(frozen=True)
class Drawn:
    """What an arm draws.

    Attributes:
        pictures: [n, h, w, 3], or [n, frames, h, w, 3], float32 in [0, 1].
        latents: [n, ...] float32, after the last step.
    """

    pictures: np.ndarray
    latents: np.ndarray


@dataclass(frozen=True)
class Spent:
    """What a picture costs.

    Attributes:
        loop: Seconds of the denoising loop: from the first latents to the end of the last step; one a round.
        call: Seconds of the whole call.
        work: Multiply-accumulates of linear layers that ran, of a whole timed call; for arms without a patch.
        held: Bytes of a whole timed call: the most that a patch's caches held, or of all tensors that were alive after
            the last step; 0 where nobody looked.
        flop_speedup: By a patch's own report; None for arms without one.
    """

    loop: tuple[float, ...]
    call: tuple[float, ...]
    work: int
    held: int
    flop_speedup: float | None


@dataclass(frozen=True)
class Sketch:
    """How a pipeline draws a picture.

    Attributes:
        calls: Of its transformers in a step.
        doubled: What the last call was given by name with a row more, of the run without a prompt; nothing where that
            is a call of its own, or there is none.
        listed: Whether it was given them in lists.
        picture: [1, h, w, 3], or [1, frames, h, w, 3].
    """

    calls: int
    doubled: Mapping[str, Tensor]
    listed: bool
    picture: np.ndarray


@dataclass
class _Call:
    """One call as it was seen from outside."""

    began: float = 0.0
    ended: float = 0.0
    latents: Tensor | None = None
    steps: int = 0
    held: int = 0


class Studio:
    """It draws.

    Args:
        pipe: With its own scheduler; it must not be patched.
        prompts: Texts, or class numbers for a class-conditional model; a picture of each.
        folder: What is drawn is kept here.
        seed: Of the first picture's noise, drawn on the CPU; the next one has the next.
        batch: Pictures of a call.
        arguments: Further ones of the pipeline's call, e.g. height and guidance_scale; a text goes with each prompt.
        backend: As in :func:`fastdit.patch`.
        identity: JSON data that the folder belongs to.

    Raises:
        ArgumentError: The folder holds pictures of another study, or the pipeline takes no such argument.
        UnsupportedModelError: The sampler draws noise at each step, so that it has no solution, or the pipeline has no
            transformer or draws neither prompts nor classes.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        folder: Path,
        *,
        seed: int = 0,
        batch: int = 4,
        arguments: Mapping[str, Any] | None = None,
        backend: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        from fastdit.cli.loading import calls

        self.pipe, self.prompts, self.folder = pipe, tuple(prompts), folder
        self.seed, self.batch, self.backend = seed, batch, backend
        self.arguments = dict(arguments or {})
        self.transformers = transformers_of(pipe)
        check_solvable(pipe)
        parameters = inspect.signature(type(pipe).__call__).parameters
        if unknown := [name for name in self.arguments if name not in parameters]:
            raise ArgumentError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
        texts = {name: text for name, text in self.arguments.items() if isinstance(text, str)}
        self._given = {n: value for n, value in self.arguments.items() if n not in texts}
        self._calls = [call | texts for call in calls(pipe, self.prompts)]
        self._tells = next((n for n in ("callback_on_step_end", "callback") if n in parameters), "")
        self._belong({**(identity or {}), "seed": seed, "arguments": self.arguments})

    @property
    def size(self) -> dict[str, int]:
        """That of its pictures as a handle's `explain` takes it, so far as it was asked for."""
        named = {"height": "height", "width": "width", "frames": "num_frames"}
        return {n: self.arguments[given] for n, given in named.items() if given in self.arguments}

    def _belong(self, identity: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "study.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        identity = json.loads(json.dumps(identity))
        if other := sorted(name for name in known if known[name] != identity.get(name)):
            raise ArgumentError(
                f"{self.folder} holds pictures of another study, which differs in {', '.join(other)}; "
                "give another folder"
            )
        path.write_text(json.dumps(identity, indent=1) + "\n")

    # ---- pictures

    def drawn(self, name: str, arm: Arm) -> Drawn:
        """An arm's pictures of all prompts; those that the folder has are read."""
        mark = hashlib.sha256(f"{name}\n{arm.key}".encode()).hexdigest()[:8]
        path = self.folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{mark}.npz"
        pictures: list[np.ndarray] = []
        latents: list[np.ndarray] = []
        if path.exists():
            with np.load(path) as kept:
                pictures, latents = list(kept["pictures"]), list(kept["latents"])
        done = len(latents)
        while done < len(self.prompts):
            last = min(done + (1 if arm.alone else self.batch), len(self.prompts))
            with self._ready(arm) as (_, arguments):
                output, seen = self._call(arguments, done, last)
            pictures += list(np.round(output * DEEP).astype(np.uint16))
            latents += list(seen.latents.float().cpu().numpy())
            done = last
            part = path.with_suffix(".part.npz")
            np.savez(part, pictures=np.array(pictures), latents=np.array(latents))
            part.replace(path)
        count = len(self.prompts)
        shown = np.array(pictures[:count], dtype=np.float32) / DEEP
        return Drawn(shown, np.array(latents[:count]))

    @contextmanager
    def _ready(self, arm: Arm) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Inside, the pipeline draws by an arm: the handle of its patch, if any, and arguments of the call."""
        from fastdit.patch import patch

        with prepared(self.pipe, arm) as arguments:
            if arm.method is None:
                yield None, arguments
                return
            made = arm.method(self.pipe, arm.steps)
            methods = made if isinstance(made, (list, tuple)) else [made]
            handle = patch(self.pipe, *methods, backend=self.backend)
            try:
                yield handle, arguments
            finally:
                handle.unpatch()

    def _call(
        self, arguments: Mapping[str, Any], first: int, last: int, weigh: bool = False
    ) -> tuple[np.ndarray, _Call]:
        """Pictures of some prompts in one call, and what was seen of it."""
        from fastdit.cli.loading import pictures_of

        asked: dict[str, list[Any]] = {}
        for call in self._calls[first:last]:
            for name, value in call.items():
                asked.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        seeds = range(self.seed + first, self.seed + last)
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        seen = _Call(began=self._now())
        with self._watched(seen, weigh) as callback:
            output = self.pipe(
                **asked,
                **self._given,
                **arguments,
                **callback,
                generator=noise,
                output_type="np",
            )
        seen.latents = rows_of(seen.latents, last - first, type(self.pipe).__name__)
        return np.clip(np.asarray(pictures_of(output), dtype=np.float32), 0, 1), seen

    @contextmanager
    def _watched(self, seen: _Call, weigh: bool) -> Iterator[dict[str, Any]]:
        """Inside, a call tells when its loop begins; its callback, in what this gives, when each step ends.

        Of a pipeline that takes no callback the scheduler's steps tell, before anything else is done to the latents.
        """

        def step(latents: Tensor) -> None:
            seen.ended, seen.latents = self._now(), latents
            seen.steps += 1
            if weigh and seen.steps == len(self.pipe.scheduler.timesteps):
                seen.held = _held_bytes()

        def told(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            step(given["latents"])
            return given

        def begin(*args: Any, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            seen.began = self._now()
            return made

        prepare, take = getattr(self.pipe, "prepare_latents", None), self.pipe.scheduler.step

        @functools.wraps(take)  # a pipeline may ask for its arguments
        def stepped(*args: Any, **kwargs: Any) -> Any:
            made = take(*args, **kwargs)
            step(made[0])
            return made

        with ExitStack() as stack:
            if prepare is not None:
                stack.enter_context(_replaced(self.pipe, "prepare_latents", begin))
            if self._tells == "callback":
                yield {"callback": lambda i, t, latents: step(latents), "callback_steps": 1}
            elif self._tells:
                yield {"callback_on_step_end": told}
            else:
                stack.enter_context(_replaced(self.pipe.scheduler, "step", stepped))
                yield {}

    def sketch(self, arm: Arm, index: int = 0) -> Sketch:
        """A picture is drawn and not kept."""
        count, doubled, listed = 0, {}, False

        def look(_: Any, args: Any, given: Mapping[str, Any]) -> None:
            nonlocal count, doubled, listed
            count += 1
            lists = (each for each in (*args, *given.values()) if isinstance(each, list))
            listed = any(len(each) == 2 and isinstance(each[0], Tensor) for each in lists)
            tensors = {n: each for n, each in given.items() if isinstance(each, Tensor)}
            doubled = {n: each for n, each in tensors.items() if each.ndim and len(each) == 2}

        hooks = [
            each.register_forward_pre_hook(look, with_kwargs=True) for each in self.transformers
        ]
        try:
            with self._ready(arm) as (_, arguments):
                picture, _ = self._call(arguments, index, index + 1)
        finally:
            for hook in hooks:
                hook.remove()
        return Sketch(-(-count // arm.steps), doubled, listed, picture)

    # ---- costs

    def spent(
        self, arms: Mapping[str, Arm], rounds: int = ROUNDS, lose: Lose | None = None
    ) -> dict[str, Spent]:
        """What a picture costs in each way; the arms take turns, each after a call that is not timed.

        With a single thread on a CPU the processor's time is taken, which is wall time where nothing else runs.

        Args:
            lose: Told an arm that fails and its error, which it may raise; without it all are raised.
        """
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        looks: dict[str, tuple[int, int, float | None]] = {}
        for turn in range(rounds):
            for name in list(times):
                try:
                    look, seconds = self._timed(arms[name], name == UNPATCHED, first=not turn)
                except Exception as error:
                    if lose is None:
                        raise
                    lose(name, error)
                    del times[name]
                    continue
                times[name].append(seconds)
                looks[name] = looks.get(name, look)
        return {
            name: Spent(*map(tuple, zip(*each, strict=True)), *looks[name])
            for name, each in times.items()
        }

    def _timed(
        self, arm: Arm, own: bool, first: bool
    ) -> tuple[tuple[int, int, float | None], tuple[float, float]]:
        """What the first untimed call showed, and the seconds of a picture in the loop and in the call."""
        last, look = 1 if arm.alone else min(TIMED, len(self.prompts)), (0, 0, None)
        with self._ready(arm) as (handle, arguments):
            if first:
                look = self._look(handle, arguments, last, own or arm.around is not nullcontext)
            else:
                self._call(arguments, 0, last)
            start = self._now()
            _, seen = self._call(arguments, 0, last)
            whole = self._now() - start
        return look, ((seen.ended - seen.began) / last, whole / last)

    def _look(
        self, handle: Any, arguments: Any, last: int, weigh: bool
    ) -> tuple[int, int, float | None]:
        """The work of a call's linear layers, the most bytes it held, and how much less it computed by its report."""
        work = [0]

        def count(layer: nn.Linear, given: Any, output: Tensor) -> None:
            work[0] += output.numel() * layer.in_features

        hooks = []
        if handle is None:  # a patch runs no module's own forward, and reports
            modules = (module for each in self.transformers for module in each.modules())
            layers = (module for module in modules if isinstance(module, nn.Linear))
            hooks = [layer.register_forward_hook(count) for layer in layers]
        if weigh:
            gc.freeze()  # what there is already is none of this call's
        try:
            _, seen = self._call(arguments, 0, last, weigh)
        finally:
            gc.unfreeze()
            for hook in hooks:
                hook.remove()
        if handle is None:
            return work[0], seen.held, None
        report = handle.report()
        return 0, report.peak_cache_bytes, report.flop_speedup

    def _now(self) -> float:
        if torch.cuda.is_available() and self.pipe.device.type == "cuda":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


def transformers_of(pipe: Any) -> list[nn.Module]:
    """Those that denoise: one, or Wan 2.2's two.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    if found[0] is None:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer to make faster")
    return [each for each in found if each is not None]


def check_solvable(pipe: Any) -> None:
    """This refuses a pipeline whose runs have no solution.

    Raises:
        UnsupportedModelError: Its sampler draws noise at each step.
    """
    if noise := noise_of(pipe.scheduler):
        raise UnsupportedModelError(
            f"errors are distances to the solution that many steps come to, and a sampler that draws noise at each "
            f"step ({noise}) comes to none: give the folder another scheduler"
        )


def rows_of(latents: Tensor | None, count: int, name: str) -> Tensor:
    """The latents of so many pictures; DiT's pipeline has those without a class behind them.

    Raises:
        UnsupportedModelError: They were not seen, or are of another number of pictures.
    """
    if latents is None or len(latents) not in (count, 2 * count):
        seen = "none were seen" if latents is None else f"{count} pictures have {len(latents)} rows"
        raise UnsupportedModelError(f"the latents of {name} cannot be compared: {seen}")
    return latents[:count]


@contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """Inside, an object has another attribute."""
    own = vars(owner).get(name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _held_bytes() -> int:
    """Bytes of all tensors that Python holds and the collector may see, each storage once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and each.layout is torch.strided and not each.is_meta:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
