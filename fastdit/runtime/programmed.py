"""A call of the transformer by its program: found by the kind of call, or recorded where there is none yet.

A kind is all that decides what a call does: the model as it is, what the call is given, the plan's row of the step, and
the form of what the branch keeps. The form is known from the call before, as long as programs follow each other. Calls
that nobody can foresee stay as they are: see :func:`model_of`, and `recorder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdit.blocks import attention
from fastdit.blocks.attention import KeyValues, Rotation
from fastdit.blocks.attention_choice import choices, is_tuning
from fastdit.blocks.nodes import HeldSums, Nodes
from fastdit.programs.library import described, record
from fastdit.programs.model import Model, hooks_so_far
from fastdit.programs.program import Program
from fastdit.programs.state import State, UnknownState, know
from fastdit.runtime.install import is_installed

know(KeyValues, Rotation, HeldSums, Nodes)


def model_of(call: Any) -> Model | None:
    """The model of a call that may have a program; None where it has none.

    It has none where gradients, autocast or the `reference` backend are wanted, where somebody sees what is called, and
    where the model is one that nobody can know. A call whose attentions are noted has none for the while.
    """
    run, patched, transformer = call.run, call.run.patched, call.transformer
    if patched.programs is None or call.immediate or call.arguments.skips_blocks:
        return None
    if is_seen() or is_tuning():
        return None
    model = run.model
    if model is None or run.hooks != hooks_so_far() or not model.has_its_processors():
        run.hooks = hooks_so_far()
        model = run.model = patched.programs.model(transformer, is_installed)
    if model.why is not None or patched.compiled_call(transformer, run) is not None:
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
    branch, programs = call.branch, call.run.patched.programs
    written = _written(call)
    try:
        if branch.form is None:
            branch.form = programs.form_of(written)
        kind = _kind(call, args, kwargs)
        program = programs.get(kind)
    except UnknownState as unknown:
        program = str(unknown)
    ahead = call.ahead
    branch.form = None  # not known until the call is over
    if isinstance(program, Program):
        output = run(program, call, args, kwargs, written)
        branch.form = program.after
        return output
    call.interpret()
    transformer = call.transformer
    if program is not None:
        return type(transformer).forward(transformer, *args, **kwargs)
    tables = {} if ahead is None else {key: rows[ahead.row] for key, rows in ahead.tables.items()}
    state = {"modulations": tables, "given": _given(call), **written}
    output, made = record(
        lambda: type(transformer).forward(transformer, *args, **kwargs),
        call.run.model,
        args,
        kwargs,
        state,
        lambda: call.run.forecast_weights.made if call.run.patched.forecasts else (),
    )
    if not isinstance(made, str):
        branch.form = programs.form_of(written)
        forward = call.forward
        made = Program(*made, branch.form, forward.computed, forward.reused)
    programs.keep(kind, made)
    return output


def run(program: Program, call: Any, args: Any, kwargs: Any, written: State) -> Any:
    """The transformer's output, by a program."""
    call.program, ahead = program, call.ahead
    call.run.programs += 1
    row, tables = (0, {}) if ahead is None else (ahead.row, ahead.tables)
    return program.run(args, kwargs, row, tables, _given(call), **written)


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


def _given(call: Any) -> dict[str, Tensor]:
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


def _form_of(ahead: Any, programs: Any) -> Any:
    """What stands for the modulations that were made."""
    if ahead.form is None:
        rows = {key: rows[ahead.row] for key, rows in ahead.tables.items()}
        ahead.form = programs.form_of({"modulations": rows})
    return ahead.form


def _kind(call: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    run, branch, layout = call.run, call.branch, call.layout
    programs, ahead, resolution = run.patched.programs, call.ahead, run.resolution
    plan, step = run.plan, run.step
    found = [
        run.model,
        branch.form,
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
        found.append(programs.form_of({"stage": resolution.memory}))
    if call.collapses or run.patched.forecasts:
        # The sums are those of this very step, and so are a forecast's weights.
        found += [plan, step]
    if run.patched.forecasts:
        found.append(tuple(run.forecast_weights.sigmas))
    return tuple(found)
