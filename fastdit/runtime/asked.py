"""What modules other than blocks ask of the call in progress: positions, the prompt's projection, the last norm."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from fastdit.blocks.residual import is_plain, norm_parameters
from fastdit.observe import unobserved
from fastdit.runtime.install import is_installed


class Asked:
    """These methods of a :class:`~fastdit.runtime.call.Call` stand for modules' own forwards."""

    run: Any
    transformer: nn.Module
    branch: Any
    forward: Any
    arguments: Any
    ahead: Any
    layout: Any
    rows: Tensor | None
    held: Tensor | None = None
    _embeds_text = False

    def embed(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """This computes a module that embeds patches and adds their positions, for the tokens that pass."""
        adapter = self.run.patched.adapter
        if self._embeds_text:
            return self._once(self.branch.memory, module, *args, key="text", **kwargs)
        self._embeds_text = adapter.embeds_text
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
                given, positions = apart
                if positions is not None:
                    forward.wait_at_first("image", positions)
                return given
        return type(module).forward(module, *args, **kwargs)

    def project_prompt(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module that depends on the prompt alone is computed once a run, exactly."""
        return self._once(self.branch.prompts, module, *args, **kwargs)

    def project_prompt_keys(self, module: nn.Module, x: Tensor) -> Tensor:
        """So are keys and values of the prompt alone, where `max_cache_bytes` has room for them."""
        if not self.run.keeps_prompt_keys:
            return type(module).forward(module, x)
        return self._once(self.branch.prompts, module, x)

    def _once(
        self, kept: dict[Any, Any], module: nn.Module, *args: Any, key: Any = None, **kwargs: Any
    ) -> Any:
        """What a module gives is kept, under `key` where it gives several things.

        A module that somebody looks into, or that carries an adapter of peft, whose scale may change, runs every time.
        """
        if self.forward.immediate or not unobserved(module):
            return type(module).forward(module, *args, **kwargs)
        key = key or module
        if key not in kept:
            kept[key] = type(module).forward(module, *args, **kwargs)
        return kept[key]

    def modulate(self, module: nn.Module, conditioning: Tensor) -> Tensor:
        """Modulations that all blocks share are made ahead where those of blocks are."""
        forward = type(module).forward
        if self.ahead is None or self.forward.immediate or not unobserved(module):
            return forward(module, conditioning)
        return self.ahead.of(module, lambda given: (forward(module, given),))[0]

    def norm_output(self, module: nn.Module, x: Tensor, conditioning: Tensor) -> Tensor:
        """The modulated norm behind the blocks, by one op, its modulation made ahead where those of the blocks are."""
        if self.forward.immediate or not is_plain(module.norm, x) or not unobserved(module):
            return type(module).forward(module, x, conditioning)
        scales_only = hasattr(module, "linear_1")
        linear = module.linear_1 if scales_only else module.linear

        def make(given: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return linear(module.silu(given).to(x.dtype)).chunk(1 if scales_only else 2, dim=1)

        made = make(conditioning) if self.ahead is None else self.ahead.of(module, make)
        if made[0].dtype is not x.dtype or x.stride(-1) != 1:
            return type(module).forward(module, x, conditioning)
        out = self.run.patched.ops.norm_modulate(x, *made, **norm_parameters(module.norm, x.dtype))
        return module.linear_2(out) if scales_only and module.linear_2 is not None else out

    def hold_output(self, module: nn.Module, x: Tensor) -> Tensor:
        """The norm before a modulation in the transformer's own forward, with that, by one op; made ahead as well.

        The projection behind it is handed the result. What the forward modulates meanwhile is one token, which nobody
        reads.
        """
        self.held = None
        if not self._modulates_output(module, x):
            return type(module).forward(module, x)
        modulate = self.run.patched.adapter.modulate_output
        made = self.ahead.of(module, functools.partial(modulate, self.transformer, x.dtype))
        if made[0].dtype is not x.dtype or made[0].device != x.device:
            return type(module).forward(module, x)
        given = norm_parameters(module, x.dtype)
        self.held = self.run.patched.ops.norm_modulate(x, *made, **given)
        return x[:, :1]

    def project_held(self, module: nn.Module, x: Tensor) -> Tensor:
        """The projection of what :meth:`hold_output` holds, in the dtype of what it stands for."""
        held, self.held = self.held, None
        return type(module).forward(module, x if held is None else held.to(x.dtype))

    def _modulates_output(self, norm: nn.Module, x: Tensor) -> bool:
        """Whether the op stands for the norm and the modulation behind it, which nobody sees."""
        adapter, forward = self.run.patched.adapter, self.forward
        if self.ahead is None or forward.compiled is not None or not is_plain(norm, x):
            return False
        modules = adapter.modulated_output_of(self.transformer)
        seen = (*modules, *adapter.output_modulators_of(self.transformer))
        return x.stride(-1) == 1 and is_installed(modules[1]) and all(map(unobserved, seen))
