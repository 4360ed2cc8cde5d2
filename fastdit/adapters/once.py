"""What a run makes once of its prompt and of its positions, as a family says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Once:
    """Base of adapters: modules whose outputs are the same at every step, and what is read on the host once."""

    blocks: Callable[..., Sequence[tuple[str, nn.Module]]]
    example: Callable[..., dict[str, Any]]

    # ---- the whole model

    #: whether the family has a forward of the whole model, which does once what the model's own does at each call. It
    #: runs where nobody sees what is called, so that a call may have a program; in a family without `embedders` also
    #: wherever a part of the tokens passes, or those of a layout
    restates_model = False

    #: a method (transformer, given) -> what that forward is to know of a call's conditions, made once for them; it may
    #: look at their values. A tuple of tensors, plain values and tuples: first the number of text tokens in the blocks,
    #: then of how many more of these something is kept than the `prompt_projections` give in the example. None where
    #: the model's own forward is to run
    read_prompt: Callable[..., tuple[Any, ...] | None]

    #: that forward, a method (transformer, call, known, given) -> the output, which looks at no value: `known` is what
    #: `read_prompt` gave, `given` are the arguments by name, the latents as a tensor. Of the call, a
    #: :class:`fastdit.runtime.call.Call`, it reads what the blocks ask (`forward`), how many image tokens pass and how
    #: many the picture has (`tokens`, `count`), where these are (`layout`, `arguments`), what is kept (`memory`), and
    #: whether nobody sees what modules are given (`unseen`), so that others may stand for them
    run_model: Callable[..., Tensor]

    #: arguments of the model's class that make one of a block of each kind
    small_config: Mapping[str, Any] = {}

    def small(self, model_class: Any, size: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Such a model, and the arguments of a call by which the drift guard compares `run_model` with its own."""
        model = model_class(**self.small_config)
        return model, self.example(model, size)

    # ---- the prompt

    #: paths of the modules that turn the prompt alone into text tokens, the same at every step
    prompt_projections: Sequence[str] = ()

    def prompt_projections_of(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's modules there; a model may lack one, and a list stands for its modules."""
        found = (module_at(transformer, path) for path in self.prompt_projections)
        lists = (m if isinstance(m, nn.ModuleList) else [m] for m in found if m is not None)
        return list(itertools.chain(*lists))

    #: block list attribute -> attentions of its blocks whose keys and values are the prompt's alone
    prompt_attentions: Mapping[str, Sequence[str]] = {}

    def prompt_keys_of(self, kind: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
        """(attention, layer) of a block's layers that make those."""
        return [
            (name, getattr(getattr(block, name), layer))
            for name in self.prompt_attentions.get(kind, ())
            for layer in ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj", "to_added_kv")
            if getattr(getattr(block, name), layer, None) is not None
        ]

    def prompt_key_layers_of(self, transformer: nn.Module) -> list[nn.Module]:
        """Those of all blocks."""
        found = (self.prompt_keys_of(*each) for each in self.blocks(transformer))
        return [layer for layers in found for _, layer in layers]

    def weights_read_once(self, transformer: nn.Module) -> list[dict[str, Tensor | None]]:
        """The dicts of the weights behind what a run makes of the prompt alone."""
        layers = self.prompt_key_layers_of(transformer)
        made = (*self.prompt_projections_of(transformer), *layers)
        parts = (part._parameters for module in made for part in module.modules())
        return [weights for weights in parts if weights]

    # ---- positions

    #: path of the module that makes rotary angles of the positions alone, the same at every step; in a family that has
    #: one it is the only one of the `embedders`
    position_embedding: str | None = None
    #: whether each call asks the `embedders` once more, behind the image's positions for the text's
    embeds_text = False

    def position_embeddings_of(self, transformer: nn.Module) -> list[nn.Module]:
        """That module, if the family has one."""
        path = self.position_embedding
        return [] if path is None else [module_at(transformer, path)]


def module_at(transformer: Any, path: str) -> Any:
    """The module at a path, or None."""
    for name in path.split("."):
        transformer = getattr(transformer, name, None)
    return transformer
