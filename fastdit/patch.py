"""The two verbs: `patch` puts fastdit under a pipeline or a transformer, `unpatch` takes it out again.

Only instances are touched: the blocks' innermost forward (`install.py`), two native forward hooks on the transformer,
the scheduler's class (`clock.py`), and one instance attribute each as the link to the session. Everything that can be
refused is checked before anything changes.
"""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdit import clock, ops
from fastdit.adapters import adapters, find_adapter
from fastdit.drift import check_drift
from fastdit.errors import ArgumentError, CompositionError, FastDiTError, UnsupportedModelError
from fastdit.explain import Explanation, explain_session, run_speedup
from fastdit.frames import Frames
from fastdit.graphs import Graphs
from fastdit.install import LINK, check_installable, install, uninstall
from fastdit.measure import Measurement, measure
from fastdit.methods.base import Method
from fastdit.methods.dense import Dense
from fastdit.packed import check_packable, linears_of
from fastdit.plan import check_composition
from fastdit.report import Report, report_session
from fastdit.schedule import Every, Schedule
from fastdit.session import Session

OPS = ("gated_residual", "norm_modulate")
#: where a method computes a part of the tokens
TOKEN_OPS = ("qkv_prologue", "token_select")
#: where a method changes the resolution
RESOLUTION_OPS = ("patchify", "unpatchify", "resolution_transition")
_RESET = "_reset_stateful_cache"


class BlockLink:
    """What a block's rewritten forward calls; a deep copy of the model gets links to the copied session."""

    __slots__ = ("index", "kind", "session")

    def __init__(self, session: Session, kind: str, index: int) -> None:
        self.session = session
        self.kind = kind
        self.index = index

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.block(self.kind, self.index, module, args, kwargs)


class ComponentLink:
    """What the rewritten forward of a component calls that was wrapped as it is."""

    __slots__ = ("index", "name", "session")

    def __init__(self, session: Session, index: int, name: str) -> None:
        self.session = session
        self.index = index
        self.name = name

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.component(self.index, self.name, module, args, kwargs)


class EmbedLink:
    """What the rewritten forward of a patch embedding calls."""

    __slots__ = ("session",)

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.embed(module, *args, **kwargs)


class ConditionLink(EmbedLink):
    """What the rewritten forward of the embedding of timestep and prompt calls."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.embed_condition(module, *args, **kwargs)


class PromptLink(EmbedLink):
    """What the rewritten forward of a projection of the prompt calls."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.project_prompt(module, *args, **kwargs)


class LinearLink(EmbedLink):
    """What the rewritten forward of a block's linear layer calls."""

    __slots__ = ()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.session.linear(module, *args, **kwargs)


class Handle:
    """What `patch` returns: look at, pause, and remove a patch."""

    def __init__(self, session: Session, transformer: nn.Module, pipeline: Any | None) -> None:
        self._session = session
        self._transformer = transformer
        self._pipeline = pipeline

    def explain(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        steps: int | None = None,
        cfg: bool | None = None,
        text_tokens: int | None = None,
    ) -> Explanation:
        """Predict what a run will do: backends, plan, FLOPs, bytes and cache size.

        Args:
            height, width: Image size in pixels; the pipeline's default if left out.
            batch: Images per run.
            steps: Transformer steps; the schedule's, else the pipeline's default.
            cfg: Whether classifier-free guidance doubles the rows; by default what is usual for the family.
            text_tokens: Text length; the family's usual one if left out.

        Raises:
            ScheduleError: A schedule does not fit `steps`.
            ArgumentError: A size is not positive.
        """
        return explain_session(
            self._session,
            self._transformer,
            self._pipeline,
            height,
            width,
            batch,
            steps,
            cfg,
            text_tokens,
        )

    def report(self) -> Report:
        """What the last run did; warns when a method that should reuse something reused nothing."""
        return report_session(self._session, run_speedup(self._session, self._transformer))

    def measure(self, run: Callable[[], Any], repeats: int = 5) -> Measurement:
        """Wall seconds of `run()` on this machine, patched and stock in turns.

        Args:
            run: Does the work, such as ``lambda: pipe("a red circle")``.
            repeats: Timed turns after a warm-up.

        Raises:
            ArgumentError: `repeats` is not a positive int.
        """
        return measure(run, self.disabled, self._transformer.device, repeats)

    def stage_pictures(self) -> np.ndarray:
        """What the picture was going to be at the end of each stage of the last run, decoded by the pipeline's VAE.

        Returns:
            uint8 [stages, B, H, W, 3]; half-size ones are drawn twice as large.

        Raises:
            ArgumentError: The last run had no stages.
        """
        run = self._session.run
        if run is None or run.resolution is None or not run.resolution.records:
            raise ArgumentError("stage_pictures needs a run in stages; the last one had none")
        return run.resolution.pictures()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the stock model inside the `with`; caches are dropped on the way in and out."""
        session, before = self._session, self._session.enabled
        session.reset()
        session.enabled = False
        try:
            yield
        finally:
            session.enabled = before
            session.reset()

    @contextmanager
    def watch(self) -> Iterator[Frames]:
        """Keep what each step takes the clean image to be, for pictures of the image as it forms.

        Example:
            >>> with handle.watch() as frames:
            ...     image = pipe("a red circle").images[0]
            >>> video = handle.report().token_map(frames.pictures())

        Raises:
            ArgumentError: The handle is of a bare transformer, so nothing can decode.
        """
        for part in ("vae", "image_processor"):
            if not hasattr(self._pipeline, part):
                raise ArgumentError(
                    f"watch() needs a patched pipeline with a {part} to decode with"
                )
        session, before = self._session, self._session.frames
        session.frames = Frames(session.adapter, self._pipeline)
        try:
            yield session.frames
        finally:
            session.frames = before

    @contextmanager
    def run(self, timesteps: Sequence[Any] | torch.Tensor) -> Iterator[Handle]:
        """One run of a hand-written loop over `timesteps`, where no scheduler tells the steps.

        A new value of the transformer's timestep argument is a new step; that read waits for a GPU. Call `advance()`
        after each step to spare it.

        Example:
            >>> with h.run(timesteps):
            ...     for t in timesteps:
            ...         velocity = transformer(latents, timestep=t, ...)
            ...         latents = update(latents, velocity)
            ...         h.advance()
        """
        if len(timesteps) < 1:
            raise ArgumentError("timesteps must hold at least one value, got none")
        session = self._session
        session.start_run(len(timesteps), timesteps_given=True)
        run = session.run
        if run is not None:
            run.timesteps = timesteps if isinstance(timesteps, torch.Tensor) else None
        try:
            yield self
        finally:
            session.end_run()
            if run is not None:
                run.timesteps_given = False

    def advance(self) -> None:
        """Say that a step of `run` is done, instead of letting the timestep argument tell."""
        session = self._session
        if not session.enabled:
            return
        if session.run is None:
            raise ArgumentError(
                "advance() needs a run in progress: use it inside `with h.run(timesteps)`"
            )
        session.run.manual = True
        session.end_step()

    def reset(self) -> None:
        """Drop all caches and forget the run in progress, e.g. after an aborted run of a bare transformer."""
        self._session.reset()

    def unpatch(self) -> None:
        """Remove the patch; the model is as it was before. A later patch of the same model is not affected."""
        if self._transformer.__dict__.get(LINK) is self._session:
            _remove(self._transformer)

    def __repr__(self) -> str:
        methods = ", ".join(method.name for method in self._session.methods)
        return f"<fastdit {methods} on {type(self._transformer).__name__}>"


def patch(
    target: Any,
    *methods: Method,
    backend: str | None = None,
    pack_weights: bool = False,
    cuda_graphs: bool = False,
) -> Handle:
    """Make a diffusers pipeline or transformer run on fastdit.

    Args:
        target: A pipeline with a supported `transformer`, or the transformer itself.
        methods: What to skip; none means :class:`Dense` (skip nothing).
        backend: "reference", "cpu", "triton" or "cuda" for all ops; by default FASTDIT_BACKEND, else the best that
            serves
            each op's device and dtype. A backend named here or there is never silently replaced.
        pack_weights: Keep a copy of the blocks' weights during a run, laid out for products of few rows, as RAS has
            them; see `packed.py`. For fp32 on a CPU whose torch has MKL.
        cuda_graphs: Replay whole runs as CUDA graphs from the third of a kind on (size, batch, steps, settings); see
            `graphs.py`. For steps so short that the GPU waits for Python. Runs that cannot be replayed are eager, and
            a warning says why.

    Returns:
        A :class:`Handle`. A second patch of the same model replaces the first.

    Raises:
        UnsupportedModelError: No adapter knows the model; names what is supported.
        ScheduleError, CompositionError: A method does not fit the model or the other methods.
        BackendError: The backend named cannot serve an op on the model's device and dtype, or this torch no
            `pack_weights`.
        DriftError: The installed diffusers computes a block otherwise than the adapter.
        In every case the model, and a patch it already has, stay as they were.

    Example:
        >>> handle = fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
        >>> image = pipe("a red circle").images[0]
        >>> print(handle.report())
    """
    pipeline, transformer = _resolve(target)
    reuses = all(getattr(method, "writes", None) == {"reuse"} for method in methods)
    adapter = find_adapter(transformer, wraps=bool(methods) and reuses)
    for method in methods:
        if not isinstance(method, Method):
            hint = ": give fastdit.Cached(it)" if isinstance(method, (Schedule, Every)) else ""
            raise ArgumentError(
                f"methods must be instances such as fastdit.Dense() or fastdit.Cached(schedule), got {method!r}{hint}"
            )
    methods = methods or (Dense(),)
    spec = adapter.spec(transformer)
    if not adapter.restates and any(method.max_cache_bytes is not None for method in methods):
        raise UnsupportedModelError(
            f"max_cache_bytes needs the size of every output, which is not known of {type(transformer).__name__}: "
            "it has no adapter"
        )
    check_composition(methods)
    for method in methods:
        method.check(spec)
    bound = ops.bind(backend)
    sparse = any("rows" in method.writes for method in methods)
    resizing = next((method for method in methods if "resolution" in method.writes), None)
    used = OPS + TOKEN_OPS * sparse + RESOLUTION_OPS * (resizing is not None)
    _check_backend(bound, transformer, used)
    check_drift(adapter, transformer)
    blocks = adapter.blocks(transformer)
    embedders = []
    if sparse:
        adapter.check_tokens(transformer)
    if resizing is not None:
        adapter.check_resolution(transformer)
        _check_resizing(resizing, pipeline)
    if sparse or resizing is not None:
        embedders = adapter.embedders(transformer)
    wrapped = adapter.wrapped(transformer)
    if cuda_graphs and resizing is not None:
        raise CompositionError(
            f"cuda_graphs cannot replay {resizing.name}, whose tokens differ from picture to picture; leave one of them"
        )
    eager = bound.backend == "reference"
    prompts = [] if eager else adapter.prompt_projections_of(transformer)
    conditions = [] if eager else adapter.condition_embeddings_of(transformer)
    parts = [part for _, _, part in wrapped]
    linears = []
    if pack_weights:
        check_packable(transformer, bound.backend)
        found = linears_of([block for _, block in blocks])
        linears = [layer for layer in found if layer not in parts]
    for module in (
        *(block for _, block in blocks),
        *embedders,
        *prompts,
        *conditions,
        *parts,
        *linears,
        *[transformer] * cuda_graphs,
    ):
        check_installable(module)
    if pipeline is not None:
        clock.check_scheduler(pipeline.scheduler)

    graphs = Graphs() if cuda_graphs else None
    session = Session(adapter, spec, methods, bound, [block for _, block in blocks], eager, graphs)
    if pipeline is not None:
        session.pipeline = weakref.ref(pipeline)
    if LINK in transformer.__dict__:
        _remove(transformer)
    _install(session, transformer, pipeline, blocks, embedders)
    for modules, link in ((prompts, PromptLink), (conditions, ConditionLink)):
        for module in modules:
            install(module, link(session))
    if cuda_graphs:
        install(transformer, session)
    session.linears = linears
    for module in linears:
        install(module, LinearLink(session), compiles=True)
    for index, name, module in wrapped:
        install(module, ComponentLink(session, index, name))
    if not adapter.restates:
        warnings.warn(
            f"{type(transformer).__name__} has no adapter: its {_names(spec)} are wrapped as they are, so norms and "
            "residuals around reused ones still run, and costs are estimates",
            stacklevel=2,
        )
    return Handle(session, transformer, pipeline)


def unpatch(target: Any) -> None:
    """Remove fastdit from a pipeline or transformer, also from a deep copy. Does nothing on one that has no patch."""
    _, transformer = _resolve(target)
    _remove(transformer)


def explain(target: Any, **kwargs: Any) -> Explanation:
    """:meth:`Handle.explain` of a patched pipeline or transformer."""
    return handle_of(target).explain(**kwargs)


def report(target: Any) -> Report:
    """:meth:`Handle.report` of a patched pipeline or transformer."""
    return handle_of(target).report()


def handle_of(target: Any) -> Handle:
    """The handle of a patched pipeline or transformer.

    Raises:
        FastDiTError: It is not patched.
    """
    pipeline, transformer = _resolve(target)
    session = transformer.__dict__.get(LINK)
    if session is None:
        raise FastDiTError(f"this {type(target).__name__} is not patched; call fastdit.patch first")
    return Handle(session, transformer, pipeline)


def _resolve(target: Any) -> tuple[Any | None, nn.Module]:
    """(pipeline or None, transformer); a transformer wrapped by torch.compile is unwrapped."""
    pipeline = None if isinstance(target, nn.Module) else target
    transformer = target if pipeline is None else getattr(target, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, nn.Module):
        supported = sorted(
            name for adapter in adapters().values() for name in adapter.model_classes
        )
        raise UnsupportedModelError(
            f"target must be a pipeline with a transformer, or a transformer, got {type(target).__name__}; "
            f"supported transformers: {', '.join(supported)}"
        )
    return pipeline, transformer


def _names(spec: Any) -> str:
    return ", ".join(sorted({name for kind in spec.kinds for name in kind.components}))


def _check_backend(bound: Any, transformer: nn.Module, names: Sequence[str]) -> None:
    weight = next(
        (p for p in transformer.parameters() if p.is_floating_point() and p.device.type != "meta"),
        None,
    )
    if weight is not None:
        for op in names:
            bound.backend_for(op, weight.device, transformer.dtype)


def _check_resizing(method: Method, pipeline: Any | None) -> None:
    """A method that changes the resolution leads the scheduler, and may decode."""
    if pipeline is None:
        raise UnsupportedModelError(
            f"target must be a pipeline for {method.name}, which leads its scheduler; got a transformer"
        )
    clock.check_flow(pipeline.scheduler)
    if method.selector == "edges" and getattr(pipeline, "vae", None) is None:
        raise UnsupportedModelError(
            f'{method.name} selector="edges" decodes by the pipeline\'s vae, but it has none; '
            'accepted are "gradient" and "variance"'
        )


def _install(
    session: Session,
    transformer: nn.Module,
    pipeline: Any,
    blocks: list[tuple[str, nn.Module]],
    embedders: Sequence[nn.Module],
) -> None:
    transformer.__dict__[LINK] = session
    for index, (kind, block) in enumerate(blocks):
        install(block, BlockLink(session, kind, index))
    for module in embedders:
        install(module, EmbedLink(session))
    transformer.register_forward_pre_hook(session.forward_pre_hook, with_kwargs=True)
    transformer.register_forward_hook(session.forward_hook, with_kwargs=True, always_call=True)
    transformer.__dict__[_RESET] = types.MethodType(_end_of_pipeline_call, transformer)
    if pipeline is not None:
        session.follow(pipeline.scheduler)


def _remove(transformer: nn.Module) -> None:
    session = transformer.__dict__.pop(LINK, None)
    if session is None:
        return
    uninstall(transformer)
    for _, block in session.adapter.blocks(transformer):
        uninstall(block)
    for module in session.adapter.embedders(transformer):
        uninstall(module)
    for module in (
        *session.adapter.prompt_projections_of(transformer),
        *session.adapter.condition_embeddings_of(transformer),
    ):
        uninstall(module)
    for _, _, module in session.adapter.wrapped(transformer):
        uninstall(module)
    for module in session.linears:
        uninstall(module)
    _remove_hooks(transformer, session)
    transformer.__dict__.pop(_RESET, None)
    session.unfollow()
    session.reset()


def _remove_hooks(transformer: nn.Module, session: Session) -> None:
    for names in (
        ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
        ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ):
        hooks = getattr(transformer, names[0])
        for key in [
            key for key, hook in hooks.items() if getattr(hook, "__self__", None) is session
        ]:
            for name in names:
                getattr(transformer, name).pop(key, None)


def _end_of_pipeline_call(transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """diffusers calls this on every component when a pipeline call ends, also after an interrupted one."""
    transformer.__dict__[LINK].end_run()
    inherited = getattr(type(transformer), _RESET, None)
    if inherited is not None:
        inherited(transformer, *args, **kwargs)
