"""Every transformer of diffusers, tiny: how it is built and called, and what is wrapped of its blocks.

One entry a class of `diffusers.models.transformers`, two blocks in each list. Weights are drawn by `tiny_models`. What
cannot be served has the reason in place of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TEXT = 5


@dataclass(frozen=True)
class Entry:
    """How a class is built and called.

    Attributes:
        config: Arguments of its constructor.
        call: Step -> arguments of a call; what changes from step to step are the latents and the time.
        parts: Block list -> the modules of its blocks that are wrapped, in any order; none where it has an adapter.
        published: What its constructor must be given for a model of usual size.
        refused: What the refusal at `patch` says; empty where it is served.
        other: What it is where it is no denoiser.
    """

    config: Mapping[str, Any]
    call: Callable[[int], dict[str, Any]] = dict
    parts: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    other: str = ""


def noise(step: int, *shape: int) -> Tensor:
    """Latents, others at each step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def told(*shape: int) -> Tensor:
    """A condition, the same at each step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def at(step: int, most: float = 1.0) -> Tensor:
    """The time of a step, of one row."""
    return torch.tensor([most * (0.9 - 0.1 * step)])


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def grid(*sides: int, axes: int = 0, first: int = 0) -> Tensor:
    """Positions [tokens, axes] of a grid, in the axes from `first` on."""
    found = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"), -1)
    found = found.reshape(-1, len(sides)).float()
    return torch.nn.functional.pad(found, (first, max(0, axes - first - len(sides))))


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
FOUR = {"in_channels": 4, "out_channels": 4}
#: packed latents, 16 tokens of 16 channels, with positions of three axes
PACKED = {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16, "num_layers": 2}


def packed(step: int, text: int = 20, axes: int = 3, **more: Any) -> dict[str, Any]:
    ids = {"img_ids": grid(4, 4, axes=axes, first=1), "txt_ids": torch.zeros(TEXT, axes)}
    return {
        "hidden_states": noise(step, 1, 16, 16),
        "encoder_hidden_states": told(1, TEXT, text),
        "timestep": at(step),
        **ids,
        **more,
    }


def picture(step: int, *shape: int, text: int = 12, most: float = 1000.0) -> dict[str, Any]:
    """Latents [1, 4, 8, 8], if no other shape is given, and a prompt."""
    return {
        "hidden_states": noise(step, *(shape or (1, 4, 8, 8))),
        "encoder_hidden_states": told(1, TEXT, text),
        "timestep": at(step, most),
    }


def video(step: int, *shape: int, **more: Any) -> dict[str, Any]:
    return picture(step, *(shape or (1, 4, 3, 8, 8)), **more)


WAN = (
    HEADS
    | FOUR
    | {
        "attention_head_dim": 12,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
)


def cogvideo(step: int) -> dict[str, Any]:
    return picture(step, 1, 3, 4, 8, 8)


COGVIDEO = (
    HEADS
    | FOUR
    | {
        "time_embed_dim": 16,
        "text_embed_dim": 12,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
    }
)
SIZES = {"target_size": torch.full((1, 2), 8.0), "crop_coords": torch.zeros(1, 2)}
COGVIEW_SIZES = SIZES | {"original_size": torch.full((1, 2), 8.0)}
COGVIEW = (
    HEADS
    | FOUR
    | {
        "num_layers": 2,
        "text_embed_dim": 12,
        "time_embed_dim": 16,
        "condition_dim": 4,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    }
)
UNET = HEADS | {"in_channels": 16, "num_layers": 2, "norm_num_groups": 4, "cross_attention_dim": 12}
UNET |= {"out_channels": 16}

ENTRIES: dict[str, Entry] = {}

ENTRIES["AceStepTransformer1DModel"] = Entry(
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "in_channels": 12,
        "audio_acoustic_hidden_dim": 4,
        "sliding_window": 4,
        "encoder_hidden_size": 12,
    },
    lambda step: (
        picture(step, 1, 12, 4, most=1)
        | {"timestep_r": at(step), "context_latents": told(1, 12, 8)}
    ),
    parts={"layers": "self_attn cross_attn mlp"},
)
ENTRIES["AuraFlowTransformer2DModel"] = Entry(
    {
        "sample_size": 8,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    },
    lambda step: picture(step, most=1),
    parts={
        "joint_transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "attn ff",
    },
)
ENTRIES["CogVideoXTransformer3DModel"] = Entry(
    COGVIDEO,
    cogvideo,
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["ConsisIDTransformer3DModel"] = Entry(
    COGVIDEO,
    cogvideo,
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["DiTTransformer2DModel"] = Entry(
    HEADS | FOUR | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
    lambda step: {
        "hidden_states": noise(step, 1, 4, 8, 8),
        "timestep": torch.tensor([900 - 100 * step]),
        "class_labels": torch.tensor([3]),
    },
)
ENTRIES["DualTransformer2DModel"] = Entry(
    {"in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 12},
    other="a part of a UNet",
    refused="none of its lists of blocks has attentions",
)
ENTRIES["HunyuanDiT2DModel"] = Entry(
    HEADS
    | {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 4,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": TEXT,
        "text_len_t5": TEXT,
    },
    lambda step: (
        picture(step)
        | {
            "text_embedding_mask": ones(1, TEXT),
            "encoder_hidden_states_t5": told(1, TEXT, 16),
            "text_embedding_mask_t5": ones(1, TEXT),
            "image_meta_size": told(1, 6),
            "style": torch.zeros(1, dtype=torch.long),
        }
    ),
    published={"in_channels": 4, "patch_size": 2},
    parts={"blocks": "attn1 attn2 ff"},
)
ENTRIES["LatteTransformer3DModel"] = Entry(
    HEADS
    | {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 12,
        "video_length": 2,
    },
    lambda step: picture(step, 1, 4, 2, 8, 8),
    published={
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "attention_head_dim": 72,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 4096,
    },
    parts={"transformer_blocks": "attn1 attn2 ff", "temporal_transformer_blocks": "attn1 ff"},
)
ENTRIES["LuminaNextDiT2DModel"] = Entry(
    {
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "multiple_of": 16,
        "ffn_dim_multiplier": 1.0,
        "num_kv_heads": 2,
        "cross_attention_dim": 12,
    },
    lambda step: (
        picture(step, most=1)
        | {
            "encoder_mask": ones(1, TEXT),
            "image_rotary_emb": torch.polar(
                torch.ones(8, 8, 4), grid(8, 8).sum(-1).view(8, 8, 1) * 0.1 + torch.zeros(8, 8, 4)
            ),
            "cross_attention_kwargs": {},
        }
    ),
    published={"ffn_dim_multiplier": 1.0, "num_kv_heads": 8},
)
ENTRIES["MiniMaxMusic3RVQDepthDecoder"] = Entry(
    {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    other="it decodes tokens one by one",
    refused="no argument of its forward is hidden_states",
)
ENTRIES["PixArtTransformer2DModel"] = Entry(
    HEADS
    | {
        "in_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 8,
        "caption_channels": 12,
        "use_additional_conditions": False,
    },
    lambda step: picture(step),
)
ENTRIES["PriorTransformer"] = Entry(
    HEADS
    | {"num_layers": 2, "embedding_dim": 12, "num_embeddings": TEXT, "additional_embeddings": 4},
    lambda step: picture(step, 1, 12) | {"proj_embedding": told(1, 12)},
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["SanaTransformer2DModel"] = Entry(
    HEADS
    | FOUR
    | {
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 8,
    },
    lambda step: picture(step),
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["StableAudioDiTModel"] = Entry(
    HEADS
    | FOUR
    | {
        "sample_size": 8,
        "num_layers": 2,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 16,
        "time_proj_dim": 8,
        "global_states_input_dim": 8,
        "cross_attention_input_dim": 12,
    },
    lambda step: (
        picture(step, 1, 4, 8, most=1)
        | {
            "global_hidden_states": told(1, 1, 8),
            "rotary_embedding": (torch.cos(told(9, 4)), torch.sin(told(9, 4))),
        }
    ),
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["T5FilmDecoder"] = Entry(
    {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
    refused="no argument of its forward is hidden_states",
)
ENTRIES["Transformer2DModel"] = Entry(
    HEADS
    | {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 12,
    },
    lambda step: picture(step) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    published={
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "sample_size": 64,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 4096,
    },
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["DreamLiteTransformer2DModel"] = Entry(
    UNET,
    lambda step: picture(step, 1, 16, 4, 4),
    other="a part of a UNet",
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["AllegroTransformer3DModel"] = Entry(
    HEADS
    | FOUR
    | {
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 3,
        "caption_channels": 12,
    },
    lambda step: (
        video(step)
        | {
            "attention_mask": torch.ones(1, 3, 8, 8),
            "encoder_attention_mask": ones(1, TEXT),
            "image_rotary_emb": None,
        }
    ),
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["AnyFlowTransformer3DModel"] = Entry(
    WAN,
    lambda step: (
        picture(step, 1, 3, 4, 8, 8)
        | {"timestep": at(step, 1000).expand(1, 3), "r_timestep": at(step + 1, 1000).expand(1, 3)}
    ),
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["AnyFlowFARTransformer3DModel"] = Entry(
    WAN | {"chunk_partition": (1, 2), "full_chunk_limit": 2},
    lambda step: (
        picture(step, 1, 3, 4, 8, 8)
        | {
            "timestep": at(step, 1000).expand(1, 3),
            "r_timestep": at(step + 1, 1000).expand(1, 3),
            "chunk_partition": (1, 2),
        }
    ),
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["BriaTransformer2DModel"] = Entry(
    PACKED | {"joint_attention_dim": 20, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)},
    packed,
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "proj_mlp proj_out attn",
    },
)
ENTRIES["BriaFiboTransformer2DModel"] = Entry(
    PACKED
    | {
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "text_encoder_dim": 12,
    },
    lambda step: packed(step, text_encoder_layers=[told(1, TEXT, 12)] * 4),
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "proj_mlp proj_out attn",
    },
)
ENTRIES["BriaFibo2Transformer2DModel"] = Entry(
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "cap_feat_dim": 12,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 2,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (64, 32, 32),
    },
    lambda step: (
        picture(step, most=1)
        | {"encoder_hidden_states": told(1, 2, TEXT, 12), "encoder_attention_mask": ones(1, TEXT)}
    ),
    parts={
        "noise_refiner": "attention feed_forward",
        "layers": "attention feed_forward cross_attention",
    },
)
APPROXIMATOR = {
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}
ENTRIES["ChromaTransformer2DModel"] = Entry(
    PACKED
    | APPROXIMATOR
    | {"joint_attention_dim": 20, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)},
    packed,
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "proj_mlp proj_out attn",
    },
)
ENTRIES["ChronoEditTransformer3DModel"] = Entry(
    WAN,
    video,
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["CogView3PlusTransformer2DModel"] = Entry(
    COGVIEW,
    lambda step: picture(step) | COGVIEW_SIZES,
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["CogView4Transformer2DModel"] = Entry(
    COGVIEW,
    lambda step: picture(step) | COGVIEW_SIZES,
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["CosmosTransformer3DModel"] = Entry(
    HEADS
    | FOUR
    | {
        "attention_head_dim": 12,
        "num_layers": 2,
        "text_embed_dim": 12,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,
    },
    lambda step: video(step, most=1) | {"fps": 16},
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["Cosmos3OmniTransformer"] = Entry(
    {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
        "rope_axes_dim": (4, 2, 2),
    },
    lambda step: {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat(
            [torch.arange(TEXT).expand(3, TEXT), grid(2, 4, 4).long().T + TEXT], 1
        ),
        "und_len": TEXT,
        "sequence_length": TEXT + 32,
        "vision_tokens": [noise(step, 1, 4, 2, 8, 8)],
        "vision_token_shapes": [(2, 4, 4)],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + 32),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + 32),
        "vision_timesteps": at(step, 1000).expand(32),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    },
    parts={"layers": "self_attn mlp mlp_moe_gen"},
)
ENTRIES["EasyAnimateTransformer3DModel"] = Entry(
    FOUR
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 16,
        "text_embed_dim": 12,
    },
    lambda step: video(step, 1, 4, 1, 8, 8),
    published={"in_channels": 16, "out_channels": 16, "patch_size": 2},
    parts={"transformer_blocks": "attn1 ff txt_ff"},
)
ENTRIES["ErnieImageTransformer2DModel"] = Entry(
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "text_in_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    },
    lambda step: {
        "hidden_states": noise(step, 1, 4, 4, 4),
        "timestep": at(step, 1000),
        "text_bth": told(1, TEXT, 12),
        "text_lens": torch.tensor([TEXT]),
    },
    parts={"layers": "self_attention mlp"},
)
ENTRIES["FluxTransformer2DModel"] = Entry(
    PACKED
    | {
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "pooled_projection_dim": 8,
    },
    lambda step: packed(step, pooled_projections=told(1, 8)),
)
ENTRIES["Flux2Transformer2DModel"] = Entry(
    PACKED
    | {
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    lambda step: packed(step, axes=4, guidance=torch.ones(1)),
    parts={"transformer_blocks": "attn ff ff_context", "single_transformer_blocks": "attn"},
)
ENTRIES["Flux3Transformer2DModel"] = Entry(
    PACKED
    | {
        "cond_in_channels": 16,
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "timestep_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    lambda step: packed(
        step,
        axes=4,
        image_cond_hidden_states=told(1, 4, 16),
        image_cond_ids=grid(2, 2, axes=4, first=1),
    ),
    parts={
        "mode_blocks.image": "attn ff",
        "mode_blocks.image_cond": "attn ff",
        "txt_mode_blocks": "attn ff",
        "single_transformer_blocks": "attn ff",
    },
)
ENTRIES["GlmImageTransformer2DModel"] = Entry(
    {k: v for k, v in COGVIEW.items() if k not in ("pos_embed_max_size", "sample_size")}
    | {"prior_vq_quantizer_codebook_size": 8},
    lambda step: (
        picture(step)
        | SIZES
        | {
            "prior_token_id": torch.arange(16).view(1, 16) % 8,
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        }
    ),
    parts={"transformer_blocks": "attn1 ff"},
)
ENTRIES["HeliosTransformer3DModel"] = Entry(
    {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
    video,
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["HiDreamImageTransformer2DModel"] = Entry(
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_channels": (12, 12),
        "text_emb_dim": 8,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": (0, 1, 2, 3),
        "force_inference_output": True,
    },
    lambda step: {
        "hidden_states": noise(step, 1, 4, 8, 8),
        "timesteps": at(step, 1000),
        "encoder_hidden_states_t5": told(1, TEXT, 12),
        "encoder_hidden_states_llama3": told(4, 1, TEXT, 12),
        "pooled_embeds": told(1, 8),
    },
    published={
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": (4096, 4096),
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": tuple(range(48)),
    },
    parts={
        "double_stream_blocks": "block.attn1 block.ff_i block.ff_t",
        "single_stream_blocks": "block.attn1 block.ff_i",
    },
)
HUNYUAN = (
    HEADS
    | FOUR
    | {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
    }
)


def hunyuan(step: int) -> dict[str, Any]:
    return video(step) | {
        "encoder_attention_mask": ones(1, TEXT),
        "pooled_projections": told(1, 8),
        "guidance": torch.full((1,), 1000.0),
    }


ENTRIES["HunyuanVideoTransformer3DModel"] = Entry(
    HUNYUAN | {"pooled_projection_dim": 8},
    hunyuan,
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "attn proj_mlp proj_out",
    },
)
ENTRIES["HunyuanVideo15Transformer3DModel"] = Entry(
    {k: v for k, v in HUNYUAN.items() if k != "num_single_layers"}
    | {"in_channels": 9, "text_embed_2_dim": 12, "image_embed_dim": 12, "target_size": 8},
    lambda step: (
        video(step, 1, 9, 2, 4, 4)
        | {
            "encoder_attention_mask": ones(1, TEXT),
            "encoder_hidden_states_2": told(1, TEXT, 12),
            "encoder_attention_mask_2": ones(1, TEXT),
            "image_embeds": told(1, 3, 12),
        }
    ),
    parts={"transformer_blocks": "attn ff ff_context"},
)
ENTRIES["HunyuanVideoFramepackTransformer3DModel"] = Entry(
    HUNYUAN
    | {
        "pooled_projection_dim": 8,
        "has_image_proj": True,
        "image_proj_dim": 12,
        "has_clean_x_embedder": True,
    },
    lambda step: (
        hunyuan(step)
        | {
            "image_embeds": told(1, 3, 12),
            "indices_latents": torch.arange(3),
            "latents_clean": told(1, 4, 2, 8, 8),
            "indices_latents_clean": torch.tensor([0, 4]),
            "latents_history_2x": told(1, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.tensor([5, 6]),
            "latents_history_4x": told(1, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.tensor([7, 8, 9, 10]),
        }
    ),
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "attn proj_mlp proj_out",
    },
)
ENTRIES["HunyuanImageTransformer2DModel"] = Entry(
    HUNYUAN | {"rope_axes_dim": (4, 4), "text_embed_2_dim": 12, "patch_size": (1, 1)},
    lambda step: (
        picture(step, 1, 4, 4, 4)
        | {
            "encoder_attention_mask": ones(1, TEXT),
            "encoder_hidden_states_2": told(1, TEXT, 12),
            "encoder_attention_mask_2": ones(1, TEXT),
        }
    ),
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "attn proj_mlp proj_out",
    },
)
ENTRIES["Ideogram4Transformer2DModel"] = Entry(
    {
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "adaln_dim": 16,
        "llm_features_dim": 12,
        "mrope_section": (2, 2, 2),
    },
    lambda step: {
        "hidden_states": noise(step, 1, TEXT + 16, 4),
        "timestep": at(step),
        "encoder_hidden_states": told(1, TEXT + 16, 12),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4, 4, axes=3, first=1)])[None].long(),
        "segment_ids": torch.ones(1, TEXT + 16, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * 16]),
    },
    parts={"layers": "attention feed_forward"},
)
JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 12,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
ENTRIES["JoyImageEditTransformer3DModel"] = Entry(
    JOY,
    lambda step: video(step, 1, 2, 4, 1, 8, 8),
    parts={"double_blocks": "img_mlp txt_mlp attn"},
)
ENTRIES["JoyImageEditPlusTransformer3DModel"] = Entry(
    JOY,
    lambda step: (
        video(step, 1, 20, 4, 1, 2, 2)
        | {
            "encoder_hidden_states_mask": torch.ones(1, TEXT),
            "shape_list": [[(1, 4, 4), (1, 2, 2)]],
        }
    ),
    parts={"double_blocks": "img_mlp txt_mlp attn"},
)
ENTRIES["Kandinsky5Transformer3DModel"] = Entry(
    {
        "in_text_dim": 12,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
    },
    lambda step: (
        video(step, 1, 2, 8, 8, 4)
        | {
            "pooled_projections": told(1, 8),
            "visual_rope_pos": [torch.arange(n) for n in (2, 4, 4)],
            "text_rope_pos": torch.arange(TEXT),
        }
    ),
    parts={
        "text_transformer_blocks": "self_attention feed_forward",
        "visual_transformer_blocks": "self_attention cross_attention feed_forward",
    },
)
ENTRIES["Kandinsky6Transformer3DModel"] = Entry(
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 12,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "in_audio_dim": 6,
        "out_audio_dim": 6,
    },
    lambda step: (
        video(step, 1, 2, 8, 8, 9)
        | {"pooled_projections": told(1, 8), "audio_hidden_states": noise(step, 1, 7, 6)}
    ),
    parts={
        "video_text_transformer_blocks": "attn feed_forward",
        "audio_text_transformer_blocks": "attn feed_forward",
        "visual_transformer_blocks": "video_dec_block.self_attention video_dec_block.cross_attention "
        "video_dec_block.feed_forward audio_dec_block.self_attention audio_dec_block.cross_attention "
        "audio_dec_block.feed_forward va_cross_attention av_cross_attention",
    },
)
ENTRIES["Kandinsky6SRTransformer3DModel"] = Entry(
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
    },
    lambda step: {"hidden_states": noise(step, 1, 2, 8, 16, 9), "timestep": at(step, 1000)},
    parts={"visual_transformer_blocks": "self_attention feed_forward"},
)
ENTRIES["Krea2Transformer2DModel"] = Entry(
    {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 12,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 24,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda step: {
        "hidden_states": noise(step, 1, 16, 16),
        "encoder_hidden_states": told(1, TEXT, 2, 12),
        "timestep": at(step),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4, 4, axes=3, first=1)]),
    },
    parts={"transformer_blocks": "attn ff"},
)
ENTRIES["LongCatAudioDiTTransformer"] = Entry(
    {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4},
    lambda step: (
        picture(step, 1, 8, 4, most=1)
        | {
            "encoder_attention_mask": ones(1, TEXT),
            "attention_mask": ones(1, 8),
            "latent_cond": told(1, 8, 4),
        }
    ),
    parts={"blocks": "self_attn cross_attn ffn"},
)
ENTRIES["LongCatImageTransformer2DModel"] = Entry(
    PACKED
    | {
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "pooled_projection_dim": 8,
    },
    packed,
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "proj_mlp proj_out attn",
    },
)
ENTRIES["LTXVideoTransformer3DModel"] = Entry(
    HEADS | FOUR | {"cross_attention_dim": 16, "num_layers": 2, "caption_channels": 12},
    lambda step: (
        picture(step, 1, 32, 4)
        | {"encoder_attention_mask": ones(1, TEXT), "num_frames": 2, "height": 4, "width": 4}
    ),
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
LTX2 = (
    HEADS
    | FOUR
    | {
        "cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 12,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
    }
)
ENTRIES["LTX2VideoTransformer3DModel"] = Entry(
    LTX2,
    lambda step: (
        picture(step, 1, 32, 4)
        | {
            "audio_hidden_states": noise(step, 1, 9, 4),
            "audio_encoder_hidden_states": told(1, TEXT, 12),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 9,
        }
    ),
    parts={
        "transformer_blocks": "attn1 audio_attn1 attn2 audio_attn2 audio_to_video_attn video_to_audio_attn ff audio_ff"
    },
)
ENTRIES["Lumina2Transformer2DModel"] = Entry(
    {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": 12,
    },
    lambda step: picture(step, most=1) | {"encoder_attention_mask": ones(1, TEXT)},
)
ENTRIES["MiniMaxH3Transformer3DModel"] = Entry(
    HEADS
    | {
        "hidden_size": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 64,
        "in_channels": 4,
        "audio_in_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 8,
        "rope_freq_dim": 1,
    },
    lambda step: {
        "hidden_states": noise(step, 1, 16, 16),
        "audio_hidden_states": noise(step, 1, 6, 4),
        "encoder_hidden_states": told(1, TEXT, 12),
        "timestep": at(step, 1000),
        "timestep_indices": torch.zeros(27, dtype=torch.long),
        "token_tags": torch.tensor([0] * 16 + [1] * 6 + [2] * TEXT),
        "position_ids": torch.cat([grid(4, 4, axes=3, first=1), torch.ones(6 + TEXT, 3)]),
        "video_indices": torch.arange(16),
        "audio_indices": torch.arange(16, 22),
        "text_indices": torch.arange(22, 27),
    },
    parts={"transformer_blocks": "attn ff"},
)
ENTRIES["MiniMaxMusic3Transformer1DModel"] = Entry(
    {
        "in_channels": 4,
        "condition_dim": 12,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ff_inner_dim": 64,
        "rotary_dim": 8,
        "fourier_embedding_dim": 16,
    },
    lambda step: {
        "hidden_states": noise(step, 1, 4, 8),
        "timestep": at(step),
        "encoder_hidden_states": told(1, 8, 12),
    },
    parts={"transformer_blocks": "attn ff_in ff_out"},
)
ENTRIES["MochiTransformer3DModel"] = Entry(
    HEADS
    | {
        "num_layers": 2,
        "pooled_projection_dim": 8,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": TEXT,
    },
    lambda step: video(step, text=16) | {"encoder_attention_mask": ones(1, TEXT)},
    parts={"transformer_blocks": "attn1 ff ff_context"},
)
ENTRIES["MotifVideoTransformer3DModel"] = Entry(
    HEADS
    | {
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "text_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
    lambda step: video(step, 1, 9, 2, 4, 4) | {"encoder_attention_mask": ones(1, TEXT)},
    parts={
        "transformer_blocks": "attn cross_attn ff ff_context",
        "single_transformer_blocks": "attn cross_attn proj_mlp proj_out",
    },
)
ENTRIES["NucleusMoEImageTransformer2DModel"] = Entry(
    PACKED
    | {
        "out_channels": 4,
        "num_layers": 3,
        "joint_attention_dim": 20,
        "num_key_value_heads": 1,
        "axes_dims_rope": (4, 6, 6),
        "mlp_ratio": 12.0,
        "dense_moe_strategy": "leave_first_three_and_last_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 16,
        "capacity_factors": 4.0,
    },
    lambda step: {
        "hidden_states": noise(step, 1, 16, 16),
        "encoder_hidden_states": told(1, TEXT, 20),
        "encoder_hidden_states_mask": ones(1, TEXT),
        "timestep": at(step),
        "img_shapes": [(1, 4, 4)],
    },
    parts={"transformer_blocks": "attn img_mlp"},
)
ENTRIES["OmniGenTransformer2DModel"] = Entry(
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 16,
        "pos_embed_max_size": 8,
        "time_step_dim": 16,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    },
    lambda step: {
        "hidden_states": noise(step, 1, 4, 8, 8),
        "timestep": at(step),
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, TEXT + 17, TEXT + 17),
        "position_ids": torch.arange(TEXT + 17)[None],
    },
    published={"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    parts={"layers": "self_attn mlp"},
)
ENTRIES["OvisImageTransformer2DModel"] = Entry(
    PACKED
    | {
        "out_channels": 16,
        "joint_attention_dim": 20,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
    },
    packed,
    parts={
        "transformer_blocks": "attn ff ff_context",
        "single_transformer_blocks": "proj_mlp proj_out attn",
    },
)
ENTRIES["PRXTransformer2DModel"] = Entry(
    {
        "in_channels": 4,
        "context_in_dim": 12,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    },
    lambda step: picture(step, most=1) | {"attention_mask": ones(1, TEXT)},
    parts={"blocks": "attention gate_proj up_proj down_proj"},
)
ENTRIES["QwenImageTransformer2DModel"] = Entry(
    PACKED | {"out_channels": 4, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6)},
    lambda step: {
        "hidden_states": noise(step, 1, 16, 16),
        "encoder_hidden_states": told(1, TEXT, 20),
        "encoder_hidden_states_mask": ones(1, TEXT),
        "timestep": at(step),
        "img_shapes": [[(1, 4, 4)]],
    },
)
ENTRIES["QwenImage21Transformer2DModel"] = Entry(
    PACKED | {"out_channels": 16, "context_in_dim": 20, "axes_dims_rope": (4, 6, 6)},
    lambda step: {
        "hidden_states": noise(step, 1, 16, 16),
        "encoder_hidden_states": told(1, TEXT, 20),
        "timestep": at(step),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * TEXT + [True] * 4]),
        "encoder_hidden_states_mask": ones(1, TEXT),
    },
    parts={"transformer_blocks": "attn img_mlp"},
)
ENTRIES["RFD4ProteinaTransformer"] = Entry(
    {"nlayers": 1}, refused="no argument of its forward is hidden_states"
)
ENTRIES["SanaVideoTransformer3DModel"] = Entry(
    HEADS
    | FOUR
    | {
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 12,
        "sample_size": 8,
        "rope_max_seq_len": 32,
    },
    video,
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["SanaWMTransformer3DModel"] = Entry(
    {
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "linear_head_dim": 12,
        "softmax_every_n": 2,
        "chunk_plucker_channels": 6,
        "chunk_plucker_post_attn_blocks": 2,
        "caption_channels": 12,
    },
    lambda step: (
        video(step, 1, 4, 2, 4, 4)
        | {
            "timestep": at(step, 1000).view(1, 1, 1).expand(1, 1, 2),
            "encoder_hidden_states": told(1, 1, TEXT, 12),
            "encoder_attention_mask": ones(1, TEXT),
        }
    ),
    parts={"blocks": "attn cross_attn mlp"},
)
ENTRIES["SanaWMLTX2RefinerTransformer3DModel"] = Entry(
    LTX2,
    lambda step: (
        picture(step, 1, 32, 4)
        | {"video_rotary_emb": (torch.cos(told(1, 32, 16)), torch.sin(told(1, 32, 16)))}
    ),
    parts={
        "transformer_blocks": "attn1 audio_attn1 attn2 audio_attn2 audio_to_video_attn video_to_audio_attn ff audio_ff"
    },
)
ENTRIES["SD3Transformer2DModel"] = Entry(
    HEADS
    | FOUR
    | {
        "sample_size": 8,
        "num_layers": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    lambda step: picture(step) | {"pooled_projections": told(1, 8)},
)
ENTRIES["SkyReelsV2Transformer3DModel"] = Entry(
    WAN,
    video,
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["StableAudio3DiTModel"] = Entry(
    {
        "io_channels": 4,
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 12,
        "global_cond_dim": 12,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 16,
        "num_memory_tokens": 2,
    },
    lambda step: (
        picture(step, 1, 4, 8, most=1)
        | {"global_hidden_states": told(1, 12), "local_add_cond": told(1, 5, 8)}
    ),
    parts={"transformer_blocks": "self_attn cross_attn ff"},
)
ENTRIES["TransformerTemporalModel"] = Entry(
    {k: v for k, v in UNET.items() if k != "cross_attention_dim"},
    lambda step: {"hidden_states": noise(step, 3, 16, 4, 4), "timestep": at(step), "num_frames": 3},
    other="a part of a UNet",
    parts={"transformer_blocks": "attn1 attn2 ff"},
)
ENTRIES["WanTransformer3DModel"] = Entry(
    WAN,
    video,
)
ENTRIES["WanAnimateTransformer3DModel"] = Entry(
    WAN
    | {
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 12,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 12,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    lambda step: (
        video(step, 1, 12, 3, 8, 8)
        | {
            "encoder_hidden_states_image": told(1, 3, 12),
            "pose_hidden_states": told(1, 4, 2, 8, 8),
            "face_pixel_values": told(1, 3, 5, 16, 16),
        }
    ),
    parts={"blocks": "attn1 attn2 ffn"},
)
ENTRIES["WanAnimate2Transformer3DModel"] = Entry(
    {
        "text_len": TEXT,
        "in_dim": 8,
        "dim": 24,
        "ffn_dim": 48,
        "freq_dim": 16,
        "text_dim": 12,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
    },
    lambda step: {
        "hidden_states": [noise(step, 4, 2, 8, 8)],
        "timestep": at(step, 1000),
        "encoder_hidden_states": [told(TEXT, 12)],
        "condition_latents": [told(4, 2, 8, 8)],
        "kv_cache": SimpleNamespace(
            get=lambda _: SimpleNamespace(get=lambda: (told(1, 16, 2, 12),) * 2)
        ),
        "kv_cache_mode": "cached",
        "seq_len": 32,
        "encoder_hidden_states_image": told(1, 3, 1280),
        "offset_grid_sizes": torch.tensor([[1, 4, 4]]),
        "reference_grid_sizes": torch.tensor([[1, 4, 4]]),
        "origin_len": 5,
        "origin_area": (64, 64),
    },
    parts={"blocks": "self_attn cross_attn ffn"},
)
ENTRIES["WanVACETransformer3DModel"] = Entry(
    WAN | {"vace_layers": [0, 1], "vace_in_channels": 12},
    lambda step: video(step) | {"control_hidden_states": told(1, 12, 3, 8, 8)},
    parts={"blocks": "attn1 attn2 ffn", "vace_blocks": "attn1 attn2 ffn proj_out"},
)
ENTRIES["ZImageTransformer2DModel"] = Entry(
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32],
    },
    lambda step: {"x": [noise(step, 4, 1, 8, 8)], "t": at(step), "cap_feats": [told(TEXT, 12)]},
    parts={
        "noise_refiner": "attention feed_forward",
        "context_refiner": "attention feed_forward",
        "layers": "attention feed_forward",
    },
)
