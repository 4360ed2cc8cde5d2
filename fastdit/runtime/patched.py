"""A patched model is what never changes while it is patched, shared by all threads and pipelines.

Its native hooks hand each call of the transformer to the run that it belongs to (`runs.py`).
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from fastdit.blocks.forward import Forward
from fastdit.errors import ArgumentError, FastDiTError
from fastdit.observe import observed
from fastdit.programs.library import Programs
from fastdit.runtime import arrivals, owners
from fastdit.runtime.call import Call
from fastdit.runtime.followed import Followed
from fastdit.runtime.graphs import Graphs
from fastdit.runtime.run import Run, nobody
from fastdit.runtime.runs import Runs
from fastdit.runtime.shed import Shed
from fastdit.runtime.timesteps import Timesteps
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.plan import RunPlan, plan_run, weights_of
from fastdit.spec import ModelSpec

#: plans that are kept: numbers of steps, and which of them compute a part of the tokens
PLANS = 32

_uncompiled = functools.cache(torch.compiler.disable)


class _Here(threading.local):
    """The transformer call in progress in a thread, and what its blocks ask, are each thread's own."""

    call: Call | None = None
    forward: Forward | None = None


@dataclass(eq=False, repr=False)
class Patched:
    """This is a patched transformer: what is fixed when patching, and what follows from it.

    Attributes:
        adapter, spec, methods, ops: What runs.
        blocks: The transformer's blocks of all kinds in running order.
        linears: Layers of the blocks whose weights are kept packed in a run.
        graphs: What captures and replays whole runs; None where they stay eager.
        programs: What stands for whole calls; None where all calls stay as they are.
        pipeline: Weak reference to the pipeline that was patched, or what gives None.
        records: Whether calls may be recorded as programs.
        shed: The modulation layers whose weights lie elsewhere; None where all stay.
        here: The call in progress in this thread.
        runs, followed: Its runs, and the pipelines and schedulers that tell of them.
        eager: True on the `reference` backend: no rewrite that changes a rounding.
        stands_in: Whether the adapter's own attention may run in the place of diffusers' processors.
        acts, forecasts, adapts: Whether a method leaves anything out, draws outputs through earlier ones, or does so
            where that was better than a repeat.
        made_steps: The number of steps that a method was made for, or None.
        asks_guidance: A run's guidance is read when it starts.
        max_cache_bytes: The least that a method allows caches to hold; None for no bound.
    """

    adapter: Any
    spec: ModelSpec
    methods: tuple[Any, ...]
    ops: Any
    blocks: tuple[nn.Module, ...]
    linears: tuple[nn.Linear, ...] = ()
    graphs: Graphs | None = None
    pipeline: Callable[[], Any] = nobody
    records: bool = True
    shed: Shed | None = None

    def __post_init__(self) -> None:
        self.here = _Here()
        self.runs, self.followed = Runs(self), Followed(self)
        self.eager = self.ops.backend == "reference"
        self.acts = any(method.writes for method in self.methods)
        self.forecasts = any(method.forecasts for method in self.methods)
        known = self.adapter.restates and not self.linears
        self.programs = Programs() if known and self.records and not self.eager else None
        sizes = self.writer("rows"), self.writer("resolution")
        #: some tokens pass in a forward of the adapter's
        self.runs_model = self.adapter.restates_model and sizes != (None, None)
        #: torch's compiler traces the transformer's own forward
        self.compiles = not (self.graphs is not None or self.forecasts or self.runs_model)
        self.adapts = any(method.adapts for method in self.methods)
        self.made_steps = self._first("run_steps")
        self.asks_guidance = any(
            method.made_for is not None or method.asks_guidance for method in self.methods
        )
        bounds = (m.max_cache_bytes for m in self.methods if m.max_cache_bytes is not None)
        self.max_cache_bytes: int | None = min(bounds, default=None)
        self._cache_dtype: str | None = self._first("cache_dtype")
        # A family that runs two token sizes by its own attention may do so for one image of several.
        resized = self.writer("resolution") is not None and self.adapter.replaces_attention
        weighs = any(method.weighs_keys for method in self.possible)
        self.stands_in = self.writer("rows") is not None or weighs or resized
        self._plans: dict[Any, RunPlan] = {}
        # Hooks that a compiled model calls as they are. Bound methods, so that a copied model's hooks belong to its own
        # patch; wrapped here and not in the class, since torch's compiler takes long to import.
        self.forward_pre_hook = types.MethodType(_uncompiled(Patched.before_forward), self)
        self.forward_hook = types.MethodType(_uncompiled(Patched.after_forward), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        """A copied model gets a patch of its own: the same methods, the copied blocks, no run."""
        clone = memo[id(self)] = Patched.__new__(Patched)
        pipeline = memo.get(id(self.pipeline()))  # where the whole pipeline is being copied
        given = {part.name: getattr(self, part.name) for part in fields(self)}
        given["blocks"], given["linears"] = copy.deepcopy((self.blocks, self.linears), memo)
        given["graphs"] = self.graphs and self.graphs.another()
        given["shed"] = self.shed and self.shed.another(memo)
        given["pipeline"] = nobody if pipeline is None else weakref.ref(pipeline)
        clone.__init__(**given)
        if pipeline is not None:  # an ordinary one again, but for the copied hook on its decoder
            clone.followed.pipelines[id(pipeline)] = pipeline
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FastDiTError(
            "a patched model cannot be pickled: call fastdit.unpatch first; "
            "state_dict and save_pretrained work as they are"
        )

    def _first(self, name: str) -> Any:
        values = (getattr(method, name) for method in self.methods)
        return next((value for value in values if value is not None), None)

    @property
    def possible(self) -> tuple[Any, ...]:
        """The methods, and those that some of their runs go by as well."""
        return tuple(each for method in self.methods for each in (method, *method.beside()))

    def writer(self, field: str, steps: int | None = None, budget: Any = None) -> Any:
        """This gives the method that decides a field of a run's plan; None where none does.

        Without a number of steps it is one that does so in some run.
        """
        methods = self.possible if steps is None else self.under(budget, steps)
        return next((method for method in methods if field in method.writes), None)

    def under(self, budget: Any, steps: int | None = None) -> tuple[Any, ...]:
        """The methods of a run that has this budget in place of the patch's; None for the patch's own.

        With the run's number of steps, those that they go by as well are among them.
        """
        found = (
            self.methods
            if budget is None
            else tuple(budget if type(m) is type(budget) else m for m in self.methods)
        )
        if steps is None:
            return found
        return tuple(each for method in found for each in (method, *method.beside(steps)))

    def check_sampler(self, noise: str, scheduler: str = "", budget: Any = None) -> None:
        """This refuses a sampler that a method does not fit, see :meth:`Method.check_sampler`."""
        for method in self.under(budget):
            method.check_sampler(noise, scheduler)

    def plan(
        self,
        steps: int,
        partial: tuple[bool, ...] = (),
        timesteps: Timesteps | None = None,
        budget: Any = None,
    ) -> RunPlan:
        """This makes the plan of a run, and keeps it, unless it was mapped to other timesteps."""
        repeats = self.forecasts and timesteps is not None and timesteps.repeat
        fitted = bool(weights_of(self.under(budget, steps), steps, timesteps))
        key = steps, partial, repeats, budget, fitted
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        given = steps, partial, timesteps, not self.eager, repeats
        plan = self.planned(*given, budget=budget)
        if plan.reuse is None or not plan.reuse.taken:
            if len(self._plans) >= PLANS:
                self._plans = {}
            self._plans[key] = plan
        return plan

    def planned(self, *given: Any, budget: Any = None) -> RunPlan:
        """The plan of a run whose number of steps, partial ones, and so on are `given` as to :func:`plan_run`."""
        methods = self.under(budget, given[0])
        return plan_run(methods, self.spec, *given, self.graphs is not None)

    # ---- one transformer call

    def before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The transformer's native forward pre-hook finds the call's run, and gives what :meth:`Call.begin` does."""
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
        branch = run.locate(site, arguments.timestep)
        try:
            if not run.image_tokens:
                self._check_first_call(transformer, run, arguments)
            given = call.begin(run, branch, transformer, arguments, args, kwargs)
        except FastDiTError:
            run.end()
            raise
        return given

    def after_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """The transformer's native forward hook ends this call, after an exception too, as :meth:`Call.finish` does."""
        here = self.here
        call = here.call
        if call is None:
            return None
        here.call = call.outer
        here.forward = None if call.outer is None else call.outer.forward
        ran = call.forward is not None or call.program is not None or call.forecast is not None
        return call.finish(output) if ran and output is not None else None

    def __call__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The transformer's rewritten forward computes the call, where runs are replayed."""
        call = self.here.call
        if call is None or (call.forward is None and call.forecast is None and call.model is None):
            return type(transformer).forward(transformer, *args, **kwargs)
        return call.compute(args, kwargs)

    # ---- what a run's first call shows

    def _check_first_call(self, transformer: nn.Module, run: Run, arguments: Any) -> None:
        """This refuses a run that a method was not made for, or that something which came after `patch` would spoil."""
        arrivals.refuse_replaced_blocks(self, transformer)
        arrivals.refuse_other_caches(self, transformer)
        if self.stands_in:
            arrivals.refuse_other_attention(self, arguments.tells_attention)
        if self.asks_guidance:
            self._check_conditions(run, arguments.tokens)
        run.image_tokens, run.text_tokens = arguments.tokens, arguments.text
        self.runs.note(run)

    def _check_conditions(self, run: Run, tokens: int) -> None:
        """This refuses a run that a method was not made for, or has another in its place."""
        methods = self.under(run.budget)
        made = [method for method in methods if method.made_for is not None]
        found = Conditions(image_tokens=tokens, **run.guidance)
        if made:  # only where somebody asks: the timesteps may have to come from a GPU
            found = replace(Conditions.of(run.scheduler, tokens, {}), **run.guidance)
            for method in made:
                method.made_for.check(found, method.name, method.otherwise)
        for other in filter(None, [m.instead(found, run.timesteps) for m in methods]):
            run.go_by(other)

    def _refuse_checkpointing(self, transformer: nn.Module) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when the caches have moved on."""
        if getattr(transformer, "gradient_checkpointing", False):
            raise ArgumentError(
                "a schedule cannot run under gradient checkpointing, which recomputes blocks in the backward pass; "
                "call disable_gradient_checkpointing() on the transformer, or run under torch.no_grad()"
            )

    # ---- what calls ask

    def may_collapse(self) -> bool:
        """Reused outputs may be kept as sums where nobody looks at the stream between blocks."""
        return not self.eager and not any(map(observed, self.blocks))

    def holds_sums(self, streams: torch.dtype) -> bool:
        """This tells whether slots hold sums of outputs, which without their gates may leave the range of fp16."""
        return torch.float16 not in (self.precision(streams) or (streams,))

    def precision(self, streams: torch.dtype) -> tuple[torch.dtype, torch.dtype] | None:
        """This gives the dtypes of slots and streams, where a method keeps less than the model computes in."""
        if self._cache_dtype is None:
            return None
        slots = getattr(torch, self._cache_dtype)
        return (slots, streams) if slots.itemsize < streams.itemsize else None

    def compiled_call(self, transformer: nn.Module, run: Run) -> Any:
        """The transformer's compiled call is that of `transformer.compile()` or of the pipeline's wrapper; or None."""
        pipeline = run.pipeline() or self.pipeline()
        wrappers = [getattr(pipeline, name, None) for name in owners.TRANSFORMERS]
        if not any(wrapper is transformer for wrapper in wrappers):
            for wrapper in wrappers:  # a module takes long to say that it lacks an attribute
                if getattr(wrapper, "_orig_mod", None) is transformer:
                    return wrapper.forward
        return transformer._compiled_call_impl
