"""A small random CLIP in a folder, as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdit.tiny.tokenizer import build_tokenizer


def save_clip(folder: Path) -> tuple[Any, Any, Any]:
    """Its model, tokenizer and image processor, of 32 x 32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    words = build_tokenizer()
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "eos_token_id": words.eos_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, words, pictures):
        part.save_pretrained(folder)
    return model, words, pictures
