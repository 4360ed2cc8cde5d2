"""A pipeline under training: its transformer runs as teacher, as student, or not at all, as a driver says.

The pipeline's own `__call__` runs unchanged. Three places are taken over while training, on instances and for that
time alone: the transformer's forward, its blocks' forwards, and the scheduler's `step`. The student is the adapters'
own text of a block with another `component` (`blending.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit.adapters import find_adapter
from fastdit.blocks.forward import Forward, Slots
from fastdit.blocks.nodes import Weights
from fastdit.errors import ArgumentError
from fastdit.runtime.install import LINK, check_installable, install, uninstall
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.solvers import noise_of, step_sigmas
from fastdit.train.blending import BlendForward, Blending, Ratios, blend_output
from fastdit.train.noise import own_noise


class Driver(Protocol):
    """A driver decides about a run."""

    def call(self, step: int, branch: int, forward: Callable[[Forward | None], Tensor]) -> Tensor:
        """It gives a transformer call's output; `forward` runs the model, with stock blocks where it is given None."""

    def step(self, step: int, prediction: Tensor) -> Tensor:
        """It gives what the scheduler gets in place of the pipeline's prediction."""

    def stepped(self, step: int, latents: Tensor) -> bool:
        """It sees the latents after the step, and tells whether the run is over."""


class Trainee:
    """A training runs on this pipeline, in a `with`.

    Attributes:
        pipeline, transformer, adapter, spec, blocks: What runs.
        places: (block over all kinds, component) -> its place k among the N ratios of a step, in running order.
        blending: How its students blend.
    """

    def __init__(
        self, pipeline: Any, checkpointing: bool = False, blending: Blending | None = None
    ) -> None:
        transformer = getattr(pipeline, "transformer", None)
        if not isinstance(transformer, nn.Module) or not hasattr(pipeline, "scheduler"):
            raise ArgumentError(
                "pipeline must be a diffusers pipeline with a transformer and a scheduler, "
                f"got {type(pipeline).__name__}"
            )
        if LINK in transformer.__dict__:
            raise ArgumentError("the pipeline is patched; call fastdit.unpatch before training")
        if getattr(transformer, "gradient_checkpointing", False):
            raise ArgumentError(
                "the transformer's own gradient checkpointing would run blocks again outside their call; "
                "call disable_gradient_checkpointing() and give checkpointing=True"
            )
        self.pipeline = pipeline
        self.transformer = transformer
        self.adapter = find_adapter(transformer)
        self.spec = self.adapter.spec(transformer)
        self.blocks = [block for _, block in self.adapter.blocks(transformer)]
        for module in (transformer, *self.blocks):
            check_installable(module)
        first, count = {}, 0
        for kind in self.spec.kinds:
            first[kind.name] = count
            count += kind.count
        self.places = {
            (first[kind.name] + block, component): k
            for k, (kind, block, component) in enumerate(self.spec.components())
        }
        self.blending = blending or Blending()
        self._checkpointing = checkpointing
        self._driver: Driver | None = None
        self._forward: Forward | None = None
        self._step = self._branch = 0
        self._weights = Weights([])
        self._undo: list[Callable[[], None]] = []

    # ---- in and out

    def __enter__(self) -> Trainee:
        transformer, scheduler = self.transformer, self.pipeline.scheduler
        wanted = [p for p in transformer.parameters() if p.requires_grad]
        was_training = transformer.training
        transformer.requires_grad_(False).eval()
        install(transformer, self._call)
        for index, (kind, block) in enumerate(self.adapter.blocks(transformer)):
            install(block, functools.partial(self._block, kind, index))
        scheduler.step = self._stepper(scheduler.step)

        def undo() -> None:
            del scheduler.step
            for module in (transformer, *self.blocks):
                uninstall(module)
            transformer.train(was_training)
            for parameter in wanted:
                parameter.requires_grad_(True)

        self._undo.append(undo)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.pop()()

    # ---- a run

    def run(self, driver: Driver, arguments: Mapping[str, Any]) -> None:
        """The driver leads ``pipeline(**arguments)``, up to the step where it says that the run is over.

        The same arguments, `generator` among them, give the same noise under every driver.
        """
        self._driver, self._step, self._branch = driver, 0, 0
        device = next(self.transformer.parameters()).device
        try:
            with own_noise(arguments, device):
                self.pipeline(**arguments)
        except _Over:
            return
        finally:
            self._driver = None
        raise ArgumentError(
            f"{type(self.pipeline).__name__} ended after {self._step} scheduler steps, "
            "before its driver said so: training needs a scheduler that every prediction goes through"
        )

    def student(
        self,
        ratios: Ratios,
        slots: Slots,
        forward: Callable[[Forward | None], Tensor],
        teacher: Tensor | None = None,
    ) -> tuple[Tensor, Slots]:
        """This gives a student's output in the running call, and its slots afterwards.

        Args:
            ratios: How much of each output is fresh, [N]; COMPUTE stands for all ones.
            slots: Those before.
            forward: Runs the model, see :class:`Driver`.
            teacher: What the stock model gives in this call, where that is known.
        """
        if self.blending.whole:
            fresh = forward(None) if teacher is None else teacher
            return blend_output(fresh, ratios, slots, self.blending, self._step, self._weights)
        student = self.blend(ratios, slots)
        output = forward(student)
        return output, slots | student.written

    def blend(self, ratios: Ratios, slots: Slots) -> BlendForward:
        """A student's call is made, which blends the outputs of components."""
        given = self.blending, self._step, self._weights
        return BlendForward(self.blocks, self.places, ratios, slots, *given)

    def look(self, arguments: Mapping[str, Any]) -> tuple[Conditions, int]:
        """A run's first transformer call tells what the run is like, and its number of text tokens."""
        found = []
        accepted = inspect.signature(self.pipeline.__call__).parameters
        given = {name: one.default for name, one in accepted.items()} | dict(arguments)

        class Look:
            def call(self, step: int, branch: int, forward: Any) -> Tensor:
                raise _Over

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self.adapter.call(module, args, kwargs)
            scheduler = self.pipeline.scheduler
            conditions = Conditions.of(scheduler, call.tokens, given)
            found[:] = [replace(conditions, noise=noise_of(scheduler, given)), call.text]

        handle = self.transformer.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.run(Look(), arguments)
        finally:
            handle.remove()
        return found[0], found[1]

    # ---- the three places

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def forward(student: Forward | None) -> Tensor:
            self._forward = student
            try:
                return _sample(type(module).forward(module, *args, **kwargs))
            finally:
                self._forward = None

        if self._driver is None:
            return type(module).forward(module, *args, **kwargs)
        if self._step == self._branch == 0:  # the pipeline has set its timesteps
            self._weights = Weights(step_sigmas(self.pipeline.scheduler))
        output = self._driver.call(self._step, self._branch, forward)
        self._branch += 1
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=output)
        return (output,)

    def _block(self, kind: str, index: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        student = self._forward
        if student is None:
            return type(module).forward(module, *args, **kwargs)

        def run(*args: Any) -> Any:
            student.start_block(index)
            return self.adapter.forwards[kind](module, student, *args, **kwargs)

        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def _stepper(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._driver is None:
                return original(model_output, *args, **kwargs)
            self._check_variances(model_output)
            prediction = self._driver.step(self._step, model_output)
            result = original(prediction, *args, **kwargs)
            latents = result[0] if isinstance(result, tuple) else result.prev_sample
            over = self._driver.stepped(self._step, latents)
            self._step += 1
            self._branch = 0
            if over:
                raise _Over
            return result

        return step

    def _check_variances(self, prediction: Tensor) -> None:
        """A scheduler that wants the variances which the model predicts must get them."""
        kind = vars(self.pipeline.scheduler).get("variance_type")
        if kind not in ("learned", "learned_range"):
            return
        if prediction.shape[1] == self.transformer.config.in_channels:
            raise ArgumentError(
                f"the scheduler has variance_type={kind!r}, but {type(self.pipeline).__name__} drops the variances "
                "that its transformer predicts; accepted are the fixed ones, such as 'fixed_small'"
            )


class _Over(Exception):
    """This ends a pipeline's call: nobody needs the picture."""


def squares(first: Tensor, second: Tensor) -> Tensor:
    """This is (first - second)^2, in float32 at least: of half precision little would be left."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return (first.to(dtype) - second.to(dtype)).square()


def _sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
