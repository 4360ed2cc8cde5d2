"""What a family's adaLN layers are given, and what modulates its output: made for several steps at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of
from fastdit.adapters.once import module_at
from fastdit.blocks.layer_inputs import LayerInputs, repeated


class Modulated:
    """Base of adapters: modulations, see `blocks/modulation.py`."""

    image_argument: str
    timesteps_per_unit: int
    width: Callable[[nn.Module], int]

    #: path of the module whose output is what the adaLN layers are given, if there is one for all
    condition_embedding: str | None = None
    #: what it embeds beside the timestep, if given
    condition_arguments: Sequence[str] = ()

    #: path of the adaLN norm behind the blocks, if there is one: with `silu`, `norm`, and `linear` (scale, then shift),
    #: or `linear_1` (scale) and `linear_2`, a projection behind it
    output_norm: str | None = None
    #: names of the norm behind the blocks and of the projection, where the transformer's own forward modulates between
    modulated_output: Sequence[str] = ()
    #: names of the modules that turn what the adaLN layers are given into modulations which all blocks share
    shared_modulations: Sequence[str] = ()
    #: names of the streams that nobody reads behind the last block, though it gives them
    unread: Sequence[str] = ()

    def output_norms_of(self, transformer: nn.Module) -> list[nn.Module]:
        """That norm; none in a family whose output is modulated otherwise."""
        return [] if self.output_norm is None else [module_at(transformer, self.output_norm)]

    def modulated_output_of(self, transformer: nn.Module) -> list[nn.Module]:
        """Those modules, if the family has them."""
        return [getattr(transformer, name) for name in self.modulated_output]

    def output_modulation(self, transformer: nn.Module) -> int:
        """Channels of the modulations behind the blocks; between `modulated_output` there are a scale and a shift."""
        linears = (
            getattr(n, "linear_1", None) or n.linear for n in self.output_norms_of(transformer)
        )
        behind = sum(linear.out_features for linear in linears)
        return behind + (2 * self.width(transformer) if self.modulated_output else 0)

    def modulate_output(
        self, transformer: nn.Module, dtype: torch.dtype, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift [B, D] between these, of what adaLN layers are given."""
        raise NotImplementedError

    def output_modulators_of(self, transformer: nn.Module) -> list[nn.Module]:
        """The modules that :meth:`modulate_output` calls."""
        return []

    def shared_modulations_of(self, transformer: nn.Module) -> list[nn.Module]:
        """Those modules, if the family has them."""
        return [getattr(transformer, name) for name in self.shared_modulations]

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """What the adaLN layers of a call of `batch` rows are given; None for a family that does not say."""
        if self.condition_embedding is None:
            return None
        given = arguments_of(transformer, args, kwargs)
        latents = given[self.image_argument]
        told = [given.get(name) for name in self.condition_arguments]

        def make(timesteps: Tensor) -> tuple[Tensor]:
            rows = (None if t is None else repeated(t, len(timesteps), batch) for t in told)
            return (self.embed_condition(transformer, latents, timesteps, *rows),)

        return LayerInputs(make, tuple(t for t in told if t is not None))

    def embed_condition(
        self, transformer: Any, latents: Tensor, timesteps: Tensor, *told: Any
    ) -> Tensor:
        """What the transformer makes of timesteps and of the `condition_arguments` for its adaLN layers."""
        return module_at(transformer, self.condition_embedding)(timesteps, *told)

    def embedded(self, module: Any, made: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """What the condition embedding gives where the layers' inputs were `made`; it was called with the rest."""
        return made if len(made) > 1 else made[0]

    def condition_embeddings_of(self, transformer: nn.Module) -> list[nn.Module]:
        """That module; none in a family whose layers have their own."""
        path = self.condition_embedding
        return [] if path is None else [module_at(transformer, path)]

    def given_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """A scheduler's timesteps as the family's pipelines hand them on."""
        unit = self.timesteps_per_unit
        return timesteps if unit == 1 else timesteps.to(dtype) / unit
