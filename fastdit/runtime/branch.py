"""What is kept of one branch of guidance, and which of it a call has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdit.blocks.attention import KeyValues
from fastdit.blocks.forward import Slots
from fastdit.blocks.modulation import Modulations
from fastdit.runtime.forecasts import Outputs
from fastdit.versions import Watched, same, versions

if TYPE_CHECKING:
    from fastdit.runtime.run import Run


@dataclass(eq=False)
class Branch:
    """A branch holds the caches of one CFG branch: of the calls at one place in the code within the steps of a run.

    One that is met again is the same object, and a key for what methods keep of it.
    """

    slots: Slots = field(default_factory=dict)
    owned: dict[Any, None] = field(default_factory=dict)  # slots that may be written into
    prompts: dict[nn.Module, Tensor] = field(default_factory=dict)
    modulations: Modulations | None = None
    foresees: bool = True
    keys: dict[Any, KeyValues] = field(default_factory=dict)
    ages: dict[Any, Any] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=Outputs)
    velocity: Tensor | None = None
    collapses: bool = False
    unseen: bool = False
    memory: dict[Any, Any] = field(default_factory=dict)
    form: Any = None  # what stands for what is kept, where that is known; see `programmed.py`
    signature: tuple[Any, ...] | None = None
    embeddings: tuple[Tensor, ...] = ()
    versions: tuple[Any, ...] = ()

    def clear_tokens(self) -> None:
        """What is kept of tokens in the blocks is freed, where these are others from now on."""
        for held in (self.slots, self.keys, self.ages, self.memory):
            held.clear()
        self.velocity = self.form = None

    def clear(self) -> None:
        """Everything is freed, also for whoever still holds on to the branch."""
        for held in (self.slots, self.owned, self.prompts, self.keys, self.memory):
            held.clear()
        self.__init__()


class Branched:
    """These methods of a :class:`~fastdit.runtime.call.Call` find its branch."""

    run: Run
    transformer: nn.Module
    key: Any
    arguments: Any

    def _branch(self) -> Branch:
        """The branch has the call's caches, which go when they were made for other shapes, dtypes or embeddings."""
        run, arguments = self.run, self.arguments
        compared = run.patched.adapter.compared(self.transformer, arguments)
        branch = run.branches.get(self.key)
        if branch is None:
            branch = run.branches[self.key] = Branch()
        autocast = torch.is_autocast_enabled(arguments.hidden_states.device.type)
        stage = run.resolution.index if run.resolution is not None else 0
        signature = (*arguments.signature, autocast, stage)
        unchanged = branch.signature is not None and same(
            branch.embeddings, branch.versions, compared
        )
        if not unchanged:
            branch.prompts.clear()
        if not run.patched.eager:
            self._watch_weights()
        if not unchanged or branch.signature is None or branch.signature[:-2] != signature[:-2]:
            branch.memory.clear()  # with the rotation of all positions
            branch.form = None
        if branch.signature != signature or not unchanged:
            branch.slots.clear()
            branch.keys.clear()
            branch.ages.clear()
            branch.form = None
            branch.outputs = Outputs(run.patched.adapts, run.guard)
            branch.velocity = None
        branch.signature = signature
        # Of inference tensors the versions are copies, which need no renewal while they are equal.
        if not unchanged or not torch.is_inference_mode_enabled():
            branch.embeddings = compared
            branch.versions = versions(compared)
        return branch

    def _watch_weights(self) -> None:
        """What was made of the prompt alone goes where the weights that made it changed."""
        run = self.run
        if run.watched is None:
            run.watched = Watched(run.patched.adapter.weights_read_once(self.transformer))
        elif run.watched.changed():
            run.forget_weights()
