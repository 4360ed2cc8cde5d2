"""The models that ECAD's schedules were published for, without weights: enough to count what a schedule costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdit.account.cost import Cost
    from fastdit.schedules.schedule import Schedule

#: PixArt's models for 1024 pixels and more embed the image size
LARGE = 1024


def published_cost(schedule: Schedule, pixels: int) -> tuple[str, Cost] | None:
    """This gives (what was counted, its costs) for a square image; None where the schedule fits no published model.

    As the authors count: a batch of two rows, 120 text tokens in PixArt and 512 in FLUX (ECAD spec section 6.6).
    """
    import torch
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

    from fastdit.account.cost import Cost

    shape = {kind: layer.bits.shape[1] for kind, layer in schedule.layers.items()}
    tokens = (pixels // 16) ** 2
    with torch.device("meta"):
        if shape == {"transformer_blocks": 28}:
            sample = 128 if pixels >= LARGE else 64
            model = PixArtTransformer2DModel(sample_size=sample, caption_channels=4096)
            return "PixArt-XL/2", Cost.of(model, tokens, text=120, transformer_batch=2)
        if shape == {"transformer_blocks": 19, "single_transformer_blocks": 38}:
            return "FLUX.1-dev", Cost.of(
                FluxTransformer2DModel(guidance_embeds=True), tokens, text=512, transformer_batch=2
            )
    return None
