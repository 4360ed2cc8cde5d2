"""FLUX.1: double-stream blocks, then single-stream blocks over [text, image], rotary positions, adaLN-zero.

Restates diffusers' `FluxTransformerBlock` and `FluxSingleTransformerBlock` (the forms of diffusers >= 0.35, which take
and return the two streams apart). Component names are ECAD's. In single blocks only `single_proj_out` reaches the
residual stream; `single_attn` and `single_proj_mlp` (cached before the GELU) are read by it alone, so they do not run
where it is reused, unless a later step wants their value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.adapters.base import (
    Adapter,
    Call,
    Size,
    argument_of,
    batch_index,
    blank,
    chunk_gates,
    place_of,
)
from fastdit.attention import Part, Rotation, attend, projections
from fastdit.errors import ArgumentError
from fastdit.forward import Forward, gathered, joint_normed
from fastdit.layout import SIDE, Layout
from fastdit.modulation import LayerInputs, repeated
from fastdit.observe import private

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def double_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One `FluxTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunk_gates(
        _modulation(fw, block.norm1, temb), 6
    )
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = chunk_gates(
        _modulation(fw, block.norm1_context, temb), 6
    )

    def attend_jointly(u_image: Tensor, u_text: Tensor) -> tuple[Tensor, ...]:
        if fw.tokens is not None:
            return _attend_jointly(fw, block.attn, u_image, u_text, image_rotary_emb)
        return fw.segments.attention(
            block.attn,
            hidden_states=u_image,
            encoder_hidden_states=u_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    attention = fw.component(
        "full_attn",
        lambda: attend_jointly(
            image.normed(block.norm1.norm, scale, shift),
            text.normed(block.norm1_context.norm, c_scale, c_shift),
        ),
    )
    image.add(attention[0], gate)
    image.add(
        fw.component(
            "full_ff",
            lambda: fw.segments.feed_forward(
                block.ff, image.normed(block.norm2, scale_mlp, shift_mlp)
            ),
        ),
        gate_mlp,
    )
    if len(attention) == 3:  # an IP-adapter's image prompt, added without a gate
        image.add(attention[2])
    text.add(attention[1], c_gate)
    text.add(
        fw.component(
            "full_ff_context",
            lambda: fw.segments.feed_forward(
                block.ff_context, text.normed(block.norm2_context, c_scale_mlp, c_shift_mlp)
            ),
        ),
        c_gate_mlp,
    )
    text.clip_to_half()
    return text.leave(), image.leave()


def single_block(
    block: nn.Module,
    fw: Forward,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """One `FluxSingleTransformerBlock`: image [B, N, D], text [B, T, D], temb [B, D] -> (text, image)."""
    image, text = fw.enter(hidden_states, "image"), fw.enter(encoder_hidden_states, "text")
    text_length = encoder_hidden_states.shape[1]
    shift, scale, gate = chunk_gates(_modulation(fw, block.norm, temb), 3)
    runs_out = fw.computes("single_proj_out")
    if runs_out or fw.computes("single_attn") or fw.computes("single_proj_mlp"):
        u = joint_normed((text, image), block.norm.norm, scale, shift)

    def attend_single() -> Tensor:
        if fw.tokens is not None:
            return _attend_single(fw, block.attn, u, text_length, image_rotary_emb)
        return fw.segments.attention(
            block.attn,
            hidden_states=u,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

    def expand() -> Tensor:
        return fw.segments.linear(block.proj_mlp, u)

    if runs_out:
        mlp = gathered(fw.component("single_proj_mlp", expand))
        attention = gathered(fw.component("single_attn", attend_single))
    else:  # the output is reused; refresh what a later step will read
        if fw.computes("single_proj_mlp"):
            fw.component("single_proj_mlp", expand)
        if fw.computes("single_attn"):
            fw.component("single_attn", attend_single)
    branch = fw.component(
        "single_proj_out",
        lambda: fw.segments.project(block.proj_out, attention, block.act_mlp, mlp),
    )
    for stream, part in zip((text, image), fw.parted(branch, text_length), strict=True):
        stream.add(part, gate)
    text.clip_to_half()
    image.clip_to_half()
    return text.leave(), image.leave()


def _attend_jointly(
    fw: Forward, attn: nn.Module, image: Tensor, text: Tensor, rotation: Any
) -> tuple[Tensor, Tensor]:
    """Attention of the active image tokens and the text, keys in the order [text, image]."""
    tokens, length = fw.tokens, text.shape[1]
    parts = (
        Part(*projections(attn, text, added=True), attn.norm_added_q, attn.norm_added_k, 0, None),
        Part(*projections(attn, image), attn.norm_q, attn.norm_k, length, tokens.rows),
    )
    out = attend(
        tokens,
        (fw.index, "full_attn"),
        parts,
        length + tokens.count,
        attn.heads,
        _rotation(fw, rotation),
        attn.processor,
    )
    first, rest = out.split((length, image.shape[1]), dim=1)
    return attn.to_out[1](attn.to_out[0](rest)), attn.to_add_out(first)


def _attend_single(fw: Forward, attn: nn.Module, u: Tensor, text: int, rotation: Any) -> Tensor:
    """The same for a single-stream block, whose tokens are joint already."""
    tokens = fw.tokens
    rows = tokens.joint_rows(text)
    part = Part(*projections(attn, u), attn.norm_q, attn.norm_k, 0, rows)
    return attend(
        tokens,
        (fw.index, "single_attn"),
        (part,),
        text + tokens.count,
        attn.heads,
        _rotation(fw, rotation),
        attn.processor,
    )


def _rotation(fw: Forward, given: Any) -> Any:
    """cos and sin of all positions. A call of a part of the tokens is given those of other positions."""
    memory = fw.tokens.memory
    if fw.tokens.rows is None and (memory.rotation is None or memory.rotation.cos is not given[0]):
        memory.rotation = Rotation(*given)  # of the whole call: its blocks share the halves
    return memory.rotation


def _of_picture(positions: Tensor) -> Tensor:
    """The positions of the picture itself, which come first: the first number of a reference image's is another."""
    positions = positions[0] if positions.ndim == 3 else positions
    return positions[: int((positions[:, 0] == positions[0, 0]).cumprod(0).sum())]


def _modulation(fw: Forward, norm: nn.Module, temb: Tensor) -> Tensor:
    """The layer's linear(silu(temb)) [B, k D]."""
    return fw.modulation(norm, lambda emb: fw.segments.linear(norm.linear, norm.silu(emb)), temb)


class Flux(Adapter):
    """Adapter of `FluxTransformer2DModel`."""

    family = "flux"
    model_classes = ("FluxTransformer2DModel",)
    kinds = {DOUBLE: "FluxTransformerBlock", SINGLE: "FluxSingleTransformerBlock"}
    components = {
        DOUBLE: ("full_attn", "full_ff", "full_ff_context"),
        SINGLE: ("single_attn", "single_proj_mlp", "single_proj_out"),
    }
    consumers = {SINGLE: {"single_attn": "single_proj_out", "single_proj_mlp": "single_proj_out"}}
    forwards = {DOUBLE: double_block, SINGLE: single_block}
    embeddings_arguments = ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")
    text_tokens = 512
    uses_cfg = False
    shifts_latents = True
    layouts = {
        "full_attn": ("image", "text"),
        "full_ff": ("image",),
        "full_ff_context": ("text",),
        "single_attn": ("joint",),
        "single_proj_mlp": ("joint",),
        "single_proj_out": ("joint",),
    }
    fused_attentions = ("attn",)
    prompt_projections = ("context_embedder",)
    condition_embedding = "time_text_embed"
    processors = ("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0")
    residual_arguments = ("controlnet_block_samples", "controlnet_single_block_samples")
    changes_resolution = True

    def embedders(self, transformer: nn.Module) -> list[nn.Module]:
        """What makes the rotation."""
        return [transformer.pos_embed]

    def embed(
        self, module: nn.Module, shape: Sequence[int], rows: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A rotation that nobody reads: attention takes that of all tokens at the rows."""
        return type(module).forward(module, ids)

    def patch(self, transformer: nn.Module) -> int:
        """The pipeline packs 2 x 2 latent pixels."""
        return 2

    def moved_tokens(self, call: Call) -> int:
        """Those of the picture, without the reference images that Kontext puts behind it; waits for the device."""
        return call.tokens if call.positions is None else len(_of_picture(call.positions))

    def grid(self, latents: Sequence[int], positions: Tensor | None, patch: int) -> tuple[int, int]:
        """Read off the positions, so it waits for the device; other than a grid of them is one row."""
        tokens, rows = latents[1], 1
        if positions is not None:
            own = _of_picture(positions)
            tokens, rows = len(own), int(own[:, 1].max()) + 1
        return (rows, tokens // rows) if tokens % rows == 0 else (1, tokens)

    def latent_image(self, latents: Tensor, grid: tuple[int, int], vae: Any) -> Tensor:
        """From [B, N, C p p]."""
        tiles = latents.unflatten(2, (-1, 2, 2)).unflatten(1, grid)
        image = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return super().latent_image(image, grid, vae)

    def patches(self, velocity: Tensor, patch: int) -> Tensor:
        """[B, N, C p p] as [B, N, 1, p, p, C]: the grid does not matter to who chooses tokens."""
        return velocity.unflatten(-1, (-1, patch, patch)).permute(0, 1, 3, 4, 2).unsqueeze(2)

    def gather_inputs(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Any, rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The active tokens' latents, and as many positions, which nobody reads."""
        args, kwargs = list(args), dict(kwargs)
        owner, key = place_of(transformer, args, kwargs, "hidden_states")
        count = owner[key].shape[1]
        owner[key] = owner[key][batch_index(rows), rows]
        owner, key = place_of(transformer, args, kwargs, "img_ids")
        owner[key] = owner[key][..., : rows.shape[1], :]
        self._gather_residuals(transformer, args, kwargs, rows, count)
        return tuple(args), kwargs

    def scatter_output(self, sample: Tensor, rows: Tensor, full: Tensor, patch: int) -> Tensor:
        """`full` [B, N, C p p] with `rows` replaced by `sample`."""
        return full.index_put((batch_index(rows), rows), sample)

    def check_resolution(self, transformer: nn.Module) -> None:
        """Its own attention must be able to run where each image of a batch has other tokens."""
        super().check_resolution(transformer)
        self.check_tokens(transformer)

    def cells(self, call: Call, patch: int) -> tuple[int, int]:
        """Read off the positions, which must be those of one picture; waits for the device."""
        height, width = super().cells(call, patch)
        count = call.hidden_states.shape[1]
        ids = call.positions.reshape(-1, call.positions.shape[-1])
        expected = Layout.uniform((height, width), 0, ids.device).table[0]
        if count != ids.shape[0] or not torch.equal(ids.float(), expected.float()):
            raise ArgumentError(
                "img_ids must be the rows and columns of one picture for RALU; "
                f"got {count} tokens that are not (reference images, or positions of your own)"
            )
        return height, width

    def field(self, latents: Tensor, cells: tuple[int, int]) -> Tensor:
        """[B, gh gw, 4 C] as [B, gh, gw, 2, 2, C]."""
        grid = latents.unflatten(1, cells).unflatten(3, (-1, SIDE, SIDE))
        return grid.permute(0, 1, 2, 4, 5, 3)

    def reduce_inputs(
        self,
        transformer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Any,
        layout: Layout,
        ops: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layout's tokens, and as many positions, which `embed_layout` replaces."""
        args, kwargs = list(args), dict(kwargs)
        owner, key = place_of(transformer, args, kwargs, "hidden_states")
        owner[key] = layout.read(self.field(owner[key], layout.cells), ops)
        owner, key = place_of(transformer, args, kwargs, "img_ids")
        owner[key] = owner[key][..., : layout.tokens, :]
        return tuple(args), kwargs

    def expand_output(self, sample: Tensor, layout: Layout, latents: Tensor, ops: Any) -> Tensor:
        """[B, n, 4 C] drawn at full size, [B, N, 4 C]."""
        full = sample.new_empty(sample.shape[0], latents.shape[1], sample.shape[2])
        layout.write(sample, self.field(full, layout.cells), ops)
        return full

    def embed_layout(
        self, module: nn.Module, layout: Layout, memory: dict[Any, Any], ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [S, d], or [B, S, d] where each image has other tokens; made once for a stage.

        Below full resolution positions are those of a picture of half the size, in steps of a half.
        """
        key = "rotation", ids.shape[0]
        if key not in memory:
            places = layout.table.float()
            images, count = places.shape[:2]
            if layout.kind == "full":
                memory[key] = type(module).forward(module, ids)
            else:
                places = torch.cat([torch.zeros_like(places[..., :1]), places[..., 1:] / 2], dim=-1)
                text = ids[:-count].float().expand(images, -1, -1)
                joint = torch.cat([text, places], dim=1)
                turn = type(module).forward(module, joint.flatten(0, 1))
                memory[key] = tuple(t.unflatten(0, joint.shape[:2]) for t in turn)
                if images == 1:
                    memory[key] = tuple(t[0] for t in memory[key])
        return memory[key]

    replaces_attention = True

    def owns_attention(self, layout: Layout, batch: int) -> bool:
        """The stock one has one rotation for all images."""
        return layout.table.shape[0] > 1

    def tokens(self, transformer: nn.Module, latent_shape: Any) -> int:
        """The pipeline packs latents to [B, N, 4 C]; a [B, C, H, W] shape (for predictions) packs 2 x 2."""
        if len(latent_shape) == 3:
            return latent_shape[1]
        return (latent_shape[-2] // 2) * (latent_shape[-1] // 2)

    def layer_inputs(
        self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
    ) -> LayerInputs | None:
        """The embedding of timestep, guidance if the model has it, and pooled prompt."""
        embed = transformer.time_text_embed
        names = ("hidden_states", "guidance", "pooled_projections")
        latents, guidance, pooled = (argument_of(transformer, args, kwargs, n) for n in names)
        if pooled is None or not private(embed):
            return None
        tensors = (pooled,) if guidance is None else (guidance, pooled)
        dtype = latents.dtype

        def make(timesteps: Tensor) -> tuple[Tensor]:
            rows = [repeated(tensor, len(timesteps), batch) for tensor in tensors]
            if guidance is not None:
                rows[0] = rows[0].to(dtype) * 1000
            return (embed(timesteps.to(dtype) * 1000, *rows),)

        return LayerInputs(make, tensors)

    def given_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """In thousandths."""
        return timesteps.to(dtype) / 1000

    def example(self, transformer: nn.Module, size: Size) -> dict[str, Any]:
        """Packed pictures and prompts; the distilled form is told the guidance."""
        config = transformer.config
        return {
            "hidden_states": blank(transformer, size.image, config.in_channels),
            "encoder_hidden_states": blank(transformer, size.text, config.joint_attention_dim),
            "pooled_projections": blank(transformer, config.pooled_projection_dim),
            "timestep": blank(transformer),
            "guidance": blank(transformer) if config.guidance_embeds else None,
            "img_ids": blank(transformer, size.image, 3)[0],
            "txt_ids": blank(transformer, size.text, 3)[0],
        }


ADAPTER = Flux()
