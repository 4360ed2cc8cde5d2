"""There are two verbs: `patch` puts fastdit under a pipeline or a transformer, `unpatch` takes it out again.

Only instances are touched: the blocks' innermost forward, two native forward hooks on the transformer, the classes of
the scheduler and the pipeline, and one instance attribute each as the link to the patch (`runtime/attach.py`).
Everything that can be refused is checked before anything changes.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastdit import ops
from fastdit.account.cost import Cost
from fastdit.account.explain import Explanation, waits_for_host
from fastdit.account.report import Report
from fastdit.adapters import adapters, find_adapter
from fastdit.adapters.base import Size
from fastdit.blocks.attention_choice import choices
from fastdit.blocks.held import PLACES
from fastdit.blocks.prepacked import check_packable, linears_of
from fastdit.checks import one_of
from fastdit.drift import check_drift
from fastdit.errors import ArgumentError, FastDiTError, UnsupportedModelError
from fastdit.handle import Handle
from fastdit.methods.base import Method
from fastdit.methods.budget import budgeted
from fastdit.methods.dense import Dense
from fastdit.runtime import clock
from fastdit.runtime.arrivals import refuse_other_caches
from fastdit.runtime.attach import Rewrite, attach, refuse_while_running, remove, rewrites
from fastdit.runtime.graphs import Graphs
from fastdit.runtime.install import LINK, check_installable, is_installable
from fastdit.runtime.owners import TRANSFORMERS
from fastdit.runtime.patched import Patched
from fastdit.runtime.run import nobody
from fastdit.runtime.shed import find_shed
from fastdit.runtime.timesteps import check_flow
from fastdit.schedules.book import PlanBook
from fastdit.schedules.plan import check_composition, ops_of
from fastdit.schedules.schedule import Every, Schedule
from fastdit.schedules.solvers import noise_of


def patch(
    target: Any,
    *methods: Method,
    backend: str | None = None,
    pack_weights: bool = False,
    graphs: bool | str = False,
    programs: bool = True,
    shed_modulations: str | None = None,
    speedup: float | None = None,
    quality: str | None = None,
    latency: float | str | None = None,
    vram: int | str | None = None,
    book: PlanBook | str | os.PathLike[str] | None = None,
    guard: bool = False,
) -> Handle:
    """This makes a diffusers pipeline or transformer run on fastdit.

    Args:
        target: A pipeline with a supported `transformer`, or the transformer itself. A `transformer_2`, which does
            the pipeline's later steps, is patched too: the same methods, by its steps, with caches of its own.
        methods: What to skip; none means :class:`Dense` (skip nothing).
        backend: "reference", "cpu", "triton" or "cuda" for all ops; by default FASTDIT_BACKEND, else the best that
            serves each op's device and dtype. A backend named here or there is never silently replaced.
        pack_weights: Keep a copy of the blocks' weights during a run, laid out for products of few tokens, as RAS has
            them; see `blocks/prepacked.py`. For fp32 on a CPU whose torch has MKL.
        graphs: Replay calls of the transformer as CUDA graphs, each kind of call from its third on; see
            `runtime/graphs.py`. For steps so short that the GPU waits for Python. Runs that cannot be replayed are
            eager, and a warning says why. "auto" chooses by `account/pace.py`, and tells it in `explain` and `report`.
        programs: Record each kind of transformer call once, and run that in place of the model's forward. False runs
            the forward every time, at more Python calls, for who wants to look into it.
        shed_modulations: "host" or "disk": the weights of the blocks' adaLN layers leave the model for pinned host
            memory, or for a file in TMPDIR that is mapped, and tables that are made once a run stand for the layers;
            see `runtime/shed.py`.
        speedup, quality, latency: One of them, in place of methods: a :class:`Budget`. A latency is a number of seconds
            or a text, "0.8s" or "800ms".
        vram: Most bytes that its caches may hold: a number or a text, "+2GiB".
        book: Its :class:`PlanBook`, or the path of one; by default the package's, for the models in it.
        guard: Compute whatever turns out to be further off than the book's plan was, see :class:`Budget`.

    Returns:
        A :class:`Handle`, of both where there are two. A second patch of the same model replaces the first.

    Raises:
        UnsupportedModelError: No adapter knows the model; names what is supported. Or its blocks have no modulation
            layers that could be shed.
        ScheduleError, CompositionError: A method does not fit the model or the other methods.
        BackendError: The backend named cannot serve an op on the model's device and dtype, or this torch no
            `pack_weights`.
        FastDiTError: A run is in progress on the model.
        DriftError: The installed diffusers computes a block otherwise than the adapter.
        In every case the model, and a patch it already has, stay as they were.

    Example:
        >>> handle = fastdit.patch(pipe, fastdit.Cached(fastdit.Schedule.every(2)))
        >>> image = pipe("a red circle").images[0]
        >>> print(handle.report())
    """
    pipeline, transformers = _resolve(target)
    _check_arguments(methods, pack_weights=pack_weights, programs=programs)
    asked = {"speedup": speedup, "quality": quality, "latency": latency, "vram": vram, "book": book}
    asked["guard"] = guard
    methods = budgeted(transformers[0], methods, **asked)
    if not (isinstance(graphs, bool) or graphs == "auto"):
        raise ArgumentError(f'graphs must be True, False or "auto", got {graphs!r}')
    options = methods, backend, pack_weights, graphs, programs, shed_modulations
    checked = [_checked(pipeline, transformer, *options) for transformer in transformers]
    for transformer in transformers:
        refuse_while_running(transformer, "patch")
    try:
        for transformer, (patched, rewritten) in zip(transformers, checked, strict=True):
            remove(transformer, "patch")
            attach(patched, transformer, pipeline, rewritten)
    except BaseException:
        for transformer in transformers:
            remove(transformer)
        raise
    parts = [
        (patched, transformer)
        for transformer, (patched, _) in zip(transformers, checked, strict=True)
    ]
    _tell_of_wrapping(parts)
    _tell_of_others(pipeline, transformers)
    return Handle(parts, pipeline)


def _checked(
    pipeline: Any | None,
    transformer: nn.Module,
    methods: Sequence[Method],
    backend: str | None,
    pack_weights: bool,
    graphs: bool | str,
    programs: bool,
    shed_modulations: str | None,
) -> tuple[Patched, Sequence[Rewrite]]:
    """A transformer's patch, and what it rewrites, after everything that can be refused was checked."""
    reuses = all(method.writes == {"reuse"} for method in methods)
    wraps = "steps" if all(method.skips_steps for method in methods) else "components"
    adapter = find_adapter(transformer, wraps if methods and reuses else "")
    methods = methods or (Dense(),)
    spec, bound = adapter.spec(transformer), ops.bind(backend)
    shed = None
    if shed_modulations is not None:
        one_of("shed_modulations", shed_modulations, PLACES)
        exact = bound.backend == "reference"
        shed = find_shed(adapter, transformer, shed_modulations, exact)
    blocks = tuple(block for _, block in adapter.blocks(transformer))
    check_composition(methods)
    for method in methods:
        method.check(spec)
        for (
            other
        ) in method.beside():  # in place of it: a book's plan was measured with its own methods
            check_composition((*(each for each in methods if each is not method), other))
    linears: tuple[nn.Linear, ...] = ()
    if pack_weights:
        check_packable(transformer, bound.backend)
        others = [part for *_, part in adapter.wrapped(transformer)]
        others += [] if shed is None else shed.layers
        linears = tuple(layer for layer in linears_of(blocks) if layer not in others)
    replays = Graphs(waits_for_host if graphs == "auto" else None) if graphs else None
    weak = nobody
    if pipeline is not None:
        clock.check_scheduler(getattr(pipeline, "scheduler", None))
        weak = weakref.ref(pipeline)
    patched = Patched(adapter, spec, methods, bound, blocks, linears, replays, weak, programs, shed)
    refuse_other_caches(patched, transformer)
    _check_backend(bound, transformer, ops_of(patched.possible))
    check_drift(adapter, transformer)
    resizing = patched.writer("resolution")
    if resizing is not None:
        adapter.check_resolution(transformer)
        _check_resizing(resizing, pipeline)
    if patched.stands_in:
        adapter.check_tokens(transformer)
    rewritten = rewrites(patched, transformer)
    if not is_installable(transformer):
        patched.programs = None
    needs = not patched.compiles
    for module in (*(module for module, _ in rewritten), *[transformer] * needs):
        check_installable(module)
    if pipeline is not None:
        patched.check_sampler(noise_of(pipeline.scheduler))
    if adapter.restates and patched.max_cache_bytes is not None:
        Cost(adapter, transformer, Size(1, 1))  # counted here, not by the first request
    return patched, rewritten


def unpatch(target: Any) -> None:
    """This removes fastdit from a pipeline or transformer, also from a deep copy, if it is there.

    Raises:
        FastDiTError: A run is in progress.
    """
    _, transformers = _resolve(target)
    for transformer in transformers:
        refuse_while_running(transformer, "unpatch")
    for transformer in transformers:
        remove(transformer)


def explain(target: Any, **kwargs: Any) -> Explanation:
    """This is :meth:`Handle.explain` of a patched pipeline or transformer."""
    return handle_of(target).explain(**kwargs)


def report(target: Any) -> Report:
    """This is :meth:`Handle.report` of a patched pipeline or transformer."""
    return handle_of(target).report()


def handle_of(target: Any) -> Handle:
    """This gives the handle of a patched pipeline or transformer.

    Raises:
        FastDiTError: It is not patched.
    """
    pipeline, transformers = _resolve(target)
    parts = [(t.__dict__[LINK], t) for t in transformers if t.__dict__.get(LINK) is not None]
    if not parts:
        raise FastDiTError(f"this {type(target).__name__} is not patched; call fastdit.patch first")
    return Handle(parts, pipeline)


def _check_arguments(methods: Sequence[Any], **switches: Any) -> None:
    for method in methods:
        if not isinstance(method, Method):
            raise ArgumentError(
                "methods must be instances such as fastdit.Dense() or fastdit.Cached(schedule), "
                f"got {method!r}{_way_out(method)}"
            )
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {value!r}")


def _way_out(given: Any) -> str:
    if isinstance(given, (Schedule, Every)):
        return ": give fastdit.Cached(it)"
    if isinstance(given, type) and issubclass(given, Method):
        return f": this is the class, give {given.__name__}(...)"
    if isinstance(given, (list, tuple)):
        return ": give them one by one, fastdit.patch(target, *methods)"
    return ""


def _resolve(target: Any) -> tuple[Any | None, list[nn.Module]]:
    """This gives the pipeline, or None, and the transformers, which torch.compile may have wrapped."""
    pipeline = None if isinstance(target, nn.Module) else target
    found = [target] if pipeline is None else [getattr(target, n, None) for n in TRANSFORMERS]
    found = [getattr(transformer, "_orig_mod", transformer) for transformer in found]
    # A pipeline may lack either, or have one for both.
    transformers = [*dict.fromkeys(part for part in found if isinstance(part, nn.Module))]
    if not transformers:
        there = f", whose transformer is {found[0]}" if hasattr(target, "transformer") else ""
        supported = sorted(
            name for adapter in adapters().values() for name in adapter.model_classes
        )
        raise UnsupportedModelError(
            f"target must be a pipeline with a transformer, or a transformer, got {type(target).__name__}{there}; "
            f"supported transformers: {', '.join(supported)}"
        )
    return pipeline, transformers


def _tell_of_wrapping(parts: Sequence[tuple[Patched, nn.Module]]) -> None:
    """A transformer without an adapter runs by wrapping; of two of one class one is told of."""
    told = {type(transformer): (patched, transformer) for patched, transformer in parts}
    for patched, transformer in told.values():
        if not patched.adapter.restates and patched.spec.kinds:
            count = Cost(patched.adapter, transformer, Size(1024, 0))
            components = sorted({name for kind in patched.spec.kinds for name in kind.components})
            warnings.warn(
                f"{type(transformer).__name__} has no adapter: its {', '.join(components)} are wrapped as they are, "
                f"about {count.reusable_share:.0%} of its arithmetic; the rest always runs, norms and residuals around "
                "reused ones too",
                stacklevel=3,
            )


def _tell_of_others(pipeline: Any | None, transformers: Sequence[nn.Module]) -> None:
    """Some pipelines have a transformer of their own for the other branch of guidance; it stays as it is."""
    for name, part in getattr(pipeline, "__dict__", {}).items():
        known = any(getattr(part, "_orig_mod", part) is transformer for transformer in transformers)
        if isinstance(part, type(transformers[0])) and not known and LINK not in part.__dict__:
            warnings.warn(
                f"{name} of this {type(pipeline).__name__} is not patched with its transformer; call "
                f"fastdit.patch(pipe.{name}, ...) too",
                stacklevel=3,
            )


def _check_backend(bound: Any, transformer: nn.Module, names: Sequence[str]) -> None:
    weight = next(
        (p for p in transformer.parameters() if p.is_floating_point() and p.device.type != "meta"),
        None,
    )
    if weight is not None:
        for op in names:
            bound.backend_for(op, weight.device, transformer.dtype)
        choices(weight.device)  # read before a run asks


def _check_resizing(method: Method, pipeline: Any | None) -> None:
    """A method that changes the resolution leads the scheduler, and may decode."""
    if pipeline is None:
        raise UnsupportedModelError(
            f"target must be a pipeline for {method.name}, which leads its scheduler; got a transformer"
        )
    if all(isinstance(getattr(pipeline, name, None), nn.Module) for name in TRANSFORMERS):
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has two transformers that take turns; {method.name} leads a run of one"
        )
    check_flow(getattr(pipeline, "scheduler", None))
    if method.selector == "edges" and getattr(pipeline, "vae", None) is None:
        raise UnsupportedModelError(
            f'{method.name} selector="edges" decodes by the pipeline\'s vae, but it has none; '
            'accepted are "gradient" and "variance"'
        )
