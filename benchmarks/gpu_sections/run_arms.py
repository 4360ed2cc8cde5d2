"""What draws a whole run: the stock pipeline, the best that two lines of diffusers make of it, rivals, and fastdit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdit
from attention import MODELS, TINY_MODELS, TORCH, inputs, torch_contenders
from fastdit import Schedule
from fastdit.adapters import find_adapter
from gpu_sections.place import Place
from gpu_sections.stand_ins import captures
from real_runs import Runs
from timing import race

UNPATCHED, COMPILED, DENSE = "unpatched", "compiled, best attention", "dense"
CACHE_DIT = "cache-dit, every 2nd step"
FIRST_BLOCK_CACHE = "FirstBlockCache, all but the first step"
RIVALS = (CACHE_DIT, FIRST_BLOCK_CACHE)
GRAPHS = ", graphs"
RALU_PRESETS = {"FluxTransformer2DModel": "flux-7x", "SD3Transformer2DModel": "sd3-3x"}
#: names of diffusers' own dispatcher for torch's backends, where an attention asks it
DISPATCHED = {"cudnn": "_native_cudnn", "flash": "_native_flash", "efficient": "_native_efficient"}


class Absent(Exception):
    """What an arm needs is not installed here."""


@dataclass(frozen=True)
class Arm:
    """One way to draw.

    Attributes:
        name: As tables call it.
        kind: "baseline", "rival" or "fastdit".
        enter: Makes the pipeline draw so within a `with`, which may give a handle.
        steps: Its own number; None for the model's usual one.
        steady: Any few of its steps are like all of them.
        graphs: Of three equal runs only the third is a replay.
        guess: What its first visit may cost: so many unpatched runs, and seconds besides.
    """

    name: str
    kind: str
    enter: Callable[[Runs, Place], AbstractContextManager[Any]]
    steps: int | None = None
    steady: bool = False
    graphs: bool = False
    guess: tuple[float, float] = (2.0, 1.0)


def arms_of(runs: Runs) -> dict[str, Arm]:
    """All that the model's family can, by name."""
    steps, align = runs.steps, 1 if runs.tiny else 64

    def every(n: int, order: int = 0) -> Any:
        return fastdit.Cached(Schedule.every(n), order=order)

    def ras(ratio: float) -> Any:
        return fastdit.RAS(ratio=ratio, align=align)

    # what of an unpatched run's time it may take, and what is patched in
    methods: dict[str, tuple[float, Callable[[Any], list[Any]]]] = {
        DENSE: (0.9, lambda pipe: []),
        "every(2)": (0.5, lambda pipe: [every(2)]),
        "every(3)": (0.4, lambda pipe: [every(3)]),
        "every(2), order 1": (0.5, lambda pipe: [every(2, 1)]),
        "random 75 %": (0.3, lambda pipe: [_random(pipe, steps, 0.75)]),
        "RAS 0.5": (0.8, lambda pipe: [ras(0.5)]),
        "RAS 0.25": (0.6, lambda pipe: [ras(0.25)]),
        "RAS 0.25 + every(2)": (0.4, lambda pipe: [ras(0.25), every(2)]),
    }
    found = [Arm(UNPATCHED, "baseline", _unpatched, steady=True)]
    found.append(Arm(COMPILED, "baseline", compiled, steady=True, guess=(2.0, 30.0)))
    for name, (share, make) in methods.items():
        guess = (3 * share, 1.0), (4 * share, 1.0)
        enter = _patched(make), _patched(make, graphs=True)
        found.append(Arm(name, "fastdit", enter[0], steady=name == DENSE, guess=guess[0]))
        found.append(Arm(name + GRAPHS, "fastdit", enter[1], graphs=True, guess=guess[1]))
    if preset := RALU_PRESETS.get(runs.real.cls):
        ralu = fastdit.RALU.preset(preset)
        enter = _patched(lambda pipe: [ralu]), _patched(lambda pipe: [ralu], graphs=True)
        name, steps = f"RALU {preset}", ralu.run_steps
        found.append(Arm(name, "fastdit", enter[0], steps=steps))
        found.append(Arm(name + GRAPHS, "fastdit", enter[1], steps=steps, graphs=True))
    found.append(Arm(CACHE_DIT, "rival", cache_dit))
    found.append(Arm(FIRST_BLOCK_CACHE, "rival", first_block_cache))
    return {arm.name: arm for arm in found}


@torch.no_grad()
def tune(runs: Runs, place: Place) -> None:
    """fastdit's attention is measured once, as its users do, since the compiled baseline has its best one too."""
    if place.rehearsal:
        place.stands_in("attentions are not measured, torch chooses")
        return
    handle = fastdit.patch(runs.pipe, fastdit.RAS(ratio=0.25))
    try:
        with handle.tune_attention() as tuning:
            runs.draw(8)
    finally:
        handle.unpatch()
    place.answer.facts[f"attention, {runs.real.name}"] = str(tuning)


def _unpatched(runs: Runs, place: Place) -> AbstractContextManager[None]:
    return nullcontext()


def _patched(
    make: Callable[[Any], list[Any]], graphs: bool = False
) -> Callable[[Runs, Place], AbstractContextManager[Any]]:
    """A pipeline patched with what `make` gives."""

    @contextmanager
    def enter(runs: Runs, place: Place) -> Iterator[Any]:
        with captures(place) if graphs else nullcontext():
            handle = fastdit.patch(runs.pipe, *make(runs.pipe), graphs=graphs)
            try:
                yield handle
            finally:
                handle.unpatch()

    return enter


@contextmanager
def compiled(runs: Runs, place: Place) -> Iterator[None]:
    """Compiled blocks, with the attention that is the fastest at this model's shape."""
    model, options = runs.transformer, {"fullgraph": True}
    if place.rehearsal:
        options["backend"] = "eager"
        place.stands_in("torch.compile traces, and its eager backend stands for Inductor")
    with ExitStack() as stack:
        stack.enter_context(best_attention(runs, place))
        stack.callback(_leave_uncompiled, model)
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(**options)
        else:  # what that does, for a class that does not say which blocks are repeated
            for block in model.transformer_blocks:
                block.compile(**options)
        yield


def _leave_uncompiled(model: Any) -> None:
    for module in model.modules():
        module._compiled_call_impl = None


@contextmanager
def best_attention(runs: Runs, place: Place) -> Iterator[None]:
    """The fastest of torch's backends at the shape of this model's attention, as diffusers lets a user take it."""
    (form,) = (form for form in MODELS if runs.real.name.startswith(form.model))
    q, k, v = inputs(TINY_MODELS[0] if runs.tiny else form, 1.0, place.device, place.dtype)
    contenders = {
        name: lambda i, call=call: call() for name, call in torch_contenders(q, k, v).items()
    }
    found = race(contenders, 1, place.device, turns=3).seconds
    best = min(found, key=found.__getitem__)
    us = {name: 1e6 * seconds for name, seconds in found.items()}
    place.tell(**{f"attention of {runs.real.name}": {"best": best, "us": us}})
    asks = any(hasattr(m, "_attention_backend") for m in _processors(runs.transformer))
    if best == "torch" or place.rehearsal:
        yield
    elif asks:
        runs.transformer.set_attention_backend(DISPATCHED[best])
        try:
            yield
        finally:
            runs.transformer.set_attention_backend("native")
            runs.transformer.reset_attention_backend()
    else:
        with sdpa_kernel([_backend(best)]):
            yield


def _processors(model: Any) -> list[Any]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


def _backend(name: str) -> SDPBackend:
    (found,) = (b for b in TORCH if b.name.removesuffix("_ATTENTION").lower() == name)
    return found


@contextmanager
def cache_dit(runs: Runs, place: Place) -> Iterator[None]:
    """cache-dit at every second step: what it would decide by itself says nothing on random weights.

    Raises:
        Absent: It is not installed.
    """
    if importlib.util.find_spec("cache_dit") is None:
        raise Absent("cache-dit is not installed: give its wheel by --wheels FOLDER")
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=runs.steps,
        steps_computation_mask=[1 - step % 2 for step in range(runs.steps)],
        steps_computation_policy="static",
    )
    with _given_back(runs.transformer):
        cache_dit.enable_cache(runs.pipe, cache_config=config)
        try:
            yield
        finally:
            cache_dit.disable_cache(runs.pipe)


@contextmanager
def _given_back(model: nn.Module) -> Iterator[None]:
    """Each module has its own attributes again afterwards: cache-dit leaves a forward of its own on FLUX."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in before:
            vars(module).clear()
            vars(module).update(own)


@contextmanager
def first_block_cache(runs: Runs, place: Place) -> Iterator[None]:
    """diffusers' own, told that no step differs from the one before: a step of it that reuses is what is measured."""
    from diffusers import FirstBlockCacheConfig

    runs.transformer.enable_cache(FirstBlockCacheConfig(threshold=torch.finfo(torch.float32).max))
    try:
        yield
    finally:
        runs.transformer.disable_cache()


def _random(pipe: Any, steps: int, reused: float) -> Any:
    """Single components reused at random: no searched schedule is less regular."""
    spec = find_adapter(pipe.transformer).spec(pipe.transformer)
    random, kept = np.random.default_rng(0), 1 - reused * steps / (steps - 1)
    bits = {
        kind.name: random.random((steps, kind.count, len(kind.components))) < kept
        for kind in spec.kinds
    }
    components = {kind.name: kind.components for kind in spec.kinds}
    return fastdit.Cached(Schedule.from_bits(bits, components))
