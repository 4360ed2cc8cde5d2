"""Calls of the transformer become CUDA graphs: one for each program and branch of guidance, replayed wherever it runs.

Where a step is short, a GPU waits for Python; a replay is one launch. A program (`programmed.py`) does the same for all
calls of one kind, so one graph of it serves them all: what differs from call to call is copied to where the graph reads
it before it is replayed. That is what the call is given, its modulations, its active rows and the weights of its
forecasts. What a run keeps lies in an :class:`~fastdit.runtime.arena.Arena`, at one address for each form of it.
Weights are read where they lie, which is looked up before each replay.

The first call of a kind is recorded as a program. The second runs that on the stream of all captures, which warms up
what may not happen while capturing, and is captured then; so a capture that fails costs no call its result. Later ones
are replayed. The first call of each branch in a run, and in a stage, stays eager: nothing is kept yet, so it is like no
other, and it computes everything, so nobody waits for Python. The graphs of one session share a memory pool, for what
lives within a call.

A session is of one size of pictures, and is leased by one run at a time: another one of that size meanwhile is eager.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdit.programs.program import Program, put
from fastdit.programs.state import Form, Moment, UnknownState
from fastdit.runtime import capture, programmed
from fastdit.runtime.arena import Arena, NoRoom

#: sessions that are kept: one for each size and batch of pictures
MOST_SESSIONS = 8
#: graphs of a session; where more would pay, those replayed least give way
MOST_GRAPHS = 128
#: choices that are remembered
MOST_CHOSEN = 64


@dataclass(eq=False, repr=False)
class Graph:
    """A program, captured for one branch.

    Attributes:
        replay: Runs it.
        output: What the program returned, which a replay fills.
        given: Where it reads what differs from call to call.
        hosts: Which of the call's tensors lie on the host, and where it reads those.
        pointers: Where the weights lay that it reads.
        put: Puts what it kept into the run's dicts.
        form, arrangement: Of what the branch keeps afterwards.
    """

    replay: Callable[[], None]
    output: Any
    given: list[Tensor]
    hosts: dict[int, Tensor]
    pointers: list[int]
    put: Callable[..., None]
    form: Any
    arrangement: Any


@dataclass(eq=False, repr=False)
class Session:
    """A session has the graphs of the runs of one size, and the memory that they use.

    Attributes:
        capture: What captures, into a pool of its own.
        kept: What a run keeps between its calls: outputs, keys and values, prompts.
        tables: What it keeps beside that, of positions.
        given: What a call is given.
        graphs: (branch, program, where lies what is kept, and what is shared, how modulations lie) -> a graph.
        met: How often each of them was called.
        copied: What was copied from the host, by where to.
        used: When it was last; a higher number is later.
    """

    capture: Any
    kept: Arena
    model: Any = None
    tables: Arena = field(default_factory=Arena)
    given: Arena = field(default_factory=Arena)
    graphs: dict[Any, Graph] = field(default_factory=dict)
    met: Counter[Any] = field(default_factory=Counter)
    copied: dict[int, Tensor] = field(default_factory=dict)
    used: int = 0
    _lease: dict[str, weakref.ref[GraphRun]] = field(default_factory=dict)

    def lease(self, run: GraphRun) -> bool:
        """The session goes to this one run; False where another has it."""
        mine = weakref.ref(run)
        found = self._lease.setdefault("to", mine)
        if found() is None:  # a loop was given up in its midst
            self.give_back()
            found = self._lease.setdefault("to", mine)
        return found() is run

    def is_leased_to(self, run: GraphRun) -> bool:
        """Whether it is this run that has it."""
        found = self._lease.get("to")
        return found is not None and found() is run

    def give_back(self) -> None:
        """The run needs it no more."""
        self._lease.pop("to", None)

    def makes_room(self, key: Any, device: torch.device) -> bool:
        """Whether a graph may be added; where there is no room, one that was called less often goes."""
        if len(self.graphs) < MOST_GRAPHS and self.capture.nbytes <= self.capture.most_bytes(
            device
        ):
            return True
        rarest = min(self.graphs, key=self.met.__getitem__, default=None)
        if rarest is None or 2 * self.met[rarest] > self.met[key]:
            return False
        del self.graphs[rarest]
        return len(self.graphs) < MOST_GRAPHS

    @property
    def nbytes(self) -> int:
        """What its memories take."""
        return sum(arena.nbytes for arena in (self.kept, self.tables, self.given))

    def settle(self, branch: Any, written: Any) -> Any:
        """Put what a branch keeps where it stays, and beside it what all of them share; see :meth:`Arena.settle`."""
        kept = {source: written[source] for source in ("slots", "owned", "keys", "prompts")}
        arrangement = self.kept.settle(branch, kept)
        arrangement |= self.tables.settle(branch, {"memory": written["memory"]})
        self.tables.settle(None, {"stage": written["stage"]})
        return arrangement

    def clear(self) -> None:
        """All is let go: the model is another."""
        self.graphs.clear()
        self.met.clear()
        for memory in (self.copied, self.kept, self.tables, self.given):
            memory.clear()


class Graphs:
    """A patched model has sessions, and tells once why a run has none.

    Args:
        chooses: Tells of the call that a run begins with whether it is worth it; None where every run is.
    """

    def __init__(self, chooses: Callable[[Any], bool] | None = None) -> None:
        self.chooses = chooses
        self._chosen: dict[Any, bool] = {}
        self.failure: str | None = None
        self.sessions: dict[Any, Session] = {}
        self._told: set[str] = set()
        self._count = itertools.count()

    def begin(self, call: Any) -> GraphRun | str:
        """The session of the run that begins with a call; or this says why it is eager."""
        patched, arguments = call.run.patched, call.arguments
        key = arguments.hidden_states.shape, arguments.signature
        why = self.failure or capture.why_eager(call)
        if why is None and not self._is_chosen(call, key):
            return "since the GPU takes longer than the host at every step"
        if why is not None:
            if why not in self._told and (self.chooses is None or self.failure is not None):
                self._told.add(why)
                warnings.warn(f"graphs: runs eagerly, {why}", stacklevel=2)
            return why
        session = self.sessions.get(key)
        if session is None:
            made = Session(capture.CudaCapture(), Arena(patched.max_cache_bytes))
            session = self.sessions.setdefault(key, made)
        session.used = next(self._count)
        if len(self.sessions) > MOST_SESSIONS:
            held = sorted(self.sessions.items(), key=lambda item: item[1].used)
            self.sessions.pop(held[0][0], None)
        run = GraphRun(self, session)
        if not session.lease(run):
            return "since another run of its size is in progress"
        if session.model is not call.run.model:
            session.clear()
            session.model = call.run.model
        return run

    def another(self) -> Graphs:
        """The same of a copied model."""
        return Graphs(self.chooses)

    def _is_chosen(self, call: Any, size: Any) -> bool:
        """Whether the run is worth it, which is asked once for each plan and size."""
        if self.chooses is None:
            return True
        key = size, call.run.plan
        if key not in self._chosen:
            if len(self._chosen) >= MOST_CHOSEN:
                self._chosen = {}
            self._chosen[key] = self.chooses(call)
        return self._chosen[key]


class GraphRun:
    """One run that is replayed where it can be.

    Attributes:
        calls, captured, replayed: How many there were, and how many of them were.
        ended: Why no more are; None as long as they may be.
        unknown: Why a call of it has no program; empty where all have one.
    """

    def __init__(self, graphs: Graphs, session: Session) -> None:
        self._graphs = graphs
        self._session = session
        self.calls = self.captured = self.replayed = 0
        self._begun: set[Any] = set()
        self._is_first = False
        self.ended: str | None = None
        self.unknown = ""

    def __str__(self) -> str:
        if self.ended is not None:
            return self.ended
        if self.unknown and not self.captured + self.replayed:
            return f"since a call of its kind {self.unknown}"
        mode = "captured" if self.captured else "replayed" if self.replayed else "warming up"
        return f"{mode}, {self.replayed} of {self.calls} calls"

    @property
    def nbytes(self) -> int:
        """What its caches take, all run long."""
        return self._session.kept.nbytes

    def follow(self, call: Any) -> GraphRun | None:
        """A call of the run begins; this is None where it has no program."""
        self.calls += 1
        stages = call.run.resolution
        branch = call.key, stages and stages.index
        self._is_first = branch not in self._begun
        self._begun.add(branch)
        return None if call.model is None else self

    def run(
        self, program: Program, call: Any, args: Any, kwargs: Any, form: Any, written: Any
    ) -> tuple[Any, Any]:
        """The output of a call by its program, and the form of what its branch keeps afterwards.

        Args:
            form: Of what it kept before: as :meth:`settle` gives it.
        """
        session, (_, moments, arrangement) = self._session, form
        now = Moment(call.run.step)
        layout = None if call.ahead is None else call.ahead.packed().keys
        key = call.key, program, arrangement, programmed.stage_of(call.run)[2], layout
        if self._is_first:
            return self._eagerly(program, call, args, kwargs, moments, written)
        session.met[key] += 1
        graph = session.graphs.get(key)
        weights = list(program.weights_now())
        if graph is None or graph.pointers != list(map(Tensor.data_ptr, weights)):
            return self._first(key, program, call, args, kwargs, moments, written)
        self.replayed += 1
        given = given_to(program, call, args, kwargs, moments)
        if graph.hosts:
            self._copy_hosts(graph, given)
        torch._foreach_copy_(graph.given, given)
        graph.replay()
        graph.put(now, moments, **written)
        after = program.moments_after(now, moments)
        return copied_out(graph.output), (graph.form, after, graph.arrangement)

    def _eagerly(
        self,
        program: Program,
        call: Any,
        args: Any,
        kwargs: Any,
        moments: Sequence[Moment],
        written: Any,
    ) -> tuple[Any, Any]:
        """A call that is not to have a graph runs its program."""
        given = args, kwargs, Moment(call.run.step), moments, written
        return programmed.run(program, call, *given), self.settle(call, written)

    def settle(self, call: Any, written: Any) -> Any:
        """What a call kept that ran without a graph goes where graphs find it; this gives its form."""
        programs, session = call.run.patched.programs, self._session
        try:
            arrangement = session.settle(call.key, written)
        except (NoRoom, UnknownState) as why:
            self.end(f"since {why}")
            arrangement = None
        return *programs.form_of(written), programs.interned(arrangement)

    def end(self, why: str | None = None) -> None:
        """The run is over, or no more of its calls may be replayed."""
        self.ended = self.ended or why
        if self._session.is_leased_to(self):
            self._session.give_back()

    def _first(
        self,
        key: Any,
        program: Program,
        call: Any,
        args: Any,
        kwargs: Any,
        moments: Sequence[Moment],
        written: Any,
    ) -> tuple[Any, Any]:
        """A call that has no graph yet runs its program, and is captured."""
        session, device = self._session, call.arguments.hidden_states.device
        before = {source: dict(values) for source, values in written.items()}
        now, own = Moment(call.run.step), (*args, *kwargs.values())
        given = given_to(program, call, args, kwargs, moments)
        homes = [
            session.given.like((call.key, number), tensor, device)
            for number, tensor in enumerate(given)
        ]
        for home, tensor in zip(homes, given, strict=True):
            home.copy_(tensor)
            session.copied.pop(id(home), None)
        rest = iter(homes)
        values = _replaced(own, rest)
        static = values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))
        tables = {}
        if call.ahead is not None:
            packed = call.ahead.packed()
            parts = packed.parted([next(rest) for _ in packed.tables])
            tables = {key: (vectors,) for key, vectors in parts.items()}
        sources = [{name: next(rest) for name in program.reads[s]} for s in ("given", "weights")]

        def compute(state: Any) -> Any:
            return program.run(*static, 0, now, moments, tables, *sources, **state)

        def captured() -> Any:
            state = {source: dict(values) for source, values in before.items()}
            output, held = compute(state), session.nbytes
            session.settle(call.key, state)
            if session.nbytes != held:
                raise RuntimeError("what it keeps has no place outside of the graph's pool")
            return output, state

        output, form = session.capture.warm(
            lambda: (compute(written), self.settle(call, written)), device
        )
        if self.ended is not None or not session.makes_room(key, device):
            return output, form
        try:
            replay, (static_output, after) = session.capture(captured, device)
        except Exception as error:
            line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._graphs.failure = f"a call could not be captured: {line}"
            self.end(self._graphs.failure)
            return output, form
        self.captured += 1
        hosts = {n: home for n, home in enumerate(homes) if lies_elsewhere(given[n], device)}
        pointers = list(map(Tensor.data_ptr, program.weights_now()))
        placed = put(Form(before), Form(after), now)
        on_device = [home for n, home in enumerate(homes) if n not in hosts]
        session.graphs[key] = Graph(
            replay, static_output, on_device, hosts, pointers, placed, form[0], form[2]
        )
        return output, form

    def _copy_hosts(self, graph: Graph, given: list[Tensor]) -> None:
        """Take out what lies on the host; where it holds something else than before it is copied, which waits."""
        copied = self._session.copied
        for number, home in reversed(graph.hosts.items()):
            tensor = given.pop(number)
            before = copied.get(id(home))
            if before is None or not torch.equal(before, tensor):
                home.copy_(tensor)
                copied[id(home)] = tensor.clone()


def given_to(
    program: Program, call: Any, args: Any, kwargs: Any, moments: Sequence[Moment]
) -> list[Tensor]:
    """What differs from call to call of a program: arguments, modulations, rows, weights of forecasts."""
    found = _tensors((*args, *kwargs.values()))
    reads, ahead = program.reads, call.ahead
    if ahead is not None:
        found += ahead.packed().rows(ahead.row)
    if reads["given"]:
        beside = programmed.given(call)
        found += [beside[name] for name in reads["given"]]
    if reads["weights"]:
        found += programmed.weights_of(program, call.run, moments).values()
    return found


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors in arguments, lists and dicts of them included, in order."""
    found: list[Tensor] = []
    waiting = list(values)[::-1]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting += list(value.values())[::-1]
        elif isinstance(value, (tuple, list)):
            waiting += value[::-1]
    return found


def _replaced(values: Any, by: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of :func:`_tensors`."""
    if isinstance(values, Tensor):
        return next(by)
    if isinstance(values, dict):
        return {name: _replaced(value, by) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)([_replaced(value, by) for value in values])
    return values


def lies_elsewhere(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is to be copied from the host: Lumina's rotary table, which each step makes anew."""
    return tensor.device != device


def copied_out(output: Any) -> Any:
    """A transformer's output, with a copy of its sample, or of a list of them: the next call may lie there."""
    sample = output[0] if isinstance(output, tuple) else output.sample
    copied = list(map(Tensor.clone, sample)) if isinstance(sample, list) else sample.clone()
    return (copied, *output[1:]) if isinstance(output, tuple) else type(output)(sample=copied)
