"""A program: the recorded lines of a call as one Python function, without a branch, a module or a check in it.

What it reads lies where the call finds it: in the call's arguments, in the modules' own dicts of weights, in the run's
state. It is loaded right before it is first read, and let go after it was last read, as in the call that was recorded.
Entries of the state that the call took out or put in, the program does, too.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdit.programs.copies import without_copies
from fastdit.programs.folding import fold
from fastdit.programs.lines import Line, Ref, refs_in
from fastdit.programs.state import OBJECTS, Form, Moment, Place

#: what makes a tensor that shares memory with no other
_FILLED = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
#: where a call's arguments are, the step's row of the modulations, the step, and the steps in the state, latest first
CALL = ("args", "kwargs", "row", "now", "moments")
#: the dicts of a state that a program reads, and those that it writes, too
READ = ("modulations", "given", "weights")
WRITTEN = ("slots", "owned", "keys", "prompts", "memory", "stage")


class NoProgram(Exception):
    """What was recorded cannot be written down."""


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """This stands for the forward of a transformer in all calls of one kind.

    Attributes:
        run: ``run(args, kwargs, row, now, moments, **state)`` gives the transformer's output.
        source: Its text.
        reads: Which keys it reads of the dicts in `READ`.
        weights: The dicts of modules with the weights that it reads, and their names there.
        moments: The steps in the state afterwards: ranks among those before it, None for its own.
        after: The form of what the branch keeps afterwards.
        computed, reused: Components.
    """

    run: Callable[..., Any]
    source: str
    reads: Mapping[str, tuple[Any, ...]]
    weights: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]
    moments: tuple[int | None, ...]
    after: Any
    computed: int
    reused: int

    def weights_now(self) -> Iterator[Tensor]:
        """The weights that it reads, as the modules hold them now."""
        return map(operator.getitem, *self.weights)

    def moments_after(self, now: Moment, moments: Sequence[Moment]) -> tuple[Moment, ...]:
        """The steps in the state after a call at the step `now`, of those before it."""
        return tuple(now if rank is None else moments[rank] for rank in self.moments)


def write(
    lines: Sequence[Line],
    inputs: Mapping[Ref, Any],
    output: Any,
    before: Form,
    after: Form,
    known: Callable[[Tensor], Ref | None],
    now: Moment,
) -> tuple[Any, ...]:
    """What a :class:`Program` of what was recorded begins with: its function, its text, and so on.

    Args:
        lines: What was called.
        inputs: Where tensors come from: a :class:`Place`, a (dict, name) of weights, or the tensor itself where it is
            the same for every call of the kind.
        output: What the call returned.
        before, after: The state.
        known: Gives the Ref of a tensor.
        now: The step.

    Raises:
        NoProgram: A tensor that stays comes from nowhere, or something changed that a program does not write.
    """
    return _Writer(inputs, before, known, now).write(lines, output, after)


def put(before: Form, after: Form, now: Moment) -> Callable[..., None]:
    """``put(now, moments, **written)`` makes of a state of the form `before` that of the step `now`, `after`.

    What it puts in are the very values of `after`, but for the steps in them.

    Raises:
        NoProgram: Something changed that a program does not write.
    """
    return _Putter({}, before, lambda tensor: None, now).put(after)


class _Writer:
    def __init__(
        self,
        inputs: Mapping[Ref, Any],
        before: Form,
        known: Callable[[Tensor], Ref | None],
        now: Moment,
    ) -> None:
        self._ranks: dict[int, int | None] = {
            moment: rank for rank, moment in enumerate(before.moments)
        }
        self._ranks[now] = None
        self._given = inputs
        self._before = before
        self._known = known
        self._space: dict[str, Any] = {"new_tuple": tuple.__new__, "new_object": _new_object}
        self._names: dict[int, str] = {}
        self._made: dict[int, str] = {}
        self._kept: list[Ref] = []
        self._text: list[str] = []
        self._opened: dict[tuple[str, Any], str] = {}

    def write(self, lines: Sequence[Line], output: Any, after: Form) -> tuple[Any, ...]:
        ends = [*self._stores(after), f"return {self._output(output)}"]
        self._inputs = dict(self._given)  # what is kept may be one that nobody read
        self._gone = self._changed(after)
        lines, folded = fold(lines, self._inputs, self._kept)
        self._inputs |= folded
        lines = without_copies(lines, self._kept)
        lines = _live(_without_stores(lines, self._kept), self._kept)
        last = self._last_uses(lines)
        read = {ref for line in lines for ref in line.reads} | set(self._kept)
        places = [self._inputs[ref] for ref in read if ref in self._inputs]
        nested = (place for place in places if isinstance(place, Place) and place.steps)
        self._pending = Counter((place.source, place.key) for place in nested)
        taken = {(p.source, p.key) for p in places if isinstance(p, Place)}
        self._text += [f"del {self._entry(where)}" for where in self._gone if where not in taken]
        for number, line in enumerate(lines):
            for ref in line.reads:
                self._load(ref)
            self._text.append(self._call(line))
            if number in last:
                self._text.append("del " + ", ".join(last[number]))
        for ref in self._kept:
            self._load(ref)
        body = "\n    ".join([*self._text, *ends])
        source = f"def program({', '.join((*CALL, *READ, *WRITTEN))}):\n    {body}\n"
        exec(compile(source, "<a program of fastdit>", "exec"), self._space)
        keys = [(place.source, place.key) for place in places if isinstance(place, Place)]
        reads = {s: tuple(dict.fromkeys(key for at, key in keys if at == s)) for s in READ}
        owned = [place for place in places if type(place) is tuple]
        weights = tuple(values for values, _ in owned), tuple(name for _, name in owned)
        moments = tuple(self._ranks[moment] for moment in after.moments)
        return self._space["program"], source, reads, weights, moments

    # ---- the state

    def _changed(self, after: Form) -> list[tuple[str, Any]]:
        """Entries that are not there afterwards, or are another."""
        found = []
        for where, held in self._before.entries.items():
            now = after.entries.get(where)
            if now is None or not _alike(held, now):
                found.append(where)
        return found

    def _stores(self, after: Form) -> Iterator[str]:
        """Lines that put in what is new."""
        for where, now in after.entries.items():
            held = self._before.entries.get(where)
            if held is not None and _alike(held, now):
                continue
            if where[0] not in WRITTEN:
                raise NoProgram(f"it changes {where[0]}")
            before: list[str] = []
            made = self._value(now[0], before)
            yield from before
            yield f"{self._entry(where)} = {made}"

    def _value(self, value: Any, before: list[str]) -> str:
        """An expression for a value of the state; `before` has lines that make what several entries may share."""
        if isinstance(value, Tensor):
            return self._keep(value)
        if id(value) in self._made:
            return self._made[id(value)]
        kind = type(value)
        if kind is Moment:
            rank = self._ranks[value]
            return "now" if rank is None else f"moments[{rank}]"
        if isinstance(value, tuple):
            parts = "".join(f"{self._value(part, before)}, " for part in value)
            made = (
                f"({parts})" if kind is tuple else f"new_tuple({self._constant(kind)}, ({parts}))"
            )
        elif kind in OBJECTS:
            parts = ", ".join(f"{k!r}: {self._value(v, before)}" for k, v in vars(value).items())
            made = f"new_object({self._constant(kind)}, {{{parts}}})"
        else:
            return self._constant(value)
        name = self._made[id(value)] = f"v{len(self._made)}"
        before.append(f"{name} = {made}")
        return name

    def _keep(self, tensor: Tensor) -> str:
        ref = self._known(tensor)
        if ref is None:
            raise NoProgram(f"it keeps a tensor {list(tensor.shape)} that comes from nowhere")
        self._kept.append(ref)
        return f"t{ref.number}"

    def _output(self, output: Any) -> str:
        if type(output) is tuple:
            parts = map(self._returned, output)
            return "(" + "".join(f"{part}, " for part in parts) + ")"
        if list(getattr(output, "keys", tuple)()) != ["sample"]:
            raise NoProgram(f"it returns a {type(output).__name__}")
        return f"{self._constant(type(output))}(sample={self._returned(output.sample)})"

    def _returned(self, value: Any) -> str:
        """An expression for a part of what the call returns: some models give a list, of one tensor a picture."""
        if type(value) is not list:
            return self._value(value, [])
        return "[" + "".join(f"{self._returned(part)}, " for part in value) + "]"

    # ---- tensors

    def _last_uses(self, lines: Sequence[Line]) -> dict[int, list[str]]:
        """Line -> the tensors that nobody reads after it."""
        last = {ref: number for number, line in enumerate(lines) for ref in line.refs}
        found: dict[int, list[str]] = {}
        kept = set(self._kept)
        for ref, number in last.items():
            if ref not in kept and not isinstance(self._inputs.get(ref), Tensor):
                found.setdefault(number, []).append(f"t{ref.number}")
        return found

    def _load(self, ref: Ref) -> None:
        """Its place is read when the tensor is first needed."""
        found = self._inputs.get(ref)
        if found is None or isinstance(found, Tensor):
            return
        del self._inputs[ref]
        name = f"t{ref.number}"
        if not isinstance(found, Place):
            weights, key = found
            self._text.append(f"{name} = {self._constant(weights)}[{key!r}]")
            return
        where = found.source, found.key
        value = f"{found.source}.pop({self._constant(found.key)})"
        value = value if where in self._gone else self._entry(where)
        if not found.steps:
            self._text.append(f"{name} = {value}")
            return
        if where not in self._opened:
            self._opened[where] = f"e{len(self._opened)}"
            self._text.append(f"{self._opened[where]} = {value}")
        steps = "".join(
            f".{step}" if found.source in WRITTEN and isinstance(step, str) else f"[{step!r}]"
            for step in found.steps
        )
        self._text.append(f"{name} = {self._opened[where]}{steps}")
        self._pending[where] -= 1
        if not self._pending[where]:
            self._text.append(f"del {self._opened[where]}")

    def _entry(self, where: tuple[str, Any]) -> str:
        source, key = where
        row = "[row]" if source == "modulations" else ""
        return f"{source}[{self._constant(key)}]{row}"

    # ---- lines

    def _call(self, line: Line) -> str:
        args = [self._expression(arg) for arg in line.args]
        kwargs = [f"{name}={self._expression(value)}" for name, value in line.kwargs.items()]
        name, function = line.name, line.function
        if name == "__setitem__":
            if _is_number(line.args[2]) and _is_view(line.args[1]):  # no tensor of the host's
                return f"{args[0]}[{args[1]}].fill_({args[2]})"
            return f"{args[0]}[{args[1]}] = {args[2]}"
        if name == "__getitem__":
            made = f"{args[0]}[{args[1]}]"
        elif function is None:
            made = f"{args[0]}.{name}"
        elif line.is_method:
            made = f"{args[0]}.{name}({', '.join((*args[1:], *kwargs))})"
        else:
            made = f"{self._constant(function)}({', '.join((*args, *kwargs))})"
        fresh = [ref for ref in refs_in(line.result) if ref not in line.reads]
        if isinstance(line.result, tuple):
            return "".join(f"t{ref.number}, " for ref in line.result) + f"= {made}"
        return f"t{fresh[0].number} = {made}" if fresh else made

    def _expression(self, value: Any) -> str:
        if isinstance(value, Ref):
            found = self._inputs.get(value)
            return self._constant(found) if isinstance(found, Tensor) else f"t{value.number}"
        if not any(True for _ in refs_in(value)):
            return self._constant(value)
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self._expression, parts))})"
        if type(value) is dict:
            return "{" + ", ".join(f"{k!r}: {self._expression(v)}" for k, v in value.items()) + "}"
        parts = "".join(f"{self._expression(part)}, " for part in value)
        return f"({parts})" if type(value) is tuple else f"[{parts}]"

    def _constant(self, value: Any) -> str:
        """A literal, or the name of what it stands for."""
        if _is_literal(value):
            return repr(value)
        if type(value) in (tuple, list) and all(map(_is_literal, value)):
            return repr(value)
        if id(value) not in self._names:
            self._names[id(value)] = name = f"c{len(self._names)}"
            self._space[name] = value  # kept, so that its id stays its own
        return self._names[id(value)]


class _Putter(_Writer):
    def put(self, after: Form) -> Callable[..., None]:
        gone = [where for where in self._changed(after) if where not in after.entries]
        lines = [f"del {self._entry(where)}" for where in gone]
        body = "\n    ".join([*lines, *self._stores(after), "return None"])
        source = f"def put({', '.join(('now', 'moments', *WRITTEN))}):\n    {body}\n"
        exec(compile(source, "<a program of fastdit>", "exec"), self._space)
        return self._space["put"]

    def _value(self, value: Any, before: list[str]) -> str:
        return super()._value(value, before) if _is_of_steps(value) else self._constant(value)


def _is_of_steps(value: Any) -> bool:
    """Whether the number of a step is in a value of the state."""
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return type(value) is Moment or (type(value) is not Tensor and any(map(_is_of_steps, parts)))


def _alike(held: tuple[Any, Any], now: tuple[Any, Any]) -> bool:
    """Whether an entry is the same object, and still looks the same."""
    return held[0] is now[0] and held[1] == now[1]


def _without_stores(lines: Sequence[Line], kept: Sequence[Ref]) -> list[Line]:
    """The lines without tensors that a call makes and fills and nobody reads, as a mask where no token is hidden."""
    stored = {line.result for line in lines if line.name in _FILLED} - set(kept)

    def fills(line: Line) -> bool:
        return line.name == "__setitem__" and line.args[0] in stored

    for line in lines:
        stored -= set(refs_in((line.args[1:], line.kwargs)) if fills(line) else line.reads)
    return [line for line in lines if not (line.result in stored or fills(line))]


def _live(lines: Sequence[Line], kept: Sequence[Ref]) -> list[Line]:
    """The lines that write, or whose results somebody reads who is left, too."""
    readers = Counter(ref for line in lines for ref in line.reads)
    alone = {line.result for line in lines if "empty" in line.name and readers[line.result] == 1}
    alone -= set(kept)
    wanted, found = set(kept), []
    for line in reversed(lines):
        # An op may write into what was made for that, and nobody reads.
        writes = line.writes and not (line.op and all(ref in alone for ref in line.written))
        if writes or any(ref in wanted for ref in refs_in(line.result)):
            found.append(line)
            wanted.update(line.reads)
    return found[::-1] if len(found) == len(lines) else _live(found[::-1], kept)


def _is_literal(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float) and _is_literal(value)


def _is_view(index: Any) -> bool:
    """Whether a tensor indexed so is a view of it, as of numbers and slices."""
    if type(index) is tuple:
        return all(map(_is_view, index))
    return index is None or type(index) in (int, slice, type(Ellipsis))


def _new_object(cls: type, attributes: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    made.__dict__.update(attributes)
    return made
