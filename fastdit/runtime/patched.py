"""A patched model: what never changes while it is patched, shared by all threads and pipelines.

Native hooks hand each call of the transformer to the run that it belongs to (`runs.py`).
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdit.blocks.forward import Forward
from fastdit.errors import ArgumentError, FastDiTError
from fastdit.observe import observed
from fastdit.runtime import clock, owners
from fastdit.runtime.arrivals import (
    refuse_other_attention,
    refuse_other_caches,
    refuse_replaced_blocks,
)
from fastdit.runtime.call import Call
from fastdit.runtime.followed import Followed
from fastdit.runtime.graphs import Graphs
from fastdit.runtime.run import Run
from fastdit.runtime.runs import Runs
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.plan import RunPlan, plan_run
from fastdit.spec import ModelSpec

#: plans that are kept: numbers of steps, and which of them compute a part of the tokens
PLANS = 32


class _Here(threading.local):
    """The transformer call in progress in a thread, and what its blocks ask."""

    call: Call | None = None
    forward: Forward | None = None


class Patched:
    """A patched transformer.

    Attributes:
        adapter, spec, methods, ops: What runs, fixed when patching.
        blocks: The transformer's blocks of all kinds in running order.
        eager: True on the `reference` backend: no rewrite that changes a rounding.
        linears: Layers of the blocks whose weights are kept packed in a run.
        graphs: What captures and replays whole runs; None where they stay eager.
        pipeline: The pipeline that was patched: a weak reference, or what gives None.
        acts: Whether a method leaves anything out.
        max_cache_bytes: The least that a method allows caches to hold; None for no bound.
        here: The call in progress in this thread.
        runs, followed: Its runs, and the pipelines and schedulers that tell of them.
    """

    def __init__(
        self,
        adapter: Any,
        spec: ModelSpec,
        methods: Sequence[Any],
        ops: Any,
        blocks: Sequence[nn.Module],
        eager: bool,
        linears: Sequence[nn.Linear] = (),
        graphs: Graphs | None = None,
        pipeline: Any = None,
    ) -> None:
        self.adapter = adapter
        self.spec = spec
        self.methods = tuple(methods)
        self.ops = ops
        self.blocks = tuple(blocks)
        self.eager = eager
        self.linears = tuple(linears)
        self.graphs = graphs
        self.pipeline: Callable[[], Any] = _nobody if pipeline is None else weakref.ref(pipeline)
        self.acts = any(method.writes for method in self.methods)
        # A family that runs two token sizes by its own attention may do so for one image of several.
        self._stands_in = self.writer("rows") is not None or (
            self.writer("resolution") is not None and adapter.replaces_attention
        )
        self.asks = any(method.made_for is not None for method in self.methods)
        bounds = (m.max_cache_bytes for m in self.methods if m.max_cache_bytes is not None)
        self.max_cache_bytes: int | None = min(bounds, default=None)
        dtypes = (m.cache_dtype for m in self.methods if m.cache_dtype is not None)
        self._cache_dtype: str | None = next(dtypes, None)
        self.here = _Here()
        self._plans: dict[Any, RunPlan] = {}
        self.runs = Runs(self)
        self.followed = Followed(self)
        # Hooks that a compiled model calls as they are. Bound methods, so that a copied model's hooks belong to its own
        # patch; wrapped here and not in the class, since torch's compiler takes long to import.
        self.forward_pre_hook = types.MethodType(_uncompiled(Patched.before_forward), self)
        self.forward_hook = types.MethodType(_uncompiled(Patched.after_forward), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        """A copied model gets a patch of its own: the same methods, the copied blocks, no run."""
        clone = Patched.__new__(Patched)
        memo[id(self)] = clone
        pipeline = memo.get(id(self.pipeline()))  # where the whole pipeline is being copied
        clone.__init__(
            self.adapter,
            self.spec,
            self.methods,
            self.ops,
            copy.deepcopy(self.blocks, memo),
            self.eager,
            copy.deepcopy(self.linears, memo),
            self.graphs and Graphs(),
            pipeline,
        )
        if pipeline is not None:  # an ordinary one again, but for the copied hook on its decoder
            clone.followed.pipelines[id(pipeline)] = pipeline
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FastDiTError(
            "a patched model cannot be pickled: call fastdit.unpatch first; "
            "state_dict and save_pretrained work as they are"
        )

    def writer(self, field: str) -> Any:
        """The method that decides a field of the plan; None where none does."""
        return next((method for method in self.methods if field in method.writes), None)

    def plan(
        self, steps: int, partial: tuple[bool, ...] = (), levels: clock.Levels | None = None
    ) -> RunPlan:
        """The plan of a run. One that was mapped to other noise levels is made anew for each run."""
        key = steps, partial
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        plan = plan_run(self.methods, self.spec, steps, partial, levels, not self.eager)
        if plan.reuse is None or not plan.reuse.rows:
            if len(self._plans) >= PLANS:
                self._plans = {}
            self._plans[key] = plan
        return plan

    # ---- one transformer call

    def before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Native forward pre-hook of the transformer: place this call in its run and prepare it.

        Returns:
            The arguments of a call of the active tokens alone; None where all tokens pass.
        """
        here = self.here
        if here.call is not None and not owners.is_inside(transformer):
            here.call = None
        call = here.call = Call(here.call)
        here.forward = None
        arguments = self.adapter.call(transformer, args, kwargs)
        run, site = self.runs.of(arguments.timestep)
        call.run = run  # from now on what ends the run takes the call away, where an interrupt passes by the hook below
        if run is None:
            return None
        if self.acts and torch.is_grad_enabled():
            self._refuse_checkpointing(transformer)
        place = run.place(site, arguments.timestep)
        try:
            if not run.image_tokens:
                self._check_first_call(transformer, run, arguments)
            given = call.begin(run, place, transformer, arguments, args, kwargs)
        except FastDiTError:
            run.end()
            raise
        here.forward = call.forward
        return given

    def after_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """Native forward hook of the transformer, also called after an exception.

        Returns:
            The output with the velocities of all tokens after a call of the active ones; None to leave it.
        """
        here = self.here
        call = here.call
        if call is None:
            return None
        here.call = call.outer
        here.forward = None if call.outer is None else call.outer.forward
        if call.forward is None or output is None:
            return None
        return call.finish(output)

    def __call__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The transformer's rewritten forward, where runs are replayed."""
        call = self.here.call
        if call is None or call.forward is None:
            return type(transformer).forward(transformer, *args, **kwargs)
        return call.compute(args, kwargs)

    # ---- what a run's first call shows

    def _check_first_call(self, transformer: nn.Module, run: Run, arguments: Any) -> None:
        """Refuse a run that a method was not made for, or that something which came after `patch` would spoil."""
        refuse_replaced_blocks(self, transformer)
        if self.acts:
            names = " + ".join(method.name for method in self.methods)
            refuse_other_caches(transformer, self.blocks, names)
        if self._stands_in:
            refuse_other_attention(self, arguments.tells_attention)
        wanted = {m.name: m.made_for for m in self.methods if m.made_for is not None}
        # Only where somebody asks: the timesteps may have to come from a GPU.
        found = (
            replace(Conditions.of(run.scheduler, arguments.tokens, {}), **run.guidance)
            if wanted
            else None
        )
        for name, conditions in wanted.items():
            conditions.check(found, name)
        run.image_tokens, run.text_tokens = arguments.tokens, arguments.text
        self.runs.note(run)

    def _refuse_checkpointing(self, transformer: nn.Module) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when the caches have moved on."""
        if getattr(transformer, "gradient_checkpointing", False):
            raise ArgumentError(
                "a schedule cannot run under gradient checkpointing, which recomputes blocks in the backward pass; "
                "call disable_gradient_checkpointing() on the transformer, or run under torch.no_grad()"
            )

    # ---- what calls ask

    def may_collapse(self) -> bool:
        """Whether reused outputs may be kept as sums: nobody looks at the stream between blocks."""
        return not self.eager and not any(map(observed, self.blocks))

    def precision(self, arguments: Any) -> tuple[torch.dtype, torch.dtype] | None:
        """(dtype of slots, dtype of the streams) where a method keeps less than the model computes in."""
        if self._cache_dtype is None:
            return None
        slots, streams = getattr(torch, self._cache_dtype), arguments.hidden_states.dtype
        return (slots, streams) if slots.itemsize < streams.itemsize else None

    def compiled_call(self, transformer: nn.Module, run: Run) -> Any:
        """The transformer's compiled call, by `transformer.compile()` or a wrapper in the pipeline; or None."""
        pipeline = run.pipeline() or self.pipeline()
        wrapper = getattr(pipeline, "transformer", None)
        if getattr(wrapper, "_orig_mod", None) is transformer:
            return wrapper.forward
        return transformer._compiled_call_impl


def _nobody() -> None:
    """In place of a weak reference to nothing."""


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)
