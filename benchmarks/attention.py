"""The attentions of the models at the shares of active tokens, as sparse_attention meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdit.backends.base import attention

TORCH = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Attention:
    """One attention of a model: image and text tokens are keys, the active ones and the text ask."""

    model: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    image: int
    text: int

    @property
    def keys(self) -> int:
        return self.image + self.text

    def queries(self, share: float) -> int:
        """With this share of the image tokens active."""
        return self.text + max(1, int(share * self.image))

    def flops(self, share: float) -> int:
        """Of both products."""
        return 4 * self.batch * self.heads * self.queries(share) * self.keys * self.dim


MODELS = (
    Attention("FLUX.1-dev", 1, 24, 24, 128, 4096, 512),
    Attention("SD3 medium", 2, 24, 24, 64, 4096, 333),
    Attention("SD3.5 large", 2, 38, 38, 64, 4096, 333),
    Attention("PixArt-Sigma", 2, 16, 16, 72, 4096, 0),
    Attention("Lumina-Next", 2, 32, 8, 72, 4096, 0),
    Attention("Lumina-Image-2.0", 2, 24, 24, 96, 4096, 256),
)
TINY_MODELS = (Attention("tiny", 1, 4, 2, 24, 30, 3),)


def inputs(
    form: Attention, share: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Q, H, d], k and v [B, S, G, d]."""
    new = {"device": device, "dtype": dtype}
    kv = (form.batch, form.keys, form.kv_heads, form.dim)
    q = torch.randn(form.batch, form.queries(share), form.heads, form.dim, **new)
    return q, torch.randn(kv, **new), torch.randn(kv, **new)


def torch_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's attention as it is, and by each of its backends."""

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            return attention(q, k, v, None)

    found: dict[str, Callable[[], Tensor]] = {"torch": lambda: attention(q, k, v, None)}
    for backend in TORCH:
        found[backend.name.removesuffix("_ATTENTION").lower()] = lambda b=backend: by(b)
    return found
