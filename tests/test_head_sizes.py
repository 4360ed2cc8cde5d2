"""Heads of a size that an op does not take: the same attention by torch."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

import fastdit
import tiny_models
from contract import distance
from fastdit import RAS
from fastdit.ops.qkv_prologue import HEAD_DIMS
from tiny_models import sample

pytestmark = [pytest.mark.diffusers, pytest.mark.slow]


def with_heads_of(family, size):
    """A tiny model with a few heads of this size, and the arguments of a call."""
    heads = 4 if size % 2 else 2  # positions are embedded in a multiple of four channels
    changes = {"num_layers": 2, "num_attention_heads": heads, "attention_head_dim": size}
    given = tiny_models.call(family, 2, torch.float64)
    if family == "sd3.5":
        changes["caption_projection_dim"] = heads * size
    if family == "flux":
        axis = size // 4 * 2
        changes["axes_dims_rope"] = (size - axis, axis // 2 // 2 * 2, axis - axis // 2 // 2 * 2)
    if family == "pixart-sigma":
        changes["cross_attention_dim"] = heads * size
    if family == "lumina":
        changes = {"num_attention_heads": 2, "num_kv_heads": 1, "hidden_size": 2 * size}
        given["image_rotary_emb"] = get_2d_rotary_pos_embed_lumina(size, 16, 16)
    model = tiny_models.FAMILIES[family].build()
    model = type(model).from_config({**model.config, **changes})
    return tiny_models.randomise(model).double(), given


CASES = [
    *[
        (family, size)
        for family in ("sd3.5", "flux", "pixart-sigma", "lumina")
        for size in (4, 260)
    ],
    *[(family, 13) for family in ("sd3.5", "pixart-sigma")],
]


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize(("family", "size"), CASES)
def test_any_head_size_is_served(family, size, fused, monkeypatch):
    """Where all tokens are active too, as on a GPU."""
    assert size not in HEAD_DIMS
    monkeypatch.setattr("fastdit.blocks.attention.fuses", lambda device: fused)
    model, given = with_heads_of(family, size)
    with torch.no_grad():
        expected = sample(model(**given))
        for backend in ("reference", None):
            fastdit.patch(model, backend=backend)
            assert distance(sample(model(**given)), expected) <= 1e-7
            handle = fastdit.patch(model, RAS(start=1, resets=(), align=1), backend=backend)
            with handle.run(range(3)):
                for _ in range(3):
                    assert distance(sample(model(**given)), expected) <= 1e-7
                    handle.advance()
            assert max(handle.report().tokens_per_step[1:]) < 32
