"""Whole runs become CUDA graphs: one for each transformer call, replayed in the order of their capture.

Where a step is short, a GPU waits for Python; a replay is one launch. What a static plan does at each step is known
before the run, so every call of it is a graph of its own: which components run, where their outputs are kept, the
modulations made ahead. Runs that do the same with arguments of the same shapes have one signature. The first run of a
signature is eager and warms up what may not happen while capturing, the second is captured and replayed call by call,
later ones are replayed.

The graphs of one signature share a memory pool. A slot lives there from the call that makes it to the last one that
reads it, as in the run that was captured, and other calls' intermediates lie around it. That holds only in the same
order from the first call on: a run that leaves it (a prompt swapped on the way) drops its caches and goes on eagerly.
It holds for one run at a time, too: a recording is leased, and another run of its signature meanwhile is eager.
Signatures have pools of their own, so that runs of two of them may go on at once.

What comes from outside is copied to where the graphs read it: arguments, the rows of active tokens, timesteps. Weights
are read where they lie, so a run whose weights or settings are elsewhere than before has another signature.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit.runtime import capture
from fastdit.runtime.capture import Replay, described, fingerprint, why_eager

#: recordings that are kept: one for each signature of size, batch, number of steps
MAX_RECORDINGS = 8


class Inputs:
    """The graphs of one call within a step read its arguments here."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        with torch.inference_mode(False):  # written to in whatever mode a later run has
            self.buffers = [
                torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ]
        self.forget()

    def forget(self) -> None:
        """A new run begins: whatever is given is copied."""
        self._sources: list[tuple[Any, int]] = [(None, 0)] * len(self.buffers)

    def fill(self, leaves: Sequence[Any], changing: Sequence[Any], kept: Sequence[Any]) -> bool:
        """What is new is copied, and this tells whether one of `kept`, which caches depend on, is so in this run.

        One of `changing` is always copied. A tensor that is the same object, unwritten since, is not, nor one of `kept`
        in new memory that is equal, which waits for the device as it does without graphs.
        """
        renewed = False
        for index, (buffer, leaf) in enumerate(zip(self.buffers, leaves, strict=True)):
            if not isinstance(leaf, Tensor):
                continue
            version = -1 if leaf.is_inference() else leaf._version
            source, before = self._sources[index]
            unwritten = source is leaf and before == version and not leaf.is_inference()
            if unwritten and not _among(leaf, changing):
                continue
            self._sources[index] = leaf, version
            if source is not None and _among(leaf, kept):
                if torch.equal(buffer, leaf):
                    continue
                renewed = True
            buffer.copy_(leaf)
        return renewed


@dataclass
class RecordedCall:
    """This is one transformer call of a recording.

    Attributes:
        index: (step, call within it).
        given: What its arguments look like.
        renewed: Whether it was given other embeddings than the step before.
        state: What was decided about it outside its graph.
        replay: Runs it.
        sample: Where its output is then.
        rebuild: Makes the transformer's output of a sample.
        computed, reused: Components.
    """

    index: tuple[int, int]
    given: Any
    renewed: bool
    state: Any = None
    replay: Replay | None = None
    sample: Tensor | None = None
    rebuild: Callable[[Tensor], Any] | None = None
    computed: int = 0
    reused: int = 0


@dataclass
class Recording:
    """A recording has the calls of the runs of one signature.

    Attributes:
        capture: What captures its calls, into a pool of its own.
        length: Calls of the run that warmed up; None before it.
        ready: All of its calls are captured.
        peak_bytes: Most bytes that caches held while it was captured.
    """

    capture: Any
    length: int | None = None
    calls: list[RecordedCall] = field(default_factory=list)
    inputs: dict[Any, Inputs] = field(default_factory=dict)
    held: dict[Any, Tensor] = field(default_factory=dict)
    ready: bool = False
    peak_bytes: int = 0
    _lease: dict[str, weakref.ref[Trace]] = field(default_factory=dict)

    def lease(self, trace: Trace) -> bool:
        """The recording goes to the one run that may warm it up, capture or replay it; False where another has it."""
        mine = weakref.ref(trace)
        found = self._lease.setdefault("to", mine)
        if found() is None:  # a loop was given up in its midst
            self.clear()
            self.give_back()
            found = self._lease.setdefault("to", mine)
        trace.mode = self.mode
        return found() is trace

    def is_leased_to(self, trace: Trace) -> bool:
        """This tells whether it is this run that has it."""
        found = self._lease.get("to")
        return found is not None and found() is trace

    def give_back(self) -> None:
        """The run needs it no more."""
        self._lease.pop("to", None)

    @property
    def mode(self) -> str:
        """The next run is warming up, captured or replayed."""
        if self.ready:
            return "replayed"
        return "warming up" if self.length is None else "captured"

    def clear(self) -> None:
        """The recording begins anew."""
        self.calls.clear()
        self.inputs.clear()
        self.held.clear()
        self.length, self.ready = None, False


class Graphs:
    """A patched model has recordings, and tells once why a run has none."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.recordings: dict[Any, Recording] = {}
        self._told: set[str] = set()

    def begin(self, call: Any, args: Any, kwargs: Any) -> Trace | str:
        """A run is followed from its first `call` on; or this says why it is eager."""
        run, (leaves, spec) = call.run, tree_flatten((args, kwargs))
        why = self.failure or why_eager(call, leaves)
        if why is not None:
            if why not in self._told:
                self._told.add(why)
                warnings.warn(f"cuda_graphs: runs eagerly, {why}", stacklevel=2)
            return why
        given = described(leaves, spec)
        signature = run.steps, run.first, given, fingerprint(call.transformer)
        recording = self.recordings.pop(signature, None) or Recording(capture.CudaCapture())
        recording = self.recordings.setdefault(signature, recording)  # the last used is the last
        for other in list(self.recordings)[:-MAX_RECORDINGS]:
            self.recordings.pop(other, None)
        trace = Trace(self, recording)
        if not recording.lease(trace):
            return "since another run of its signature is in progress"
        return trace


class Trace:
    """A trace is one run that warms up, is captured, or is replayed.

    Attributes:
        mode: "warming up", "captured" or "replayed"; "left" once it has gone another way and runs eagerly.
    """

    def __init__(self, graphs: Graphs, recording: Recording) -> None:
        self._graphs = graphs
        self._recording = recording
        self._count = 0
        self._call: RecordedCall | None = None
        self.mode = recording.mode

    def __str__(self) -> str:
        return self.mode

    @property
    def substitutes(self) -> bool:
        """This tells whether the transformer is given tensors that stay where they are."""
        return self.mode in ("captured", "replayed")

    def enter(self, call: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """This copies a call's arguments to where graphs read them; `mode` may be "left" after it."""
        self._count += 1
        if not self.substitutes:
            return args, kwargs
        leaves, spec = tree_flatten((args, kwargs))
        recording, given = self._recording, described(leaves, spec)
        run, arguments = call.run, call.arguments
        index = run.step, run.calls - 1
        known = recording.calls[self._count - 1] if self._count <= len(recording.calls) else None
        if self.mode == "replayed" and (
            known is None or known.index != index or known.given != given
        ):
            self.leave(run)
            return args, kwargs
        inputs = recording.inputs.get((index[1], given))
        if inputs is None:
            inputs = recording.inputs[index[1], given] = Inputs(leaves)
        changing = arguments.hidden_states, arguments.timestep
        renewed = inputs.fill(leaves, changing, arguments.embeddings)
        if self.mode == "replayed":
            if known.renewed != renewed:
                self.leave(run)
                return args, kwargs
            self._call = known
        else:
            self._call = RecordedCall(index, given, renewed)
        return tree_unflatten(inputs.buffers, spec)

    def hold(self, name: Any, value: Tensor) -> Tensor:
        """This copies a tensor made outside of the graphs to where they read it."""
        if not self.substitutes:
            return value
        key = name, tuple(value.shape), value.dtype
        held = self._recording.held
        if key not in held:
            with torch.inference_mode(False):
                held[key] = torch.empty_like(value)
        held[key].copy_(value)
        return held[key]

    def agrees(self, run: Any, state: Any) -> bool:
        """What was decided about this call must be what was captured; else the run is left, and this says so."""
        if self.mode == "captured":
            self._call.state = state
        elif self.mode == "replayed" and self._call.state != state:
            self.leave(run)
            return False
        return True

    def leave(self, run: Any) -> None:
        """The run goes another way than the one that was captured, or cannot be captured. Its caches go."""
        self.mode = "left"
        self._recording.clear()
        self._recording.give_back()
        run.drop_caches()

    def run(self, compute: Callable[[], Any], call: Any) -> Any:
        """This gives the transformer's output, of a graph where there is one.

        Raises:
            CaptureError: What `compute` does cannot be captured.
        """
        own, forward = self._call, call.forward
        if self.mode == "captured":
            try:
                device = call.arguments.hidden_states.device
                own.replay, output = self._recording.capture(compute, device)
            except Exception as error:
                line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                self._graphs.failure = f"a call could not be captured: {line}"
                self.leave(call.run)
                raise CaptureError from error
            own.sample, own.rebuild = _parts(output)
            own.computed, own.reused = forward.computed, forward.reused
            self._recording.calls.append(own)
        elif self.mode == "replayed":
            forward.take_counts(own.computed, own.reused)
        else:
            return compute()
        own.replay()
        return own.rebuild(own.sample.clone())  # the next call may lie there

    def end(self, peak_bytes: int) -> int:
        """The run is over, or was broken off; this gives the most bytes that its caches held."""
        recording = self._recording
        if not recording.is_leased_to(self):
            return peak_bytes
        if self.mode == "warming up":
            recording.length = self._count
        elif self.mode == "captured":
            recording.ready = len(recording.calls) == recording.length
            recording.peak_bytes = peak_bytes
            if not recording.ready:
                recording.clear()
        for inputs in recording.inputs.values():
            inputs.forget()
        recording.give_back()
        return recording.peak_bytes if self.mode == "replayed" else peak_bytes


class CaptureError(Exception):
    """A call cannot be captured, and is to be done again without."""


def _parts(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """This gives an output's sample, and what makes such an output of another sample."""
    if isinstance(output, tuple):
        return output[0], lambda sample: (sample, *output[1:])
    return output.sample, lambda sample: type(output)(sample=sample)


def _among(tensor: Tensor, tensors: Sequence[Any]) -> bool:
    return any(tensor is other for other in tensors)
