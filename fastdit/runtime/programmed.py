"""A call of the transformer by its program: found by the kind of call, or recorded where there is none yet.

A kind is all that decides what a call does: the model as it is, what the call is given, the plan's row of the step, and
the form of what the branch keeps. The form is known from the call before, as long as programs follow each other. Calls
that nobody can foresee stay as they are: see :func:`model_of`, and `recorder.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks import attention
from fastdit.blocks.attention import KeyValues, Rotation
from fastdit.blocks.attention_choice import choices, is_tuning
from fastdit.blocks.nodes import HeldSums, Nodes
from fastdit.programs.library import described, record
from fastdit.programs.model import Model, hooks_so_far, same_objects
from fastdit.programs.program import Program
from fastdit.programs.state import Form, Moment, State, UnknownState, know
from fastdit.runtime.install import is_installed

know(KeyValues, Rotation, HeldSums, Nodes)


def model_of(call: Any) -> Model | None:
    """The model of a call that may have a program; None where it has none.

    It has none where gradients, autocast or the `reference` backend are wanted, where somebody sees what is called, and
    where the model is one that nobody can know. A call whose attentions are noted has none for the while.
    """
    run, patched, transformer = call.run, call.run.patched, call.transformer
    arguments = call.arguments
    if patched.programs is None or call.immediate or arguments.skips_blocks or arguments.writes:
        return None
    if is_seen() or is_tuning():
        return None
    model = run.model
    if model is None or run.hooks != hooks_so_far() or not model.has_its_processors():
        run.hooks = hooks_so_far()
        model = run.model = patched.programs.model(transformer, is_installed)
    if model.why is not None or not model.has_its_forwards():
        return None
    if patched.compiled_call(transformer, run) is not None:
        return None
    return model


def is_seen() -> bool:
    """Whether a mode sees what is called, or does something else in its place."""
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() > 0


def fuses_attention(call: Any, model: Model) -> bool:
    """What :meth:`Call._fuses_attention` says, looked up once for a model."""
    adapter = call.run.patched.adapter
    if not adapter.fused_attentions or not attention.fuses(call.arguments.hidden_states.device):
        return False
    if "stock attention" not in model.known:
        blocks = call.run.patched.blocks
        model.known["stock attention"] = all(map(adapter.has_stock_attention, blocks))
    return model.known["stock attention"] and not call.arguments.tells_attention


def compute(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The transformer's output, by a program or as it is recorded."""
    branch, programs, trace = call.branch, call.run.patched.programs, call.trace
    written = _written(call)
    try:
        if branch.form is None:
            branch.form = form_of(call, written)
        kind = _kind(call, args, kwargs)
        program = programs.get(kind)
    except UnknownState as unknown:
        program = str(unknown)
    ahead = call.ahead
    before, branch.form = branch.form, None  # not known until the call is over
    if isinstance(program, Program):
        call.program = program
        call.run.programs += 1
        if trace is not None:
            output, branch.form = trace.run(program, call, args, kwargs, before, written)
            return output
        now, moments = Moment(call.run.step), before[1]
        output = run(program, call, args, kwargs, now, moments, written)
        branch.form = program.after, program.moments_after(now, moments), None
        return output
    call.interpret()
    if program is not None:
        if trace is not None:
            trace.unknown = program
        output = call.run_model(args, kwargs)
        _look_after(call, written)
        return output
    tables = {}
    if ahead is not None:
        tables = {key: rows[ahead.row] for key, rows in ahead.table.rows.items()}
    state = {"modulations": tables, "given": given(call), **written}
    output, made = record(
        lambda: call.run_model(args, kwargs),
        call.run.model,
        args,
        kwargs,
        state,
        lambda: _weights_made(call.run, before[1]),
        Moment(call.run.step),
    )
    if not isinstance(made, str):
        after = programs.form_of(written)[0]
        made = Program(*made, after, call.forward.computed, call.forward.reused)
    programs.keep(kind, made)
    _look_after(call, written)
    return output


def _look_after(call: Any, written: State) -> None:
    """Find out what a call without a program leaves, so that the next one need not."""
    with contextlib.suppress(UnknownState):
        call.branch.form = form_of(call, written)
        if call.ahead is not None:
            _form_of(call.ahead, call.run.patched.programs)


def form_of(call: Any, written: State) -> tuple[Any, Sequence[Moment], Any]:
    """What stands for the form of what a branch keeps, the steps in it, and what for where it lies, if that matters."""
    if call.trace is not None:
        return call.trace.settle(call, written)
    return *call.run.patched.programs.form_of(written), None


def run(
    program: Program,
    call: Any,
    args: Any,
    kwargs: Any,
    now: Moment,
    moments: Sequence[Moment],
    written: State,
) -> Any:
    """The transformer's output, by a program."""
    ahead = call.ahead
    row, tables = (0, {}) if ahead is None else (ahead.row, ahead.table.rows)
    weights = weights_of(program, call.run, moments)
    return program.run(args, kwargs, row, now, moments, tables, given(call), weights, **written)


def weights_of(program: Program, run: Any, moments: Sequence[Moment]) -> dict[Any, Tensor]:
    """The weights of forecasts that a program reads at this step."""
    found, steps = {}, (*moments, run.step)  # -1 for the last one
    for key in program.reads["weights"]:
        nodes = tuple([tuple(map(steps.__getitem__, each)) for each in key[0]])
        found[key] = run.forecast_weights.by_key(run.step, (nodes, *key[1:]))
    return found


def _weights_made(run: Any, moments: Sequence[Moment]) -> dict[Any, Tensor]:
    """The weights of forecasts made at this step, by key: with ranks among the steps in the state for those steps."""
    if not run.patched.forecasts:
        return {}
    ranks = {moment: rank for rank, moment in enumerate(moments)} | {run.step: -1}
    return {
        (tuple(tuple(ranks[node] for node in each) for each in key[0]), *key[1:]): made
        for key, made in run.forecast_weights.made_at(run.step).items()
        if all(node in ranks for each in key[0] for node in each)
    }


def _written(call: Any) -> State:
    """What a call of a branch may change."""
    branch, resolution = call.branch, call.run.resolution
    return {
        "slots": branch.slots,
        "owned": branch.owned,
        "keys": branch.keys,
        "prompts": branch.prompts,
        "memory": branch.memory,
        "stage": {} if resolution is None else resolution.memory,
    }


def given(call: Any) -> dict[str, Tensor]:
    """What a call is given beside its arguments."""
    found = {}
    if call.rows is not None:
        found["rows"] = call.rows
    if call.layout is not None:
        found["table"] = call.layout.table
        bias = call.key_bias()
        if bias is not None:
            found["key_bias"] = bias
    return found


def stage_of(run: Any) -> tuple[Any, Any, Any]:
    """What all branches keep of the stage in progress, what stands for its form, and what for where it lies."""
    memory = {} if run.resolution is None else run.resolution.memory
    values, known = list(memory.values()), run.stage
    if known is None or not same_objects(values, known[0]):
        form, interned = Form({"stage": memory}), run.patched.programs.interned
        lies = frozenset([(place, id(leaf)) for place, leaf in form.leaves])
        known = run.stage = values, interned(form.key if memory else ()), interned(lies)
    return known


def _form_of(ahead: Any, programs: Any) -> Any:
    """What stands for the modulations that were made."""
    table = ahead.table
    if table.form is None:
        rows = {key: rows[ahead.row] for key, rows in table.rows.items()}
        table.form = programs.form_of({"modulations": rows})[0]
    return table.form


def _kind(call: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    run, branch, layout = call.run, call.branch, call.layout
    programs, ahead = run.patched.programs, call.ahead
    found = [
        run.model,
        branch.form[0],
        described(args, kwargs),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        call.collapses,
        call.keeps,
        call.fuses,
        run.keeps_prompt_keys,
        choices(call.arguments.hidden_states.device),
        programs.row(call.actions),
        None if ahead is None else _form_of(ahead, programs),
    ]
    if call.rows is not None:
        found.append((call.rows.shape, call.rows.dtype))
    if layout is not None:
        table = layout.table.shape
        given = layout.coarse, layout.centred, layout.weighs_keys
        found.append((layout.name, layout.grid, table, *given))
        found.append(stage_of(run)[1])
    if call.collapses:
        found.append(programs.sums(run.plan.sums[run.step]))
    if run.patched.forecasts:
        sigmas = run.forecast_weights.sigmas
        if len(set(sigmas)) < len(sigmas):  # a step replaces the outputs of one at the same sigma
            found += [run.step, tuple(sigmas)]
    return tuple(found)
