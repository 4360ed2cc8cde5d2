"""What a run makes once of its prompt and of its positions, as a family says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Once:
    """Base of adapters: modules whose outputs are the same at every step, and what is read on the host once."""

    blocks: Callable[..., Sequence[tuple[str, nn.Module]]]

    # ---- the prompt

    #: paths of the modules that turn the prompt alone into text tokens, the same at every step
    prompt_projections: Sequence[str] = ()

    def prompt_projections_of(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's modules there; a model may lack one, and a list stands for its modules."""
        found = (module_at(transformer, path) for path in self.prompt_projections)
        lists = (m if isinstance(m, nn.ModuleList) else [m] for m in found if m is not None)
        return list(itertools.chain(*lists))

    #: whether the model's own forward reads the prompt on the host at each call, and :meth:`run_read` stands for it
    reads_prompts = False

    def read_prompt(self, given: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """How many text tokens the blocks will have, how many of these are kept, and what else `run_read` is to know.

        It is read once for a prompt; None where that forward cannot run.
        """
        raise NotImplementedError

    def run_read(
        self,
        known: tuple[Any, ...],
        kept: dict[Any, Any],
        transformer: Any,
        *args: Any,
        **given: Any,
    ) -> Any:
        """The model's output, without a look at values.

        Args:
            known: What :meth:`read_prompt` gave.
            kept: What is kept of the prompt as long as it is the same.
        """
        raise NotImplementedError

    def small(self, model_class: Any) -> tuple[nn.Module, dict[str, Any]]:
        """A model of one block and arguments of a call, by which the drift guard compares :meth:`run_read`."""
        raise NotImplementedError

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

    #: in a family whose positions are read out of masks on the host, a method (transformer, args, kwargs) that gives
    #: what a run needs of them, once for its conditions; :meth:`embed_known` is that module's forward then
    known_positions: Callable[..., Any] | None = None

    def embed_known(self, module: nn.Module, known: Any, *args: Any) -> Any:
        """The output of the `position_embedding` for the tokens that pass, by what `known_positions` gave."""
        raise NotImplementedError

    def position_embeddings_of(self, transformer: nn.Module) -> list[nn.Module]:
        """That module, if the family has one."""
        path = self.position_embedding
        return [] if path is None else [module_at(transformer, path)]


def module_at(transformer: Any, path: str) -> Any:
    """The module at a path, or None."""
    for name in path.split("."):
        transformer = getattr(transformer, name, None)
    return transformer
