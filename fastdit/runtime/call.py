"""A call of the transformer computes some components, on some tokens, from the caches of its branch.

It is made before the transformer's forward and gone after it. The rewritten forwards of blocks and other modules find
it by thread, so calls of other threads, and calls inside a call, have their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.account.cost import Cost
from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.base import Size
from fastdit.blocks import attention
from fastdit.blocks.active import ActiveTokens
from fastdit.blocks.forward import Forward
from fastdit.blocks.layer_inputs import LayerInputs
from fastdit.blocks.modulation import Modulations
from fastdit.blocks.segments import segments_like
from fastdit.blocks.sums import Sums
from fastdit.errors import ArgumentError
from fastdit.programs.state import Moment
from fastdit.runtime import programmed
from fastdit.runtime.asked import Asked
from fastdit.runtime.branch import Branched
from fastdit.runtime.graphs import GraphRun
from fastdit.runtime.guard import Guarded
from fastdit.runtime.restated import PROMPT, Restated, as_object
from fastdit.runtime.run import Run, StepRecord
from fastdit.runtime.shed import ShedModulations, at_hand, modulations_of


class Call(Asked, Branched, Restated):
    """This is one call of the transformer of a run.

    Attributes:
        run, transformer, outer: Its run and model, and the call in this thread that it interrupts, or None.
        arguments: What the adapter reads off the call.
        branch: Its caches.
        layout: Of its tokens, where a method decides it.
        rows: Indices [B, K] of the image tokens that pass; None where all do.
        forward: What its blocks ask; None before it is prepared, and in a call that runs stock or is forecast.
        forecast: What stands for the model's output; None where the model runs.
        model: The model as its programs know it; None where this call has none.
        unseen: Nobody sees what modules are given, so that others may stand for them: there may be a program.
        program: What ran in place of the model's forward; None where that did.
        actions, ahead, collapses, keeps, fuses: What the blocks are told, the modulations made ahead, and whether
            outputs are kept as sums, keys and values are, and the adapter's own attention spares copies.
        tokens, count: How many image tokens pass, and how many would if none were left out.
        immediate: Every residual is added at once, as diffusers does; see `blocks/forward.py`.
    """

    def __init__(self, outer: Call | None) -> None:
        self.outer = outer
        self.run: Run | None = None
        self.forward: Forward | None = None
        self.forecast: Any = None
        self.guarded: Any = None
        self.model: Any = None
        self.unseen = False
        self.program: Any = None

    # ---- before the transformer's forward

    def begin(
        self,
        run: Run,
        key: Any,
        transformer: nn.Module,
        arguments: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """This chooses what a call of `run` computes, whose branch has this `key`.

        Returns:
            The arguments of a call of the active tokens alone; None where all tokens pass.
        """
        patched = run.patched
        adapter = patched.adapter
        self.run, self.transformer, self.arguments = run, transformer, arguments
        self.key = key
        self.trace: GraphRun | None = None
        self.rows = self.layout = None
        run.patch = adapter.patch(transformer)
        run.latents, run.positions = arguments.hidden_states.shape, arguments.positions
        for method in run.methods:
            self.layout = method.layout(self) or self.layout
        if patched.forecasts:
            run.hear_sigma(arguments.timestep)
        order = run.plan.forecast_order(run.step)
        if order:
            branch = self._branch()
            if not branch.outputs.empty:
                weights = run.forecast_weights
                drawn = branch.outputs.forecast(run.step, order, weights, patched.ops)
                fired = () if run.guard is None else run.guard.fired(run.step)
                if not fired:
                    self.forecast = _with_sample(drawn, adapter.as_given(_first(drawn)))
                    return None
                sample = _first(drawn)
                self.guarded = Guarded(sample, run.guard.rows_of(fired, len(sample)))
                some = self.guarded.call_of(adapter, transformer, args, kwargs)
                if some is not None:  # a branch of its own, whose tensors have as many rows
                    args, kwargs = (), some
                    self.key = key, fired
                    self.arguments = adapter.call(transformer, args, kwargs)
        self._smaller = self.layout is not None and self.layout.name != "full"
        if self._smaller:
            adapter.refuse_residuals(transformer, args, kwargs)
            if run.calls == 1 and run.step == run.first:
                adapter.refuse_conditions(transformer, args, kwargs)
        rounds_alike = torch.is_grad_enabled() or torch.is_autocast_enabled(
            arguments.hidden_states.device.type
        )
        self.immediate = patched.eager or rounds_alike
        self.foresees = not rounds_alike and (not patched.eager or patched.shed is not None)
        self._args, self._kwargs = args, kwargs
        self.model = programmed.model_of(self)
        self.unseen = self.model is not None
        if patched.graphs is not None and self.guarded is None:  # no plan has such a step
            self.trace = self._follow_trace()
        self.prepare()
        if self._smaller:
            return adapter.reduce_inputs(transformer, args, kwargs, self.layout, patched.ops)
        if self.rows is None:
            return None if self.key is key else (args, dict(kwargs))
        return adapter.gather_inputs(transformer, args, kwargs, self.rows)

    def prepare(self) -> None:
        """This chooses what the blocks compute, and from what."""
        run, arguments = self.run, self.arguments
        patched = run.patched
        immediate = self.immediate
        defer = not immediate and not arguments.skips_blocks
        branch = self.branch = self._branch()
        if patched.adapter.restates_model:
            self.read_prompt(branch)
        self.rows, keeps = None, False
        for method in run.methods:
            rows = method.rows(self)
            self.rows = self.rows if rows is None else rows
            keeps = method.keeps_keys(self) or keeps
        collapses = defer and run.has_sums and (self.model is not None or patched.may_collapse())
        collapses = collapses and patched.holds_sums(arguments.hidden_states.dtype)
        self.collapses, self.keeps = collapses, keeps
        if collapses is not branch.collapses:
            branch.slots.clear()  # an output may be older in a sum than in its own slot
            branch.collapses, branch.form = collapses, None
        if patched.max_cache_bytes is not None and self.guarded is None:
            self._check_cache_bytes(collapses)
        count = arguments.tokens if self.layout is None else self.layout.tokens
        self.tokens = count if self.rows is None else self.rows.shape[1]
        self.count = count
        self.ahead = self._foresee() if self.foresees else None
        if self.ahead is None and patched.shed is not None:
            run.unforeseen.add(run.step)
        # What has nothing to be forecast from computes.
        planned = run.plan.actions and not run.plan.forecast_order(run.step)
        actions = run.plan.actions[run.step] if planned else ()
        for method in run.methods:
            actions = method.actions(self, actions)
        self.actions = actions
        self.fuses = not immediate and (
            self._fuses_attention()
            if self.model is None
            else programmed.fuses_attention(self, self.model)
        )
        if self.model is None:
            self.interpret()

    def interpret(self) -> None:
        """The blocks will ask for what was chosen, where no program stands for them."""
        run, branch = self.run, self.branch
        branch.form = None
        patched = run.patched
        ahead, collapses = self.ahead, self.collapses
        self.forward = patched.here.forward = Forward(
            patched.ops,
            patched.blocks,
            actions=self.actions,
            slots=branch.slots,
            owned=branch.owned,
            immediate=self.immediate,
            defer=not self.immediate and not self.arguments.skips_blocks,
            compiled=patched.compiled_call(self.transformer, run),
            tokens=self._tokens(self.count, self.keeps),
            layouts=patched.adapter.layouts,
            unread=patched.adapter.unread,
            references=self.arguments.references if self.rows is None else 0,
            precision=patched.precision(self.arguments.hidden_states.dtype),
            modulations=ahead,
            step=Moment(run.step),
            weights=run.forecast_weights if patched.forecasts else None,
            sums=Sums(run.plan.sums[run.step], patched.spec.shared_gates) if collapses else None,
        )

    @property
    def memory(self) -> dict[Any, Any]:
        """Free space of the adapter that lives as long as the shapes of what passes, and the prompt, stay."""
        return self.branch.memory if self.layout is None else self.run.resolution.memory

    def key_bias(self) -> Tensor | None:
        """What its layout adds to the products with its keys, see :meth:`Layout.key_bias`."""
        if self.layout is None:
            return None
        return self.layout.key_bias(self.arguments.hidden_states.dtype)

    def _tokens(self, count: int, keeps: bool) -> ActiveTokens | None:
        """The adapter's own attention is told of these tokens; None where the stock one runs."""
        patched, branch = self.run.patched, self.branch
        ops = None if self.immediate else patched.ops
        bias, text_first = self.key_bias(), patched.adapter.text_first
        if keeps:
            return ActiveTokens(
                count, self.rows, branch.keys, branch.memory, ops, branch.ages, bias, text_first
            )
        owns = self.layout is not None and patched.adapter.owns_attention(
            self.layout, self.arguments.hidden_states.shape[0]
        )
        if owns or self.fuses:
            return ActiveTokens(
                count, None, None, branch.memory, ops, key_bias=bias, text_first=text_first
            )
        return None

    def _fuses_attention(self) -> bool:
        """The adapter's own attention stands in for the stock one to spare its copies, unless somebody looks into that
        one, changed it, compiled it, or tells it something.
        """
        patched = self.run.patched
        adapter = patched.adapter
        return bool(
            adapter.fused_attentions
            and attention.fuses(self.arguments.hidden_states.device)
            and not self.arguments.tells_attention
            and patched.compiled_call(self.transformer, self.run) is None
            and all(
                block._compiled_call_impl is None and adapter.has_stock_attention(block)
                for block in patched.blocks
            )
        )

    def _foresee(self) -> Modulations | None:
        """These are the modulations of the steps to come; None where it is not known what the model will be given.

        The first call of a branch compares the timestep it is given with the one foreseen, later ones only where that
        does not wait for a device. Once a run has gone another way, its steps make their own.
        """
        run, arguments, branch = self.run, self.arguments, self.branch
        adapter = run.patched.adapter
        if not branch.foresees:
            return None
        batch, timestep = arguments.hidden_states.shape[0], arguments.timestep
        first, inputs, timesteps = branch.modulations is None, None, None
        kind = Modulations if run.patched.shed is None else ShedModulations
        if isinstance(timestep, Tensor) and (
            self.model is not None
            or all(map(kind.stands_for, adapter.condition_embeddings_of(self.transformer)))
        ):
            inputs = adapter.layer_inputs(self.transformer, self._args, self._kwargs, batch)
        if inputs is not None and not first and self._goes_on(inputs, at_hand(timestep)):
            return branch.modulations
        if inputs is not None and (first or run.patched.shed is not None):
            timesteps = run.told if isinstance(run.told, Tensor) else None
            if run.scheduler is not None:
                timesteps = adapter.given_timesteps(
                    run.scheduler.timesteps, arguments.hidden_states.dtype
                )
        if timesteps is not None:
            branch.modulations = modulations_of(run, inputs, timesteps.to(timestep), batch)
        branch.foresees = timesteps is not None and self._goes_on(inputs, True)
        if not branch.foresees:
            branch.modulations = None
        return branch.modulations

    def _goes_on(self, inputs: LayerInputs, look: bool) -> bool:
        """The modulations of the branch go to this step, unless something else is given there than was foreseen."""
        run, arguments = self.run, self.arguments
        batch = arguments.hidden_states.shape[0]
        return self.branch.modulations.begin(run.step, arguments.timestep, inputs, batch, look)

    def _check_cache_bytes(self, collapses: bool) -> None:
        """This refuses a run whose caches will not fit, at its first call of each branch."""
        run, arguments = self.run, self.arguments
        patched = run.patched
        most = patched.max_cache_bytes
        branches = len(run.branches)
        if run.bytes_checked == (branches, arguments.signature):
            return
        run.bytes_checked = (branches, arguments.signature)
        dtype = arguments.hidden_states.dtype
        kept = patched.precision(dtype) or (dtype,)
        batch = arguments.hidden_states.shape[0] * branches
        size = Size(arguments.tokens, arguments.text)
        count = Cost(patched.adapter, self.transformer, size, batch, dtype.itemsize)
        plan = run.plan if collapses else replace(run.plan, sums=())
        needed = count.cache_bytes(plan, kept[0].itemsize)
        needed += 0 if run.selection is None else count.key_bytes()
        needed += 0 if patched.eager else count.prompt_bytes()
        known = self.branch.memory.get(PROMPT)
        if known is not None:  # what was read of a prompt says how much is kept of it
            width = patched.adapter.width(self.transformer)
            needed += known[1] * width * batch * dtype.itemsize
        if run.keeps_prompt_keys and needed + count.prompt_key_bytes() > most:
            run.keeps_prompt_keys = False
            run.forget_prompts()
        if needed > most:
            raise ArgumentError(
                f"the caches of this run need {needed} bytes ({arguments.tokens} image and {arguments.text} text "
                f"tokens in a batch of {batch}), max_cache_bytes is {most}; allow as many, keep them in a lower "
                "precision (cache_dtype), or draw fewer or smaller images at once"
            )

    # ---- replayed calls

    def _follow_trace(self) -> GraphRun | None:
        """What captures and replays the calls of the run; None where this call is eager."""
        run = self.run
        if run.trace is None:
            run.trace = run.patched.graphs.begin(self)
        trace = run.trace
        if not isinstance(trace, GraphRun) or trace.ended is not None:
            return None
        return trace.follow(self)

    def compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """This runs the transformer's forward, by a graph where there is one."""
        if self.forecast is not None:
            return self.forecast
        patched = self.run.patched
        if self.model is None and not patched.blocks:  # the blocks see to that themselves
            compiled = patched.compiled_call(self.transformer, self.run)
            return segments_like(compiled, self.transformer).stock(
                self.transformer, *args, **kwargs
            )
        compute = functools.partial(programmed.compute, self) if self.unseen else self.run_model
        if not self.restated:
            return compute(args, kwargs)
        adapter, given = patched.adapter, dict(arguments_of(self.transformer, args, kwargs))
        given[adapter.image_argument] = adapter.as_latents(given[adapter.image_argument])
        (sample,) = compute((), given)
        sample = adapter.as_given(sample)
        return as_object(sample) if given.get("return_dict", True) else (sample,)

    # ---- after the transformer's forward

    def finish(self, output: Any) -> Any:
        """This notes what was done, and gives the velocities of all tokens.

        Returns:
            The output in place of the transformer's; None to leave that.

        Raises:
            RuntimeError: A residual was left waiting: an adapter's last block did not leave its streams.
        """
        run, forward = self.run, self.forward or self.program
        record = run.records.setdefault(run.step, StepRecord())
        if forward is None:
            record.reused += run.patched.spec.component_count or 1
            return None
        if self.program is None and not forward.complete:
            raise RuntimeError(
                f"a residual was left waiting: the last block of the {run.patched.adapter.family} adapter did not "
                "leave its streams"
            )
        record.tokens, record.actions = self.tokens, self.actions
        record.computed += forward.computed if run.patched.blocks else 1
        record.reused += forward.reused
        adapter, sample = run.patched.adapter, _first(output)
        if self._smaller or run.methods or run.plan.forecasts:
            sample = adapter.as_latents(sample)
        given = sample
        if self._smaller:
            sample = adapter.expand_output(
                sample, self.layout, self.arguments.hidden_states, run.patched.ops
            )
        for method in run.methods:
            sample = method.output(self, sample)
        if self.guarded is not None:
            sample = self.guarded.mixed(sample)
        if run.plan.forecasts and self.guarded is None:
            self._keep(_with_sample(output, sample), max(run.plan.forecasts))
        if forward.computed:
            held = run.cache_bytes() if self.trace is None else self.trace.nbytes
            run.peak_bytes = max(run.peak_bytes, held)
        return None if sample is given else _with_sample(output, adapter.as_given(sample))

    def _keep(self, output: Any, order: int) -> None:
        """Whole steps are forecast through this output."""
        run, outputs, weights = self.run, self.branch.outputs, self.run.forecast_weights
        if self.rows is None and outputs.tokens is None:
            outputs.add(run.step, output, weights, order)
        else:
            patches = functools.partial(run.patched.adapter.patches, patch=run.patch)
            tokens = self._tokens(self.count, self.keeps)
            outputs.add_tokens(run.step, output, tokens, patches, weights, order)


def _first(output: Any) -> Any:
    """This is the sample of a transformer's output: some give that alone, or in an object of other names."""
    if isinstance(output, Tensor):
        return output
    found = None if isinstance(output, tuple) else getattr(output, "sample", None)
    return output[0] if found is None else found


def _with_sample(output: Any, sample: Any) -> Any:
    """This is a transformer's output with this sample in the place of its own."""
    if _first(output) is sample:
        return output
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    found = copy.copy(output)
    found.sample = sample
    return found
