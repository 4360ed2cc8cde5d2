"""ImageReward (arXiv 2304.05977) from a local folder: BLIP reads picture and prompt together, a small head scores.

The folder holds two files: `ImageReward.pt`, the released checkpoint (read as tensors only), and `vocab.txt`, that of
bert-base-uncased. The checkpoint's sizes are read off its tensors; BLIP's own classes are transformers'. Tested on
checkpoints of random weights in the released layout; the released weights themselves have not been tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.errors import ArgumentError
from fastdit.search.local_models import eight_bits, require_files

CHECKPOINT, VOCABULARY = "ImageReward.pt", "vocab.txt"
MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072  # of the released scores
HEAD = 64  # width of an attention head, in both encoders
LENGTH = 35  # tokens of a prompt
VISION_NAMES = (  # of the checkpoint, and of transformers
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)", r"encoder.layers.\1.layer_norm\2"),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"^blocks\.(\d+)\.attn", r"encoder.layers.\1.self_attn"),
    (r"^blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
)


class ImageReward:
    """The loss is 1 - ImageReward, the paper's objective.

    Args:
        folder: See the module's description.
    """

    name = "image-reward"
    needs_reference = False

    def __init__(self, folder: Path) -> None:
        require_files(folder, self.name, (CHECKPOINT, VOCABULARY))
        import torch
        from transformers import BertTokenizer, CLIPImageProcessor

        try:
            weights = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
            self._vision = _vision(_part(weights, "blip.visual_encoder."))
            self._text = _text(_part(weights, "blip.text_encoder."))
            self._head = _head(_part(weights, "mlp.layers."))
            self._words = BertTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what a wrong checkpoint raises depends on where it is wrong
            raise ArgumentError(
                f"quality 'image-reward': {folder / CHECKPOINT} is not the released checkpoint: "
                f"{type(error).__name__}: {error!s:.300}"
            ) from error
        side = self._vision.config.image_size
        self._pictures = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    def losses(
        self, images: np.ndarray, prompts: Sequence[str], references: np.ndarray | None
    ) -> list[float]:
        """Each picture and its prompt have 1 - (score - mean) / spread."""
        import torch

        pixels = self._pictures(images=[eight_bits(image) for image in images], return_tensors="pt")
        words = self._words(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        with torch.no_grad():
            seen = self._vision(pixel_values=pixels["pixel_values"]).last_hidden_state
            read = self._text(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            )
            scores = self._head(read.last_hidden_state[:, 0]).squeeze(1)
        return [1 - (float(score) - MEAN) / SPREAD for score in scores]


def _part(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    if not found:
        raise ValueError(f"it has no {prefix}*")
    return found


def _layers(names: Mapping[str, Any], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


def _vision(weights: dict[str, Any]) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"blocks\.(\d+)\."),
            num_attention_heads=width // HEAD,
            image_size=side * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    model.load_state_dict(renamed)
    return model.eval()


def _text(weights: dict[str, Any]) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
            num_attention_heads=width // HEAD,
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        ),
        add_pooling_layer=False,
    )
    model.load_state_dict(weights)
    return model.eval()


def _head(weights: dict[str, Any]) -> Any:
    """The head is linear layers without activations; the released ones have dropout between them."""
    from torch import nn

    order = sorted({int(name.split(".")[0]) for name in weights})
    layers = []
    for index in order:
        rows, columns = weights[f"{index}.weight"].shape
        layers.append(nn.Linear(columns, rows))
        layers[-1].load_state_dict(
            {part: weights[f"{index}.{part}"] for part in ("weight", "bias")}
        )
    return nn.Sequential(*layers).eval()
