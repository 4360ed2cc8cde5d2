"""Wan's VACE: videos drawn beside a control video, whose own blocks give hints to some of Wan's.

Restates diffusers' `WanVACETransformerBlock.forward`. The control's blocks run before the others, on a stream that
begins with the video's, and are modulated as these are. What a block says of its stream is a component of its own; the
model adds it, by a scale, to the video behind a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastdit.adapters.arguments import arguments_of, place_of
from fastdit.adapters.base import Size, blank
from fastdit.adapters.latents import batch_index
from fastdit.adapters.wan import Wan, add_components
from fastdit.blocks.forward import Forward
from fastdit.blocks.residual import gathered
from fastdit.errors import ArgumentError

CONTROL = "control_hidden_states"


def vace_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor]:
    """One `WanVACETransformerBlock`: video and control [B, N, D] -> hint, control."""
    if block.proj_in is not None:
        control_hidden_states = block.proj_in(control_hidden_states) + hidden_states
    control = fw.enter(control_hidden_states, "control", wide=True)
    add_components(block, fw, control, encoder_hidden_states, temb, rotary_emb)
    hint = None
    if block.proj_out is not None:
        hint = gathered(
            fw.component("proj_out", lambda: fw.segments.linear(block.proj_out, control.read()))
        )
    # No block of the next list takes the control over.
    return hint, control.read() if fw.ends else control.leave()


class WanVACE(Wan):
    """Adapter of `WanVACETransformer3DModel`."""

    family = "wan-vace"
    model_classes = ("WanVACETransformer3DModel",)
    kinds = {"vace_blocks": "WanVACETransformerBlock", **Wan.kinds}
    components = {
        "vace_blocks": (*Wan.components["blocks"], "proj_out"),
        **Wan.components,
    }
    shared_gates = dict.fromkeys(kinds, Wan.shared_gates["blocks"])
    prompt_attentions = dict.fromkeys(kinds, Wan.prompt_attentions["blocks"])
    forwards = {"vace_blocks": vace_block, **Wan.forwards}
    layouts = dict.fromkeys(components["vace_blocks"], ("image",))
    embeddings_arguments = (*Wan.embeddings_arguments, CONTROL, f"{CONTROL}_scale")
    changes_resolution = False  # the control is at full size

    def weights_read_once(self, transformer: nn.Module) -> list[dict[str, Tensor | None]]:
        """The tables of the control's blocks, too."""
        tables = [block._parameters for block in transformer.vace_blocks]
        return [*super().weights_read_once(transformer), *tables]

    def gather_inputs(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The control's tokens lie where the video's do.

        Raises:
            ArgumentError: There are fewer of them.
        """
        given = arguments_of(transformer, args, kwargs)
        video, control = given["hidden_states"].shape, given[CONTROL].shape
        if video[2:] != control[2:]:
            raise ArgumentError(
                f"{CONTROL} must have as many frames, rows and columns as the latents where a part of the tokens is "
                f"computed, {tuple(video[2:])}, got {tuple(control[2:])}"
            )
        args, kwargs = super().gather_inputs(transformer, args, kwargs, rows)
        owner, key = place_of(transformer, (found := list(args)), kwargs, CONTROL)
        patch, index = self.patch(transformer), (batch_index(rows), rows)
        owner[key] = self.gather_latents(owner[key], index, patch)
        return tuple(found), kwargs

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """The control is as large as the video."""
        given = super().example(transformer, size)
        sides = given["hidden_states"].shape[2:]
        return given | {CONTROL: blank(transformer, transformer.config.vace_in_channels, *sides)}


ADAPTER = WanVACE()
