"""The programs of a patched model, by kind of call; all its runs and threads share them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdit.programs.model import Model
from fastdit.programs.program import NoProgram, Program, write
from fastdit.programs.recorder import Recorder
from fastdit.programs.state import Form, Moment, Place, State, UnknownState

#: programs that are kept; the one that was not run for longest goes first
MOST_PROGRAMS = 256
#: what stands for keys, before they are forgotten, and with them their programs
MOST_INTERNED = 4096


class Programs:
    """What was recorded of a model.

    Attributes:
        found: Kind of call -> its program, or why there is none.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Program | str] = {}
        self._used: dict[Any, int] = {}
        self._count = itertools.count()
        self._model: Model | None = None
        self._interned: dict[Any, Any] = {}
        self._rows: dict[int, tuple[Sequence[Any], Any]] = {}
        self._sums: dict[int, tuple[Any, Any]] = {}

    def model(self, transformer: nn.Module, is_ours: Callable[[nn.Module], bool]) -> Model:
        """The model as it is now; the same object as long as it is the same."""
        known = self._model
        if known is not None and known.is_still(transformer):
            return known
        # What was recorded before goes, lest it keeps modules that somebody replaced.
        self.found, self._used = {}, {}
        self._model = model = Model(transformer, is_ours)
        return model

    def interned(self, key: Any) -> Any:
        """An object that stands for a key, which is quicker to compare than a large one."""
        if len(self._interned) >= MOST_INTERNED:
            self._interned = {}
        return self._interned.setdefault(key, _Stand(key))

    def get(self, kind: Any) -> Program | str | None:
        """The program of a kind, or why there is none; None where it was not met."""
        program = self.found.get(kind)
        if program is not None:
            self._used[kind] = next(self._count)
        return program

    def keep(self, kind: Any, program: Program | str) -> None:
        """A kind of call was recorded."""
        if len(self.found) >= MOST_PROGRAMS:
            oldest = min(list(self._used), key=lambda kind: self._used.get(kind, 0), default=None)
            self.found.pop(oldest, None)
            self._used.pop(oldest, None)
        self.found[kind] = program
        self._used[kind] = next(self._count)

    def row(self, actions: Sequence[Any]) -> Any:
        """What stands for what the blocks are told."""
        found = self._rows.get(id(actions))
        if found is None or found[0] is not actions:
            if len(self._rows) >= MOST_INTERNED:
                self._rows = {}
            key = self.interned(tuple(tuple(row.items()) for row in actions))
            found = self._rows[id(actions)] = actions, key
        return found[1]

    def sums(self, plan: Any) -> Any:
        """What stands for the sums that a step makes and keeps, :class:`fastdit.schedules.collapse.StepSums`."""
        found = self._sums.get(id(plan))
        if found is None or found[0] is not plan:
            if len(self._sums) >= MOST_INTERNED:
                self._sums = {}
            kept = {slot: each for slot, each in plan.newest.items() if each.last > plan.step}
            order = {id(each): n for n, each in enumerate(dict.fromkeys(kept.values()))}
            slots = tuple(each.slots for each in dict.fromkeys(kept.values()))
            places = tuple((slot, order[id(each)]) for slot, each in kept.items())
            found = self._sums[id(plan)] = plan, self.interned((slots, places))
        return found[1]

    def form_of(self, state: State) -> tuple[Any, tuple[Moment, ...]]:
        """What stands for the form of a state, and the steps in it, latest first.

        Raises:
            UnknownState: It holds what nobody knows.
        """
        if not any(state.values()):
            return self.interned(()), ()
        form = Form(state)
        return self.interned(form.key), form.moments


class _Stand:
    """It is equal to nothing but itself."""

    def __init__(self, key: Any) -> None:
        self.key = key


def described(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What decides which program arguments are for: shapes, dtypes, strides, devices, and plain values as they are.

    Also which of them are one tensor, as a prompt for several pictures may be.

    Raises:
        UnknownState: One is of an unknown class.
    """
    seen: list[int] = []
    found = _described(args, seen), tuple(kwargs), _described(tuple(kwargs.values()), seen)
    return found if len(set(seen)) == len(seen) else (*found, tuple(map(seen.index, seen)))


def _described(values: Sequence[Any], seen: list[int]) -> Any:
    found = []
    for value in values:
        kind = type(value)
        if kind is Tensor:
            seen.append(id(value))
            found.append(
                (value.shape, value.dtype, value.device, value.stride(), value.is_inference())
            )
        elif value is None or kind in (bool, int, str):
            found.append((kind, value))
        elif kind is tuple or kind is list:
            found.append((kind, _described(value, seen)))
        elif kind is dict:
            found.append((tuple(value), _described(tuple(value.values()), seen)))
        else:
            raise UnknownState(f"it is given a {kind.__name__}")
    return tuple(found)


def record(
    compute: Callable[[], Any],
    model: Model,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    state: State,
    weights_made: Callable[[], Mapping[Any, Tensor]],
    now: Moment,
) -> tuple[Any, Any]:
    """The output of a call, and what makes its program; a reason, as text, where there can be none.

    Args:
        compute: Runs the call.
        state: What is read and written beside the arguments: of each dict the values that this call may use.
        weights_made: Gives the weights of forecasts by key, once it has run.
        now: The step.
    """
    before = Form(state)
    origins = {id(leaf): place for place, leaf in before.leaves}
    given = Form({"args": dict(enumerate(args)), "kwargs": kwargs}, lists=True)
    origins |= {id(leaf): place for place, leaf in given.leaves}
    held = {id(leaf): leaf for _, leaf in (*before.leaves, *given.leaves)}
    weights = model.weights()

    def origin(tensor: Tensor) -> Any:
        if held.get(id(tensor)) is tensor:
            return origins[id(tensor)]
        values, name = weights.get(id(tensor), ({}, ""))
        if values.get(name) is tensor:
            return values, name
        found = (key for key, each in weights_made().items() if each is tensor)
        return next((Place("weights", key) for key in found), None)

    recorder = Recorder(origin)
    with recorder:
        output = compute()
    if recorder.why is not None:
        return output, recorder.why
    try:
        after = Form(state)
        written = write(recorder.lines, recorder.inputs, output, before, after, recorder.known, now)
    except (NoProgram, UnknownState) as reason:
        return output, str(reason)
    return output, written
