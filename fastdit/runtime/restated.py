"""Where a family's forward of its whole model stands for the transformer's own, and what is read for it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of, scaled_adapters
from fastdit.adapters.base import ATTENTION_ARGUMENTS

if TYPE_CHECKING:
    from fastdit.runtime.branch import Branch
    from fastdit.runtime.run import Run

#: where a branch keeps what its family reads of a prompt
PROMPT = "prompt"


class Restated:
    """These methods of a :class:`~fastdit.runtime.call.Call` choose the forward of the model, and run it."""

    run: Run
    transformer: nn.Module
    branch: Branch
    unseen: bool
    arguments: Any
    rows: Tensor | None
    _smaller: bool
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]

    @property
    def restated(self) -> bool:
        """Whether the family's forward stands for the transformer's own."""
        if self.unseen:
            return self.branch.memory.get(PROMPT) is not None
        adapter = self.run.patched.adapter
        some = self.rows is not None or self._smaller
        return some and adapter.restates_model and not adapter.embedders(self.transformer)

    def read_prompt(self, branch: Branch) -> None:
        """What the family's forward is to know of a prompt is read once for it, where nobody sees what is called.

        It may have other tokens of text than the model's own, in another order: what one of them kept is none of the
        other's.
        """
        if self.unseen is not branch.unseen:
            branch.clear_tokens()
            branch.prompts.clear()
            branch.unseen = self.unseen
        if self.unseen and PROMPT not in branch.memory:
            given = arguments_of(self.transformer, self._args, self._kwargs)
            known = self.run.patched.adapter.read_prompt(self.transformer, given)
            branch.memory[PROMPT], branch.form = known, None
            if known is not None:
                self.arguments = replace(self.arguments, text=known[0])
                if len(self.run.branches) == 1:
                    self.run.text_tokens = known[0]

    def run_model(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output of the one or of the other; that of the family's is a tuple of the sample, a tensor."""
        adapter, transformer = self.run.patched.adapter, self.transformer
        if not self.restated:
            return type(transformer).forward(transformer, *args, **kwargs)
        known = self.branch.memory.get(PROMPT) or adapter.read_prompt(transformer, kwargs)
        told = next(filter(None, map(kwargs.get, ATTENTION_ARGUMENTS)), None)
        with scaled_adapters(transformer, told):
            return (adapter.run_model(transformer, self, known, kwargs),)


def as_object(sample: Any) -> Any:
    """What a transformer's own forward returns of its sample, in an object."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
