"""What modules other than blocks ask of the call in progress: positions, the prompt's projection, the last norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit.blocks.residual import is_plain, norm_parameters
from fastdit.observe import unobserved


class Asked:
    """These methods of a :class:`~fastdit.runtime.call.Call` stand for modules' own forwards."""

    run: Any
    branch: Any
    forward: Any
    arguments: Any
    ahead: Any
    layout: Any
    rows: Tensor | None

    def embed(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """This computes a module that embeds patches and adds their positions, for the tokens that pass."""
        adapter = self.run.patched.adapter
        if self.rows is not None:
            shape = self.arguments.hidden_states.shape
            return adapter.embed(module, shape, self.rows, *args, **kwargs)
        if self.layout is not None:
            memory = self.run.resolution.memory
            return adapter.embed_layout(module, self.layout, memory, *args, **kwargs)
        if adapter.position_embedding is not None:
            return self._once(self.branch.memory, module, *args, **kwargs)
        forward = self.forward
        if forward.waits_at_first() and unobserved(module):
            apart = adapter.embed_apart(module, self.branch.memory, *args)
            if apart is not None:
                forward.wait_at_first("image", apart[1])
                return apart[0]
        return type(module).forward(module, *args, **kwargs)

    def project_prompt(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module that depends on the prompt alone is computed once a run, exactly."""
        return self._once(self.branch.prompts, module, *args, **kwargs)

    def _once(self, kept: dict[Any, Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module gives is kept.

        A module that somebody looks into, or that carries an adapter of peft, whose scale may change, runs every time.
        """
        if self.forward.immediate or not unobserved(module):
            return type(module).forward(module, *args, **kwargs)
        if module not in kept:
            kept[module] = type(module).forward(module, *args, **kwargs)
        return kept[module]

    def norm_output(self, module: nn.Module, x: Tensor, conditioning: Tensor) -> Tensor:
        """The modulated norm behind the blocks, by one op, its modulation made ahead where those of the blocks are."""
        if self.forward.immediate or not is_plain(module.norm, x) or not unobserved(module):
            return type(module).forward(module, x, conditioning)

        def make(given: Tensor) -> Tensor:
            return module.linear(module.silu(given).to(x.dtype))

        made = make(conditioning) if self.ahead is None else self.ahead.of(module, make)
        if made.dtype is not x.dtype or x.stride(-1) != 1:
            return type(module).forward(module, x, conditioning)
        scale, shift = made.chunk(2, dim=1)
        ops = self.run.patched.ops
        return ops.norm_modulate(x, scale, shift, **norm_parameters(module.norm))
