"""Everything that lives as long as a patched model: the clock, the run in progress, its slots and its report.

One session per transformer. It learns where a run stands from three places: the scheduler (`clock.py`), the
transformer's native forward hooks, and, where there is no scheduler, the timestep argument. A run's state is a
:class:`Run`; starting, ending or aborting a run drops it whole, so nothing crosses from one run to the next.
"""

from __future__ import annotations

import copy
import functools
import time
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import attention, clock
from fastdit.adapters.base import Size
from fastdit.conditions import Conditions
from fastdit.cost import Cost
from fastdit.errors import ArgumentError, FastDiTError, ScheduleError
from fastdit.forward import Forward, Slots, Tokens
from fastdit.frames import Frames
from fastdit.graphs import CaptureError, Graphs, Trace
from fastdit.layout import Layout
from fastdit.modulation import Modulations
from fastdit.observe import observed, private
from fastdit.packed import PackedWeights
from fastdit.plan import RunPlan, plan_run
from fastdit.resolution import ResolutionRun
from fastdit.spec import ModelSpec
from fastdit.sums import Sums
from fastdit.tokens import TokenRun

#: steps planned for when nobody says how many there will be: the training timesteps of every supported family
OPEN_STEPS = 1000


@dataclass
class StepRecord:
    """What one step did: tokens through the blocks, components computed and reused, summed over its calls."""

    tokens: int = 0
    computed: int = 0
    reused: int = 0


@dataclass
class Branch:
    """The caches of one transformer call within a step (batched CFG has one, sequential CFG two)."""

    slots: Slots = field(default_factory=dict)
    owned: set[tuple[int, str]] = field(default_factory=set)  # slots that may be written into
    prompts: dict[nn.Module, Tensor] = field(default_factory=dict)
    modulations: Modulations | None = None
    foresees: bool = True
    keys: dict[Any, attention.KeyValues] = field(default_factory=dict)
    velocity: Tensor | None = None
    collapses: bool = False
    rotation: Any = None
    signature: tuple[Any, ...] | None = None
    embeddings: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()


@dataclass
class Run:
    """One pass over the timesteps."""

    steps: int | None
    plan: RunPlan
    scheduler: Any = None
    levels: clock.Levels | None = None
    step: int = 0
    first: int | None = None
    call: int = 0
    branches: dict[int, Branch] = field(default_factory=dict)
    tokens: TokenRun | None = None
    tokens_from: int = 0
    resolution: ResolutionRun | None = None
    outputs: list[Tensor] = field(default_factory=list)
    timesteps_given: bool = False
    timesteps: Tensor | None = None
    manual: bool = False
    last_timestep: float | None = None
    bytes_checked: Any = None
    image_tokens: int = 0
    text_tokens: int = 0
    patch: int = 1
    latents: Sequence[int] = ()
    positions: Tensor | None = None
    trace: Trace | str | None = None
    records: dict[int, StepRecord] = field(default_factory=dict)
    packed: PackedWeights = field(default_factory=PackedWeights)
    packed_bytes: int = 0
    peak_bytes: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    finished: bool = False


@dataclass(frozen=True)
class _ActiveCall:
    """The transformer call in progress.

    Attributes:
        branch: Its caches.
        rows: Of its tokens; None where all pass.
        latents, layout: As given; the layout of the tokens if there is one.
        trace: What captures or replays it.
        prepare: Prepares the call, once more where it could not be captured.
    """

    branch: Branch
    rows: Tensor | None
    latents: Tensor
    layout: Layout | None
    trace: Trace | None
    prepare: Callable[[], None]


class Session:
    """The state of one patched transformer.

    Attributes:
        adapter, spec, methods, ops: What runs, fixed when patching.
        blocks: The transformer's blocks of all kinds in running order.
        eager: True on the `reference` backend: no rewrite that changes a rounding.
        linears: Layers of the blocks whose weights are kept packed in a run.
        enabled: False inside ``with h.disabled()``.
        frames: What watches the image form, inside ``with h.watch()``; else None.
        graphs: What captures and replays whole runs; None where they stay eager.
        run: The run in progress, or the last one (its caches already dropped), or None.
    """

    def __init__(
        self,
        adapter: Any,
        spec: ModelSpec,
        methods: Sequence[Any],
        ops: Any,
        blocks: Sequence[nn.Module],
        eager: bool,
        graphs: Graphs | None = None,
    ) -> None:
        self.adapter = adapter
        self.spec = spec
        self.methods = tuple(methods)
        self.ops = ops
        self.blocks = list(blocks)
        self.eager = eager
        self.linears: list[nn.Linear] = []
        self.enabled = True
        self.run: Run | None = None
        self.forward: Forward | None = None
        self.family: dict[str, Any] = {}
        self.pipeline: weakref.ref[Any] | None = None
        self.frames: Frames | None = None
        self.graphs = graphs
        self._scheduler: weakref.ref[Any] | None = None
        self._tokens = 0
        self._plans: dict[Any, RunPlan] = {}
        self._token_method = next((m for m in self.methods if "rows" in m.writes), None)
        self._resolution_method = next((m for m in self.methods if "resolution" in m.writes), None)
        self._active: _ActiveCall | None = None
        # Hooks that a compiled model calls as they are. Bound methods, so that a copied model's hooks belong to its own
        # session; wrapped here and not in the class, since torch's compiler takes long to import.
        self.forward_pre_hook = types.MethodType(_uncompiled(Session.before_forward), self)
        self.forward_hook = types.MethodType(_uncompiled(Session.after_forward), self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A copied model gets a session of its own: the same methods, the copied blocks, no run."""
        clone = Session.__new__(Session)
        memo[id(self)] = clone
        blocks = copy.deepcopy(self.blocks, memo)
        graphs = self.graphs and Graphs()
        Session.__init__(
            clone, self.adapter, self.spec, self.methods, self.ops, blocks, self.eager, graphs
        )
        clone.linears = copy.deepcopy(self.linears, memo)
        clone.enabled = self.enabled
        copied = memo.get(id(self.pipeline())) if self.pipeline is not None else None
        if copied is not None:  # the whole pipeline is being copied
            clone.pipeline = weakref.ref(copied)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FastDiTError(
            "a patched model cannot be pickled: call fastdit.unpatch first; "
            "state_dict and save_pretrained work as they are"
        )

    # ---- the run, as told by the scheduler or by `with h.run(...)`

    def follow(self, scheduler: Any) -> None:
        """Take the clock from `scheduler`, and no longer from the one before."""
        self.unfollow()
        clock.attach(scheduler, self)
        self._scheduler = weakref.ref(scheduler)

    def unfollow(self) -> None:
        """Leave the scheduler as it was before :meth:`follow`."""
        scheduler = self._scheduler() if self._scheduler is not None else None
        if scheduler is not None and clock.is_attached(scheduler, self):
            clock.detach(scheduler)
        self._scheduler = None

    def start_run(
        self,
        steps: int | None,
        scheduler: Any = None,
        levels: clock.Levels | None = None,
        timesteps_given: bool = False,
    ) -> None:
        """Begin a run of `steps` steps; whatever an earlier run left is dropped.

        Raises:
            ScheduleError: A method does not fit this number of steps. No run is open afterwards.
        """
        self.reset()
        if not self.enabled:
            return
        if steps is None and self._token_method is not None:
            raise ScheduleError(
                f"{self._token_method.name} must know the number of steps when a run starts: "
                "call the transformer inside `with handle.run(timesteps)`"
            )
        resolution = self._resolution_method
        if resolution is not None and scheduler is None:
            raise ScheduleError(
                f"{resolution.name} takes its steps from the pipeline's scheduler, but this is no call of its run"
            )
        planned = OPEN_STEPS if steps is None else steps
        if resolution is not None:
            resolution.check_steps(planned)
        for method in self.methods:
            if method is not resolution:
                method.check_steps(self._steps_of(method, planned))
        if resolution is not None:
            clock.replace_sigmas(scheduler, resolution.run_sigmas)
            levels = levels.with_sigmas(resolution.run_sigmas)
        plan = self._plan(planned, levels=levels)
        self.run = Run(steps, plan, scheduler, levels, timesteps_given=timesteps_given)
        if resolution is not None:
            self.run.resolution = ResolutionRun(resolution, self.adapter, self.ops, self.pipeline())
        if self.frames is not None:
            self.frames.start()

    def _steps_of(self, method: Any, steps: int) -> int:
        """The steps that `method` has a say in: one that leaves tokens out has to wait for the full resolution."""
        if method is self._token_method and self._resolution_method is not None:
            last = self._resolution_method.stages()[-1]
            return last.steps if last.layout == "full" else 0
        return steps

    def begin_step(self, scheduler: Any, velocity: Any, timestep: Any, sample: Any) -> None:
        """The scheduler is about to do a step with what the model gave it; only the one that leads the run is heard."""
        run = self.run
        if run is None or run.scheduler is not scheduler:
            return
        if self.frames is not None:
            if not self.frames.latents:
                self.frames.grid = self.adapter.grid(run.latents, run.positions, run.patch)
            self.frames.add(scheduler, velocity, timestep, sample)
        if run.resolution is not None:
            if run.step == run.first:
                run.resolution.seed(sample)
            arrival = run.resolution.arrival(run.step)
            if arrival is not None:
                scheduler.sigmas[run.step + 1] = arrival

    def end_step(
        self, scheduler: Any = None, velocity: Any = None, delta: Any = 1.0, latents: Any = None
    ) -> None:
        """A step is done, says `scheduler`, or the user; only the one that leads the run is heard.

        Args:
            velocity: What the scheduler was given; without one the transformer's own outputs of this step stand in.
            delta: Difference of the sigmas over the step.
            latents: What the scheduler returns; those of the next stage are written into them.
        """
        run = self.run
        if run is None or run.finished or run.scheduler is not scheduler:
            return
        if run.tokens is not None and run.first is not None:
            if velocity is None and run.outputs:
                velocity = torch.stack(run.outputs).mean(0)
            if velocity is not None:
                patches = self.adapter.patches(velocity, run.patch)
                run.tokens.observe(run.step - run.tokens_from, patches, delta)
            run.outputs.clear()
        resolution = run.resolution
        if resolution is not None:
            if run.step == run.first:
                resolution.settle(latents)
            if resolution.arrival(run.step) is not None:
                resolution.finish(velocity, latents)
                scheduler.sigmas[run.step + 1] = resolution.departure
        run.step += 1
        run.call = 0
        if run.steps is not None and run.step >= run.steps:
            self.end_run()

    def end_run(self) -> None:
        """Drop the caches; the run's record stays for the report."""
        if self.run is not None and not self.run.finished:
            self.run.finished = True
            if isinstance(self.run.trace, Trace):
                self.run.peak_bytes = self.run.trace.end(self.run.peak_bytes)
            self.run.seconds = time.perf_counter() - self.run.started
            self.run.branches.clear()
            self.run.outputs.clear()
            self.run.packed_bytes = self.run.packed.nbytes
            self.run.packed.clear()
            self.run.scheduler = None
        self.forward = None

    def reset(self) -> None:
        """Forget the run in progress and all caches."""
        self.end_run()
        self.run = None
        self.family.clear()

    def cache_bytes(self) -> int:
        """Bytes held by slots now; storages counted once."""
        storages = {}
        for branch in self.run.branches.values() if self.run else ():
            kept = [(keys.k, keys.v) for keys in branch.keys.values()]
            made = (*branch.slots.values(), *branch.prompts.values(), branch.velocity)
            for value in (*made, *kept):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    # ---- one transformer call

    def before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Native forward pre-hook of the transformer: place this call in the run and prepare its state.

        Returns:
            The arguments of a call of the active tokens alone; None where all tokens pass.
        """
        self.forward = self._active = None
        if not self.enabled:
            return None
        self._refuse_checkpointing(transformer)
        call = self.adapter.call(transformer, args, kwargs)
        run = self._locate(call.timestep)
        self._check_conditions(run, call)
        run.patch = self.adapter.patch(transformer)
        run.latents, run.positions = call.hidden_states.shape, call.positions
        try:
            layout = self._lay_out(transformer, run, call)
            if layout is not None and layout.kind != "full":
                self.adapter.refuse_residuals(transformer, args, kwargs)
        except FastDiTError:
            self.reset()
            raise
        immediate = (
            self.eager
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(call.hidden_states.device.type)
        )
        trace = self._trace(transformer, run, args, kwargs, immediate)
        if trace is not None:
            args, kwargs = self._enter(trace, run, call, args, kwargs)
            call = self.adapter.call(transformer, args, kwargs)
        self._prepare(transformer, run, call, args, kwargs, layout, immediate, trace)
        run.call += 1
        rows = self._active.rows
        if layout is not None and layout.kind != "full":
            return self.adapter.reduce_inputs(transformer, args, kwargs, layout, self.ops)
        if trace is not None:
            return args, kwargs
        if rows is None:
            return None
        return self.adapter.gather_inputs(transformer, args, kwargs, rows)

    def _prepare(
        self,
        transformer: nn.Module,
        run: Run,
        call: Any,
        args: Any,
        kwargs: Any,
        layout: Layout | None,
        immediate: bool,
        trace: Trace | None,
    ) -> None:
        """Choose what a call computes and from what."""
        again = functools.partial(
            self._prepare, transformer, run, call, args, kwargs, layout, immediate, trace
        )
        defer = not immediate and not call.skips_blocks
        branch = self._prepare_branch(run, call)
        rows, captures = self._choose_tokens(transformer, run, branch, call)
        if rows is not None and trace is not None:
            rows = trace.hold("rows", rows)
        collapses = defer and bool(run.plan.sums) and self.may_collapse()
        if collapses is not branch.collapses:
            branch.slots.clear()  # an output may be older in a sum than in its own slot
            branch.collapses = collapses
        self._check_cache_bytes(transformer, run, call, collapses)
        count = call.tokens if layout is None else layout.tokens
        self._tokens = count if rows is None else rows.shape[1]
        self._active = _ActiveCall(branch, rows, call.hidden_states, layout, trace, again)
        ahead = None if immediate else self._foresee(transformer, run, call, args, kwargs)
        if trace is not None and not trace.agrees((self._tokens, collapses, ahead is not None)):
            run.branches.clear()
            again()
            return
        actions = run.plan.actions[run.step] if run.plan.actions else ()
        self.forward = Forward(
            self.ops,
            self.blocks,
            actions=actions,
            slots=branch.slots,
            owned=branch.owned,
            immediate=immediate,
            defer=defer,
            family=self.family,
            compiled=self._compiled_call(transformer),
            tokens=self._tokens_of(transformer, call, count, rows, captures, branch, immediate),
            layouts=self.adapter.layouts,
            precision=self._precision(call),
            modulations=ahead,
            sums=Sums(run.plan.sums[run.step], self.spec.shared_gates) if collapses else None,
        )

    def __call__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The transformer's rewritten forward, where runs are replayed."""
        stock = type(transformer).forward
        active, forward = self._active, self.forward
        if forward is None or active is None or active.trace is None:
            return stock(transformer, *args, **kwargs)

        def compute() -> Any:
            rows = self._active.rows
            if rows is None:
                return stock(transformer, *args, **kwargs)
            given = self.adapter.gather_inputs(transformer, args, kwargs, rows)
            return stock(transformer, *given[0], **given[1])

        try:
            return active.trace.run(compute, forward, transformer.device)
        except CaptureError:
            run = self.run
            run.branches.clear()
            self.family.clear()
            run.call -= 1
            active.prepare()
            run.call += 1
            return compute()

    def _trace(
        self, transformer: nn.Module, run: Run, args: Any, kwargs: Any, immediate: bool
    ) -> Trace | None:
        """What captures or replays the run that this call belongs to; None where it is eager."""
        if self.graphs is None:
            return None
        if run.trace is None:
            run.trace = self._begin_trace(transformer, run, args, kwargs, immediate)
        if not isinstance(run.trace, Trace) or run.trace.mode == "left":
            return None
        if immediate:
            run.trace.leave()
            run.branches.clear()
            return None
        return run.trace

    def _begin_trace(
        self, transformer: nn.Module, run: Run, args: Any, kwargs: Any, immediate: bool
    ) -> Trace | str:
        why = None
        if immediate:
            why = "since gradients, autocast or the reference backend are wanted"
        elif run.steps is None:
            why = "since nobody says how many steps it has"
        elif self._plans.get((run.steps, ())) is not run.plan:
            why = "since its schedule is mapped to other noise levels"
        key = run.steps, run.first
        return self.graphs.begin(self, transformer, key, args, kwargs, why)

    def _enter(self, trace: Trace, run: Run, call: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments as graphs read them; the caches are dropped where the run leaves its recording."""
        changing = call.hidden_states, call.timestep
        args, kwargs = trace.enter((run.step, run.call), args, kwargs, changing, call.embeddings)
        if trace.mode == "left":
            run.branches.clear()
        return args, kwargs

    def _tokens_of(
        self,
        transformer: nn.Module,
        call: Any,
        count: int,
        rows: Tensor | None,
        captures: bool,
        branch: Branch,
        immediate: bool,
    ) -> Tokens | None:
        """What the adapter's own attention needs; None where the stock one runs."""
        layout = self._active.layout
        ops = None if immediate else self.ops
        if captures:
            return Tokens(count, rows, branch.keys, branch, ops)
        if layout is not None and self.adapter.owns_attention(layout, call.hidden_states.shape[0]):
            return Tokens(count, None, None, branch, ops)
        if ops is not None and self._fuses_attention(transformer, call):
            return Tokens(count, None, None, branch, ops)
        return None

    def may_collapse(self) -> bool:
        """Whether reused outputs may be kept as sums: nobody looks at the stream between blocks."""
        return not self.eager and not any(map(observed, self.blocks))

    def _fuses_attention(self, transformer: nn.Module, call: Any) -> bool:
        """Whether the adapter's own attention stands in for the stock one to spare its copies.

        Not where somebody looks into it, changed it, compiled it, or tells it something.
        """
        adapter = self.adapter
        return bool(
            adapter.fused_attentions
            and attention.fuses(call.hidden_states.device)
            and not call.tells_attention
            and self._compiled_call(transformer) is None
            and all(
                block._compiled_call_impl is None and adapter.has_stock_attention(block)
                for block in self.blocks
            )
        )

    def _lay_out(self, transformer: nn.Module, run: Run, call: Any) -> Layout | None:
        """The layout of this call's tokens; None without a method that decides it."""
        resolution = run.resolution
        if resolution is None:
            return None
        name = resolution.method.name
        if torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} has no gradient: run under torch.no_grad(), or inside `with handle.disabled()`"
            )
        if run.first:
            raise ScheduleError(
                f"{name} starts from noise, but this run begins at step {run.first} of {run.steps}"
            )
        if resolution.layout is None:
            cells = self.adapter.cells(call, run.patch)
            if any(side % 2 for side in cells):
                scale = run.patch * getattr(resolution.pipeline, "vae_scale_factor", 8)
                raise ArgumentError(
                    f"height and width must be multiples of {2 * scale} for {name}, "
                    f"got {cells[0] * scale} x {cells[1] * scale}"
                )
            text = call.embeddings[0].shape[1]
            resolution.begin(cells, text, call.hidden_states.device)
        return resolution.layout

    def after_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """Native forward hook of the transformer, also called after an exception.

        Returns:
            The output with the velocities of all tokens after a call of the active ones; None to leave it.
        """
        forward, self.forward = self.forward, None
        active, self._active = self._active, None
        if forward is None or output is None or self.run is None:
            return None
        assert forward.settled, (
            "a residual was left waiting: the adapter's last block did not settle its streams"
        )
        record = self.run.records.setdefault(self.run.step, StepRecord())
        record.tokens = self._tokens
        record.computed += forward.computed
        record.reused += forward.reused
        if forward.computed:
            self.run.peak_bytes = max(self.run.peak_bytes, self.cache_bytes())
        return self._merge(active, output)

    def _merge(self, active: _ActiveCall, output: Any) -> Any:
        """Put the active tokens' velocities among those that the others keep."""
        run = self.run
        sample = output[0] if isinstance(output, tuple) else output.sample
        if active.layout is not None and active.layout.kind != "full":
            full = self.adapter.expand_output(sample, active.layout, active.latents, self.ops)
            return _replaced(output, full)
        if run.tokens is None:
            return None
        branch = active.branch
        if active.rows is None:
            branch.velocity = sample.clone()  # the caller may write into what it gets
            merged = None
        else:
            full = self.adapter.scatter_output(sample, active.rows, branch.velocity, run.patch)
            branch.velocity = full
            merged = _replaced(output, full.clone())
        if run.scheduler is None:
            run.outputs.append(branch.velocity)
        return merged

    def _choose_tokens(
        self, transformer: nn.Module, run: Run, branch: Branch, call: Any
    ) -> tuple[Tensor | None, bool]:
        """(rows of this call, or None for all tokens; whether keys and values are kept)."""
        method = self._token_method
        if method is None or (run.resolution and run.resolution.layout.kind != "full"):
            return None, False
        if torch.is_grad_enabled() and call.hidden_states.requires_grad:
            raise ArgumentError(
                f"{method.name} has no gradient: run under torch.no_grad(), or inside `with handle.disabled()`"
            )
        if run.tokens is None:
            first = run.tokens_from = (
                run.resolution.stage.first if run.resolution else run.first or 0
            )
            count = self.adapter.moved_tokens(call)
            run.tokens = TokenRun(method, run.steps - first, count, self.ops)
            self._plan_rows(run, first)
        tokens, step = run.tokens, run.step - run.tokens_from
        rows = tokens.rows if tokens.at(step) is not None else None
        batch = call.hidden_states.shape[0]
        if rows is not None and branch.velocity is not None and batch % rows.shape[0] == 0:
            return rows.repeat(batch // rows.shape[0], 1).long(), True
        # A schedule may reuse an attention in the step that would have kept its keys, so with one all steps keep them.
        return None, tokens.at(step + 1) is not None or bool(run.plan.actions)

    def _plan_rows(self, run: Run, first: int) -> None:
        """Lower a schedule anew: a component that computes some rows does not replace what the others hold."""
        if run.plan.reuse is None:
            return
        partial = tuple(
            step >= first and run.tokens.at(step - first) is not None for step in range(run.steps)
        )
        run.plan = self._plan(run.steps, partial, run.levels)

    def _plan(
        self, steps: int, partial: tuple[bool, ...] = (), levels: clock.Levels | None = None
    ) -> RunPlan:
        """The plan of a run. One that was mapped to other noise levels is made anew for each run."""
        if (steps, partial) in self._plans:
            return self._plans[steps, partial]
        plan = plan_run(self.methods, self.spec, steps, partial, levels, not self.eager)
        if plan.reuse is None or not plan.reuse.rows:
            self._plans[steps, partial] = plan
        return plan

    def block(
        self,
        kind: str,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A block's rewritten forward; outside a transformer call, and while disabled, the stock one.

        Stock too where gradients are wanted and no plan acts: another order of the same operations would accumulate
        them in another order.
        """
        if self.forward is None:
            return type(module).forward(module, *args, **kwargs)
        if torch.is_grad_enabled() and not self.forward.actions:
            parts = self.adapter.components[kind]
            self.forward.computed += sum(
                self.adapter.has_component(kind, module, part) for part in parts
            )
            return type(module).forward(module, *args, **kwargs)
        self.forward.start_block(index)
        return self.adapter.forwards[kind](module, self.forward, *args, **kwargs)

    def component(
        self, index: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The forward of a component that was wrapped as it is, in block `index`."""

        def compute() -> Any:
            return type(module).forward(module, *args, **kwargs)

        forward = self.forward
        if forward is None or forward.index != index or not forward.actions:
            return compute()
        return forward.component(name, compute)

    def embed(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The rewritten forward of a module that embeds patches and adds their positions."""
        active = self._active
        if active is not None and active.rows is not None:
            shape = active.latents.shape
            return self.adapter.embed(module, shape, active.rows, *args, **kwargs)
        if active is not None and active.layout is not None:
            memory = self.run.resolution.memory
            return self.adapter.embed_layout(module, active.layout, memory, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def embed_condition(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The rewritten forward of the module that embeds timestep and prompt for all adaLN layers."""
        ahead = None if self.forward is None else self.forward.modulations
        found = None if ahead is None else ahead.given()
        return type(module).forward(module, *args, **kwargs) if found is None else found

    def project_prompt(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The rewritten forward of a module that depends on the prompt alone: computed once a run, exactly.

        A module that somebody looks into, or that carries an adapter of peft, whose scale may change, runs every time.
        """
        forward, active = self.forward, self._active
        if forward is None or forward.immediate or not private(module):
            return type(module).forward(module, *args, **kwargs)
        kept = active.branch.prompts
        if module not in kept:
            kept[module] = type(module).forward(module, *args, **kwargs)
        return kept[module]

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        """The rewritten forward of a block's linear layer, whose weights are kept packed."""
        if self.forward is None:
            return type(module).forward(module, x)
        return self.run.packed.linear(module, x)

    # ---- helpers

    def _foresee(
        self, transformer: nn.Module, run: Run, call: Any, args: Any, kwargs: Any
    ) -> Modulations | None:
        """The modulations of the steps to come; None where it is not known what the model will be given.

        The first call of a branch compares the timestep it is given with the one foreseen, later ones only where that
        does not wait for a device. Once a run has gone another way, its steps make their own.
        """
        branch = self._active.branch
        if not branch.foresees:
            return None
        batch, timestep = call.hidden_states.shape[0], call.timestep
        inputs = self.adapter.layer_inputs(transformer, args, kwargs, batch)
        first = branch.modulations is None
        if not isinstance(timestep, Tensor):
            inputs = None
        if first and inputs is not None:
            timesteps = run.timesteps
            if run.scheduler is not None:
                dtype = call.hidden_states.dtype
                timesteps = self.adapter.given_timesteps(run.scheduler.timesteps, dtype)
            if timesteps is not None:
                table = timesteps.to(timestep)
                trace = self._active.trace
                if trace is not None:
                    table = trace.hold(("timesteps", run.call), table)
                branch.modulations = Modulations(inputs, table, batch)
        branch.foresees = (
            inputs is not None
            and branch.modulations is not None
            and branch.modulations.begin(
                run.step, timestep, inputs, batch, first or timestep.device.type == "cpu"
            )
        )
        if not branch.foresees:
            branch.modulations = None
        return branch.modulations

    def _refuse_checkpointing(self, transformer: nn.Module) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when the caches have moved on."""
        acts = any(method.writes for method in self.methods)
        if acts and torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", 0):
            raise ArgumentError(
                "a schedule cannot run under gradient checkpointing, which recomputes blocks in the backward pass; "
                "call disable_gradient_checkpointing() on the transformer, or run under torch.no_grad()"
            )

    def _locate(self, timestep: Any) -> Run:
        """The run this call belongs to, its step counter up to date."""
        self._follow_scheduler()
        run = self.run
        if run is None or run.scheduler is None or run.finished:
            return self._locate_by_timestep(run, timestep)
        if run.first is None:
            # Image-to-image enters the schedule late; rows of a plan are scheduler indices.
            run.step = run.first = getattr(run.scheduler, "_begin_index", None) or 0
        return run

    def _check_conditions(self, run: Run, call: Any) -> None:
        """At a run's first call, refuse one that a method was not made for; no run is open afterwards."""
        if run.image_tokens:
            return
        pipeline = self.pipeline() if self.pipeline is not None else None
        wanted = {m.name: m.made_for for m in self.methods if m.made_for is not None}
        # Only where somebody asks: the timesteps may have to come from a GPU.
        found = Conditions.of(run.scheduler, call.tokens, pipeline) if wanted else None
        try:
            for name, conditions in wanted.items():
                conditions.check(found, name)
        except ScheduleError:
            self.reset()
            raise
        run.image_tokens, run.text_tokens = call.tokens, call.text

    def _precision(self, call: Any) -> tuple[torch.dtype, torch.dtype] | None:
        """(dtype of slots, dtype of the streams) where a method keeps less than the model computes in."""
        name = next((m.cache_dtype for m in self.methods if m.cache_dtype is not None), None)
        if name is None:
            return None
        slots, streams = getattr(torch, name), call.hidden_states.dtype
        return (slots, streams) if slots.itemsize < streams.itemsize else None

    def _check_cache_bytes(
        self, transformer: nn.Module, run: Run, call: Any, collapses: bool
    ) -> None:
        """Refuse a run whose caches will not fit, at its first call of each branch; no run is open afterwards."""
        most = min(
            (m.max_cache_bytes for m in self.methods if m.max_cache_bytes is not None), default=None
        )
        if most is None:
            return
        branches = len(run.branches)
        signature = (branches, call.signature)
        if run.bytes_checked == signature:
            return
        run.bytes_checked = signature
        dtype = call.hidden_states.dtype
        kept = self._precision(call) or (dtype,)
        rows = call.hidden_states.shape[0] * branches
        size = Size(call.tokens, call.text)
        count = Cost(self.adapter, transformer, self.spec, size, rows, dtype.itemsize)
        plan = run.plan if collapses else replace(run.plan, sums=())
        needed = count.cache_bytes(plan, kept[0].itemsize)
        needed += 0 if run.tokens is None else count.key_bytes()
        needed += 0 if self.eager else count.prompt_bytes()
        if needed > most:
            self.reset()
            raise ArgumentError(
                f"the caches of this run need {needed} bytes ({call.tokens} image and {call.text} text tokens in "
                f"{rows} rows), max_cache_bytes is {most}; allow as many, keep them in a lower precision "
                "(cache_dtype), or draw fewer or smaller images at once"
            )

    def _follow_scheduler(self) -> None:
        """Follow a scheduler that was put into the pipeline after patching; its timesteps are already set."""
        pipeline = self.pipeline() if self.pipeline is not None else None
        given = self.run is not None and self.run.timesteps_given
        if pipeline is None or given or clock.is_attached(pipeline.scheduler, self):
            return
        if self._resolution_method is not None:
            self.reset()
            raise ScheduleError(
                f"the scheduler was replaced after patching, and {self._resolution_method.name} cannot change "
                "timesteps that are already in use; call fastdit.patch again"
            )
        self.follow(pipeline.scheduler)
        scheduler = pipeline.scheduler
        levels = clock.Levels(scheduler, {})
        self.start_run(len(scheduler.timesteps), scheduler, levels)

    def _compiled_call(self, transformer: nn.Module) -> Any:
        """The transformer's compiled call, by `transformer.compile()` or a wrapper in the pipeline; or None."""
        pipeline = self.pipeline() if self.pipeline is not None else None
        wrapper = getattr(pipeline, "transformer", None)
        if getattr(wrapper, "_orig_mod", None) is transformer:
            return wrapper.forward
        return transformer._compiled_call_impl

    def _locate_by_timestep(self, run: Run | None, timestep: Any) -> Run:
        """Without a scheduler the timestep argument tells: another value is another step, a noisier one another run.

        Reads the value, so it waits for a GPU; a scheduler, or `advance()`, does not.
        """
        if run is not None and run.timesteps_given and run.finished:
            raise ScheduleError(_one_call_too_many(run.steps))
        if run is not None and run.manual and not run.finished:
            return run
        value = (
            float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep or 0)
        )
        if self.adapter.timesteps_rise:
            value = -value
        last = None if run is None else run.last_timestep
        if (
            run is None
            or run.finished
            or (last is not None and value > last and not run.timesteps_given)
        ):
            self.start_run(
                next(
                    (method.run_steps for method in self.methods if method.run_steps is not None),
                    None,
                )
            )
            run = self.run
        elif last is not None and value != last:
            run.step += 1
            run.call = 0
        if run.step >= (run.steps or OPEN_STEPS):
            raise ScheduleError(_one_call_too_many(run.steps or OPEN_STEPS))
        run.first = run.first or 0
        run.last_timestep = value
        return run

    def _prepare_branch(self, run: Run, call: Any) -> Branch:
        """The caches of this call; dropped when they were made for other shapes, dtypes or embeddings."""
        branch = run.branches.setdefault(run.call, Branch())
        autocast = torch.is_autocast_enabled(call.hidden_states.device.type)
        stage = run.resolution.index if run.resolution is not None else 0
        signature = (*call.signature, autocast, stage)
        same = branch.signature is not None and _same_tensors(branch, call.embeddings)
        if not same:
            branch.prompts.clear()
        if branch.signature != signature or not same:
            branch.slots.clear()
            branch.keys.clear()
            branch.velocity = None
        branch.signature, branch.embeddings = signature, call.embeddings
        branch.versions = tuple(map(_version, call.embeddings))
        return branch


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def _same_tensors(branch: Branch, tensors: tuple[Tensor, ...]) -> bool:
    """Whether these are the tensors the branch was made for, unwritten since; or, in new memory, equal ones.

    A pipeline passes the same tensors at every step; only hand-written loops that build them anew have them compared.
    """
    return all(
        _version(old) == version and (old is new or torch.equal(old, new))
        for old, version, new in zip(branch.embeddings, branch.versions, tensors, strict=True)
    )


def _replaced(output: Any, sample: Tensor) -> Any:
    """The transformer's output with another sample."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    output.sample = sample
    return output


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; inference tensors do not."""
    return -1 if tensor.is_inference() else tensor._version


def _one_call_too_many(steps: int) -> str:
    return (
        f"the transformer was called for step {steps + 1} of a run of {steps} steps; "
        "call reset() on the handle before another run"
    )
