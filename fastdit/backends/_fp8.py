"""Rows in fp8, quantised by plain torch with torchao's expressions and roundings."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.backends.base import FP8


def quantised_rows(y: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """y [B, K, D] into out, in fp8, and what each row is to be multiplied by into row_scale, fp32 [B, K].

    A row that is too small to be divided by such a number is zeros.
    """
    most = torch.finfo(FP8).max
    by = (y.abs().amax(-1, keepdim=True) / most).to(torch.float32)
    by = torch.where(by < torch.finfo(torch.float32).tiny, 0.0, by)
    quotient = torch.where(by == 0, 0.0, y.to(torch.float32) / by)
    out.copy_(quotient.clamp(-most, most).to(FP8))
    row_scale.copy_(by.squeeze(-1))
