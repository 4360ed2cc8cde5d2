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
from fastdit.blocks.prepacked import check_packable, linears_of
from fastdit.drift import check_drift
from fastdit.errors import ArgumentError, FastDiTError, UnsupportedModelError
from fastdit.handle import Handle
from fastdit.methods.base import Method
from fastdit.methods.budget import budgeted
from fastdit.methods.dense import Dense
from fastdit.runtime import clock
from fastdit.runtime.arrivals import refuse_other_caches
from fastdit.runtime.attach import attach, remove, rewrites
from fastdit.runtime.graphs import Graphs
from fastdit.runtime.install import LINK, check_installable, is_installable
from fastdit.runtime.patched import Patched
from fastdit.runtime.run import nobody
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
    speedup: float | None = None,
    quality: str | None = None,
    latency: float | str | None = None,
    vram: int | str | None = None,
    book: PlanBook | str | os.PathLike[str] | None = None,
    guard: bool = False,
) -> Handle:
    """This makes a diffusers pipeline or transformer run on fastdit.

    Args:
        target: A pipeline with a supported `transformer`, or the transformer itself.
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
        speedup, quality, latency: One of them, in place of methods: a :class:`Budget`. A latency is a number of seconds
            or a text, "0.8s" or "800ms".
        vram: Most bytes that its caches may hold: a number or a text, "+2GiB".
        book: Its :class:`PlanBook`, or the path of one; by default the package's, for the models in it.
        guard: Compute whatever turns out to be further off than the book's plan was, see :class:`Budget`.

    Returns:
        A :class:`Handle`. A second patch of the same model replaces the first.

    Raises:
        UnsupportedModelError: No adapter knows the model; names what is supported.
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
    pipeline, transformer = _resolve(target)
    _check_arguments(methods, pack_weights=pack_weights, programs=programs)
    asked = {"speedup": speedup, "quality": quality, "latency": latency, "vram": vram, "book": book}
    asked["guard"] = guard
    methods = budgeted(transformer, methods, **asked)
    if not (isinstance(graphs, bool) or graphs == "auto"):
        raise ArgumentError(f'graphs must be True, False or "auto", got {graphs!r}')
    reuses = all(method.writes == {"reuse"} for method in methods)
    wraps = "steps" if all(method.skips_steps for method in methods) else "components"
    adapter = find_adapter(transformer, wraps if methods and reuses else "")
    methods = methods or (Dense(),)
    spec, bound = adapter.spec(transformer), ops.bind(backend)
    blocks = tuple(block for _, block in adapter.blocks(transformer))
    check_composition(methods)
    for method in methods:
        method.check(spec)
    linears: tuple[nn.Linear, ...] = ()
    if pack_weights:
        check_packable(transformer, bound.backend)
        wrapped = [part for *_, part in adapter.wrapped(transformer)]
        linears = tuple(layer for layer in linears_of(blocks) if layer not in wrapped)
    replays = Graphs(waits_for_host if graphs == "auto" else None) if graphs else None
    weak = nobody
    if pipeline is not None:
        clock.check_scheduler(getattr(pipeline, "scheduler", None))
        weak = weakref.ref(pipeline)
    patched = Patched(adapter, spec, methods, bound, blocks, linears, replays, weak, programs)
    refuse_other_caches(patched, transformer)
    _check_backend(bound, transformer, ops_of(methods))
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
    needs = bool(graphs) or patched.forecasts
    for module in (*(module for module, _ in rewritten), *[transformer] * needs):
        check_installable(module)
    if pipeline is not None:
        patched.check_sampler(noise_of(pipeline.scheduler))
    if adapter.restates and patched.max_cache_bytes is not None:
        Cost(adapter, transformer, Size(1, 1))  # counted here, not by the first request
    remove(transformer, "patch")
    attach(patched, transformer, pipeline, rewritten)
    if not adapter.restates and wraps == "components":
        count = Cost(adapter, transformer, Size(1024, 0))
        components = sorted({name for kind in spec.kinds for name in kind.components})
        warnings.warn(
            f"{type(transformer).__name__} has no adapter: its {', '.join(components)} are wrapped as they are, about "
            f"{count.reusable_share:.0%} of its arithmetic; the rest always runs, norms and residuals around reused "
            "ones too",
            stacklevel=2,
        )
    _tell_of_others(pipeline, transformer)
    return Handle(patched, transformer, pipeline)


def unpatch(target: Any) -> None:
    """This removes fastdit from a pipeline or transformer, also from a deep copy, if it is there.

    Raises:
        FastDiTError: A run is in progress.
    """
    _, transformer = _resolve(target)
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
    pipeline, transformer = _resolve(target)
    patched = transformer.__dict__.get(LINK)
    if patched is None:
        raise FastDiTError(f"this {type(target).__name__} is not patched; call fastdit.patch first")
    return Handle(patched, transformer, pipeline)


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


def _resolve(target: Any) -> tuple[Any | None, nn.Module]:
    """This gives the pipeline, or None, and the transformer, which torch.compile may have wrapped."""
    pipeline = None if isinstance(target, nn.Module) else target
    transformer = target if pipeline is None else getattr(target, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, nn.Module):
        there = f", whose transformer is {transformer}" if hasattr(target, "transformer") else ""
        supported = sorted(
            name for adapter in adapters().values() for name in adapter.model_classes
        )
        raise UnsupportedModelError(
            f"target must be a pipeline with a transformer, or a transformer, got {type(target).__name__}{there}; "
            f"supported transformers: {', '.join(supported)}"
        )
    return pipeline, transformer


def _tell_of_others(pipeline: Any | None, transformer: nn.Module) -> None:
    """Some pipelines have a second transformer, for other steps or the other branch of guidance; it stays as it is."""
    for name, part in getattr(pipeline, "__dict__", {}).items():
        known = part is transformer or getattr(part, "_orig_mod", part) is transformer
        if isinstance(part, type(transformer)) and not known and LINK not in part.__dict__:
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
    check_flow(getattr(pipeline, "scheduler", None))
    if method.selector == "edges" and getattr(pipeline, "vae", None) is None:
        raise UnsupportedModelError(
            f'{method.name} selector="edges" decodes by the pipeline\'s vae, but it has none; '
            'accepted are "gradient" and "variance"'
        )
